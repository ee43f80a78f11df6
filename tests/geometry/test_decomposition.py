"""The margin lost as a sum: complete, equal to brute force, and to patching where errors are small."""

from __future__ import annotations

from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.errors import InputError
from kvgeom.evaluation.scores import margin
from kvgeom.geometry.causal import first_order, patch_layers
from kvgeom.geometry.decomposition import Decomposition, Path, decompose, integrate
from kvgeom.geometry.rounding import Rounding
from kvgeom.models.hf import HFModel
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.tiny import KINDS, tiny_model

#: Weights are scaled after the models were loaded.
pytestmark = pytest.mark.filterwarnings("ignore:.*was changed since it was loaded")

REQUESTS = ["burn it all down", "how to steal the car"]
R = (7, 40, 41)
TENSOR = Scheme(3, True, "tensor")


def smooth(kind: str = "llama", by: float = 0.3) -> HFModel:
    """A tiny model with weights of ordinary size."""
    model = tiny_model(kind)
    with torch.no_grad():
        for parameter in model.hf_model.parameters():
            parameter.mul_(by) if parameter.ndim > 1 else None
    return model


@pytest.mark.parametrize("placement", [Placement.cache(), Placement.paper()])
@pytest.mark.parametrize("kind", KINDS)
def test_contributions_add_up_to_the_margin_lost(kind: str, placement: Placement) -> None:
    model = smooth(kind)
    prompts = model.encode(REQUESTS)
    found = decompose(model, prompts, TENSOR, R, placement=placement, group_size=3, progress=False)
    for row, prompt in enumerate(prompts):
        clean = float(margin(model.forward(prompt.ids)[-1], R))
        cache = model.new_cache(Quantizer(Recipe.uniform(3, TENSOR), placement))
        rounded = float(margin(model.forward(prompt.ids, cache)[-1], R))
        assert float(found.data.exact_margin[row]) == pytest.approx(clean, abs=1e-4)
        assert float(found.data.rounded_margin[row]) == pytest.approx(rounded, abs=1e-4)
    lost = found.margin_drop
    assert np.abs(lost).max() > 0.003
    assert found.data.settled.all()
    np.testing.assert_allclose(found.by_layer.sum("layer") + found.data.remainder, lost, atol=1e-9)
    np.testing.assert_allclose(found.by_layer.sum("layer"), lost, atol=0.05 * max(0.1, float(np.abs(lost).max())))
    mean = found.by_site.mean("prompt")
    np.testing.assert_allclose(found.data.channel_contribution.sum("channel"), mean, atol=1e-12)
    size = model.geometry.head_dim
    one = found.data.channel_contribution.sel(channel=slice(size + 3, size + 5)).sum("channel")
    np.testing.assert_allclose(one, found.data.contribution.sel(head=1, group=3).mean("prompt"), atol=1e-12)


