"""A plan as ``plan.json`` and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgeom.errors import InputError
from kvgeom.mitigation.candidates import Candidate
from kvgeom.mitigation.layers import LayerSelection
from kvgeom.mitigation.search import Search
from kvgeom.models.model import KVGeometry
from kvgeom.quant.placement import Placement
from kvgeom.quant.serialization import recipe_from_json, recipe_to_json, statics_from_json

if TYPE_CHECKING:
    from kvgeom.mitigation.plan import Plan

#: Version of the layout of plan.json; docs/mitigation.md describes it.
PLAN_VERSION = 1


def json_path(path: str | Path) -> Path:
    """The file itself, or ``plan.json`` in a folder."""
    path = Path(path)
    return path if path.suffix == ".json" else path / "plan.json"


def written(plan: Plan) -> dict[str, Any]:
    """Content of ``plan.json``."""
    statics: dict[str, Any] = {}

    def spelled(candidate: Candidate) -> dict[str, Any]:
        return {
            "name": candidate.name,
            "family": candidate.family,
            "words": candidate.words,
            "recipe": recipe_to_json(candidate.recipe, statics),
            "memory_overhead": plan.overhead(candidate),
            "bytes_per_token": candidate.bytes_per_token(plan.geometry, plan.placement),
        }

    return {
        "plan_version": PLAN_VERSION,
        "model": {"name": plan.model, "identity": plan.identity, **dataclasses.asdict(plan.geometry)},
        "scheme": plan.scheme,
        "placement": dataclasses.asdict(plan.placement),
        "mode": plan.mode,
        "chosen": spelled(plan.chosen),
        "paper": spelled(plan.paper),
        "reasons": list(plan.reasons),
        "verified": plan.verified,
        "judge": plan.judge,
        "max_new_tokens": plan.max_new_tokens,
        "candidates": [spelled(candidate) for candidate in plan.candidates],
        "search": {"meta": plan.search.meta, "records": plan.search.records()},
        "selection": plan.selection and {"meta": plan.selection.meta, "records": plan.selection.records()},
        "calibration": list(plan.calibration),
        "statics": statics,
    }


def read(path: Path) -> dict[str, Any]:
    """The attributes of the plan that a file holds.

    Raises
    ------
    InputError
        If there is none, it has another layout, or it is not whole.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["plan_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"plan {path} was asked, but it cannot be read ({error}); give a file of kvgeom fix"
        ) from error
    if version != PLAN_VERSION:
        raise InputError(f"plan {path} has layout {version}, but this kvgeom reads {PLAN_VERSION}; make it anew")
    try:
        return _attributes(record)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"plan {path} is not whole: {error!r}; make it anew with kvgeom fix") from error


def _attributes(record: dict[str, Any]) -> dict[str, Any]:
    statics = {key: statics_from_json(value, key) for key, value in record["statics"].items()}

    def candidate(spelled: dict[str, Any]) -> Candidate:
        recipe = recipe_from_json(spelled["recipe"], statics)
        return Candidate(spelled["name"], spelled["family"], recipe, spelled["words"])

    model, search, selection = record["model"], record["search"], record["selection"]
    return {
        **{name: record[name] for name in ("scheme", "mode", "judge", "max_new_tokens", "verified")},
        "model": model["name"],
        "identity": model["identity"],
        "geometry": KVGeometry(**{field.name: model[field.name] for field in dataclasses.fields(KVGeometry)}),
        "placement": Placement(**record["placement"]),
        "chosen": candidate(record["chosen"]),
        "paper": candidate(record["paper"]),
        "candidates": tuple(candidate(spelled) for spelled in record["candidates"]),
        "reasons": tuple(record["reasons"]),
        "search": Search.of_records(search["records"], search["meta"], ["candidate"]),
        "selection": selection and LayerSelection.of_records(selection["records"], selection["meta"], ["rule", "kept"]),
        "calibration": tuple(record["calibration"]),
    }
