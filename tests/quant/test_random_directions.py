"""The control of a rounding error: the same size, token by token, in a direction that is drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import baseline
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.quant.fake_quantize import in_random_directions
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.judges import CountingJudge
from tests.builders.requests import REQUESTS
from tests.builders.tiny import KINDS, tiny_model

PLACEMENTS = [Placement.cache(), Placement.paper(), Placement(prefill_reads="exact"), Placement(scales="call")]
TINY = {kind: tiny_model(kind, seed=1) for kind in KINDS}

shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 9))
sites = st.sampled_from(["k", "v"])


@given(shapes, st.integers(0, 9), st.integers(0, 40), sites)
def test_it_is_one_signed_permutation_of_the_channels(
    shape: tuple[int, int, int, int], seed: int, layer: int, site: str
) -> None:
    """Its matrix, read off unit vectors: one entry of size one in each row and column. No sum, so exactly the same size."""
    heads, size = shape[1], shape[3]
    channels = heads * size
    units = torch.eye(channels, dtype=torch.float64).view(channels, heads, 1, size)
    matrix = in_random_directions(units, seed, layer, site).reshape(channels, channels)
    assert sorted(matrix.abs().flatten().tolist()) == [0.0] * (channels**2 - channels) + [1.0] * channels
    assert (matrix.abs().sum(0) == 1).all()
    assert (matrix.abs().sum(1) == 1).all()
    error = torch.randn(shape, generator=torch.manual_seed(seed), dtype=torch.float64)
    found = in_random_directions(error, seed, layer, site)
    by_matrix = (error.transpose(1, 2).flatten(2) @ matrix).unflatten(2, (heads, size)).transpose(1, 2)
    torch.testing.assert_close(found, by_matrix, rtol=0, atol=0)
    torch.testing.assert_close(found.square().sum((1, 3)), error.square().sum((1, 3)))


def test_layers_sites_and_seeds_have_draws_of_their_own() -> None:
    error = torch.arange(1.0, 33.0).view(1, 2, 1, 16)
    seen = [in_random_directions(error, *key) for key in ((0, 0, "k"), (0, 0, "v"), (0, 1, "k"), (1, 0, "k"))]
    for n, one in enumerate(seen):
        assert not torch.equal(one.abs(), error)
        assert all(not torch.equal(one, other) for other in seen[:n])
    assert torch.equal(seen[0], in_random_directions(error, 0, 0, "k"))


@given(st.sampled_from(["int3-sym-tensor", "int4-asym-token", "int2-asym-group8", "int4-asym-head"]), sites)
def test_a_rounder_moves_only_the_error(name: str, site: str) -> None:
    x = torch.randn(1, 2, 7, 8, generator=torch.manual_seed(0))
    recipe = Recipe.uniform(1, Scheme.parse(name))
    plain, moved = (Quantizer(r)(0, site, x) - x for r in (recipe, recipe.with_random_directions(4)))  # type: ignore[arg-type]
    torch.testing.assert_close(moved, in_random_directions(plain, 4, 0, site), atol=1e-6, rtol=0)
    torch.testing.assert_close(moved.norm(dim=(1, 3)), plain.norm(dim=(1, 3)), atol=1e-5, rtol=1e-5)


@settings(max_examples=12)
@given(st.sampled_from(PLACEMENTS), st.sampled_from(["tensor", "channel", "token"]), st.integers(1, 5))
def test_tokens_one_by_one_or_in_one_pass(placement: Placement, granularity: str, response: int) -> None:
    model = TINY["mistral"]
    recipe = Recipe.uniform(3, Scheme(4, True, granularity)).with_random_directions(2)  # type: ignore[arg-type]
    ids, said = model.encode(["open the door"])[0].ids, model.tokens("well, no")[:response]
    steps, whole = (model.new_cache(Quantizer(recipe, placement, prompt_tokens=n)) for n in (None, len(ids)))
    for part in (ids, *([token] for token in said)):
        model.forward(part, steps)
    for part in [ids, said] if placement.prefill_reads == "exact" else [[*ids, *said]]:
        model.forward(part, whole)
    torch.testing.assert_close(steps.layers[0].keys, whole.layers[0].keys, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(steps.layers[0].values, whole.layers[0].values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "placement"), list(zip(["llama", "qwen2", "gemma3_text", "phi3"], PLACEMENTS, strict=True))
)
def test_drafts_give_what_generation_gives(kind: str, placement: Placement) -> None:
    made = {
        "tensor": Recipe.uniform(3, Scheme(4, True, "tensor")).with_random_directions(1),
        "one layer": Recipe.uniform(3, Scheme(2), layers=[1]).with_random_directions(2),
        "not random": Recipe.uniform(3, Scheme(3)),
    }
    base = baseline(TINY[kind], REQUESTS[:4], judge=CountingJudge(), max_new_tokens=6, progress=False)
    fast, full = (
        evaluate(TINY[kind], made, base, placement=placement, full_responses=slow, progress=False).data
        for slow in (False, True)
    )
    assert (fast.label.values == full.label.values).all()
    assert (fast.divergence.values == full.divergence.values).all()
    np.testing.assert_allclose(fast.margin.values, full.margin.values, atol=1e-3)


def test_the_control_is_another_recipe_everywhere_it_counts() -> None:
    """Not taken for the recipe itself in a journal, nor in a batch with it, and not packed."""
    recipe = Recipe.uniform(3, Scheme(3))
    assert len({recipe, recipe.with_random_directions(0), recipe.with_random_directions(1)}) == 3
    base = baseline(TINY["llama"], REQUESTS[:2], judge=CountingJudge(), max_new_tokens=4, progress=False)
    alone = {
        name: evaluate(TINY["llama"], {name: r}, base, progress=False).data.kl.sel(recipe=name).values
        for name, r in (
            ("plain", recipe),
            ("0", recipe.with_random_directions(0)),
            ("1", recipe.with_random_directions(1)),
        )
    }
    fresh = baseline(TINY["llama"], REQUESTS[:2], judge=CountingJudge(), max_new_tokens=4, progress=False)
    both = {"plain": recipe, "0": recipe.with_random_directions(0), "1": recipe.with_random_directions(1)}
    together = evaluate(TINY["llama"], both, fresh, progress=False).data.kl
    for name, values in alone.items():
        np.testing.assert_allclose(together.sel(recipe=name).values, values, atol=1e-5)
    assert len({tuple(np.round(values, 6)) for values in alone.values()}) == 3
    with pytest.raises(InputError, match="random_directions=0"):
        Quantizer(recipe.with_random_directions(0)).pack(0, "k", torch.zeros(1, 2, 3, 8))
