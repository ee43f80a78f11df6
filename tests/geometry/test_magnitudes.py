"""Sizes and errors of keys and values, against loops over what the model stores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.errors import InputError
from kvgeom.geometry.magnitudes import Magnitudes, magnitudes
from kvgeom.models.hf import HFModel
from kvgeom.quant.scheme import Scheme
from tests.builders.tiny import tiny_model

REQUESTS = ["burn it all down", "how to steal the car now"]
TENSOR = Scheme(3, True, "tensor")


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request: pytest.FixtureRequest) -> HFModel:
    """One with biases of keys, one without."""
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def found(model: HFModel) -> Magnitudes:
    return magnitudes(model, REQUESTS, TENSOR, progress=False)


def stored(model: HFModel, text: str) -> np.ndarray:
    """``[layers, 2, tokens, channels]``, from the cache of a plain forward pass of transformers."""
    ids = torch.tensor([model.encode([text])[0].ids])
    with torch.inference_mode():
        cache = model.hf_model(ids, use_cache=True).past_key_values
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    return torch.stack(layers).transpose(2, 3).flatten(3).double().numpy()


def rounded(x: np.ndarray) -> np.ndarray:
    step = np.abs(x).max() / 3
    return np.clip(np.round(x / step), -3, 3) * step


def test_by_hand(model: HFModel, found: Magnitudes) -> None:
    for number, text in enumerate(REQUESTS):
        x = stored(model, text)
        errors = np.stack([[rounded(one) - one for one in layer] for layer in x])
        np.testing.assert_allclose(found.data.max_abs[number], np.abs(x).max(2), rtol=1e-5)
        np.testing.assert_allclose(found.data.energy[number], (x**2).mean(2), rtol=1e-5)
        np.testing.assert_allclose(found.data.mse[number], (errors**2).mean(2), rtol=1e-3, atol=1e-9)
    assert found.to_frame().shape[0] == 2 * model.geometry.layers


def test_what_a_predictor_must_beat(model: HFModel, found: Magnitudes) -> None:
    bias = [getattr(layer.self_attn.k_proj, "bias", None) for layer in model.hf_model.model.layers]
    channels = [[layer, 5] for layer in range(model.geometry.layers)]
    keys, both = found.controls("k", channels), found.controls()
    for layer in range(model.geometry.layers):
        x = np.stack([np.abs(stored(model, text)[layer, 0][:, [layer, 5]]).max() for text in REQUESTS])
        np.testing.assert_allclose(keys.max_abs[layer], x, rtol=1e-5)
        own = 0.0 if bias[layer] is None else float(bias[layer].detach()[[layer, 5]].norm())
        assert keys.key_bias[layer].item() == pytest.approx(own, rel=1e-5)
        assert found.controls("v").key_bias[layer].item() == 0
        assert keys.depth[layer].item() == layer
        np.testing.assert_allclose(both.mse[layer], found.data.mse.sel(layer=layer).sum(("site", "channel")))
        share = found.data.mse.sum("channel") / found.data.energy.sum("channel")
        np.testing.assert_allclose(both.relative_mse[layer], share.sel(layer=layer, site="k"))


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([2, 3, 4, 5, 6]))
def test_more_bits_move_less(bits: int) -> None:
    model = tiny_model("llama")
    few, more = (
        magnitudes(model, REQUESTS[:1], Scheme(b, True, "token"), progress=False).data for b in (bits, bits + 2)
    )
    assert (more.mse.sum("channel") < few.mse.sum("channel")).all()
    np.testing.assert_array_equal(more.max_abs, few.max_abs)


def test_bad_input(model: HFModel, found: Magnitudes) -> None:
    with pytest.raises(InputError, match="holds no prompts"):
        magnitudes(model, [], progress=False)
    with pytest.raises(InputError, match="attention reads keys as the cache stores them"):
        magnitudes(model, REQUESTS, placement="paper", progress=False)
    with pytest.raises(InputError, match="unknown sites 'q'; choose from k, v, kv"):
        found.controls("q")
    for channels in ([[0]], [[]] * model.geometry.layers, [[10**6]] * model.geometry.layers):
        with pytest.raises(InputError, match="channels must "):
            found.controls("k", channels)
