"""Errors as attention sees them: against plain attention written out, on every architecture, and their symmetries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import kvgeom
from kvgeom.errors import InputError
from kvgeom.geometry.attention import attention_error, attention_to_request, errors
from kvgeom.models.hf import HFModel
from kvgeom.models.model import AttentionRule
from kvgeom.prompts.sets import PromptSet
from kvgeom.quant.scheme import Scheme
from tests.builders.tiny import KINDS, tiny_config, tiny_model, tiny_tokenizer


def arrays(seed: int, tokens: int = 9) -> tuple[torch.Tensor, ...]:
    g = torch.manual_seed(seed)
    shapes = ((4, tokens, 8), *[(2, tokens, 8)] * 4)
    q, k, v, ke, ve = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return q, k, v, 0.1 * ke, 0.1 * ve


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from([None, 1, 4]), st.sampled_from([None, 5.0]))
def test_by_loops(seed: int, window: int | None, softcap: float | None) -> None:
    q, k, v, ke, ve = arrays(seed)
    found = errors(q, k, v, ke, ve, AttentionRule(0.3, window, softcap))

    def score(a: np.ndarray, b: np.ndarray) -> float:
        raw = float(a @ b) * 0.3
        return raw if softcap is None else softcap * np.tanh(raw / softcap)

    for head in (0, 3):
        totals = np.zeros(4)
        for t in range(9):
            seen = [j for j in range(t + 1) if window is None or t - j < window]
            kv = head // 2
            old = np.array([score(q[head, t].numpy(), k[kv, j].numpy()) for j in seen])
            new = np.array([score(q[head, t].numpy(), (k + ke)[kv, j].numpy()) for j in seen])
            a = np.exp(old - old.max()) / np.exp(old - old.max()).sum()
            d = new - old
            one = np.array(
                [
                    d.var(),
                    a @ (d - a @ d) ** 2,
                    np.sum((a @ ve[kv, seen].numpy()) ** 2),
                    np.sum((a @ v[kv, seen].numpy()) ** 2),
                ]
            )
            totals += one
        names = ("score_error", "attended_score_error", "attended_value_error", "out2")
        np.testing.assert_allclose([found[name][head, 0] for name in names], totals, rtol=1e-9)
        np.testing.assert_allclose([found[name][head, 1] for name in names], one, rtol=1e-9, atol=1e-15)


def test_a_shift_of_all_scores_is_no_error() -> None:
    """The same error in every key moves all scores of a query alike: large as MSE, nothing for softmax."""
    q, k, v, _, ve = arrays(0)
    same = torch.ones_like(k)
    found = errors(q, k, v, same, ve, AttentionRule(0.3))
    assert found["key_mse"].min() > 1
    assert found["score_error"].max() < 1e-20
    assert found["attended_score_error"].max() < 1e-20


def test_half_its_square_is_the_divergence() -> None:
    q, k, v, ke, ve = arrays(1)
    ke = 0.01 * ke
    found = errors(q, k, v, ke, ve, AttentionRule(0.3))
    mask = torch.ones(9, 9).tril().bool()
    exact, rounded = (
        ((q @ x.repeat_interleave(2, 0).transpose(1, 2)) * 0.3).masked_fill(~mask, -torch.inf).log_softmax(-1)
        for x in (k, k + ke)
    )
    kl = (exact.exp() * (exact - rounded)).masked_fill(~mask, 0).sum(-1)
    np.testing.assert_allclose(found["attended_score_error"][:, 0] / 2, kl.sum(-1), rtol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_on_models(kind: str) -> None:
    """Exact attention of the tiny model itself: the output error is seen at the output projection's input."""
    model, scheme = tiny_model(kind), Scheme(3, True, "tensor")
    prompts = model.encode(["burn it all down", "how to clean"])
    found = attention_error(model, prompts, scheme, progress=False)
    assert found.data.sizes == {"layer": 3, "head": 4, "queries": 2}
    for variable in found.data.values():
        assert np.isfinite(variable.values).all()
        assert (variable.values >= 0).all()
    assert (found.by_layer().attended_score_error > 0).all()
    # Exact queries and keys give the layer's exact output: values rounded to nothing lose all of it.
    zero = attention_error(model, prompts, Scheme(8, False, "token"), progress=False)
    assert (zero.by_layer().attended_value_error < found.by_layer().attended_value_error).all()


def test_no_prompts() -> None:
    with pytest.raises(InputError, match="prompts"):
        attention_error(tiny_model(), [], Scheme(3, True, "tensor"))


# --- where the response looks ---


def tiny_attention(kind: str, **changes: object) -> HFModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **{**tiny_config(kind), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0) if parameter.ndim > 1 else None
    return HFModel(model, tiny_tokenizer(), name=kind)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("mistral", {"sliding_window": 24}),
        ("gemma3_text", {"sliding_window": 30, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        ("gemma2", {"sliding_window": 30, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}),
        ("phi3", {"partial_rotary_factor": 0.5}),
        ("gpt_neox", {"rotary_pct": 0.25}),
    ],
)  # fmt: skip
def test_attention_to_the_request_is_that_of_transformers(kind: str, changes: dict[str, object]) -> None:
    """Grouped queries, windows that cut the request, capped scores, and heads that are rotated only in part."""
    model = tiny_attention(kind, **changes)
    prompts = model.encode(["burn it all down", "why?", "how would one go about cleaning a very old carpet"])
    found = attention_to_request(model, prompts)
    expected = []
    for prompt in prompts:
        with torch.inference_mode():
            said = model.hf_model(torch.tensor([prompt.ids]), output_attentions=True)
        last = torch.stack([weights[0, :, -1] for weights in said.attentions])  # [layers, heads, tokens]
        assert torch.allclose(last.sum(-1), torch.ones(()), atol=1e-5)
        expected.append(last[..., prompt.instruction].sum(-1).mean(-1).double().numpy())
    np.testing.assert_allclose(found, np.mean(expected, axis=0), atol=1e-5)
    assert len({round(float(share), 4) for share in found}) == 3
    with pytest.raises(InputError, match="prompts"):
        attention_to_request(model, [])


def test_models_and_prompts_as_users_have_them(checkpoint: Path) -> None:
    """A folder and requests, or a model and prompts that are tokens already: the same numbers."""
    model = kvgeom.load(checkpoint, progress=False)
    requests = ["open the door", "why?"]
    one = attention_error(str(checkpoint), requests, "int4-asym-token", progress=False)
    other = attention_error(model, model.encode(requests), "int4-asym-token", progress=False)
    assert one.data.identical(other.data)
    np.testing.assert_array_equal(
        attention_to_request(str(checkpoint), PromptSet("two", tuple(requests), (), "here")),
        attention_to_request(model, model.encode(requests)),
    )
