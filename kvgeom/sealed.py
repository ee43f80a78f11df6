"""Files of kvgeom that only count as they were written: with a hash behind their end, or read by a strict schema."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar, cast

from kvgeom.errors import InputError, reason
from kvgeom.paths import read_whole, write_whole

T = TypeVar("T")

#: Between a file and its hash.
_MARK = b"kvgeom-sha256"
_SEAL = len(_MARK) + hashlib.sha256().digest_size
_PIECE = 1 << 24
#: No JSON file that kvgeom wrote is larger, in bytes.
LARGEST_JSON = 1 << 28


def write_sealed(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all, with its hash behind its end, where other readers of NetCDF do not look.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    return write_whole(path, content + _MARK + hashlib.sha256(content).digest())


def is_sealed(path: Path) -> bool:
    """Whether a file ends as :func:`write_sealed` ends files; what is before is not read."""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _SEAL))
        return file.read(_SEAL).startswith(_MARK)


def check_seal(path: Path) -> None:
    """Check that a file is as :func:`write_sealed` has left it.

    Raises
    ------
    InputError
        If it is not.
    """
    digest = hashlib.sha256()
    try:
        if not path.is_file():
            raise InputError(f"cannot load {path}: no such file; give a path that .save() wrote")
        with path.open("rb") as file:
            left = os.fstat(file.fileno()).st_size - _SEAL
            while left > 0 and (piece := file.read(min(left, _PIECE))):
                digest.update(piece)
                left -= len(piece)
            seal = file.read(_SEAL)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load {path}: {reason(error)}; give a path that .save() wrote") from error
    if left or not seal.startswith(_MARK):
        raise InputError(f"cannot load {path}: not a kvgeom result, or not all of one; give a path that .save() wrote")
    if seal != _MARK + digest.digest():
        raise InputError(f"cannot load {path}: it is damaged, or was changed since it was saved; make it again")


def read_json(path: Path, schema: type[T]) -> T:
    """Read a JSON file by a pydantic schema.

    Raises
    ------
    InputError
        If there is none, it is no JSON, or it is not as the schema says; the first thing that is wrong is named.
    """
    return checked_json(read_whole(path, LARGEST_JSON), schema)


def checked_json(given: Any, schema: type[T]) -> T:
    """JSON as bytes, or what was read from it, by a pydantic schema; raises as :func:`read_json`."""
    from pydantic import BaseModel, TypeAdapter, ValidationError

    if isinstance(given, BaseModel):
        return cast(T, given)  # has been read
    try:
        return TypeAdapter(schema).validate_json(given if isinstance(given, bytes) else json.dumps(given), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{where + ': ' if where else ''}{first['msg'][:200]}") from error
