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
    during, classifier = options.judges(arguments)
    run = options.run_options(arguments, during)
    options.check_out(arguments)
    prompts = options.prompt_set(arguments.prompts, arguments)
    from kvgeom.behaviour.matched import check_scan_bits, scan_width
    from kvgeom.behaviour.scan import scan_of, single_layer_scan
    from kvgeom.quant.placement import Placement

    check_scan_bits(arguments.scan_bits)
    model = kvgeom.load(arguments.model, progress=run["progress"], **options.load_options(arguments))
    base = kvgeom.baseline(model, prompts.harmful, journal=options.journal(arguments), **run)
    placement = Placement.parse(arguments.placement or "cache")
    width = scan_width(base, arguments.scan_bits, placement)
    scheme = width.scheme
    scan, outcomes = single_layer_scan(base, scheme, placement=placement, full_responses=classifier is not None)
    if classifier is not None:
        with options.released(model, classifier, arguments) as judge:
            scan = scan_of(outcomes.relabel(judge), scheme)
    return options.report(
        arguments, f"Single layers ({scheme}; {width})\n\n{scan.to_text()}\n\nCritical layer: {scan.meta['reason']}."
    )
