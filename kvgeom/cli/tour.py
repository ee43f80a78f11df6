"""``kvgeom tour``."""

from __future__ import annotations

import argparse
import sys

from kvgeom.cli import options

NAME = "tour"
HELP = "the failure modes in a minute, on tiny models: no download"
DESCRIPTION = "Plant each failure mode in a tiny model, diagnose it blindly, try the fixes, and write them beside each other into one page."


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument(
        "--out", metavar="DIR", default="kvgeom-tour", help="folder of report.html (default: %(default)s)"
    )
    command.add_argument("--seed", metavar="N", type=int, default=0, help="of what is planted (default: %(default)s)")
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def run(arguments: argparse.Namespace) -> int:
    """Tour, and say where the page lies."""
    import kvgeom

    found = kvgeom.tour(arguments.out, seed=arguments.seed, progress=not arguments.quiet)
    print(f"\n{found.to_text()}\n\nreport: {options.out_folder(arguments) / 'report.html'}")
    print("next, on a real model: kvgeom screen demo", file=sys.stdout)
    return 0
