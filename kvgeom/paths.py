"""Where kvgeom keeps what it fetched or converted, and how files are read and written."""

from __future__ import annotations

import codecs
import errno
import os
import secrets
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from kvgeom.checks import as_path
from kvgeom.errors import InputError

#: Larger files of text are not read, in bytes: AdvBench has a thousandth of it.
LARGEST_TEXT = 64 * 2**20
#: How a file begins that Git LFS has left in the place of a large one.
LFS_POINTER = b"version https://git-lfs"
#: Encodings by the mark that a file begins with. A file of UTF-32 begins like one of UTF-16, and goes on with a NUL.
_MARKS = {codecs.BOM_UTF8: "UTF-8", codecs.BOM_UTF16_LE: "UTF-16-LE", codecs.BOM_UTF16_BE: "UTF-16-BE"}


def cache_dir(*parts: str) -> Path:
    """A folder under the user's cache folder (or ``$KVGEOM_CACHE``), made if it is not there.

    Raises
    ------
    InputError
        If it cannot be made or written.
    """
    from platformdirs import user_cache_path

    chosen = os.environ.get("KVGEOM_CACHE")
    folder = (as_path("KVGEOM_CACHE", chosen) if chosen else user_cache_path("kvgeom")).joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot keep files in {folder}: {error.strerror}; set KVGEOM_CACHE to a writable folder"
        ) from error
    return folder


def not_written(what: str | Path, error: OSError, otherwise: str = "choose another folder") -> InputError:
    """The error for a file that the system did not write.

    Parameters
    ----------
    what : str or Path
        Names it.
    error : OSError
    otherwise : str
        What to do, unless the disk is full.

    Examples
    --------
    >>> not_written("a.txt", PermissionError(errno.EACCES, "Permission denied"))
    InputError('a.txt cannot be written: Permission denied; choose another folder')
    """
    if disk_is_full(error):
        otherwise = "nothing that was done is lost: free some space and run the same command again"
    return InputError(f"{what} cannot be written: {error.strerror or error}; {otherwise}")


def disk_is_full(error: OSError) -> bool:
    """Whether the system has no room for a file: a full disk, a quota, or a limit to the size of files.

    Some libraries hand its error on as text, without its number.
    """
    full = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
    return error.errno in full or any(
        said in str(error) for said in ("No space left", "File too large", "quota exceeded")
    )


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark; nothing is replaced, no end of line changed.

    Raises
    ------
    InputError
        If it is in another encoding, with line and byte, or a Git LFS pointer; or as :func:`read_whole`.
    """
    raw = read_whole(path)
    if raw.startswith(LFS_POINTER):
        raise InputError(f"{path} is a Git LFS pointer, not the file it stands for; run: git lfs pull")
    mark = next((mark for mark in _MARKS if raw.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "UTF-8")
    try:
        text = raw[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        start = len(mark) + error.start
        line = _line_of(raw[len(mark) : start].decode(encoding))
        raise InputError(
            f"line {line} of {path} is not {encoding}: byte {start} is 0x{raw[start]:02x}; save the file as UTF-8"
        ) from error
    if "\0" in text:
        before = text.partition("\0")[0]
        byte = len(mark) + len(before.encode(encoding))
        raise InputError(
            f"line {_line_of(before)} of {path} has a NUL at byte {byte}, which is not text (perhaps UTF-16 or UTF-32 "
            "without a mark); save the file as UTF-8"
        )
    return text


def _line_of(before: str) -> int:
    return before.count("\n") + 1


def read_whole(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """What a file holds, read only if it is a regular file and not too large: a pipe would be waited for, a device never ends.

    Parameters
    ----------
    path : Path
    largest : int
        The most bytes that are read.

    Raises
    ------
    InputError
        If it is something else, larger, missing, unreadable, or changes meanwhile.
    """
    name = str(path)[:300] if str(path).isprintable() else repr(str(path)[:300])
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
            raise InputError(f"{name} is {what}; give a regular file")
        if found.st_size > largest:
            sizes = f"{found.st_size / 2**20:,.1f} MiB, and files of up to {largest / 2**20:,.0f} MiB are read"
            raise InputError(f"{name} has {sizes}; give a part of it")
        with path.open("rb") as file:
            content = file.read(found.st_size + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"no such file: {name}") from error
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}; give another file") from error
    if len(content) != found.st_size:
        raise InputError(f"{name} changes while it is read; give a copy of it")
    return content


def writable_folder(out: str | Path) -> Path:
    """Make a folder, or find it, and be sure that it can be written.

    Raises
    ------
    InputError
        If it cannot, its name is empty, or it is no path.
    """
    folder = as_path("the output folder", out)
    if str(out) == "":
        raise InputError("the name of the output folder is empty; give a folder, or . for the current one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise not_written(f"output folder {out}", error, "choose another") from error
    return folder


def write_whole(path: Path, content: str | bytes | Iterable[bytes]) -> Path:
    """Write a file, text as UTF-8, whole or not at all, also when the process is killed; returns its path.

    A link stays, and the file that it leads to is written. Its mode is what the umask leaves, and no wider than that of a file which it replaces.

    Raises
    ------
    InputError
        If the path names no file, its folder cannot be written, or the disk is full.
    """
    if not path.name:
        raise InputError(f"no file was named: {str(path)!r} is a folder; give the path of a file")
    given = path
    if isinstance(content, str):
        content = content.encode()
    try:
        path = path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise InputError(f"{given} is a link that leads nowhere; give another path") from error
    partial = path.with_name(f".{path.name[:100]}-{secrets.token_hex(8)}")
    try:
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode & 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines([content] if isinstance(content, bytes) else content)
                file.flush()
                os.fsync(file.fileno())  # or a system that stops now may keep the new name and not the content
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
    except OSError as error:
        raise not_written(given, error) from error
    return given
