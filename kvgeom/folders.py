"""The folders that kvgeom writes into: one command's results, which no other command replaces, and no file of anybody else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from kvgeom.checks import as_path
from kvgeom.errors import InputError
from kvgeom.paths import read_whole, writable_folder
from kvgeom.sealed import LARGEST_JSON, is_sealed

#: The file with the settings of each command that writes a report.html; no other command writes it.
SETTINGS = {"audit": "audit.json", "fix": "fix.json", "gate": "gate.json", "paper": "paper.json", "tour": "tour.nc"}
#: The other files that each writes, but for journals.
_BESIDE = {
    "audit": ("report.html", "audit.nc"),
    "fix": ("report.html", "plan.json", "diagnosis.nc", "verification.nc"),
    "gate": ("report.html", "gate.md", "junit.xml", "gate.sarif", "gate.nc"),
    "paper": ("report.html",),
    "tour": ("report.html",),
}

#: What each JSON file of kvgeom has, and hardly a file of anybody else; of a list, each item.
_KEYS = {
    "audit.json": ("schema_version", "verdict", "curve"),
    "fix.json": ("calibration", "verification", "fingerprint"),
    "gate.json": ("gate_version", "verdict"),
    "paper.json": ("table", "mode", "prompt_set"),
    "plan.json": ("plan_version", "chosen"),
}
#: What stands near the beginning of other files of kvgeom, by their endings. Pages had a style before they had a generator.
_BEGINNINGS = {
    ".html": (b'<meta name="generator" content="kvgeom">', b"\n  .kicker {"),
    ".jsonl": (b'{"kvgeom_journal": ',),
    ".sarif": (b'"name": "kvgeom"',),
    ".xml": (b'name="kvgeom gate"',),
}
_BEGINNING = 4096


def report_folder(out: str | Path, command: str) -> Path:
    """Make or find the folder for a command's report.

    Raises
    ------
    InputError
        If it cannot be written, or holds the report of another command, or a file of somebody else that would be replaced.
    """
    folder = as_path("the output folder", out)
    for other, file in SETTINGS.items():
        if other != command and folder.joinpath(file).exists():
            raise InputError(f"folder {out} holds the results of kvgeom {other}; give another folder (--out)")
    folder = writable_folder(out)
    check_replaceable(folder, (SETTINGS[command], *_BESIDE[command]))
    return folder


def check_replaceable(folder: Path, names: Iterable[str], *, kept: bool = False) -> None:
    """Check that files which are to be written would replace none that kvgeom did not write.

    JSON, pages, results and journals say themselves whose they are. Plain text, Markdown, tables and LaTeX do not: they are
    taken for kvgeom's where the folder holds a result or a journal of kvgeom.

    Parameters
    ----------
    folder : Path
        It need not be there.
    names : iterable of str
        Names of files in it.
    kept : bool
        Whether it is known that the folder holds results of kvgeom.

    Raises
    ------
    InputError
        For the first file that somebody else wrote.
    """
    for name in names:
        path = folder / name
        if os.path.lexists(path) and not (is_ours(path) or (_says_nothing(path) and (kept or _holds_results(folder)))):
            raise InputError(
                f"{path} would be replaced, and kvgeom did not write it; give another folder (--out), or move that file"
            )


def is_ours(path: Path) -> bool:
    """Whether a file bears a mark of kvgeom, or is empty."""
    try:
        if not path.is_file():
            return False
        if path.stat().st_size == 0:
            return True
        if path.suffix == ".nc":
            return is_sealed(path)
        if path.name in _KEYS:
            return _has_keys(path)
        with path.open("rb") as file:
            beginning = file.read(_BEGINNING)
    except OSError:
        return False
    return any(mark in beginning for mark in _BEGINNINGS.get(path.suffix, ()))


def _has_keys(path: Path) -> bool:
    try:
        found = json.loads(read_whole(path, LARGEST_JSON))
    except (InputError, ValueError, RecursionError):
        return False
    records = found if isinstance(found, list) else [found]
    return bool(records) and all(isinstance(each, Mapping) and {*_KEYS[path.name]} <= {*each} for each in records)


def _says_nothing(path: Path) -> bool:
    """Whether a file is of a kind that has no place for a mark."""
    return path.is_file() and not (path.suffix in (*_BEGINNINGS, ".nc") or path.name in _KEYS)


def _holds_results(folder: Path) -> bool:
    """Whether a folder holds a result or a journal of kvgeom."""
    return any(
        path.stat().st_size > 0 and is_ours(path)
        for ending in ("jsonl", "nc")
        for path in folder.glob(f"*.{ending}")
        if path.is_file()
    )
