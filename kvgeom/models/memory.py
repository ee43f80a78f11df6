"""How many rows of a batch fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from kvgeom.models.model import Model

T = TypeVar("T")
R = TypeVar("R")

#: In a pass over whole prompts more rows at once make nothing faster.
MOST_ROWS = 128
#: A batch may take this share of the memory that is free: estimates err, and others live there too.
SHARE = 0.25


def rows_that_fit(model: Model, tokens: int, logits: int, most: int = MOST_ROWS) -> int:
    """Rows of ``tokens`` tokens, ``logits`` of them with logits, that can go through the model together, at most ``most``.

    Counts the cache, the residual stream with the wide inside of an MLP (taken as eight times the residual stream),
    and logits twice (as computed and in float32).
    """
    g, size = model.geometry, torch.finfo(model.dtype).bits // 8
    cache = 2 * g.layers * g.channels * size
    inside = 8 * g.d_model * size
    row = tokens * (cache + inside) + logits * model.vocabulary * (size + 4)
    return int(max(1, min(most, SHARE * _free(model.device) // row)))


def _free(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import psutil

    return float(psutil.virtual_memory().available)


def in_batches(items: Sequence[T], rows: int, run: Callable[[Sequence[T]], R]) -> Iterator[tuple[Sequence[T], R]]:
    """``run`` on ``rows`` items at a time; on fewer once the device is out of memory.

    Raises
    ------
    torch.OutOfMemoryError
        If a single item is too much.
    """
    begin = 0
    while begin < len(items):
        part = items[begin : begin + rows]
        try:
            found = run(part)
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
            rows = len(part) // 2
            torch.cuda.empty_cache()
            continue
        yield part, found
        begin += len(part)
