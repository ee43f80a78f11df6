"""``kvgeom screen``."""

from __future__ import annotations

import argparse

import kvgeom
from kvgeom.cli import options

NAME = "screen"
HELP = "what to expect, within minutes: nothing is generated under a rounded cache"
DESCRIPTION = "Read the model's own answers under each cache: refusals that are expected to go, by width, through which layers, and what might help."


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options.add_model(command, "the tables, screen.txt,")
    options.add_prompts(command)
    options.add_scheme(command, "rounding of the curve", text=False)
    options.add_widths(command)
    options.add_scan_bits(
        command, "width of layers and caches that are tried (default: where refusals are expected to go)"
    )
    options.add_geometry(command, default=True)
    options.add_judge(command, "it is asked about the answers with an exact cache")
    options.add_run(command)


def run(arguments: argparse.Namespace) -> int:
    """Screen, and print what is expected."""
    judge = options.judge(arguments)
    run = options.run_options(arguments, judge)
    options.check_out(arguments)
    prompts = options.prompt_set(arguments.prompts, arguments)
    found = kvgeom.screen(
        arguments.model,
        prompts,
        scheme=arguments.scheme,
        bits=arguments.bits,
        scan_bits=arguments.scan_bits,
        placement=arguments.placement,
        geometry=arguments.geometry,
        journal=options.journal(arguments),
        **run,
        **options.load_options(arguments),
    )
    return options.report(arguments, found.to_text())
