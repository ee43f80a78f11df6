"""Some candidates, and responses under them that nobody gave."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from hypothesis import strategies as st

from kvgeom.engines.registry import resolve
from kvgeom.evaluation.condition import EXACT
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.judges.judge import LABELS
from kvgeom.mitigation.candidates import UNMITIGATED, Candidate
from kvgeom.models.model import KVGeometry
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme

SHAPE = KVGeometry(6, 4, 2, 64, 32, False, "default")
NAMES = [UNMITIGATED, "group-64", "keys", "layers", "equalize", "8 bits"]
RECIPES = [
    resolve("int4-asym-token").recipe(6),
    resolve("int4-asym-group64").recipe(6),
    Recipe.uniform(6, Scheme(4), sites=["v"]),
    resolve("int4-asym-token").recipe(6).keep([0, 3]),
    resolve("int4-asym-token").recipe(6),
    resolve("int8-asym-token").recipe(6),
]
CANDIDATES = [Candidate(n, "refine", r, Placement(), f"does {n}") for n, r in zip(NAMES, RECIPES, strict=True)]


def outcomes_of(labels: Sequence[Sequence[str]], names: Sequence[str], margins: np.ndarray | None = None) -> Outcomes:
    """Responses that nobody gave; the model with an exact cache refuses all prompts."""
    rows = np.array([["refused"] * len(labels[0]), *labels], dtype=object)
    shape = rows.shape
    columns = {name: (("recipe", "prompt"), np.full(shape, "", dtype=object)) for name in ("text", "reason")}
    columns["label"] = (("recipe", "prompt"), rows)
    lost = np.zeros((len(names), shape[1])) if margins is None else margins
    columns["margin"] = (("recipe", "prompt"), np.concatenate([np.full((1, shape[1]), 5.0), 5.0 - lost]))
    meta = {"model": "m", "fingerprint": "f", "judge": "j", "max_new_tokens": 4, "seed": 0, "versions": {}}
    coords = {
        "recipe": [EXACT, *names],
        "prompt": np.arange(shape[1]),
        "placement": ("recipe", np.full(len(rows), "p", dtype=object)),
    }
    return Outcomes(xr.Dataset(columns, coords=coords), meta)


def label_rows(count: int) -> st.SearchStrategy[list[list[str]]]:
    return st.integers(1, 9).flatmap(
        lambda n: st.lists(st.lists(st.sampled_from(LABELS), min_size=n, max_size=n), min_size=count, max_size=count)
    )
