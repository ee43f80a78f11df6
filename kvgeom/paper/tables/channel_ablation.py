"""Flips with some channels of the critical layer rounded."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kvgeom.evaluation.condition import Condition
from kvgeom.models.reading import read
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import LAYER_BITS, Study
from kvgeom.paper.table import Row, share
from kvgeom.quant.scheme import Scheme

#: Shares of the channels that are drawn at random, in per cent, one draw each.
RANDOM = (1, 5, 10, 25, 50)
#: Prompts that say how large a channel is, and the most channels of low magnitude that are rounded.
CALIBRATION, MOST_LOW = 20, 100
#: Seed of the draws, as in the released code.
SEED = 42


@paper_table("flips with subsets of the channels of the critical layer rounded", passes=lambda layers: layers / 2 + 5)
def channel_ablation(study: Study, protocol: Protocol) -> Measured:
    """Outlier channels, all others, small ones and random ones of the critical layer alone, at 3 bits, symmetric.

    Outliers are the 5 % of the key channels with the largest magnitude over 20 prompts. ``released``: the same numbers are used
    for the values, and each subset is rounded with the scale of its own values. ``faithful``: keys and values have outliers
    of their own, and every subset keeps the scale of the whole tensor, which is the noise that it gets in a cache.
    """
    critical = study.critical(protocol)
    where = "projection" if protocol.mode == "released" else "cache"
    largest = magnitudes(study, critical.first, where)
    keys, values = subsets(largest["k"]), subsets(largest["k" if protocol.mode == "released" else "v"])
    tensor, channel = protocol.by_tensor(LAYER_BITS), protocol.scheme(LAYER_BITS, "channel", symmetric=True)

    def over(k: Scheme, v: Scheme) -> Condition:
        return protocol.over(k, values=v, layers=[critical.first], family="channels")

    conditions = {"every channel": over(tensor, tensor), "every channel, scaled by channel": over(channel, channel)}
    conditions |= {
        name: over(tensor.only(keys[name]), tensor.only(values[name]))
        for name in keys
        if len(keys[name]) and len(values.get(name, ()))
    }
    found = study.flipped(conditions, title="channels")
    rows = []
    for name in conditions:
        at = {"channels": name}
        count = len(keys.get(name, largest["k"]))
        rows += [
            Row(at, "channels of the keys", count, unit="channels"),
            share(at, "flip", int(found[name].sum()), len(found[name])),
        ]
    return Measured(rows, (critical.note, f"Layer {critical.first}."))


def magnitudes(study: Study, layer: int, where: str) -> dict[str, NDArray[np.float64]]:
    """Largest absolute value of each channel of a layer over the first prompts, by site."""
    found: dict[str, NDArray[np.float64]] = {}
    for prompt in study.base().prompts[:CALIBRATION]:
        one = next(each for each in read(study.model, prompt, where) if each.layer == layer)  # type: ignore[arg-type]
        for site, x in (("k", one.k), ("v", one.v)):
            largest = x[0].abs().amax(1).flatten().double().cpu().numpy()
            found[site] = np.maximum(found[site], largest) if site in found else largest
    return found


def subsets(largest: NDArray[np.float64]) -> Mapping[str, list[int]]:
    """Channels by name; the borders and the draws are those of the released code."""
    n, draws = len(largest), np.random.RandomState(SEED)
    outliers = np.flatnonzero(largest >= np.percentile(largest, 95))
    low = np.flatnonzero(largest <= np.percentile(largest, 50))[:MOST_LOW]
    chosen = {"outliers": outliers, "all but the outliers": np.setdiff1d(np.arange(n), outliers), "low magnitude": low}
    chosen |= {f"random {share} %": draws.choice(n, int(n * share / 100), replace=False) for share in RANDOM}
    return {name: sorted(map(int, channels)) for name, channels in chosen.items()}
