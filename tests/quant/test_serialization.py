"""Recipes as JSON: what comes back is what went in, and what was changed on the way is refused."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvgeom.errors import InputError
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.serialization import recipe_from_json, recipe_to_json, statics_from_json
from kvgeom.quant.transforms import Statics
from kvgeom.results import plain

SCHEMES = [
    *(
        "int3-sym-tensor",
        "int4-asym-group64",
        "int2-asym-channel-group32/f16",
        "int4-asym-token+center",
        "q4_0+hadamard",
    ),
    *(
        "fp8_e5m2",
        "mlx4-group64",
        "vllm4-token-head+rht",
        "turboquant_prod3+rotation",
        "int3-sym-tensor@0-2,4",
        "int6-sym-head+equalize",
    ),
]
schemes = st.one_of(st.none(), st.sampled_from(SCHEMES).map(Scheme.parse))
vectors = st.dictionaries(
    st.tuples(st.integers(0, 12), st.sampled_from(["k", "v"])),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31)).map(
        lambda t: torch.randn(t[:2], generator=torch.Generator().manual_seed(t[2]))
    ),
    min_size=1,
    max_size=4,
)
statics = st.builds(lambda name, v, r: Statics.of(name, v, rotary=r), st.text(max_size=5), vectors, st.booleans())
recipes = st.builds(
    Recipe,
    st.lists(st.tuples(schemes, schemes), max_size=6).map(tuple),
    st.none() | statics,
    st.none() | statics,
    st.none() | st.integers(0, 9),
)


def sent(made: list[Recipe]) -> list[Recipe]:
    """Through text, with the constants of all recipes in one place."""
    shared: dict[str, object] = {}
    records = [recipe_to_json(recipe, shared) for recipe in made]  # type: ignore[arg-type]
    text = json.dumps(plain({"recipes": records, "statics": shared}), allow_nan=False)
    read = json.loads(text)
    known = {key: statics_from_json(value, key) for key, value in read["statics"].items()}
    return [recipe_from_json(record, known) for record in read["recipes"]]


@given(st.lists(recipes, min_size=1, max_size=3))
def test_there_and_back(made: list[Recipe]) -> None:
    found = sent(made)
    assert found == made
    for one, other in zip(found, made, strict=True):
        assert str(one) == str(other)
        for back, went in ((one.offsets, other.offsets), (one.factors, other.factors)):
            if went is not None:
                assert back is not None
                assert back.vectors.keys() == went.vectors.keys()
                assert all(torch.equal(back.vectors[key], went.vectors[key]) for key in went.vectors)


@given(vectors, vectors, st.booleans())
def test_the_same_vectors_by_two_names(one: dict, other: dict, rotary: bool) -> None:  # type: ignore[type-arg]
    """Two constants of the same content, one of them turned with position, are still two."""
    first, second = Statics.of("bias", one, rotary=rotary), Statics.of("mean", one, rotary=not rotary)
    third = Statics.of("other", other)
    made = [
        Recipe(((None, None),), first, third),
        Recipe(((None, None),), second, first),
        Recipe(((None, None),), third),
    ]
    assert sent(made) == made


def test_content_that_was_changed() -> None:
    offsets = Statics.of("key bias", {(0, "k"): torch.arange(8.0).view(2, 4)}, rotary=True)
    shared: dict[str, object] = {}
    record = recipe_to_json(Recipe(((Scheme(4), None),), offsets), shared)  # type: ignore[arg-type]
    (key,) = shared
    good = json.loads(json.dumps(shared[key]))
    assert statics_from_json(good, key) == offsets
    numbers = np.arange(8, dtype="<f4")
    numbers[3] += 1
    bad = json.loads(json.dumps(good))
    bad["vectors"]["0.k"]["float32"] = base64.b64encode(numbers.tobytes()).decode()
    with pytest.raises(InputError, match="the file was changed"):
        statics_from_json(bad, key)
    moved = json.loads(json.dumps(good))
    moved["vectors"]["1.k"] = moved["vectors"].pop("0.k")
    with pytest.raises(InputError, match="the file was changed"):
        statics_from_json(moved, key)
    with pytest.raises(InputError, match="not whole"):
        recipe_from_json(record, {})
    with pytest.raises(InputError, match="scheme 'int9'"):
        recipe_from_json({**record, "layers": [["int9", None]]}, {key: offsets})


def test_a_format_that_is_not_there_is_to_be_imported() -> None:
    record = {**recipe_to_json(Recipe.uniform(1, "int4-asym-token"), {}), "layers": [["ternary-group64", None]]}
    with pytest.raises(InputError, match=r"'ternary-group64'.*import what defines that first"):
        recipe_from_json(record, {})
