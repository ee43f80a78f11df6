"""A plan as ``plan.json`` and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, JsonValue

from kvgeom.checks import as_path
from kvgeom.diagnosis.mode import ModeName
from kvgeom.errors import InputError
from kvgeom.mitigation.candidates import Candidate
from kvgeom.mitigation.layers import LayerSelection
from kvgeom.mitigation.search import Search
from kvgeom.models.model import KVGeometry
from kvgeom.paths import read_whole
from kvgeom.quant.serialization import (
    Count,
    RecipeRecord,
    Size,
    StaticsRecord,
    StrictRecord,
    placement_from_json,
    recipe_from_json,
    recipe_to_json,
    statics_from_json,
)
from kvgeom.results import plain
from kvgeom.sealed import LARGEST_JSON, checked_json

#: Version of the layout of plan.json; docs/mitigation.md describes it.
PLAN_VERSION = 4


def json_path(path: str | Path) -> Path:
    """The file itself, or ``plan.json`` in a folder."""
    path = as_path("plan", path)
    return path if path.suffix == ".json" else path / "plan.json"


def written(plan: Mapping[str, Any], overhead: Callable[[Candidate], float]) -> dict[str, Any]:
    """Content of ``plan.json``.

    Parameters
    ----------
    plan : mapping
        The attributes of a :class:`~kvgeom.mitigation.plan.Plan`, by name; the inverse of :func:`read`.
    overhead : callable (candidate) -> float
        Share by which it exceeds the unmitigated cache.
    """
    statics: dict[str, Any] = {}

    def as_json(candidate: Candidate) -> dict[str, Any]:
        return {
            "name": candidate.name,
            "family": candidate.family,
            "description": candidate.description,
            "placement": dataclasses.asdict(candidate.placement),
            "recipe": recipe_to_json(candidate.recipe, statics),
            "memory_overhead": overhead(candidate),
            "bytes_per_token": candidate.bytes_per_token(plan["geometry"]),
        }

    content = {
        "plan_version": PLAN_VERSION,
        "model": {"name": plan["model"], "identity": plan["identity"], **dataclasses.asdict(plan["geometry"])},
        "scheme": plan["scheme"],
        "mode": plan["mode"],
        "paper_mode": plan["paper_mode"],
        "chosen": as_json(plan["chosen"]),
        "paper": as_json(plan["paper"]),
        "reasons": list(plan["reasons"]),
        "verified": plan["verified"],
        "judge": plan["judge"],
        "max_new_tokens": plan["max_new_tokens"],
        "max_reasoning_tokens": plan["max_reasoning_tokens"],
        "candidates": [as_json(candidate) for candidate in plan["candidates"]],
        "search": {"meta": plan["search"].meta, "records": plan["search"].records()},
        "selection": plan["selection"] and {"meta": plan["selection"].meta, "records": plan["selection"].records()},
        "calibration": list(plan["calibration"]),
        "statics": statics,
    }
    return {**content, "hash": content_hash(plain(content))}


def content_hash(content: Mapping[str, Any]) -> str:
    """Hash of what ``plan.json`` holds beside it, however it is spaced and ordered.

    Raises
    ------
    ValueError
        If there is a number that JSON does not know.
    """
    rest = {key: value for key, value in content.items() if key != "hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


class _Versioned(StrictRecord, extra="ignore"):
    plan_version: int


class _Model(StrictRecord, extra="allow"):
    """The other fields of :class:`KVGeometry` are its own."""

    name: str
    identity: str
    layers: Annotated[int, Field(ge=1, le=100_000)]


class _Candidate(StrictRecord):
    name: str
    family: str
    description: str
    placement: dict[str, str | int]
    recipe: RecipeRecord
    memory_overhead: float
    bytes_per_token: float


class _SearchRow(StrictRecord):
    candidate: str
    family: str
    description: str
    flips: Count
    flips_complied: Count
    flips_evaded: Count
    flips_degenerate: Count
    flip_rate: float | None
    ci_low: float | None
    ci_high: float | None
    recovery: float | None
    recovery_low: float | None
    recovery_high: float | None
    p: float | None
    margin_drop: float | None
    bytes_per_token: float
    memory_overhead: float
    affordable: bool
    pareto: bool
    harmless_refused: float | None
    harmless_lost: float | None
    spoils: bool
    untested: bool


class _SearchMeta(StrictRecord, extra="allow"):
    prompts: Count
    budget: float
    exact_bytes_per_token: float
    chosen: str


class _Search(StrictRecord):
    meta: _SearchMeta
    records: Annotated[list[_SearchRow], Field(min_length=1)]


class _SelectionRow(StrictRecord):
    rule: str
    kept: Count
    flips: Count
    flip_rate: float | None
    ci_low: float | None
    ci_high: float | None
    p: float | None
    layers: str
    bytes_per_token: float


class _SelectionMeta(StrictRecord, extra="allow"):
    order: dict[str, list[Count]]
    drawn: list[str]
    prompts: Count
    unmitigated: Count


class _Selection(StrictRecord):
    meta: _SelectionMeta
    records: Annotated[list[_SelectionRow], Field(min_length=1)]


class _PlanFile(StrictRecord):
    plan_version: int
    hash: str
    model: _Model
    scheme: str
    mode: ModeName
    paper_mode: ModeName
    chosen: _Candidate
    paper: _Candidate
    reasons: list[str]
    verified: dict[str, JsonValue] | None
    judge: str
    max_new_tokens: Size
    max_reasoning_tokens: Count
    candidates: Annotated[list[_Candidate], Field(min_length=1)]
    search: _Search
    selection: _Selection | None
    calibration: list[str]
    statics: dict[str, StaticsRecord]


def read(path: Path) -> dict[str, Any]:
    """The attributes of the plan that a file holds.

    Raises
    ------
    InputError
        If there is none, it has another layout, it is not whole, or it was changed.
    """
    try:
        content = read_whole(path, LARGEST_JSON)
        version = checked_json(content, _Versioned).plan_version
    except InputError as error:
        raise InputError(f"plan {path} cannot be read ({error}); give a plan.json that kvgeom fix wrote") from error
    if version != PLAN_VERSION:
        raise InputError(
            f"plan {path} has layout {version}, but this kvgeom reads {PLAN_VERSION}; run kvgeom fix again"
        )
    try:
        record, raw = checked_json(content, _PlanFile), json.loads(content)
        found = _attributes(record, raw["search"], raw["selection"])
        changed = content_hash(raw) != record.hash
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"plan {path} is not as it was written ({error}); run kvgeom fix again") from error
    if changed:
        raise InputError(f"plan {path} was changed after it was written (its hash is another); run kvgeom fix again")
    return found


def _attributes(record: _PlanFile, search: dict[str, Any], selection: dict[str, Any] | None) -> dict[str, Any]:
    statics = {key: statics_from_json(value, key) for key, value in record.statics.items()}
    geometry = _geometry({"layers": record.model.layers, **(record.model.model_extra or {})})

    def candidate(found: _Candidate) -> Candidate:
        recipe, placement = recipe_from_json(found.recipe, statics), placement_from_json(found.placement)
        if len(recipe) != geometry.layers:
            raise InputError(f"candidate {found.name!r} has {len(recipe)} layers, the model {geometry.layers}")
        return Candidate(found.name, found.family, recipe, placement, found.description)

    candidates = tuple(map(candidate, record.candidates))
    rules = selection and LayerSelection.of_records(selection["records"], selection["meta"], ["rule", "kept"])
    if rules and rules.data.flips.isnull().any():
        raise InputError("not every rule of selection has every number of layers")
    unknown = {row.candidate for row in record.search.records} - {each.name for each in candidates}
    if unknown:
        raise InputError(f"what was searched, {min(unknown)!r}, is no candidate")
    return {
        "model": record.model.name,
        "identity": record.model.identity,
        "geometry": geometry,
        "scheme": record.scheme,
        "mode": record.mode,
        "paper_mode": record.paper_mode,
        "chosen": candidate(record.chosen),
        "paper": candidate(record.paper),
        "candidates": candidates,
        "reasons": tuple(record.reasons),
        "search": Search.of_records(search["records"], search["meta"], ["candidate"]),
        "selection": rules,
        "judge": record.judge,
        "max_new_tokens": record.max_new_tokens,
        "max_reasoning_tokens": record.max_reasoning_tokens,
        "calibration": tuple(record.calibration),
        "verified": record.verified,
    }


def _geometry(found: Mapping[str, Any]) -> KVGeometry:
    geometry = checked_json(found, KVGeometry)
    kinds = (geometry.stores, geometry.states, geometry.shares, geometry.indexed)
    numbers = [value for value in vars(geometry).values() if isinstance(value, int) and not isinstance(value, bool)]
    sizes = [*numbers, *(size for shape in geometry.shapes for size in shape)]
    if (
        found.keys() != vars(geometry).keys()
        or min(sizes) < 1
        or not all(0 <= layer < geometry.layers for layers in kinds for layer in layers)
        or len(geometry.shapes) not in (0, len(geometry.stores))
    ):
        raise InputError(f"the shape of the model is none: {dict(found)}")
    return geometry
