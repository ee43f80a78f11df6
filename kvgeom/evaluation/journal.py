"""What has been measured, written down as it is measured, so that an interrupted run goes on where it was.

A line is bound to its journal by a hash, and stands for itself: a database that lost a page would lose all behind it, and
would take a changed byte for what was measured.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO, Self
from weakref import WeakSet

from kvgeom.checks import as_path
from kvgeom.errors import InputError, KvgeomWarning
from kvgeom.paths import not_written, write_whole
from kvgeom.words import counted

#: Version of the format: 3 since every record has a hash.
FORMAT = 3
#: No line of a journal is as long, in bytes, and no header.
LONGEST, LONGEST_HEADER = 1 << 26, 1 << 20
#: A file that has no record of ours in so many lines, and another first line, is not read on.
FOREIGN = 100

Record = Mapping[str, Any]

#: What to do where a journal cannot be used.
_OTHER = "give another folder (--out) or file"
#: Journals of this process, to say who holds a file.
_OPEN: WeakSet[Journal] = WeakSet()
#: What a header holds as a hash.
_HASHED = ("fingerprint", "prompts")
#: Between a record and its hash, which ends the line.
_MARK, _END = b', "hash": "', b'"}\n'
_HASH = 16
_TAIL = len(_MARK) + _HASH + len(_END)


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
    that was done. A line that was cut off at the end is dropped, and that measurement is made again. Values stay
    in the file; only where each begins is kept in memory.

    Each record ends with a hash of itself and the header. Where a file is damaged, what is whole is used; what is not is
    measured again and said in a warning, and the damaged file is kept as ``*.damaged``.

    One run at a time holds a journal, by a lock on the file itself, which the system lets go of however the run ends. Some
    network file systems lock nothing: there a warning says so, and that no other run may use the file.

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
        self.path = as_path("journal", path)
        self._about = {"kvgeom_journal": FORMAT, **json.loads(json.dumps(dict(about)))}
        self._header = json.dumps(self._about).encode() + b"\n"
        self._begins: dict[str, int] = {}
        self._end = 0
        self._open()

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _held(self.path)
            _OPEN.add(self)
            try:
                damaged = self._read()
                if damaged:
                    self._mend(damaged)
                self._file.truncate(self._end)
                if self._end == 0:
                    self._append(self._header)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise not_written(self.path, error, _OTHER) from error

    @property
    def known(self) -> int:
        """How many measurements there are."""
        return len(self._begins)

    def __contains__(self, key: Record) -> bool:
        return _digest(key) in self._begins

    def __getitem__(self, key: Record) -> Any:
        return json.loads(self._line_at(self._begins[_digest(key)]))["value"]

    def __setitem__(self, key: Record, value: Any) -> None:
        begin = self._end
        self._append(_line(self._header, json.dumps({"key": key, "value": value}).encode()))
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
            self._open()

    @property
    def closed(self) -> bool:
        """Whether the file was let go of."""
        return self._file.closed

    def close(self) -> None:
        """Let go of the file."""
        with contextlib.suppress(OSError):  # of a line that could not be written, which has been reported
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line_at(self, begin: int) -> bytes:
        self._file.seek(begin)
        return self._file.readline()

    def _append(self, line: bytes) -> None:
        try:
            self._file.seek(self._end)
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise not_written(self.path, error, _OTHER) from error
        self._end = self._file.tell()

    def _read(self) -> list[int]:
        """Find where every record begins, and the end of the last; return the numbers of the lines that are damaged."""
        self._begins, self._end, damaged, begin, first = {}, 0, [], 0, b""
        for number, line in enumerate(_lines(self._file), start=1):
            first = first or line
            key = None if number == 1 else _key(self._header, line)
            if key is not None:
                self._begins[_digest(key)] = begin
            begin += len(line)
            if key is not None or line == self._header:
                self._end = begin
            elif number == 1 or line.endswith(b"\n") or len(line) == LONGEST:  # else it was cut off as it was written
                damaged.append(number)
            if number == FOREIGN and not self._begins:
                break
        if 1 in damaged and not self._begins:
            self._check(first)
            return []
        return damaged

    def _check(self, first: bytes) -> None:
        """Refuse a file with nothing of ours in it, unless its first line was cut off as it was written."""
        if self._header.startswith(first):
            return
        try:
            found = json.loads(first[:LONGEST_HEADER])
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise InputError(f"{self.path} is not a journal of kvgeom; {_OTHER}")
        version = found.get("kvgeom_journal")
        if version != FORMAT and isinstance(version, int):
            raise InputError(
                f"journal {self.path} was written by another version of kvgeom (format {version}, this version reads "
                f"{FORMAT}); {_OTHER}, or delete it to start over"
            )
        different = [key for key in {**self._about, **found} if found.get(key) != self._about.get(key)]
        what = "; ".join(_difference(key, found.get(key), self._about.get(key)) for key in different)
        raise InputError(
            f"journal {self.path} is about something else ({what or 'its first line is damaged'}); {_OTHER}, or delete it to "
            "start over"
        )

    def _mend(self, damaged: list[int]) -> None:
        """Keep a copy of the damaged file, and put one with the whole lines in its place."""
        names = chain([""], (f"-{number}" for number in count(2)))
        copies = (self.path.with_name(f"{self.path.name}.damaged{name}") for name in names)
        copy = next(path for path in copies if not path.exists())
        shutil.copy2(self.path, copy)
        write_whole(self.path, chain([self._header], map(self._line_at, sorted(self._begins.values()))))
        self._file.close()
        self._file = _held(self.path)  # the other file that has its name now
        self._read()
        lines = f"line{'s' if damaged[1:] else ''} {', '.join(map(str, damaged[:5]))}{', ...' if damaged[5:] else ''}"
        warnings.warn(
            f"journal {self.path} is damaged ({lines}): {counted(len(self._begins), 'whole record')} kept, the rest is measured again; "
            f"the damaged file is kept as {copy.name}",
            KvgeomWarning,
            stacklevel=2,
        )


def _held(path: Path) -> BinaryIO:
    """Open a file, made if it is not there, that nobody else can hold until it is closed."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise InputError(f"journal {path} is a pipe or a device; {_OTHER}")
        file = os.fdopen(handle, "r+b")
        try:
            _lock(file)
        except (BlockingIOError, PermissionError):
            mine = any(
                each.path.exists() and os.path.samestat(os.fstat(handle), each.path.stat())
                for each in _OPEN
                if not each.closed
            )
            file.close()
            who = "this process: close() what holds it, such as base.journal" if mine else "another run; wait for it"
            raise InputError(f"journal {path} is in use by {who}, or {_OTHER}") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                file.close()
                raise
            warnings.warn(
                f"the file system of {path} locks no files ({error.strerror}): let no other run use it meanwhile, or {_OTHER}",
                KvgeomWarning,
                stacklevel=2,
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return file
        file.close()  # another run has put a file in its place meanwhile


if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> None:
        file.seek(1 << 40)  # what is locked cannot be read: a byte that will never be there
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, of one that is no journal in pieces that memory holds."""
    file.seek(0)
    while line := file.readline(LONGEST):
        yield line


def _line(header: bytes, body: bytes) -> bytes:
    """A record with its hash."""
    return body[:-1] + _MARK + _hash(header, body) + _END


def _key(header: bytes, line: bytes) -> Record | None:
    """The key of a line that is as it was written under this header; None of any other."""
    body, tail = line[:-_TAIL] + b"}", line[-_TAIL:]
    if tail != _MARK + _hash(header, body) + _END:
        return None
    try:
        found = json.loads(body)
        key: Record = found["key"]
        return key if isinstance(key, dict) and "value" in found else None
    except (ValueError, RecursionError, KeyError, TypeError):  # of somebody who made a hash
        return None


def _hash(header: bytes, body: bytes) -> bytes:
    return hashlib.sha256(header + body).hexdigest()[:_HASH].encode()


def _difference(what: str, there: object, now: object) -> str:
    """What differs, with its values unless they are hashes, which say nothing."""
    return f"other {what}" if what in _HASHED else f"{what}: {there!r} there, {now!r} now"


def _digest(key: Record) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
