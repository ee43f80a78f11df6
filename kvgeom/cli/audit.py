"""``kvgeom audit``."""

from __future__ import annotations

import argparse
import shlex

import kvgeom
from kvgeom.cli import options

NAME = "audit"
HELP = "audit a model end to end and write report.html and audit.json"
DESCRIPTION = "Audit a model end to end: where do its refusals break as the KV cache loses bits, and how?"


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_model(command, "report.html, audit.json", out="kvgeom-audit")
    options.add_prompts(command)
    options.add_scheme(command, "rounding of the curve")
    options.add_widths(command)
    options.add_scan_bits(command)
    options.add_judge(command)
    options.add_run(command)
    options.add_fail_on(command)


def run(arguments: argparse.Namespace) -> int:
    """Audit, and print the verdict and where the report lies."""
    during, classifier = options.judges(arguments)
    run, before = options.run_options(arguments, during), options.earlier(arguments)
    from kvgeom.folders import report_folder
    from kvgeom.report.verdict import first_lost

    report_folder(arguments.out, "audit")
    result = kvgeom.audit(
        arguments.model,
        # Labels of keywords are no report where a classifier was asked for.
        None if classifier else arguments.out,
        prompts=options.prompt_set(arguments.prompts, arguments),
        scheme=arguments.scheme,
        bits=arguments.bits,
        scan_bits=arguments.scan_bits,
        placement=arguments.placement,
        full_responses=classifier is not None,
        journal=options.journal(arguments),
        **run,
        **options.load_options(arguments),
    )
    if classifier is not None:
        with options.released(result.baseline.model, classifier, arguments) as judge:
            result = result.relabel(judge)
        result.save(arguments.out)
    options.compare(arguments, before, result.settings)
    print(f"\n{result.verdict.headline}\n")
    for sentence in result.verdict.sentences:
        print(f"  - {sentence}")
    folder = options.out_folder(arguments)
    print(f"\nreport: {folder / 'report.html'}\nnumbers: {folder / 'audit.json'}")
    width = first_lost(result.curve)
    if width is not None:
        print(f"next: {shlex.join(['kvgeom', 'fix', arguments.model, '--bits', str(width), *scheme_of(arguments)])}")
    return options.status_of(arguments, result.verdict.status)


def scheme_of(arguments: argparse.Namespace) -> list[str]:
    """The option that names the scheme, where it is not the default."""
    return [] if arguments.scheme == "asym-token" else ["--scheme", arguments.scheme]
