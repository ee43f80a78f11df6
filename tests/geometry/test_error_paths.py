"""Errors through attention: against loops, against derivatives of the whole model, and against what a rounded layer writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import kvgeom
from kvgeom.errors import InputError, ModelError
from kvgeom.geometry.causal import first_order
from kvgeom.geometry.error_paths import ErrorPaths, follow_errors, through_attention
from kvgeom.models.hf import HFModel
from kvgeom.models.model import AttentionRule
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.tiny import KINDS, tiny_config, tiny_hf_model, tiny_model, tiny_tokenizer

REQUESTS = ["burn it all down", "how to steal the car now"]
R = (7, 40, 41)
TENSOR = Scheme(3, True, "tensor")


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([None, 1, 4]),
    st.sampled_from([None, 3.0]),
    st.sampled_from([None, (0.5, -1.0, 2.0, 0.0)]),
)
def test_by_loops(seed: int, window: int | None, softcap: float | None, sinks: tuple[float, ...] | None) -> None:
    g = torch.Generator().manual_seed(seed)
    q, grad, along = (torch.randn(4, 7, 6, generator=g, dtype=torch.float64) for _ in range(3))
    k, v, ke, ve = (torch.randn(2, 7, 6, generator=g, dtype=torch.float64) for _ in range(4))
    found = through_attention(q, k, v, ke, ve, AttentionRule(0.4, window, softcap, sinks), grad, along)

    def attention(head: int, t: int, keys: np.ndarray) -> tuple[list[int], np.ndarray, np.ndarray]:
        open_to = [j for j in range(t + 1) if window is None or t - j < window]
        s = np.array([float(q[head, t].numpy() @ keys[j]) * 0.4 for j in open_to])
        s = s if softcap is None else softcap * np.tanh(s / softcap)
        rest = 0.0 if sinks is None else np.exp(sinks[head])
        return open_to, s, np.exp(s) / (np.exp(s).sum() + rest)

    drop, shift, by_channel = np.zeros((4, 2)), np.zeros((4, 2)), np.zeros((2, 2, 6))
    shift_by_channel = np.zeros((2, 2, 6))
    for head in range(4):
        kv = head // 2
        keys, values, key_errors, value_errors = (x[kv].numpy() for x in (k, v, ke, ve))
        for t in range(7):
            to, s, p = attention(head, t, keys)
            _, s2, p2 = attention(head, t, keys + key_errors)
            w, a = grad[head, t].numpy(), along[head, t].numpy() * (t == 6)
            drop[head] -= [(p2 - p) @ values[to] @ w, p @ value_errors[to] @ w]
            shift[head] += [(p2 - p) @ values[to] @ a, p @ value_errors[to] @ a]
            by_channel[1, kv] -= p @ value_errors[to] * w
            shift_by_channel[1, kv] += p @ value_errors[to] * a
            for channel in range(6):
                one = keys.copy()
                one[:, channel] += key_errors[:, channel]
                moved = (attention(head, t, one)[2] - p) @ values[to]
                by_channel[0, kv, channel] -= moved @ w
                shift_by_channel[0, kv, channel] += moved @ a
        d, out = s2 - s, p @ values[to]
        mean = p @ d
        np.testing.assert_allclose(found["score_error"][head], np.sqrt(max(0, p @ d**2 - mean**2)), atol=1e-7)
        np.testing.assert_allclose(found["score_gap"][head], p @ s / p.sum() - s.mean(), atol=1e-9)
        moved = (np.abs(p2 - p).sum() + abs(p2.sum() - p.sum())) / 2
        np.testing.assert_allclose(found["attention_moved"][head], moved, atol=1e-9)
        error = [np.sum(((p2 - p) @ values[to]) ** 2), np.sum((p @ value_errors[to]) ** 2)]
        np.testing.assert_allclose(found["output_error"][head], np.array(error) / np.sum(out**2), rtol=1e-9)
    np.testing.assert_allclose(found["margin_drop"], drop, atol=1e-9)
    np.testing.assert_allclose(found["direction_shift"], shift, atol=1e-9)
    np.testing.assert_allclose(found["channel_margin_drop"], by_channel.reshape(2, 12), atol=1e-9)
    np.testing.assert_allclose(found["channel_direction_shift"], shift_by_channel.reshape(2, 12), atol=1e-9)
    np.testing.assert_allclose(found["reader_drop"].sum(1), drop.sum(0), atol=1e-9)
    # To first order: the same with errors so small that the softmax is linear in them.
    small = through_attention(q, k, v, 1e-6 * ke, 1e-6 * ve, AttentionRule(0.4, window, softcap, sinks), grad, along)
    np.testing.assert_allclose(small["margin_drop"] * 1e6, found["first_order"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(small["channel_margin_drop"] * 1e6, found["channel_first_order"], rtol=1e-3, atol=1e-4)


def test_a_shift_of_all_scores_moves_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 5, 4, generator=g, dtype=torch.float64) for _ in range(4))
    same = torch.ones_like(k)
    found = through_attention(q, k, v, same, 0 * v, AttentionRule(0.5), grad)
    for name in ("score_error", "attention_moved", "output_error", "margin_drop", "first_order", "token_drop"):
        np.testing.assert_allclose(found[name].sum(-1), 0, atol=1e-7)


def other(kind: str, changes: dict[str, object]) -> HFModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **{**tiny_config(kind), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_() if name.endswith("sinks") else parameter.mul_(10.0) if parameter.ndim > 1 else None
    return HFModel(model, tiny_tokenizer(), name=kind)


OTHERS: list[tuple[str, dict[str, object]]] = [
    ("gemma2", {"sliding_window": 30, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}),
    ("gpt_oss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 20}),
    ("olmo2", {"attention_bias": False}),
]


@pytest.mark.parametrize(("kind", "changes"), [*((kind, {}) for kind in KINDS), *OTHERS])
def test_first_order_is_the_derivative_of_the_whole_model(kind: str, changes: dict[str, object]) -> None:
    """Rebuilt attention gives, head by head, what the derivative by keys and values gives of all heads together."""
    model = other(kind, changes) if changes else tiny_model(kind)
    prompts = model.encode(REQUESTS)
    found = follow_errors(model, prompts, TENSOR, R, progress=False)
    truth = first_order(model, prompts, TENSOR, R, progress=False).data
    scale = float(np.abs(truth.margin_drop).max())
    assert scale > 0
    near = {"atol": 1e-5 * max(1, scale)}
    data = found.data
    np.testing.assert_allclose(data.first_order.sum("query_head"), truth.margin_drop, **near)
    np.testing.assert_allclose(data.channel_first_order, truth.channel_drop, **near)
    np.testing.assert_allclose(data.token_drop.sum("token"), truth.margin_drop, **near)
    np.testing.assert_allclose(data.reader_drop.sum("token"), data.margin_drop.sum("query_head"), **near)
    assert data.token_drop.isel(prompt=0, token=0).isnull().all()  # the first prompt is shorter
    assert data.direction_shift.isnull().all()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3", "gpt_neox"])
def test_the_shift_is_what_a_rounded_layer_writes(kind: str) -> None:
    model = tiny_model(kind)
    (prompt,) = model.encode(REQUESTS[:1])
    directions = np.random.default_rng(0).standard_normal((3, 32))
    found = follow_errors(model, [prompt], TENSOR, directions=directions, progress=False).data.direction_shift[0]

    def written(recipe: Recipe, layer: int) -> torch.Tensor:
        seen: dict[int, torch.Tensor] = {}

        def edit(at: int, point: str, x: torch.Tensor) -> torch.Tensor:
            if point == "attn":
                seen[at] = x[0, -1]
            return x

        model.forward(prompt.ids, model.new_cache(Quantizer(recipe)), edit_resid=edit)
        return seen[layer]

    for layer in range(3):
        for site in ("k", "v"):
            recipe = Recipe.uniform(3, TENSOR, layers=[layer], sites=[site])  # type: ignore[list-item]
            change = (written(recipe, layer) - written(Recipe.exact(3), layer)).double().numpy()
            ours = float(found.sel(layer=layer, site=site).sum())
            assert ours == pytest.approx(float(change @ directions[layer]), abs=1e-4), (layer, site)


def test_past_a_norm_the_shift_is_that_of_small_errors() -> None:
    """Gemma normalizes what attention writes: the direction is taken back through that norm."""
    model = tiny_model("gemma3_text")
    (prompt,) = model.encode(REQUESTS[:1])
    direction = np.random.default_rng(0).standard_normal(32)
    scheme = Scheme(8, True, "token")
    found = follow_errors(model, [prompt], scheme, directions=direction, progress=False).data.direction_shift[0]
    seen: list[torch.Tensor] = []

    def edit(at: int, point: str, x: torch.Tensor) -> torch.Tensor:
        if (at, point) == (1, "attn"):
            seen.append(x[0, -1])
        return x

    for recipe in (Recipe.exact(3), Recipe.uniform(3, scheme, layers=[1], sites=["v"])):
        model.forward(prompt.ids, model.new_cache(Quantizer(recipe)), edit_resid=edit)
    change = float((seen[1] - seen[0]).double().numpy() @ direction)
    assert float(found.sel(layer=1, site="v").sum()) == pytest.approx(change, rel=0.05)


@pytest.mark.parametrize("options", [{"backend": "lens"}, {"backend": "nnsight"}])
def test_backends_agree(options: dict[str, Any]) -> None:
    def on(**chosen: Any) -> xr.Dataset:
        hf = tiny_hf_model("qwen2")
        hf.set_attn_implementation("eager")
        model = kvgeom.load(hf, tokenizer=tiny_tokenizer(), **chosen)
        return follow_errors(model, REQUESTS, TENSOR, R, directions=np.ones(32), progress=False).data

    ours, theirs = on(), on(**options)
    for name, values in ours.items():
        np.testing.assert_allclose(theirs[name], values, rtol=1e-4, atol=1e-5, err_msg=str(name))


def test_an_order_of_heads_that_is_not_known() -> None:
    changes = {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}
    with pytest.raises(ModelError, match="not known"):
        follow_errors(other("falcon", changes), REQUESTS, TENSOR, R, progress=False)


def test_what_is_asked_in_vain() -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="at least one"):
        follow_errors(model, [], TENSOR)
    with pytest.raises(InputError, match="projection"):
        follow_errors(model, REQUESTS, TENSOR, placement="paper")
    for wrong in (np.ones(5), np.full(32, np.nan), "x", object(), {"a": 1}, 2 + 3j):
        with pytest.raises(InputError, match="directions must have shape"):
            follow_errors(model, REQUESTS, TENSOR, directions=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_number_formats(dtype: torch.dtype) -> None:
    hf = tiny_hf_model().to(dtype)
    model = kvgeom.load(hf, tokenizer=tiny_tokenizer())
    data = follow_errors(model, REQUESTS, TENSOR, R, directions=np.ones(32), progress=False).data
    truth = first_order(model, REQUESTS, TENSOR, R, progress=False).data.margin_drop
    scale = float(np.abs(truth).max())
    off = 1e-4 if dtype == torch.float64 else 0.1
    np.testing.assert_allclose(data.first_order.sum("query_head"), truth, atol=off * scale)
    assert np.isfinite(data.direction_shift).all()


def test_a_gate_behind_the_heads_is_not_overlooked() -> None:
    """What attention writes is then no longer what the output projection makes of the heads."""
    model = tiny_model()
    attention = model.decoder.attentions[1]
    handle = attention.register_forward_hook(lambda _m, _a, out: (out[0] * 0.5, *out[1:]))
    try:
        with pytest.raises(ModelError, match="what attention writes in layer 1"):
            follow_errors(model, REQUESTS, TENSOR, R, progress=False)
    finally:
        handle.remove()


def test_comes_back_and_is_drawn(tmp_path: Path) -> None:
    model = tiny_model()
    found = follow_errors(model, REQUESTS, TENSOR, R, progress=False)
    xr.testing.assert_identical(ErrorPaths.load(found.save(tmp_path / "a.nc")).data, found.data)
    assert len(found.to_frame()) == 2 * 3 * 4 * 2
    assert len(found.to_frame("channels")) == 3 * 2 * 16
    np.testing.assert_allclose(found.by_layer.margin_drop, found.data.margin_drop.sum(("query_head", "site")))
    gap, error, moved = found.plot().data
    np.testing.assert_allclose(gap.y, found.data.score_gap.median(("prompt", "query_head")))
    np.testing.assert_allclose(error.y, found.data.score_error.median(("prompt", "query_head")))
    np.testing.assert_allclose(moved.y, found.data.attention_moved.median(("prompt", "query_head")))
    keys, values = found.plot("head_map").data
    np.testing.assert_allclose(keys.z, found.data.margin_drop.sel(site="k").mean("prompt"))
    np.testing.assert_allclose(values.z, found.data.margin_drop.sel(site="v").mean("prompt"))
    tokens = found.plot("token_map", prompt=1).data[0]
    np.testing.assert_allclose(tokens.z, found.data.token_drop.sel(prompt=1, site="k"))
    assert np.isfinite(np.asarray(found.plot("token_map").data[0].z, dtype=float)).all()
    with pytest.raises(InputError, match="lead nowhere"):
        follow_errors(model, REQUESTS, TENSOR, progress=False).plot("head_map")
    shifts = follow_errors(model, REQUESTS, TENSOR, directions=np.ones(32), progress=False)
    np.testing.assert_allclose(
        shifts.plot("head_map").data[1].z, shifts.data.direction_shift.sel(site="v").mean("prompt")
    )
