"""Batches that fit: smaller where memory is short, and smaller still once it runs out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from kvgeom.models import batching
from kvgeom.models.batching import in_batches
from tests.builders.tiny import tiny_model


def test_batches_shrink_when_memory_runs_out() -> None:
    tried: list[int] = []

    def run(part: Sequence[int]) -> int:
        tried.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return sum(part)

    found = list(in_batches(list(range(10)), 8, run))
    assert [item for part, _ in found for item in part] == list(range(10))
    assert all(total == sum(part) for part, total in found)
    assert max(len(part) for part, _ in found) <= 3
    assert tried[:3] == [8, 4, 2]

    def never(part: Sequence[int]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    with pytest.raises(torch.OutOfMemoryError):
        list(in_batches([1, 2], 2, never))


def test_rows_follow_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    rows = []
    for free in (1e12, 1e7, 1e6, 10.0):
        monkeypatch.setattr(batching, "_free", lambda _device, free=free: free)
        rows.append(batching.rows_per_batch(model, 40, 10))
    assert rows[0] == batching.MOST_ROWS
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] == 1


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def run(part: Sequence[int]) -> int:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches([1, 2], 2, run))
