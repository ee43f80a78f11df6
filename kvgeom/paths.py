"""Where kvgeom keeps what it fetched or converted."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from kvgeom.checks import as_path
from kvgeom.errors import InputError


def cache_dir(*parts: str) -> Path:
    """A folder under the user's cache folder (or ``$KVGEOM_CACHE``), made if it is not there.

    Raises
    ------
    InputError
        If it cannot be made or written.
    """
    from platformdirs import user_cache_path

    chosen = os.environ.get("KVGEOM_CACHE")
    folder = (Path(chosen).expanduser() if chosen else user_cache_path("kvgeom")).joinpath(*parts)
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
    """Whether the system has no room for a file: a full disk, a quota, or a limit to the size of files."""
    full = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
    return error.errno in full or "No space left" in str(error)  # HDF5 gives no number


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


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write a file, text as UTF-8, whole or not at all; returns its path.

    Raises
    ------
    InputError
        If its folder cannot be written.
    """
    try:
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise not_written(path, error) from error
    return path
