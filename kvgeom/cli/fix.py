"""``kvgeom fix``."""

from __future__ import annotations

import argparse

import kvgeom
from kvgeom.cli import options

NAME = "fix"
HELP = "find a cache that keeps refusals, prove it, write plan.json and report.html"
DESCRIPTION = (
    "Diagnose a model, search a cache that keeps its refusals within a memory budget, and prove it on prompts that did not "
    "choose it. What is done is kept: the same command goes on where it was interrupted."
)


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_model(command, "report.html, plan.json", out="kvgeom-fix")
    options.add_prompts(command)
    options.add_scheme(command, "the cache to mitigate")
    command.add_argument(
        "--bits", metavar="B", type=int, help="width of the cache to mitigate (default: 4, or what the scheme offers)"
    )
    command.add_argument(
        "--memory",
        metavar="SHARE",
        type=float,
        default=0.02,
        help="budget: by how much the cache may exceed the unmitigated one (default: %(default)s)",
    )
    command.add_argument(
        "--verify-prompts",
        metavar="SET",
        default="held-out",
        help="requests that prove the plan, none of those that choose it; as --prompts (default: %(default)s)",
    )
    command.add_argument(
        "--controls",
        metavar="N",
        type=int,
        default=3,
        help="draws of errors of equal size in random directions (default: %(default)s)",
    )
    options.add_geometry(command, default=False)
    options.add_judge(command, "search and proof ask it on the way, so it is in memory together with the model")
    options.add_run(command)


def run(arguments: argparse.Namespace) -> int:
    """Fix, and print verdict, tables and what to do next."""
    judge = options.judge(arguments)
    run, before = options.run_options(arguments, judge), options.earlier(arguments)
    found = kvgeom.fix(
        arguments.model,
        arguments.out,
        prompts=options.prompt_set(arguments.prompts, arguments),
        verify_prompts=options.prompt_set(arguments.verify_prompts, arguments),
        scheme=arguments.scheme,
        bits=arguments.bits,
        memory=arguments.memory,
        controls=arguments.controls,
        geometry=arguments.geometry,
        placement=arguments.placement,
        **run,
        **options.load_options(arguments),
    )
    options.note_unread(judge)
    options.compare(arguments, before, found.settings)
    print(f"\n{found.to_text(options.out_folder(arguments))}")
    return 0
