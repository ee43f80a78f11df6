"""``kvgeom schemes``."""

from __future__ import annotations

import argparse

from kvgeom.checks import whole
from kvgeom.quant.placement import MOST_TOKENS
from kvgeom.quant.scheme import MOST_CHANNELS

NAME = "schemes"
HELP = "list formats and presets of engines, with bits per element"
DESCRIPTION = "List formats and presets of engines, with the bits that an element of the cache takes, scales included."


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument(
        "--heads", metavar="N", type=int, default=8, help="KV heads of the cache (default: %(default)s)"
    )
    command.add_argument(
        "--head-dim", metavar="N", type=int, default=128, help="channels of a head (default: %(default)s)"
    )
    command.add_argument("--tokens", metavar="N", type=int, default=4096, help="tokens stored (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Print the list."""
    from kvgeom.engines.registry import scheme_rows

    shape = (arguments.heads, arguments.head_dim, arguments.tokens)
    for name, value, most in zip(
        ("--heads", "--head-dim", "--tokens"), shape, (*[MOST_CHANNELS] * 2, MOST_TOKENS), strict=True
    ):
        whole(name, value, 1, most)
    rows = scheme_rows(*shape)
    for kind in ("format", "preset"):
        print(f"{kind + 's':<28}{'bits':>4}  {'per element':>11}")
        for row in (row for row in rows if row["kind"] == kind):
            print(f"  {row['name']:<26}{row['bits']:>4}  {row['bits_per_element']:>11.3f}  {row['note']}")
        print()
    return 0
