"""``kvgeom diagnose``."""

from __future__ import annotations

import argparse

import kvgeom
from kvgeom.cli import options

NAME = "diagnose"
HELP = "name a model's failure mode, with all the evidence"
DESCRIPTION = (
    "Sweep, single layers, ablations, PCR and failure mode, as tables. With --out, what is done is kept: the same command "
    "goes on where it was interrupted."
)


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_model(command, "the tables, diagnose.txt,")
    options.add_prompts(command)
    options.add_scheme(command, "rounding of the curve")
    options.add_widths(command)
    options.add_scan_bits(command)
    options.add_geometry(command, default=True)
    options.add_judge(command)
    options.add_run(command)


def run(arguments: argparse.Namespace) -> int:
    """Diagnose, and print all tables."""
    during, classifier = options.judges(arguments)
    run = options.run_options(arguments, during)
    options.check_out(arguments)
    found = kvgeom.diagnose(
        arguments.model,
        options.prompt_set(arguments.prompts, arguments),
        scheme=arguments.scheme,
        bits=arguments.bits,
        scan_bits=arguments.scan_bits,
        placement=arguments.placement,
        geometry=arguments.geometry,
        full_responses=classifier is not None,
        journal=options.journal(arguments),
        **run,
        **options.load_options(arguments),
    )
    if classifier is not None:
        with options.released(found.baseline.model, classifier, arguments) as judge:
            found = found.relabel(judge)
    return options.report(arguments, found.to_text())
