"""Recipes as files: what an engine's process needs to know of a mitigation, constants of the model included."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvgeom.errors import InputError
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.transforms import Key, Statics

_FORMAT = "kvgeom recipe 1"


def save_recipe(path: str | Path, recipe: Recipe, placement: Placement | None = None) -> None:
    """Write a recipe, with its offsets and factors, and a placement into one safetensors file.

    Examples
    --------
    >>> import tempfile
    >>> recipe = Recipe.uniform(4, Scheme(4)).keep([0])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_recipe(folder + "/recipe.safetensors", recipe)
    ...     load_recipe(folder + "/recipe.safetensors") == (recipe, Placement())
    True
    """
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for kind, statics in (("offsets", recipe.offsets), ("factors", recipe.factors)):
        if statics is not None:
            about[kind] = {"name": statics.name, "rotary": statics.rotary}
            for (layer, site), vector in statics.vectors.items():
                tensors[f"{kind}.{layer}.{site}"] = vector.detach().cpu().contiguous().clone()
    about["layers"] = [[None if scheme is None else str(scheme) for scheme in pair] for pair in recipe]
    about["placement"] = asdict(placement or Placement())
    save_file(tensors, path, {"format": _FORMAT, "recipe": json.dumps(about)})


def load_recipe(path: str | Path) -> tuple[Recipe, Placement]:
    """Read what :func:`save_recipe` has written.

    Raises
    ------
    InputError
        If there is no such file, or it holds something else.
    """
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            if told.get("format") != _FORMAT:
                raise InputError(f"{path} was asked, but it holds no recipe; give a file that save_recipe has written")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise InputError(f"a recipe was asked of {path}, which cannot be read: {error}") from error
    about = json.loads(told["recipe"])
    layers: Any = tuple(tuple(text and Scheme.parse(text) for text in pair) for pair in about["layers"])
    recipe = Recipe(layers, *(_statics(kind, about, tensors) for kind in ("offsets", "factors")))
    return recipe, Placement(**about["placement"])


def _statics(kind: str, about: dict[str, Any], tensors: dict[str, Tensor]) -> Statics | None:
    if kind not in about:
        return None
    vectors: dict[Key, Tensor] = {}
    for name, vector in tensors.items():
        group, layer, site = name.split(".")
        if group == kind:
            vectors[int(layer), site] = vector  # type: ignore[index]
    return Statics.of(about[kind]["name"], vectors, rotary=about[kind]["rotary"])
