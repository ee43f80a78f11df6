"""A plan as ``plan.json`` and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvgeom.errors import InputError
from kvgeom.evaluation.config import RunConfig
from kvgeom.mitigation.candidates import Candidate
from kvgeom.mitigation.layers import LayerSelection
from kvgeom.mitigation.search import Search
from kvgeom.models.model import KVGeometry
from kvgeom.quant.placement import Placement
from kvgeom.quant.serialization import recipe_from_json, recipe_to_json, statics_from_json

#: Version of the layout of plan.json; docs/mitigation.md describes it.
PLAN_VERSION = 3


def json_path(path: str | Path) -> Path:
    """The file itself, or ``plan.json`` in a folder."""
    path = Path(path)
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

    return {
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
        raise InputError(f"plan {path} cannot be read ({error}); give a plan.json that kvgeom fix wrote") from error
    if version != PLAN_VERSION:
        raise InputError(
            f"plan {path} has layout {version}, but this kvgeom reads {PLAN_VERSION}; run kvgeom fix again"
        )
    try:
        return _attributes(record)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"plan {path} is incomplete: {error!r}; run kvgeom fix again") from error


def _attributes(record: dict[str, Any]) -> dict[str, Any]:
    statics = {key: statics_from_json(value, key) for key, value in record["statics"].items()}

    def candidate(found: dict[str, Any]) -> Candidate:
        recipe, placement = recipe_from_json(found["recipe"], statics), Placement(**found["placement"])
        return Candidate(found["name"], found["family"], recipe, placement, found["description"])

    model, search, selection = record["model"], record["search"], record["selection"]
    return {
        **{name: record[name] for name in ("scheme", "mode", "paper_mode", "judge", "max_new_tokens", "verified")},
        "max_reasoning_tokens": record.get("max_reasoning_tokens", RunConfig.max_reasoning_tokens),
        "model": model["name"],
        "identity": model["identity"],
        "geometry": KVGeometry(
            **{each.name: model[each.name] for each in dataclasses.fields(KVGeometry) if each.name in model}
        ),
        "chosen": candidate(record["chosen"]),
        "paper": candidate(record["paper"]),
        "candidates": tuple(candidate(found) for found in record["candidates"]),
        "reasons": tuple(record["reasons"]),
        "search": Search.of_records(search["records"], search["meta"], ["candidate"]),
        "selection": selection and LayerSelection.of_records(selection["records"], selection["meta"], ["rule", "kept"]),
        "calibration": tuple(record["calibration"]),
    }
