"""The settings of the report that a folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue

from kvgeom.checks import as_path
from kvgeom.errors import InputError
from kvgeom.folders import SETTINGS
from kvgeom.quant.serialization import Count, Size, StrictRecord
from kvgeom.results import plain
from kvgeom.sealed import read_json


class _Prompts(StrictRecord, extra="allow"):
    """A prompt set, as :meth:`~kvgeom.prompts.sets.PromptSet.described` has it."""

    name: str
    source: str
    fingerprint: str
    harmful: Count
    harmless: Count
    harmful_clusters: Count
    harmless_clusters: Count
    repeated: Count
    similar: Count


class FixSettings(StrictRecord, extra="allow"):
    """What ``fix.json`` holds."""

    calibration: _Prompts
    verification: _Prompts
    fingerprint: str
    weights: str
    notes: list[str] = Field(default_factory=list)
    conversation: list[dict[str, str]] = Field(default_factory=list)
    runs_on: str
    scheme: str
    bits: Size | None
    placement: str
    geometry: bool
    max_new_tokens: Size
    max_reasoning_tokens: Count
    memory: float
    controls: Count
    seed: Count
    seconds: float
    created: str
    versions: dict[str, str]


#: Settings that differ from run to run.
_PASSING = ("seconds", "created", "versions")


def settings_in(out: str | Path, command: str) -> dict[str, Any]:
    """The settings of the report that a folder holds; empty if there is none that can be read."""
    try:
        record = read_json(as_path("the output folder", out) / SETTINGS[command], dict[str, JsonValue])
    except InputError:
        return {}
    found = record.get("settings", record)
    return found if isinstance(found, dict) else {}


def same_settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs were asked for the same."""
    mine, theirs = ({key: each[key] for key in each if key not in _PASSING} for each in (plain(one), plain(other)))
    return bool(mine == theirs)
