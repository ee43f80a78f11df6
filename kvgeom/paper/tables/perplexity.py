"""Perplexity by width, over windows of a text as the paper reads WikiText."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from kvgeom.evaluation.condition import Condition
from kvgeom.models.model import Model
from kvgeom.paper.cells import widths
from kvgeom.paper.memory import cache_bytes
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row
from kvgeom.quant.quantizer import Quantizer
from kvgeom.stats import mean_of_blocks

BITS = (8, 6, 5, 4, 3, 2)
#: Tokens of a window, and from one to the next.
WINDOW, STRIDE = 2048, 512


@paper_table("perplexity of a text, and memory, at each width", suites=(), passes=lambda layers: 0)
def perplexity(study: Study, protocol: Protocol) -> Measured:
    """Windows of 2,048 tokens every 512 of the run's text, under a uniform cache, and the bytes of such a cache.

    The exponential of the mean over windows, each of which counts alike (the paper); only tokens that no window before has scored
    count. The ratio to the exact cache is paired window by window; windows are neighbours, so that its interval is too narrow if
    what rounding costs goes on from one to the next. Costs seven passes over each window.
    """
    exact = protocol.over(None)
    conditions = {"16": exact, **widths(protocol, BITS)}
    found = {name: _losses(study, condition) for name, condition in conditions.items()}
    rows: list[Row] = []
    for name, condition in conditions.items():
        losses, at = np.array(found[name]), {"bits": int(name)}
        n = len(losses)
        rows.append(Row(at, "perplexity", _exp(float(losses.mean())), n=n, unit="perplexity"))
        if condition is not exact:
            grown = mean_of_blocks(losses - np.array(found["16"]), np.ones(n))
            rows.append(
                Row(at, "perplexity ratio", _exp(grown.value), _exp(grown.low), _exp(grown.high), n, "x 16 bits")
            )
        share = cache_bytes(condition, protocol.geometry) / cache_bytes(exact, protocol.geometry)
        rows += [
            Row(at, "memory", int(name) / 16, unit="x 16 bits"),
            Row(at, "memory with scales", share, unit="x 16 bits", published_at=None),
        ]
    return Measured(rows, (f"The text has {_tokens(study)} tokens; n is the number of windows.",))


def windows(tokens: int, longest: int = WINDOW) -> Iterator[tuple[int, int, int]]:
    """Where each window begins and ends, and how many of its last tokens are scored.

    Examples
    --------
    >>> list(windows(3000))
    [(0, 2048, 2047), (512, 2560, 512), (1024, 3000, 440)]
    >>> list(windows(3))
    [(0, 3, 2)]
    """
    before = 0
    for begin in range(0, tokens, STRIDE):
        end = min(begin + longest, tokens)
        yield begin, end, min(end - before, end - begin - 1)
        before = end
        if end == tokens:
            return


def window_loss(model: Model, ids: Sequence[int], scored: int, condition: Condition) -> float:
    """Mean negative log-likelihood (nats) of the last tokens of a window under a cache."""
    cache = model.new_cache(Quantizer(condition.recipe, condition.placement))
    logits = model.forward(ids, cache, all_logits=True)[-scored - 1 : -1]
    targets = torch.tensor(list(ids[-scored:]), device=logits.device)
    return float(torch.nn.functional.cross_entropy(logits, targets).double())


def _losses(study: Study, condition: Condition) -> list[float]:
    base, text = study.base(), study.run.text
    key = {"measure": "windows", "text": hashlib.sha256(text.encode()).hexdigest()[:32], **condition.key}

    def measure() -> list[float]:
        ids, longest = study.model.tokens(text), min(WINDOW, study.model.max_context)
        return [
            window_loss(study.model, ids[begin:end], scored, condition)
            for begin, end, scored in windows(len(ids), longest)
            if scored
        ]

    found: list[float] = base.known(key, measure)
    return found


def _tokens(study: Study) -> int:
    return len(study.model.tokens(study.run.text))


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))
