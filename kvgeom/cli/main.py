"""The command line: parses, calls the public API, prints. One module a command."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

import kvgeom
from kvgeom.cli import audit, diagnose, fix, scan, schemes, sweep
from kvgeom.errors import KvgeomError
from kvgeom.paths import disk_is_full, not_written

#: In the order of ``kvgeom --help``. Each module has NAME, HELP, DESCRIPTION, add_options(parser) and run(arguments).
COMMANDS = (audit, diagnose, sweep, scan, fix, schemes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``kvgeom``; returns the exit status.

    It is 0; 2 for input that cannot be used; 130 when interrupted; 141 when what reads the output has ended (``| head``).
    """
    try:
        try:
            return _run(_parser().parse_args(argv))
        finally:
            sys.stdout.flush()  # here, where what goes wrong can be said
    except OSError as error:
        if error.errno != errno.EPIPE and not disk_is_full(error):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python writes again as it ends
        return 141 if error.errno == errno.EPIPE else _refused(not_written(error.filename or "output", error))


def _run(arguments: argparse.Namespace) -> int:
    try:
        status: int = arguments.run(arguments)
    except KvgeomError as error:
        return _refused(error)
    except KeyboardInterrupt:
        kept = "; what is done is kept: run the command again to go on" if getattr(arguments, "out", None) else ""
        print(f"\nkvgeom: interrupted{kept}", file=sys.stderr)
        return 130
    return status


def _refused(error: KvgeomError) -> int:
    print(f"kvgeom: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


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
