"""Which classifier it was: a hash of all that its labels depend on, by which labels that are kept are told apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvgeom.judges.guards import Guard

#: Files up to so many bytes are hashed as a whole; of larger ones, pieces of so many bytes in as many places.
WHOLE = 1 << 24
PIECE, PLACES = 1 << 12, 1 << 10
#: Options of ``from_pretrained`` that say where weights lie, and nothing of what they are.
_WHERE = frozenset(
    {"device_map", "max_memory", "offload_folder", "cache_dir", "token", "local_files_only", "force_download"}
)
#: What a checkpoint is made of: weights, settings, tokenizer and template.
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def identity(source: str, revision: str | None, guard: Guard, dtype: object, options: Mapping[str, Any]) -> str:
    """Hash of the weights, tokenizer and template of a classifier, of its kind, and of how it is loaded.

    Of a folder the files are read (large ones in samples: seconds, not minutes), of a hub id the commit. The same
    checkpoint in another folder is the same.

    Parameters
    ----------
    source : str
        A folder or a hub id.
    revision : str or None
    guard : Guard
        Its prompt, and how answers are read.
    dtype : object
        As it is loaded.
    options : mapping
        Of ``from_pretrained``.
    """
    folder = Path(source)
    weights = _folder(folder) if folder.is_dir() else f"{source} {_commit(source, revision)}"
    how = {name: _plain(value) for name, value in sorted(options.items()) if name not in _WHERE}
    parts = [weights, repr(guard), str(dtype), json.dumps(how, sort_keys=True, default=str)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _FILES for file in folder.glob(pattern)}):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        for piece in _pieces(file):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with open(file, "rb") as opened:
        if size <= WHOLE:
            yield opened.read()
            return
        for place in range(PLACES):
            opened.seek(place * (size - PIECE) // (PLACES - 1))
            yield opened.read(PIECE)


def _commit(name: str, revision: str | None) -> str:
    """The commit that a hub id stands for: the one in the local cache, which would be loaded, or else the hub's."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str):
        return Path(cached).parent.name
    try:
        found = HfApi().model_info(name, revision=revision, timeout=10)
    except Exception:  # of whichever HTTP library the installed hub client uses; that it is there has been checked
        found = None
    return str(getattr(found, "sha", None) or revision)


def _plain(value: Any) -> Any:
    """An option in JSON types, such as a quantization configuration."""
    return value.to_dict() if hasattr(value, "to_dict") else value
