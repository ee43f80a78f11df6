"""Rounding one layer at a time: which layers carry refusal through the cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Granularity, Scheme
from kvgeom.results import Result
from kvgeom.stats import bootstrap_means, wilson

#: Scales for the whole tensor, and for each channel: PCR compares them.
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel")
#: A layer is critical if it alone flips more than this share of the refusals (arXiv:2606.09864: 10 %).
CRITICAL_SHARE = 0.1


@dataclass(frozen=True, repr=False)
class Scan(Result):
    """Damage done by rounding the keys and values of a single layer.

    ``data`` has the dimension ``layer`` and the variables

    - ``margin_drop``: mean loss of the refusal margin (nats) over the prompts refused unquantized,
      with its bootstrap 95 % interval ``margin_low``, ``margin_high``;
    - ``flips``: flips among these prompts, split into ``flips_complied`` and ``flips_degenerate``;
    - ``flip_rate``, ``ci_low``, ``ci_high``: the same as a rate with its Wilson interval;
    - ``margin_drop_channel``, ``flips_channel``: with a scale for each channel instead.

    ``meta`` holds ``scheme``, ``bits``, ``placement``, ``prompts`` (refused unquantized), ``critical_share``,
    ``critical_layer`` (int or None) and ``reason`` (why this layer, or why none).
    """

    kind: ClassVar[str] = "scan"

    @property
    def critical_layer(self) -> int | None:
        """The layer whose rounding alone flips most, None if none flips anything."""
        layer: int | None = self.meta["critical_layer"]
        return layer

    def summary(self) -> str:
        critical = self.critical_layer
        return f"{self.data.sizes['layer']} layers under {self.meta['scheme']}, critical layer " + (
            "none" if critical is None else str(critical)
        )


def single_layers(n_layers: int, scheme: Scheme, layers: Iterable[int] | None = None) -> dict[str, Recipe]:
    """The recipes of a scan: ``"layer 0 tensor"``, ``"layer 0 channel"``, ..."""
    return {
        f"layer {layer} {granularity}": Recipe.uniform(
            n_layers, replace(scheme, granularity=granularity, group_size=None), layers=[layer]
        )
        for layer in (range(n_layers) if layers is None else layers)
        for granularity in GRANULARITIES
    }


def single_layer_scan(
    base: Baseline,
    *,
    scheme: Scheme | None = None,
    placement: Placement | None = None,
    progress: bool = True,
) -> tuple[Scan, Outcomes]:
    """Round each layer alone, per-tensor and per-channel, and see which refusals are lost.

    Per prompt this is about one pass, half a pass for each layer and granularity, and decoding of what diverges.

    Parameters
    ----------
    base : Baseline
        The unquantized model; only the prompts that it refuses are used.
    scheme : Scheme, optional
        3-bit symmetric by default, as in the paper's released code; its granularity is ignored.
    placement : Placement, optional

    Returns
    -------
    (Scan, Outcomes)
        The outcomes hold the responses, by recipe ``"layer 0 tensor"``, ``"layer 0 channel"``, ...
    """
    n_layers = base.model.geometry.layers
    scheme = replace(scheme or Scheme(3, symmetric=True), granularity="tensor", group_size=None)
    outcomes = evaluate(
        base.model,
        single_layers(n_layers, scheme),
        base,
        placement=placement,
        refused_only=True,
        progress=progress,
        title="single layers",
    )
    return scan_of(outcomes, n_layers, scheme), outcomes


def scan_of(outcomes: Outcomes, n_layers: int, scheme: Scheme) -> Scan:
    """The scan that follows from responses under the recipes of :func:`single_layers`, among others."""
    outcomes = outcomes.of_refused()
    refused = outcomes.data.sizes["prompt"]
    names = {g: [f"layer {layer} {g}" for layer in range(n_layers)] for g in GRANULARITIES}
    flips = {g: [outcomes.flips(name) for name in names[g]] for g in GRANULARITIES}
    drops = {g: outcomes.margin_drops(names[g]) for g in GRANULARITIES}
    means = {g: d.mean(0) if refused else np.full(n_layers, np.nan) for g, d in drops.items()}
    counts = np.array([found["all"] for found in flips["tensor"]])
    critical, reason = _critical_layer(counts, means["tensor"], refused)
    intervals = np.array([wilson(int(count), refused) for count in counts])
    low, high = bootstrap_means(drops["tensor"]) if refused else np.full((2, n_layers), np.nan)
    columns = {
        "margin_drop": means["tensor"],
        "margin_low": low,
        "margin_high": high,
        "flips": counts,
        "flips_complied": np.array([found["complied"] for found in flips["tensor"]]),
        "flips_degenerate": np.array([found["degenerate"] for found in flips["tensor"]]),
        "flip_rate": counts / refused if refused else np.full(n_layers, np.nan),
        "ci_low": intervals[:, 0],
        "ci_high": intervals[:, 1],
        "margin_drop_channel": means["channel"],
        "flips_channel": np.array([found["all"] for found in flips["channel"]]),
    }
    meta = {
        **outcomes.made_by,
        "scheme": str(scheme),
        "bits": scheme.bits,
        "prompts": refused,
        "critical_share": CRITICAL_SHARE,
        "critical_layer": critical,
        "reason": reason,
    }
    data = xr.Dataset(
        {name: ("layer", values) for name, values in columns.items()}, coords={"layer": np.arange(n_layers)}
    )
    return Scan(data, meta)


def _critical_layer(flips: NDArray[np.integer], drops: NDArray[np.floating], refused: int) -> tuple[int | None, str]:
    """The layer that flips most; of equals, the one that loses most margin."""
    if refused == 0:
        return None, "the model refuses none of the prompts, so nothing can flip"
    if not flips.any():
        return None, "no single layer flips a refusal"
    tied = np.flatnonzero(flips == flips.max())
    critical = int(tied[np.argmax(drops[tied])])
    return critical, f"rounding layer {critical} alone flips {flips.max()} of {refused} refusals, the most of any layer"
