"""What has been measured, written down as it is measured, so that an interrupted run goes on where it was."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from kvgeom.errors import InputError

#: Version of the format.
FORMAT = 1


class Memory:
    """What has been measured, kept as long as this object."""

    def __init__(self) -> None:
        self._entries: dict[str, Any] = {}

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return _spelled(key) in self._entries

    def __getitem__(self, key: tuple[Any, ...]) -> Any:
        return self._entries[_spelled(key)]

    def __setitem__(self, key: tuple[Any, ...], value: Any) -> None:
        # What is kept is what would be read again, so that a resumed run cannot differ from one that was not.
        self._entries[_spelled(key)] = json.loads(json.dumps(value))

    def remember(self, key: tuple[Any, ...], measure: Callable[[], Any]) -> Any:
        """The value of ``key``; measured now if it is not known yet."""
        if key not in self:
            self[key] = measure()
        return self[key]

    def reopen(self) -> None:
        """Nothing was let go of."""

    def close(self) -> None:
        """Nothing to let go of."""


class Journal(Memory):
    """A file of JSON lines: a header that says what may be in it, then one line for each thing measured.

    Every line is handed to the system before the next measurement begins, so that a killed process loses nothing
    that was done. A line that was cut off in the middle is dropped, and that measurement is made again.

    Parameters
    ----------
    path : str or Path
        A new file, or one that an earlier run of the same work has left.
    about : mapping
        What all entries depend on: model, prompts, judge, versions. JSON types only.

    Raises
    ------
    InputError
        If the file is no journal, is about something else, is in use, or cannot be written.
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._about = {"kvgeom_journal": FORMAT, **json.loads(json.dumps(dict(about)))}
        super().__init__()
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        self._open()

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"journal {self.path} is in use by another run; wait for it, or name another") from None
        except OSError as error:
            raise InputError(f"journal {self.path} cannot be used: {error.strerror}; name another file") from error
        try:
            kept = self._read() if self.path.exists() else 0
            self._file = open(self.path, "r+b" if self.path.exists() else "w+b")  # noqa: SIM115  # closed by close()
        except BaseException as error:
            self._unlock()
            if isinstance(error, OSError):
                raise InputError(f"journal {self.path} cannot be used: {error.strerror}; name another file") from error
            raise
        self._file.truncate(kept)
        self._file.seek(kept)
        if kept == 0:
            self._append(self._about)

    @property
    def known(self) -> int:
        """How many measurements there are."""
        return len(self._entries)

    def __setitem__(self, key: tuple[Any, ...], value: Any) -> None:
        super().__setitem__(key, value)
        self._append({"key": key, "value": value})

    def reopen(self) -> None:
        """Take hold of the file again, after :meth:`close`; raises as the constructor does.

        What another run has added meanwhile is taken in. What is known here and no longer in the file is written again.
        """
        if not self._file.closed:
            return
        known, self._entries = self._entries, {}
        try:
            self._open()
        finally:
            missing = {key: value for key, value in known.items() if key not in self._entries}
            self._entries.update(missing)
        for key, value in missing.items():
            self._append({"key": json.loads(key), "value": value})

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        self._unlock()

    def _unlock(self) -> None:
        self._lock.release()
        with contextlib.suppress(OSError):
            os.unlink(self._lock.lock_file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def _read(self) -> int:
        """Take in what is there; return the length of its whole lines."""
        kept = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True)):
            try:
                found = json.loads(line)
                whole = line.endswith(b"\n") and isinstance(found, dict)
            except ValueError:
                whole = False
            if not whole:
                if number == 0 and not json.dumps(self._about).encode().startswith(line):
                    raise InputError(f"journal {self.path} was asked, but that file is no journal; name another file")
                break
            if number == 0:
                self._check(found)
            else:
                self._entries[_spelled(tuple(found["key"]))] = found["value"]
            kept += len(line)
        return kept

    def _check(self, found: Mapping[str, Any]) -> None:
        different = [key for key in {**self._about, **found} if found.get(key) != self._about.get(key)]
        if different:
            what = "; ".join(f"{key}: {found.get(key)!r} there, {self._about.get(key)!r} now" for key in different)
            raise InputError(
                f"journal {self.path} is about something else ({what}); name another file, or delete it to begin anew"
            )


def _spelled(key: tuple[Any, ...]) -> str:
    return json.dumps(key)
