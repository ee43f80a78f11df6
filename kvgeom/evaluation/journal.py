"""What has been measured, written down as it is measured, so that an interrupted run goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from kvgeom.errors import InputError
from kvgeom.paths import not_written

#: Version of the format: 2 since entries are records with named fields.
FORMAT = 2

Record = Mapping[str, Any]

#: What to do where a journal cannot be used.
_OTHER = "give another folder (--out) or file"
#: What a header holds as a hash.
_HASHED = ("fingerprint", "prompts")


class NoJournal:
    """Nothing is kept: what stands in for a :class:`Journal` where no file was named."""

    path: Path | None = None

    def __contains__(self, key: Record) -> bool:
        return False

    def __getitem__(self, key: Record) -> Any:
        raise KeyError(key)

    def __setitem__(self, key: Record, value: Any) -> None:
        pass

    def remember(self, key: Record, measure: Callable[[], Any]) -> Any:
        """The value of ``key``; measured now unless it is known."""
        return measure()

    def reopen(self) -> None:
        """Nothing to take hold of."""

    def close(self) -> None:
        """Nothing to let go of."""


class Journal(NoJournal):
    """A file of JSON lines: a header that says what may be in it, then one record for each thing measured.

    Every line is handed to the system before the next measurement begins, so that a killed process loses nothing
    that was done. A line that was cut off in the middle is dropped, and that measurement is made again. Values stay
    in the file; only where each begins is kept in memory.

    Parameters
    ----------
    path : str or Path
        A new file, or one that an earlier run of the same work has left.
    about : mapping
        What all entries depend on: model, prompts, judge, versions. JSON types only.

    Raises
    ------
    InputError
        If the file is no journal, is about something else, was written by another version, is in use, or cannot be
        written. Also later, when the disk is full: what was written until then is kept.
    """

    path: Path

    def __init__(self, path: str | Path, about: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._about = {"kvgeom_journal": FORMAT, **json.loads(json.dumps(dict(about)))}
        self._begins: dict[str, int] = {}
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        weakref.finalize(self, _unlock, self._lock)  # also at the end of the process
        self._open()

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"journal {self.path} is in use by another run; wait for it, or {_OTHER}") from None
        except OSError as error:
            raise not_written(self.path, error, _OTHER) from error
        try:
            kept = self._read() if self.path.exists() else 0
            self._file = open(self.path, "r+b" if self.path.exists() else "w+b")  # noqa: SIM115  # closed by close()
            self._file.truncate(kept)
            self._end = kept
            if kept == 0:
                self._append(self._about)
        except BaseException as error:
            _unlock(self._lock)
            if isinstance(error, OSError):
                raise not_written(self.path, error, _OTHER) from error
            raise

    @property
    def known(self) -> int:
        """How many measurements there are."""
        return len(self._begins)

    def __contains__(self, key: Record) -> bool:
        return _digest(key) in self._begins

    def __getitem__(self, key: Record) -> Any:
        self._file.seek(self._begins[_digest(key)])
        return json.loads(self._file.readline())["value"]

    def __setitem__(self, key: Record, value: Any) -> None:
        begin = self._end
        self._append({"key": key, "value": value})
        self._begins[_digest(key)] = begin

    def remember(self, key: Record, measure: Callable[[], Any]) -> Any:
        """The value of ``key``; measured now unless it is known."""
        if key not in self:
            self[key] = measure()
        return self[key]

    def reopen(self) -> None:
        """Take hold of the file again, after :meth:`close`; raises as the constructor does.

        What another run has added meanwhile is taken in; what is no longer in the file is measured again.
        """
        if self._file.closed:
            self._begins = {}
            self._open()

    def close(self) -> None:
        """Let go of the file."""
        with contextlib.suppress(OSError):  # of a line that could not be written, which has been reported
            self._file.close()
        _unlock(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, line: Record) -> None:
        try:
            self._file.seek(self._end)
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise not_written(self.path, error, _OTHER) from error
        self._end = self._file.tell()

    def _read(self) -> int:
        """Find where every entry begins; return the length of the whole lines."""
        end = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                try:
                    found = json.loads(line)
                    whole = line.endswith(b"\n") and isinstance(found, dict)
                except ValueError:
                    whole = False
                if not whole:
                    if number == 0 and not json.dumps(self._about).encode().startswith(line):
                        raise InputError(f"{self.path} is not a journal of kvgeom; {_OTHER}")
                    break
                if number == 0:
                    self._check(found)
                elif "key" in found and "value" in found:
                    self._begins[_digest(found["key"])] = end
                else:
                    raise InputError(
                        f"line {number + 1} of {self.path} is no record of kvgeom (it has no key and value); delete that line, "
                        f"or {_OTHER}"
                    )
                end += len(line)
        return end

    def _check(self, found: Record) -> None:
        version = found.get("kvgeom_journal")
        if version != FORMAT and isinstance(version, int):
            raise InputError(
                f"journal {self.path} was written by another version of kvgeom (format {version}, this version reads "
                f"{FORMAT}); {_OTHER}, or delete it to start over"
            )
        different = [key for key in {**self._about, **found} if found.get(key) != self._about.get(key)]
        if different:
            what = "; ".join(_difference(key, found.get(key), self._about.get(key)) for key in different)
            raise InputError(
                f"journal {self.path} is about something else ({what}); {_OTHER}, or delete it to start over"
            )


def _difference(what: str, there: object, now: object) -> str:
    """What differs, with its values unless they are hashes, which say nothing."""
    return f"other {what}" if what in _HASHED else f"{what}: {there!r} there, {now!r} now"


def _unlock(lock: FileLock) -> None:
    if lock.is_locked:
        with contextlib.suppress(OSError):  # such as Windows, where an open file stays
            os.unlink(lock.lock_file)
        lock.release()


def _digest(key: Record) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
