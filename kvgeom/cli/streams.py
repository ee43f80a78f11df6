"""Standard output and errors as the command line needs them: there, and able to take any text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper


@contextmanager
def usable_streams() -> Iterator[None]:
    r"""Within a ``with`` block, what is printed neither fails for its characters nor for want of a place.

    A stream that was closed before the program began (``>&-``) leads nowhere, as ``/dev/null`` does. One whose encoding
    lacks a character, as an ASCII terminal does of a folder's name, gets it escaped: ``caf\xe9``.
    """
    with ExitStack() as undo:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:
                nowhere = undo.enter_context(open(os.devnull, "w", encoding="utf-8"))
                setattr(sys, name, nowhere)
                undo.callback(setattr, sys, name, None)
            elif isinstance(stream, TextIOWrapper) and stream.errors == "strict" and not stream.closed:
                stream.reconfigure(errors="backslashreplace")
                undo.callback(_reset, stream)
        yield


def _reset(stream: TextIOWrapper) -> None:
    if not stream.closed:
        stream.reconfigure(errors="strict")