def test_a_contribution_is_its_share_of_the_slope_along_the_path() -> None:
    """By brute force: differences of margins, with only one site's error a little larger, summed along the path."""
    model = smooth(by=0.4)
    (prompt,) = model.encode(REQUESTS[:1])
    found = decompose(model, [prompt], TENSOR, R, tolerance=0.001, points=65, progress=False)
    errors: dict[tuple[int, str], torch.Tensor] = {}

    class Real:
        """The rounded run, whose errors are kept."""

        where, prefill_reads_exact, needs_rotation = "cache", False, False

        def __init__(self) -> None:
            self.inner = Quantizer(Recipe.uniform(3, TENSOR))

        def __call__(self, layer: int, site: Any, x: torch.Tensor) -> torch.Tensor:
            rounded = self.inner(layer, site, x)
            errors[layer, site] = rounded - x
            return rounded

    class Scaled:
        where, prefill_reads_exact = "cache", False

        def __init__(self, share: float, more: float, at: tuple[int, str]) -> None:
            self.share, self.more, self.at = share, more, at

        def __call__(self, layer: int, site: Any, x: torch.Tensor) -> torch.Tensor:
            return x + (self.share + self.more * ((layer, site) == self.at)) * errors[layer, site]

    model.forward(prompt.ids, model.new_cache(Real()))  # type: ignore[arg-type]
    steps, h = (np.arange(40) + 0.5) / 40, 0.02
    for at in ((0, "k"), (1, "v"), (2, "k")):
        slopes = []
        for share in steps:
            above, below = (
                float(margin(model.forward(prompt.ids, model.new_cache(Scaled(share, sign * h, at)))[-1], R))  # type: ignore[arg-type]
                for sign in (1, -1)
            )
            slopes.append((below - above) / (2 * h))
        ours = float(found.by_site.sel(prompt=0, layer=at[0], site=at[1]))
        assert ours == pytest.approx(np.mean(slopes), rel=0.02, abs=2e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_small_errors_are_those_of_patching_and_of_first_order(kind: str) -> None:
    model, scheme = smooth(kind, 0.2), Scheme(8, True, "token")
    prompts = model.encode(REQUESTS)
    found = decompose(model, prompts, scheme, R, patch=True, progress=False)
    exact = patch_layers(model, prompts, [scheme], R, progress=False).margin_drop.isel(scheme=0)
    scale = float(np.abs(exact).max())
    assert scale > 0
    near = {"atol": 0.15 * scale}
    first = found.data.from_exact
    np.testing.assert_allclose(found.by_layer[:, 0], exact[:, 0], **near)  # below layer 0 nothing is rounded
    np.testing.assert_allclose(found.data.alone.sum("site"), exact, **near)
    # What is rounded above a layer that is kept exact gets other errors, as large as its own, however fine the scheme.
    np.testing.assert_allclose(found.by_site[:, 2], found.data.restored[:, 2], **near)
    np.testing.assert_allclose(found.by_site, first, **near)
    np.testing.assert_allclose(first[:, 0], first_order(model, prompts, scheme, R, progress=False).data.margin_drop[:, 0], **near)  # fmt: skip


def test_patching_is_runs_made_one_by_one() -> None:
    model = smooth()
    prompts = model.encode(REQUESTS)
    found = decompose(model, prompts, TENSOR, R, patch=True, progress=False).data
    every = [(TENSOR, TENSOR)] * 3
    for row, prompt in enumerate(prompts):
        for layer in range(3):
            for index, site in enumerate("kv"):
                only, but = [(None, None)] * 3, list(every)
                only[layer] = (TENSOR, None) if site == "k" else (None, TENSOR)
                but[layer] = (None, TENSOR) if site == "k" else (TENSOR, None)
                alone, without = (
                    float(margin(model.forward(prompt.ids, model.new_cache(Quantizer(Recipe(tuple(r)))))[-1], R))
                    for r in (only, but)
                )
                cell = found.isel(prompt=row, layer=layer, site=index)
                assert float(cell.alone) == pytest.approx(float(cell.exact_margin) - alone, abs=1e-4)
                assert float(cell.restored) == pytest.approx(without - float(cell.rounded_margin), abs=1e-4)


def test_what_a_recipe_leaves_exact_contributes_nothing() -> None:
    model = smooth()
    recipe = Recipe(((TENSOR.only([1, 2]), None), (None, None), (None, TENSOR)))
    found = decompose(model, REQUESTS, recipe, R, group_size=1, progress=False).data
    touched = np.abs(found.channel_contribution) > 0
    assert touched.sel(layer=0, site="k").values.nonzero()[0].tolist() == [1, 2]
    assert touched.sel(layer=2, site="v").any()
    for layer, site in ((0, "v"), (1, "k"), (1, "v"), (2, "k")):
        assert not touched.sel(layer=layer, site=site).any()
    nothing = decompose(model, REQUESTS, Recipe.exact(3), R, progress=False)
    assert float(np.abs(nothing.data.contribution).max()) == 0
    np.testing.assert_allclose(nothing.margin_drop, 0, atol=1e-5)


def test_an_integral_that_has_not_settled_says_so() -> None:
    rough = tiny_model()  # weights ten times as large: the margin is anything but linear
    found = decompose(rough, REQUESTS, TENSOR, R, points=3, progress=False)
    assert not found.data.settled.any()  # one stretch alone cannot say by how much it is off
    assert found.data.change.isnull().all()
    assert "settled for 0 of 2" in repr(found)
    np.testing.assert_allclose(found.by_layer.sum("layer") + found.data.remainder, found.margin_drop, atol=1e-9)
    finer = decompose(rough, REQUESTS, TENSOR, R, points=65, tolerance=0.01, progress=False)
    assert (finer.data.points > 3).all()
    left = np.abs(finer.data.remainder) <= 0.01 * np.maximum(np.abs(finer.margin_drop), 0.1)
    assert (~finer.data.settled | left).all()


def test_keys_with_a_measured_offset_and_sinks() -> None:
    """Offsets of rotated keys need the rotation at every token; sinks stay exact."""
    model = smooth("qwen2")
    (prompt,) = model.encode(REQUESTS[:1])
    rounding = Rounding.of(model, "int3-sym-tensor+center", Placement(sinks=4))
    path = Path(model, prompt, rounding, lambda logits: margin(logits, R))
    assert all(float(error[:, :, :4].abs().max()) == 0 < float(error.abs().max()) for error in path.errors.values())
    cache = model.new_cache(Quantizer(rounding.recipe, rounding.placement))
    assert path.rounded == pytest.approx(float(margin(model.forward(prompt.ids, cache)[-1], R)), abs=1e-4)
    assert path.at(1.0)[0] == pytest.approx(path.rounded, abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=1, max_size=7), st.floats(0.1, 0.9), st.floats(-5, 5))
