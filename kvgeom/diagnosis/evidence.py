"""From which prompts flip under which recipes to evidence, and how sure the mode is that follows from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from kvgeom.diagnosis.taxonomy import PUBLISHED, Evidence, Thresholds, classify, pattern_of
from kvgeom.stats import Estimate, reduction_estimate, wilson

Flips = NDArray[np.bool_]
#: Moved borders under which a mode is decided again.
MOVED = {
    "critical": (0.05, 0.1, 0.15, 0.2),
    "pcr_low": (0.2, 0.3, 0.4),
    "pcr_high": (0.6, 0.7, 0.8),
    "rescue": (0.4, 0.5, 0.6),
}


@dataclass(frozen=True)
class FlipTable:
    """Which of the prompts refused unquantized flip, at the same bits.

    Attributes
    ----------
    bits : int
    worst : int or None
        The layer that alone flips most, and loses most margin among equals.
    whole, broken, group64 : bool array [prompts]
        All layers rounded per-tensor, the flips among these that end in broken text, and all layers with group-64 scales.
    layers : bool array [prompts, layers]
        Each layer alone, per-tensor.
    everywhere : bool array [prompts] or None
        All layers rounded per-channel.
    channel, worst_kept, largest, others : bool array [prompts] or None
        The worst layer alone per-channel; all layers but the worst; only the largest channels, only the others, of the
        worst layer. None without a worst layer.
    """

    bits: int
    worst: int | None
    whole: Flips
    broken: Flips
    group64: Flips
    layers: Flips
    everywhere: Flips | None = None
    channel: Flips | None = None
    worst_kept: Flips | None = None
    largest: Flips | None = None
    others: Flips | None = None

    def rows(self, rows: NDArray[np.integer]) -> FlipTable:
        """The table of some prompts, which may repeat."""
        chosen = {name: value[rows] for name, value in self.__dict__.items() if isinstance(value, np.ndarray)}
        return replace(self, **chosen)


def evidence_from(table: FlipTable, thresholds: Thresholds = PUBLISHED, *, seed: int = 0) -> Evidence:
    """Evidence with 95 % intervals: Wilson for rates, paired by prompt for reductions."""

    def rate(flips: Flips | None) -> Estimate | None:
        return None if flips is None else Estimate(float(flips.mean()), *wilson(int(flips.sum()), len(flips)))

    def reduction(before: Flips, after: Flips | None) -> Estimate | None:
        return None if after is None else reduction_estimate(before, after, seed=seed)

    return _evidence(table, thresholds, rate, reduction)


def _evidence(
    table: FlipTable,
    thresholds: Thresholds,
    rate: Callable[[Flips | None], Estimate | None],
    reduction: Callable[[Flips, Flips | None], Estimate | None],
) -> Evidence:
    n, n_layers = table.layers.shape
    if n == 0:
        return Evidence(0, table.bits)
    critical = tuple(int(layer) for layer in np.flatnonzero(table.layers.mean(0) > thresholds.critical))
    return Evidence(
        refused=n,
        bits=table.bits,
        loss=rate(table.whole),
        broken=rate(table.broken[table.whole]) if table.whole.any() else None,
        pattern=pattern_of(len(critical), n_layers),
        critical_layers=critical,
        worst_layer=table.worst,
        pcr=None if table.worst is None else reduction(table.layers[:, table.worst], table.channel),
        group64=reduction(table.whole, table.group64),
        channel=reduction(table.whole, table.everywhere),
        worst_kept=reduction(table.whole, table.worst_kept),
        largest=rate(table.largest),
        others=rate(table.others),
    )


def _as_seen(table: FlipTable, thresholds: Thresholds = PUBLISHED) -> Evidence:
    """Evidence that takes what it sees for the truth, as a bootstrap sample does."""

    def rate(flips: Flips | None) -> Estimate | None:
        return None if flips is None else _point(float(flips.mean()))

    def reduction(before: Flips, after: Flips | None) -> Estimate | None:
        return None if after is None or not before.any() else _point(1 - float(after.sum()) / float(before.sum()))

    return _evidence(table, thresholds, rate, reduction)


def _point(value: float) -> Estimate:
    return Estimate(value, value, value)


def shares(table: FlipTable, *, samples: int = 1000, seed: int = 0) -> dict[str, dict[str, float]]:
    """How a mode hangs on the sample of prompts, and on the borders.

    Returns
    -------
    dict
        ``"prompts"``: share of bootstrap samples of the prompts in which each mode comes out, each sample taken at face
        value. ``"thresholds"``: share of a grid of moved borders (:data:`MOVED`), with intervals as measured. Modes in
        descending order.
    """
    n = len(table.whole)
    if n == 0:
        return {kind: {"undetermined": 1.0} for kind in ("prompts", "thresholds")}
    rng = np.random.default_rng(seed)
    drawn = Counter(classify(_as_seen(table.rows(rng.integers(0, n, n)))).name for _ in range(samples))
    moved = Counter(classify(evidence_from(table, at, seed=seed), at).name for at in _grid())
    return {
        kind: {name: count / counts.total() for name, count in counts.most_common()}
        for kind, counts in (("prompts", drawn), ("thresholds", moved))
    }


def _grid() -> Iterator[Thresholds]:
    for values in product(*MOVED.values()):
        yield Thresholds(**dict(zip(MOVED, values, strict=True)))
