"""``kvgeom scan``."""

from __future__ import annotations

import argparse

import kvgeom
from kvgeom.cli import options

NAME = "scan"
HELP = "refusals with one layer rounded"
DESCRIPTION = "Round each layer alone, per-tensor and per-channel."


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_model(command, "the tables, scan.txt,")
    options.add_prompts(command)
    options.add_scan_bits(command)
    options.add_judge(command)
    options.add_run(command)


def run(arguments: argparse.Namespace) -> int:
    """Scan, and print the layers."""
    bits, judge, run = (
        options.check_scan_bits(arguments.scan_bits),
        options.classifier(arguments),
        options.run_options(arguments),
    )
    prompts = options.prompt_set(arguments.prompts, arguments.limit)
    from kvgeom.behaviour.scan import per_tensor, scan_of, single_layers
    from kvgeom.evaluation.evaluate import run_conditions
    from kvgeom.quant.scheme import Scheme

    model = kvgeom.load(arguments.model, progress=run["progress"], **options.load_options(arguments))
    base = kvgeom.baseline(model, prompts.harmful, journal=options.journal(arguments), **run)
    scheme = per_tensor(Scheme(bits, symmetric=True))
    outcomes = run_conditions(
        base,
        single_layers(model.geometry.layers, scheme, options.placement(arguments)),
        prompts=base.refused if judge is None else None,
        full_responses=judge is not None,
        title="single layers",
    )
    if judge is not None:
        model.release()
        outcomes = outcomes.relabel(judge)
    scan = scan_of(outcomes, scheme)
    return options.report(arguments, f"{scan.to_text()}\n\nCritical layer: {scan.meta['reason']}.")
