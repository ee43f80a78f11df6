"""``kvgeom sweep``."""

from __future__ import annotations

import argparse

import kvgeom
from kvgeom.cli import options
from kvgeom.errors import InputError

NAME = "sweep"
HELP = "refusals at each bit-width"
DESCRIPTION = "Round the whole cache at each width, and find the transition."


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_model(command, "the tables, sweep.txt,")
    options.add_prompts(command)
    options.add_scheme(command, "rounding of the curve")
    options.add_widths(command)
    command.add_argument(
        "--over-refusal", action="store_true", help="also count harmless requests of the set that are refused"
    )
    options.add_judge(command)
    options.add_run(command)
    options.add_fail_on(command)


def run(arguments: argparse.Namespace) -> int:
    """Sweep, and print the curve."""
    during, classifier = options.judges(arguments)
    run, full = options.run_options(arguments, during), classifier is not None
    options.check_out(arguments)
    prompts = options.prompt_set(arguments.prompts, arguments)
    if arguments.over_refusal and not prompts.harmless:
        raise InputError(f"--over-refusal needs harmless requests, and {arguments.prompts} has none; give another set")
    from kvgeom.behaviour.curve import bit_width_curve, curve_of
    from kvgeom.behaviour.over_refusal import harmless_responses, over_refusal_of
    from kvgeom.behaviour.widths import at_widths
    from kvgeom.report.verdict import status_of

    series = at_widths(arguments.scheme, arguments.bits, arguments.placement)
    journal, of_harmless = (options.journal(arguments, name) for name in ("journal.jsonl", "over-refusal.jsonl"))
    model = kvgeom.load(arguments.model, progress=run["progress"], **options.load_options(arguments))
    base = kvgeom.baseline(model, prompts.harmful, journal=journal, **run)
    curve, outcomes = bit_width_curve(base, series, full_responses=full)
    harmless = None
    if arguments.over_refusal:
        # A journal is about one set of requests.
        asked = kvgeom.baseline(model, prompts.harmless, journal=of_harmless, **run)
        harmless = harmless_responses(asked, series, full_responses=full)
    if classifier is not None:
        with options.released(model, classifier, arguments) as judge:
            curve = curve_of(outcomes.relabel(judge), curve.text, curve.meta)
            harmless = None if harmless is None else harmless.relabel(judge)
    parts = [] if harmless is None else [over_refusal_of(harmless, series).to_text()]
    options.report(arguments, "\n\n".join([curve.to_text(), *parts]))
    return options.status_of(arguments, status_of(curve)[0])