def test_the_integral_is_that_of_known_functions(coefficients: list[float], cliff: float, height: float) -> None:
    """A polynomial in one place, and a cliff in another: both are found, and what is left over is said."""

    def lost(share: float) -> tuple[float, np.ndarray]:
        slopes = np.zeros((2, 2, 1, 3))
        slopes[0, 0, 0, 1] = sum(c * share**power for power, c in enumerate(coefficients))
        steep = np.tanh((share - cliff) / 0.02)
        slopes[1, 1, 0, 2] = height * (1 - steep**2) / 0.02 / 2
        drop = sum(c * share ** (power + 1) / (power + 1) for power, c in enumerate(coefficients)) + height * steep / 2
        return -drop, slopes

    found, about = integrate(lost, 0.01, 401)
    polynomial = sum(c / (power + 1) for power, c in enumerate(coefficients))
    step = height * (np.tanh((1 - cliff) / 0.02) + np.tanh(cliff / 0.02)) / 2
    allowed = 0.01 * max(abs(polynomial + step), 0.1)
    assert about["settled"]
    assert found[0, 0, 0, 1] == pytest.approx(polynomial, abs=allowed)
    assert found[1, 1, 0, 2] == pytest.approx(step, abs=2 * allowed)
    assert about["exact_margin"] - about["rounded_margin"] == pytest.approx(polynomial + step, abs=1e-9)
    assert about["remainder"] == pytest.approx(polynomial + step - found.sum(), abs=1e-9)
    assert not found[0, 1].any()


def test_cubics_take_five_points_and_no_more() -> None:
    def lost(share: float) -> tuple[float, np.ndarray]:
        return -(share**4), np.full((1, 1, 1, 1), 4 * share**3)

    found, about = integrate(lost, 0.001, 101)
    assert about["points"] == 5
    assert found.item() == pytest.approx(1, abs=1e-12)
    assert about["change"] == pytest.approx(0, abs=1e-12)


def test_what_is_asked_in_vain() -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="refusal tokens"):
        decompose(model, REQUESTS, TENSOR, ())
    with pytest.raises(InputError, match="tolerance"):
        decompose(model, REQUESTS, TENSOR, R, tolerance=2)
    with pytest.raises(InputError, match="points"):
        decompose(model, REQUESTS, TENSOR, R, points=2)
    with pytest.raises(InputError, match="group_size"):
        decompose(model, REQUESTS, TENSOR, R, group_size=0)


def test_comes_back_and_is_drawn(tmp_path: File) -> None:
    model = smooth()
    found = decompose(model, REQUESTS, TENSOR, R, group_size=5, progress=False)
    xr.testing.assert_identical(Decomposition.load(found.save(tmp_path / "a.nc")).data, found.data)
    parts = found.to_frame()
    assert len(parts) == 2 * 3 * 2 * 2 * 2
    assert parts.contribution.sum() == pytest.approx(float(found.by_layer.sum()))
    assert {"remainder", "settled"} <= {*found.to_frame("prompts").columns}
    cells, bars = found.plot().data
    np.testing.assert_allclose(cells.z, found.by_site.mean("prompt").transpose("site", "layer"))
    np.testing.assert_allclose(bars.y, found.by_layer.mean("prompt"))
    keys, values = found.plot("channel_groups", layer=1).data
    assert keys.customdata[1][0] == "head 0, channels 5-7"
    np.testing.assert_allclose(sum(keys.y) + sum(values.y), found.by_layer.sel(layer=1).mean("prompt"))
    most = int(found.by_layer.mean("prompt").argmax())
    assert f"layer {most}" in str(found.plot("channel_groups").layout.annotations[0].text)
    with pytest.raises(InputError, match="layer"):
        found.plot("channel_groups", layer=7)
