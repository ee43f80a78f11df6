"""What is kept in memory, and what happens when it runs out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from kvgeom.models import memory
from kvgeom.models.memory import in_batches
from tests.builders.requests import REQUESTS as ALL_REQUESTS
from tests.builders.tiny import tiny_model

#: Fewer requests, which are evaluated many times.
REQUESTS = ALL_REQUESTS[:6]
TINY = {kind: tiny_model(kind, seed=1) for kind in ("qwen2", "llama")}


def test_batches_shrink_when_memory_runs_out() -> None:
    tried: list[int] = []

    def run(part: Sequence[int]) -> int:
        tried.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("too much")
        return sum(part)

    found = list(in_batches(list(range(10)), 8, run))
    assert [item for part, _ in found for item in part] == list(range(10))
    assert all(total == sum(part) for part, total in found)
    assert max(len(part) for part, _ in found) <= 3
    assert tried[:3] == [8, 4, 2]

    def never(part: Sequence[int]) -> int:
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(torch.OutOfMemoryError):
        list(in_batches([1, 2], 2, never))


def test_rows_follow_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama"]
    rows = []
    for free in (1e12, 1e7, 1e6, 10.0):
        monkeypatch.setattr(memory, "_free", lambda _device, free=free: free)
        rows.append(memory.rows_that_fit(model, 40, 10))
    assert rows[0] == memory.MOST_ROWS
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] == 1
