"""Where kvgeom keeps what it fetched or converted."""

from __future__ import annotations

import os
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
