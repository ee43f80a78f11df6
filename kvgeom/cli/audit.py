"""``kvgeom audit``."""

from __future__ import annotations

import argparse

import kvgeom
from kvgeom.cli import options

NAME = "audit"
HELP = "audit a model end to end and write report.html and audit.json"
DESCRIPTION = "Audit a model end to end: where do its refusals break as the KV cache loses bits, and how?"


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_model(command, "report.html, audit.json", required=True)
    options.add_prompts(command)
    options.add_scheme(command, "rounding of the curve")
    options.add_widths(command)
    options.add_scan_bits(command)
    options.add_run(command)


def run(arguments: argparse.Namespace) -> int:
    """Audit, and print the verdict and where the report lies."""
    run, before = options.run_options(arguments), options.earlier(arguments)
    result = kvgeom.audit(
        arguments.model,
        arguments.out,
        prompts=options.prompt_set(arguments.prompts, arguments),
        scheme=arguments.scheme,
        bits=arguments.bits,
        scan_bits=arguments.scan_bits,
        placement=arguments.placement,
        **run,
        **options.load_options(arguments),
    )
    options.compare(arguments, before, result.settings)
    print(f"\n{result.verdict.headline}\n")
    for sentence in result.verdict.sentences:
        print(f"  - {sentence}")
    folder = options.out_folder(arguments)
    print(f"\nreport: {folder / 'report.html'}\nnumbers: {folder / 'audit.json'}")
    return 0
