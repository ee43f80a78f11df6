"""The command line: parses, calls the public API, prints. One module a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import kvgeom
from kvgeom.cli import audit, diagnose, fix, scan, schemes, sweep
from kvgeom.errors import KvgeomError

#: In the order of ``kvgeom --help``. Each module has NAME, HELP, DESCRIPTION, add_options(parser) and run(arguments).
COMMANDS = (audit, diagnose, sweep, scan, fix, schemes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``kvgeom``; returns the exit status: 0, 2 for input that cannot be used, 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except KvgeomError as error:
        print(f"kvgeom: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "; what is done is kept: run the command again to go on" if getattr(arguments, "out", None) else ""
        print(f"\nkvgeom: interrupted{kept}", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvgeom",
        description="When an LLM's KV cache is quantized: does its safety survive, why not, and what fixes it?",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {kvgeom.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in COMMANDS:
        command = commands.add_parser(module.NAME, help=module.HELP, description=module.DESCRIPTION)
        module.add_options(command)
        command.set_defaults(run=module.run, command=module.NAME)
    return parser
