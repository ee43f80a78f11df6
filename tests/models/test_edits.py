"""Edits of weights: the function stays, and the cache holds what was asked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from kvgeom.errors import InputError, ModelError
from kvgeom.models import edits
from kvgeom.models.hf import HFModel
from tests.builders.tiny import KINDS, tiny_model

IDS = [1, *range(40, 70), 12, 9, 200]
NORMED = ("qwen3", "gemma3_text")
SEEDS = st.integers(0, 2**31)


def states(model: HFModel) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Logits, and keys and values of every layer, ``[kv_heads, tokens, head_dim]``."""
    cache = model.new_cache()
    logits = model.forward(IDS, cache, all_logits=True)
    return logits, [layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers]


def same_but(layer: int, before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        if index != layer:
            close(new, old)


def close(new: torch.Tensor, old: torch.Tensor) -> None:
    torch.testing.assert_close(new, old, atol=1e-4 * max(1.0, float(old.abs().max())), rtol=1e-4)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> HFModel:
    return tiny_model(request.param)


some = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


@some
@given(SEEDS, st.integers(0, 2), st.integers(0, 1))
def test_values_are_transformed_and_nothing_else_changes(model: HFModel, seed: int, layer: int, head: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = model.geometry.head_dim
    matrix = torch.eye(size) + 0.3 * torch.randn(size, size, generator=generator)
    assume(float(torch.linalg.cond(matrix)) < 30)  # its inverse multiplies float32's last digit by that
    logits, keys, values = states(model)
    edited = edits.copied(model)
    edits.transform_values(edited, layer, head, matrix)
    new_logits, new_keys, new_values = states(edited)
    torch.testing.assert_close(new_logits, logits, atol=1e-4, rtol=1e-4)
    expected = values[layer].clone()
    expected[head] = values[layer][head] @ matrix.T
    close(new_values[layer], expected)
    same_but(layer, values, new_values)
    same_but(-1, keys, new_keys)


@some
@given(SEEDS, st.integers(0, 2), st.floats(0.1, 100))
def test_values_get_an_offset_and_nothing_else_changes(model: HFModel, seed: int, layer: int, size: float) -> None:
    """In float64: an offset takes its digits from what varies, and these random models amplify what is lost."""
    g = model.geometry
    offset = size * torch.randn(g.kv_heads, g.head_dim, generator=torch.Generator().manual_seed(seed))
    exact = edits.copied(model)
    exact.hf_model.double()
    logits, keys, values = states(exact)
    edited = edits.copied(exact)
    edits.offset_values(edited, layer, offset)
    new_logits, new_keys, new_values = states(edited)
    torch.testing.assert_close(new_logits, logits, atol=1e-4, rtol=1e-4)
    close(new_values[layer], values[layer] + offset[:, None].double())
    same_but(layer, values, new_values)
    same_but(-1, keys, new_keys)


@some
@given(SEEDS, st.integers(0, 2))
def test_key_pairs_are_scaled_and_nothing_else_changes(model: HFModel, seed: int, layer: int) -> None:
    g = model.geometry
    planes = edits.rotary_planes(model, layer)
    scales = 4 ** torch.randn(g.kv_heads, g.head_dim, generator=torch.Generator().manual_seed(seed))
    scales[:, planes[:, 1]] = scales[:, planes[:, 0]]
    if model.name.removeprefix("tiny-") in NORMED:
        scales = scales[:1].expand_as(scales)
    logits, keys, values = states(model)
    edited = edits.copied(model)
    edits.scale_keys(edited, layer, scales)
    new_logits, new_keys, new_values = states(edited)
    torch.testing.assert_close(new_logits, logits, atol=1e-4, rtol=1e-4)
    close(new_keys[layer], keys[layer] * scales[:, None])
    same_but(layer, keys, new_keys)
    same_but(-1, values, new_values)


@pytest.mark.parametrize("seed", range(3))
def test_softmax_does_not_see_an_offset_of_keys_that_are_not_rotated(seed: int) -> None:
    model = tiny_model("gpt_neox")
    g, rotated = model.geometry, edits.rotary_planes(model, 1).numel()
    assert 0 < rotated < g.head_dim
    offset = 10 * torch.randn(g.kv_heads, g.head_dim, generator=torch.Generator().manual_seed(seed))
    offset[:, :rotated] = 0
    logits, keys, _ = states(model)
    edited = edits.copied(model)
    edits.offset_keys(edited, 1, offset)
    new_logits, new_keys, _ = states(edited)
    torch.testing.assert_close(new_logits, logits, atol=1e-4, rtol=1e-4)
    close(new_keys[1], keys[1] + offset[:, None])


@some
@given(SEEDS, st.integers(0, 2), st.integers(0, 3))
def test_keys_that_are_not_rotated_are_transformed_and_nothing_else_changes(seed: int, layer: int, head: int) -> None:
    model = tiny_model("gpt_neox")
    g, rotated = model.geometry, edits.rotary_planes(model, layer).numel()
    free = g.head_dim - rotated
    assert 0 < rotated < g.head_dim
    matrix = torch.eye(free) + 0.3 * torch.randn(free, free, generator=torch.Generator().manual_seed(seed))
    assume(float(torch.linalg.cond(matrix)) < 30)
    logits, keys, values = states(model)
    edited = edits.copied(model)
    edits.transform_keys(edited, layer, head, matrix)
    new_logits, new_keys, new_values = states(edited)
    torch.testing.assert_close(new_logits, logits, atol=1e-4, rtol=1e-4)
    expected = keys[layer].clone()
    expected[head, :, rotated:] = keys[layer][head, :, rotated:] @ matrix.T
    close(new_keys[layer], expected)
    same_but(layer, keys, new_keys)
    same_but(-1, values, new_values)


def test_rotated_and_normalized_keys_are_not_transformed() -> None:
    with pytest.raises(InputError, match=r"shape \(0, 0\)"):
        edits.transform_keys(tiny_model("llama"), 0, 0, torch.eye(8))
    with pytest.raises(ModelError, match="normalized"):
        edits.transform_keys(tiny_model("qwen3"), 0, 0, torch.eye(0))
    with pytest.raises(InputError, match="no inverse"):
        edits.transform_keys(tiny_model("gpt_neox"), 0, 0, torch.zeros(6, 6))


def test_the_copy_is_independent_and_has_its_own_fingerprint(model: HFModel) -> None:
    logits, _, values = states(model)
    edited = edits.copied(model)
    assert edited.fingerprint == model.fingerprint
    edits.transform_values(edited, 1, 0, 2 * torch.eye(model.geometry.head_dim))
    again, _, unchanged = states(model)
    assert torch.equal(again, logits)
    assert torch.equal(unchanged[1], values[1])
    assert edits.copied(edited).fingerprint != model.fingerprint


def test_an_offset_of_rotated_keys_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="rotary"):
        edits.offset_keys(model, 0, torch.ones(2, 8))
    normed = tiny_model("qwen3")
    with pytest.raises(ModelError, match="normalized"):
        edits.offset_keys(normed, 0, torch.zeros(2, 8))


def test_scales_within_a_pair_and_under_a_shared_norm_must_agree() -> None:
    scales = torch.ones(2, 8)
    scales[0, 0] = 2
    with pytest.raises(InputError, match="rotary pair"):
        edits.scale_keys(tiny_model("llama"), 0, scales)
    scales[0, 4] = 2
    with pytest.raises(InputError, match="between heads"):
        edits.scale_keys(tiny_model("qwen3"), 0, scales)
    with pytest.raises(InputError, match="positive"):
        edits.scale_keys(tiny_model("llama"), 0, -torch.ones(2, 8))


def test_what_cannot_be_asked_is_said() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="got 2"):
        edits.transform_values(model, 0, 2, torch.eye(8))
    with pytest.raises(InputError, match="got 3"):
        edits.transform_values(model, 3, 0, torch.eye(8))
    with pytest.raises(InputError, match="no inverse"):
        edits.transform_values(model, 0, 0, torch.ones(8, 8))
    with pytest.raises(InputError, match=r"\(8, 8\)"):
        edits.transform_values(model, 0, 0, torch.eye(4))
    with pytest.raises(InputError, match="shape"):
        edits.offset_values(model, 0, torch.ones(8))


def test_attention_sinks_are_refused() -> None:
    """A sink takes a share of the attention, so that the weights of the tokens do not sum to one."""
    model = tiny_model("llama")
    model._layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ModelError, match="sinks"):
        edits.offset_values(model, 0, torch.ones(2, 8))
