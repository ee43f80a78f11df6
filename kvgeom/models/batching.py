"""Batches as large as the memory of the device allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from kvgeom.models.model import Model

T = TypeVar("T")
R = TypeVar("R")

#: More rows in a pass over whole prompts are not faster.
MOST_ROWS = 128
#: Share of the free memory that a batch may take: estimates err, and other things live there too.
SHARE = 0.25


def rows_per_batch(model: Model, tokens: int, logits: int, most: int = MOST_ROWS) -> int:
    """How many rows fit into one pass: each of ``tokens`` tokens, ``logits`` of them with logits; at most ``most``.

    Counts the cache, the residual stream with the wide inside of an MLP (taken as eight times the residual stream),
    and logits twice (as computed and in float32).
    """
    g, size = model.geometry, torch.finfo(model.dtype).bits // 8
    cache = g.elements * size
    inside = 8 * g.d_model * size
    row = tokens * (cache + inside) + logits * model.vocabulary * (size + 4)
    return int(max(1, min(most, SHARE * _free(model.device) // row)))


def _free(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import psutil

    return float(psutil.virtual_memory().available)


def in_batches(items: Sequence[T], rows: int, run: Callable[[Sequence[T]], R]) -> Iterator[tuple[Sequence[T], R]]:
    """``run`` on ``rows`` items at a time; on half as many whenever the device is out of memory.

    Raises
    ------
    RuntimeError
        That of the device, if a single item is too much.
    """
    begin = 0
    while begin < len(items):
        part = items[begin : begin + rows]
        found = _attempt(part, run)
        if found is None:
            rows = len(part) // 2
            clear_device_cache(garbage_collection=True)
            continue
        yield part, found[0]
        begin += len(part)


def _attempt(part: Sequence[T], run: Callable[[Sequence[T]], R]) -> tuple[R] | None:
    """``run`` on some items, or None if they do not fit. On return the error, and what it kept alive, is gone."""
    try:
        return (run(part),)
    except RuntimeError as error:
        if len(part) == 1 or not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
    return None
