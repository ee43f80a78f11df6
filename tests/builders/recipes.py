"""Recipes that take every path of an evaluation."""

from __future__ import annotations

from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme


def recipes(layers: int) -> dict[str, Recipe]:
    mixed = Recipe(((Scheme(8), None), (None, Scheme(3, True, "tensor")), (None, None)))
    return {
        "nothing": Recipe.exact(layers),
        "8-bit": Recipe.uniform(layers, Scheme(8)),
        "tensor": Recipe.uniform(layers, Scheme(4, True, "tensor")),
        "last": Recipe.uniform(layers, Scheme(2, True, "channel"), layers=[layers - 1]),
        "middle": Recipe.uniform(layers, Scheme(3, False, "head"), layers=[1]),
        "middle, some": Recipe.uniform(layers, Scheme(2, True, "tensor").only([0, 3]), layers=[1]),
        "mixed": mixed,
    }
