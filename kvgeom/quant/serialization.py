"""Recipes as JSON and back, constants of the model included."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from kvgeom.checks import as_path
from kvgeom.errors import InputError, brief
from kvgeom.paths import write_whole
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.transforms import Statics
from kvgeom.sealed import checked_json, read_json

#: Version of the layout of a recipe's own file.
RECIPE_VERSION = 2

#: A number that there can be 0 of, and one that there cannot.
Count = Annotated[int, Field(ge=0, lt=2**40)]
Size = Annotated[int, Field(gt=0, lt=2**40)]


class StrictRecord(BaseModel):
    """Part of a JSON file with the fields that are named, of exactly these types, and no others; numbers are finite."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class VectorRecord(StrictRecord):
    """A matrix, as base64 of little-endian float32."""

    shape: tuple[Size, Size]
    float32: str


class StaticsRecord(StrictRecord):
    """Constants of a model."""

    name: str
    rotary: bool
    vectors: dict[Annotated[str, Field(pattern=r"^[0-9]{1,5}\.[kv]$")], VectorRecord]


class RecipeRecord(StrictRecord):
    """A recipe; its constants are named by their fingerprints."""

    layers: list[tuple[str | None, str | None]]
    offsets: str | None
    factors: str | None
    random_directions: Count | None


class RecipeFile(StrictRecord):
    """What :func:`save_recipe` writes."""

    recipe_version: Literal[2]
    recipe: RecipeRecord
    placement: dict[str, str | int]
    statics: dict[str, StaticsRecord]


class _Versioned(StrictRecord, extra="ignore"):
    recipe_version: int


def recipe_to_json(recipe: Recipe, statics: dict[str, Any]) -> dict[str, Any]:
    """The recipe's record; its constants go into ``statics`` by their fingerprint, where several recipes can share them."""
    for found in (recipe.offsets, recipe.factors):
        if found is not None:
            statics.setdefault(found.fingerprint, _statics_to_json(found))
    return recipe.record()


def recipe_from_json(given: RecipeRecord | Mapping[str, Any], statics: Mapping[str, Statics]) -> Recipe:
    """The inverse of :func:`recipe_to_json`.

    Raises
    ------
    InputError
        If it is no record, a scheme cannot be read, or constants are missing.
    """
    record = checked_json(given, RecipeRecord)

    def known(name: str, fingerprint: str | None) -> Statics | None:
        if fingerprint is not None and fingerprint not in statics:
            raise InputError(
                f"{name} {fingerprint} of a recipe are missing: the file is not whole; write it again with save_recipe"
            )
        return None if fingerprint is None else statics[fingerprint]

    layers = tuple((_scheme_from_json(k), _scheme_from_json(v)) for k, v in record.layers)
    offsets, factors = known("offsets", record.offsets), known("factors", record.factors)
    return Recipe(layers, offsets, factors, record.random_directions)


def placement_from_json(record: Mapping[str, Any]) -> Placement:
    """A placement as ``dataclasses.asdict`` gives it.

    Raises
    ------
    InputError
        If it has other fields or values.
    """
    try:
        return Placement(**record)
    except TypeError as error:
        raise InputError(f"a placement of {sorted(record)} is none: {error}") from error


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


def statics_from_json(given: StaticsRecord | Mapping[str, Any], fingerprint: str) -> Statics:
    """Constants as they were written.

    Raises
    ------
    InputError
        If they are no record, or not those of the fingerprint.
    """
    record = checked_json(given, StaticsRecord)
    vectors: dict[Any, torch.Tensor] = {}
    for key, value in record.vectors.items():
        layer, site = key.split(".")
        try:
            numbers = np.frombuffer(base64.b64decode(value.float32, validate=True), dtype="<f4").reshape(value.shape)
        except ValueError as error:
            raise InputError(f"vector {key} of constants {record.name!r} cannot be read: {error}") from error
        vectors[int(layer), site] = torch.from_numpy(numbers.copy())
    found = Statics.of(record.name, vectors, rotary=record.rotary)
    if found.fingerprint != fingerprint:
        raise InputError(
            f"constants {record.name!r} have fingerprint {found.fingerprint}, got {fingerprint}: the file was changed; write it "
            "again with save_recipe"
        )
    return found


def _encoded(vector: torch.Tensor) -> str:
    return base64.b64encode(vector.detach().float().cpu().numpy().astype("<f4").tobytes()).decode()


def save_recipe(path: str | Path, recipe: Recipe, placement: Placement | None = None) -> None:
    """Write a recipe, its constants and a placement into one JSON file, whole or not at all.

    Raises
    ------
    InputError
        If it cannot be written, or is no recipe.

    Examples
    --------
    >>> import tempfile
    >>> recipe = Recipe.uniform(4, Scheme(4)).keep([0])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_recipe(folder + "/recipe.json", recipe)
    ...     load_recipe(folder + "/recipe.json") == (recipe, Placement())
    True
    """
    file = as_path("the file of a recipe", path)
    if not isinstance(recipe, Recipe):
        raise InputError(f"save_recipe(path, recipe) writes a Recipe, got {brief(recipe)}")
    statics: dict[str, Any] = {}
    record = {
        "recipe_version": RECIPE_VERSION,
        "recipe": recipe_to_json(recipe, statics),
        "placement": asdict(Placement() if placement is None else Placement.parse(placement)),
        "statics": statics,
    }
    write_whole(file, json.dumps(record) + "\n")


def load_recipe(path: str | Path) -> tuple[Recipe, Placement]:
    """Read what :func:`save_recipe` has written.

    Raises
    ------
    InputError
        If there is no such file, or it holds something else.
    """
    file = as_path("the file of a recipe", path)
    try:
        version = read_json(file, _Versioned).recipe_version
        if version != RECIPE_VERSION:
            raise InputError(f"layout {version}; this version reads {RECIPE_VERSION}")
        record = read_json(file, RecipeFile)
        statics = {key: statics_from_json(value, key) for key, value in record.statics.items()}
        return recipe_from_json(record.recipe, statics), placement_from_json(record.placement)
    except (InputError, ValueError) as error:
        raise InputError(
            f"cannot read a recipe from {path} ({error}); give a file that save_recipe has written"
        ) from error
