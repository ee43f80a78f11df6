"""The command line: parses, calls the public API, prints. One module a command."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

import kvgeom
from kvgeom.cli import audit, diagnose, fix, gate, paper, scan, schemes, screen, sweep, tour
from kvgeom.cli.streams import usable_streams
from kvgeom.errors import KvgeomError, KvgeomWarning, unknown
from kvgeom.paths import disk_is_full, not_written

#: In the order of ``kvgeom --help``. Each module has NAME, HELP, DESCRIPTION, add_options(parser) and run(arguments).
COMMANDS = (tour, screen, audit, diagnose, sweep, scan, fix, gate, paper, schemes)

#: Characters of an error of the parser, which repeats what was written.
LONGEST = 500


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``kvgeom``; returns the exit status.

    It is 0, also where standard output was closed (``>&-``) and nothing is shown; of ``gate`` 1 or 3 where the candidate fails or it
    is not known; 2 for input that cannot be used, or output that cannot be written; 130 when interrupted; 141 when what reads the
    output has ended (``| head``).
    """
    with usable_streams():
        return _flushed(argv)


def _flushed(argv: Sequence[str] | None) -> int:
    try:
        try:
            return _run(_parser().parse_args(argv))
        finally:
            sys.stdout.flush()  # here, where what goes wrong can be said
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EBADF) and not disk_is_full(error):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python writes again as it ends
        return (
            141
            if error.errno == errno.EPIPE
            else _refused(not_written(error.filename or "output", error, "send it elsewhere"))
        )


def _run(arguments: argparse.Namespace) -> int:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status: int = arguments.run(arguments)
    except KvgeomError as error:
        return _refused(error)
    except KeyboardInterrupt:
        kept = "; what is done is kept: run the command again to go on" if getattr(arguments, "out", None) else ""
        print(f"\nkvgeom: interrupted{kept}", file=sys.stderr)
        return 130
    return status


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of kvgeom as its errors look, others as Python shows them."""
    if issubclass(category, KvgeomWarning):
        print(f"kvgeom: {message}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _refused(error: KvgeomError) -> int:
    print(f"kvgeom: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """Of the command line and of each command: suggests the name that was meant, and stays short whatever was written."""

    def error(self, message: str) -> NoReturn:
        super().error(message if len(message) <= LONGEST else f"{message[:LONGEST]}...")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, left = super().parse_known_args(args, namespace)
        option = next((each.partition("=")[0] for each in left if each.startswith("-")), None)
        if option is not None:
            known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            self.error(str(unknown("option", option, known)))
        return found, left

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            kind = str(action.metavar or action.dest).lower()
            raise argparse.ArgumentError(None, str(unknown(kind, value, action.choices)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
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
