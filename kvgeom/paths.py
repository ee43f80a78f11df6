"""Where kvgeom keeps what it fetched or converted."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

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


def writable_folder(out: str | Path) -> Path:
    """Make a folder, or find it, and be sure that it can be written.

    Raises
    ------
    InputError
        If it cannot.
    """
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"output folder {out} cannot be written: {error.strerror}; choose another") from error
    return folder


def write_whole(path: Path, text: str) -> Path:
    """Write a text file, whole or not at all; returns its path.

    Raises
    ------
    InputError
        If its folder cannot be written.
    """
    try:
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; choose another folder") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    return path
