"""Rounding one layer at a time: which layers carry refusal through the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from kvgeom.diagnosis.evaluate import Baseline, Outcomes, evaluate
from kvgeom.geometry.causal import patch_layers
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.results import Result
from kvgeom.stats import bootstrap_means, wilson

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, repr=False)
class Scan(Result):
    """Damage done by rounding the keys and values of a single layer.

    ``data`` has the dimension ``layer`` and the variables

    - ``margin_drop``: mean loss of the refusal margin (nats) over the prompts refused unquantized,
      with its bootstrap 95 % interval ``margin_low``, ``margin_high``;
    - ``flips``: flips among these prompts where responses were generated, NaN elsewhere;
    - ``flip_rate``, ``ci_low``, ``ci_high``: the same as a rate with its Wilson interval.

    ``meta`` holds ``scheme``, ``bits``, ``placement``, ``prompts`` (refused unquantized), ``critical_layer``
    (int or None) and ``reason`` (why this layer, or why none).
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

    def plot(self) -> go.Figure:
        """Margin lost and flips by layer."""
        from kvgeom.plots.scan import layer_scan

        return layer_scan(self)


def single_layer_scan(
    base: Baseline,
    *,
    scheme: Scheme | None = None,
    placement: Placement | None = None,
    generate_top: int = 3,
    progress: bool = True,
) -> tuple[Scan, Outcomes]:
    """Round each layer alone: the margin for all of them, responses for those where it matters.

    The margin costs half a forward pass per layer and prompt: the layers below the rounded one are not run
    again. Responses are generated for the ``generate_top`` layers that lose most margin, and for any other
    layer that changes the first token of at least a tenth of the refusals.

    Parameters
    ----------
    base : Baseline
        The unquantized model; only the prompts that it refuses are used.
    scheme : Scheme, optional
        3-bit symmetric per-tensor by default, as in the paper's released code.
    placement : Placement, optional
    generate_top : int

    Returns
    -------
    (Scan, Outcomes)
        The outcomes hold the responses, by recipe ``"layer 0"``, ...
    """
    model, n_layers = base.model, base.model.geometry.layers
    scheme = scheme or Scheme(3, symmetric=True, granularity="tensor")
    recipes = {layer: Recipe.uniform(n_layers, scheme, layers=[layer]) for layer in range(n_layers)}
    patched = patch_layers(
        model,
        [base.prompts[index] for index in base.refused],
        {"scan": scheme},
        base.refusal_tokens,
        placement=placement,
        progress=progress,
        title="margin, single layers",
    )
    drops = patched.margin_drop.sel(scheme="scan").values
    openings = np.isin(patched.data.token.sel(scheme="scan").values, list(base.refusal_tokens))
    layers = _worth_generating(drops, openings, generate_top) if base.refused else []
    outcomes = evaluate(
        model,
        {f"layer {layer}": recipes[layer] for layer in layers},
        base,
        placement=placement,
        refused_only=True,
        progress=progress,
        title="responses, single layers",
    )
    flips = np.full(n_layers, np.nan)
    for layer in layers:
        flips[layer] = outcomes.flips(f"layer {layer}")["all"]
    critical, reason = _critical_layer(flips, drops, len(base.refused))
    intervals = [wilson(int(f), len(base.refused)) if np.isfinite(f) else (np.nan, np.nan) for f in flips]
    low, high = bootstrap_means(drops) if base.refused else np.full((2, n_layers), np.nan)
    columns = {
        "margin_drop": drops.mean(0) if base.refused else np.full(n_layers, np.nan),
        "margin_low": low,
        "margin_high": high,
        "flips": flips,
        "flip_rate": flips / len(base.refused) if base.refused else flips,
        "ci_low": np.array([interval[0] for interval in intervals]),
        "ci_high": np.array([interval[1] for interval in intervals]),
    }
    meta = {
        **{key: outcomes.meta[key] for key in ("model", "fingerprint", "placement", "judge", "max_new_tokens")},
        "scheme": str(scheme),
        "bits": scheme.bits,
        "prompts": len(base.refused),
        "critical_layer": critical,
        "reason": reason,
    }
    data = xr.Dataset(
        {name: ("layer", values) for name, values in columns.items()}, coords={"layer": np.arange(n_layers)}
    )
    return Scan(data, meta), outcomes


def _worth_generating(drops: NDArray[np.float64], refuses: NDArray[np.bool_], top: int) -> list[int]:
    worst = np.argsort(-drops.mean(0), kind="stable")[:top]
    changed = np.flatnonzero((~refuses).mean(0) >= 0.1)
    return sorted({int(layer) for layer in (*worst, *changed)})


def _critical_layer(flips: NDArray[np.float64], drops: NDArray[np.float64], refused: int) -> tuple[int | None, str]:
    """The layer that flips most; of equals, the one that loses most margin."""
    if refused == 0:
        return None, "the model refuses none of the prompts, so nothing can flip"
    most = np.nanmax(flips)
    if most == 0:
        return None, "no single layer flips a refusal"
    tied = np.flatnonzero(flips == most)
    critical = int(tied[np.argmax(drops.mean(0)[tied])])
    return critical, f"rounding layer {critical} alone flips {int(most)} of {refused} refusals, the most of any layer"
