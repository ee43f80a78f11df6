"""What is kept in memory, and what happens when it runs out."""

from __future__ import annotations

import pytest
import torch
import xarray as xr

from kvgeom.evaluation.baseline import Bounded, baseline
from kvgeom.evaluation.evaluate import evaluate
from tests.builders.judges import ArbitraryJudge
from tests.builders.recipes import recipes
from tests.builders.requests import REQUESTS as ALL_REQUESTS
from tests.builders.tiny import tiny_model

#: Fewer requests, which are evaluated many times.
REQUESTS = ALL_REQUESTS[:6]
TINY = {kind: tiny_model(kind, seed=1) for kind in ("qwen2", "llama")}


@pytest.mark.parametrize("budget", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_caches_of_many_prompts_are_bounded(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """However many prompts there are; with room for none, or for one, results are those of a large budget."""
    requests = [f"{request} {n}" for n in range(4) for request in REQUESTS]
    model, options = TINY["qwen2"], {"judge": ArbitraryJudge(), "max_new_tokens": 4, "progress": False}
    wide = baseline(model, requests, **options)  # type: ignore[arg-type]
    sizes = [wide.prefill(index).nbytes for index in range(len(requests))]
    assert wide._prefills.taken == sum(sizes)
    room = budget * max(sizes)
    monkeypatch.setattr("kvgeom.evaluation.baseline.PREFILL_BYTES", room)
    tight = baseline(model, requests, **options)  # type: ignore[arg-type]
    assert tight == wide
    for index in range(len(requests)):
        one, other = tight.prefill(index), wide.prefill(index)
        torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=0)
        assert one.cache.get_seq_length() == len(tight.prompts[index])  # decoding has not grown it
        assert tight._prefills.taken <= room
    assert (tight._prefills.taken > 0) == bool(budget)
    for full in (False, True):
        one, other = (
            evaluate(model, recipes(3), base, full_responses=full, progress=False).data for base in (tight, wide)
        )
        xr.testing.assert_identical(one, other)
        assert tight._prefills.taken <= room


def test_what_was_used_least_lately_is_forgotten() -> None:
    made: list[str] = []

    def value(key: str) -> str:
        return kept.get(key, lambda: made.append(key) or key)  # type: ignore[func-returns-value]

    kept: Bounded[str, str] = Bounded(5, len)
    for key in ("aa", "bb", "aa", "c", "dd", "aa", "bb", "too long"):
        assert value(key) == key
        assert kept.taken <= 5
    assert made == ["aa", "bb", "c", "dd", "bb", "too long"]
    assert value("too long") == "too long"
    assert made.count("too long") == 2
    assert value("bb") == "bb"
    assert made.count("bb") == 2
