"""Recipes as JSON and back, constants of the model included."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvgeom.errors import InputError
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.transforms import Statics

#: Version of the layout of a recipe's own file.
RECIPE_VERSION = 2


def recipe_to_json(recipe: Recipe, statics: dict[str, Any]) -> dict[str, Any]:
    """The recipe's record; its constants go into ``statics`` by their fingerprint, where several recipes can share them."""
    for found in (recipe.offsets, recipe.factors):
        if found is not None:
            statics.setdefault(found.fingerprint, _statics_to_json(found))
    return recipe.record()


def recipe_from_json(record: Mapping[str, Any], statics: Mapping[str, Statics]) -> Recipe:
    """The inverse of :func:`recipe_to_json`.

    Raises
    ------
    InputError
        If a scheme cannot be read, or constants are missing.
    """

    def known(name: str) -> Statics | None:
        fingerprint = record[name]
        if fingerprint is not None and fingerprint not in statics:
            raise InputError(
                f"{name} {fingerprint} of a recipe are missing: the file is not whole; write it again with save_recipe"
            )
        return None if fingerprint is None else statics[fingerprint]

    layers = tuple((_scheme_from_json(k), _scheme_from_json(v)) for k, v in record["layers"])
    return Recipe(layers, known("offsets"), known("factors"), record["random_directions"])


def _scheme_from_json(text: str | None) -> Scheme | None:
    try:
        return None if text is None else Scheme.parse(text)
    except InputError as error:
        raise InputError(
            f"{error}; if it has a format or transform of yours, import what defines that first"
        ) from error


def _statics_to_json(statics: Statics) -> dict[str, Any]:
    vectors = {
        f"{layer}.{site}": {"shape": list(vector.shape), "float32": _encoded(vector)}
        for (layer, site), vector in sorted(statics.vectors.items())
    }
    return {"name": statics.name, "rotary": statics.rotary, "vectors": vectors}


def statics_from_json(record: Mapping[str, Any], fingerprint: str) -> Statics:
    """Constants as they were written.

    Raises
    ------
    InputError
        If they are not those of the fingerprint.
    """
    vectors: dict[Any, torch.Tensor] = {}
    for key, value in record["vectors"].items():
        layer, site = key.split(".")
        numbers = np.frombuffer(base64.b64decode(value["float32"]), dtype="<f4").reshape(value["shape"])
        vectors[int(layer), site] = torch.from_numpy(numbers.copy())
    found = Statics.of(record["name"], vectors, rotary=bool(record["rotary"]))
    if found.fingerprint != fingerprint:
        raise InputError(
            f"constants {record['name']!r} have fingerprint {found.fingerprint}, got {fingerprint}: the file was changed; write it "
            "again with save_recipe"
        )
    return found


def _encoded(vector: torch.Tensor) -> str:
    return base64.b64encode(vector.detach().float().cpu().numpy().astype("<f4").tobytes()).decode()


def save_recipe(path: str | Path, recipe: Recipe, placement: Placement | None = None) -> None:
    """Write a recipe, its constants and a placement into one JSON file.

    Examples
    --------
    >>> import tempfile
    >>> recipe = Recipe.uniform(4, Scheme(4)).keep([0])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_recipe(folder + "/recipe.json", recipe)
    ...     load_recipe(folder + "/recipe.json") == (recipe, Placement())
    True
    """
    statics: dict[str, Any] = {}
    record = {
        "recipe_version": RECIPE_VERSION,
        "recipe": recipe_to_json(recipe, statics),
        "placement": asdict(placement or Placement()),
        "statics": statics,
    }
    Path(path).write_text(json.dumps(record) + "\n", encoding="utf-8")


def load_recipe(path: str | Path) -> tuple[Recipe, Placement]:
    """Read what :func:`save_recipe` has written.

    Raises
    ------
    InputError
        If there is no such file, or it holds something else.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if record["recipe_version"] != RECIPE_VERSION:
            raise InputError(f"{path} has layout {record['recipe_version']}; this version reads {RECIPE_VERSION}")
        statics = {key: statics_from_json(value, key) for key, value in record["statics"].items()}
        return recipe_from_json(record["recipe"], statics), Placement(**record["placement"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"cannot read a recipe from {path} ({error!r}); give a file that save_recipe has written"
        ) from error
