"""Sampled responses: the distribution they are drawn from, and what a draw hangs on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from kvgeom.evaluation.respond import Sampler, respond
from tests.builders.requests import REQUESTS
from tests.builders.tiny import tiny_model

TINY = tiny_model("qwen2", seed=1)


@given(st.integers(0, 10_000), st.sampled_from([0.3, 0.6, 1.0, 2.0]), st.sampled_from([0.2, 0.5, 0.9, 1.0]))
def test_only_the_likeliest_are_drawn(seed: int, temperature: float, top_p: float) -> None:
    """As transformers has it."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 3
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits[None]))[0]
    allowed = {*torch.isfinite(warped).nonzero().flatten().tolist()}
    assert {Sampler(temperature, top_p, seed)(0, made, logits) for made in range(30)} <= allowed


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 0.9), (1.0, 1.0)])
def test_as_often_as_they_are_likely(temperature: float, top_p: float) -> None:
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0, -5.0])
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits[None]))[0]
    drawn = np.bincount([Sampler(temperature, top_p, 7)(3, made, logits) for made in range(4000)], minlength=6) / 4000
    np.testing.assert_allclose(drawn, torch.softmax(warped, -1).numpy(), atol=0.03)


def test_batches_change_nothing_and_seeds_do() -> None:
    prompts = TINY.encode(REQUESTS[:5])
    found = {
        (seed, size): respond(TINY, prompts, 8, batch_size=size, choose=Sampler(1.0, 0.9, seed)).tokens
        for seed in (0, 1)
        for size in (1, 2, 5)
    }
    for seed in (0, 1):
        assert found[seed, 1] == found[seed, 2] == found[seed, 5]
    assert found[0, 1] != found[1, 1]
    greedy = respond(TINY, prompts, 8).tokens
    assert respond(TINY, prompts, 8, choose=Sampler(1e-6, 1.0, 0)).tokens == greedy
