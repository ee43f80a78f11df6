"""The noise-sensitivity ratio of the safety subspace against the full space."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from kvgeom.geometry.capture import SITES, site_width, tokens_at, watch
from kvgeom.geometry.nulls import random_bases
from kvgeom.progress import track
from kvgeom.quant.rounding import round_kv
from kvgeom.quant.scheme import Scheme
from kvgeom.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from kvgeom.geometry.subspace import Direction, Subspace

#: Significance of the separation, before correction for the number of positions that were tried.
ALPHA = 0.05


@dataclass(frozen=True, repr=False)
class Sensitivity(Result):
    """How much more rounding noise the safety subspace sees, relative to its signal, than the whole space.

    ``data`` has the dimensions ``layer`` and ``site`` (``"k"``, ``"v"``, ``"resid"``) and the variables

    - ``ratio`` = ``signal_gap`` * ``noise_alignment`` (dimensionless; NaN where ``status`` is not ``ok``/``weak``);
    - ``ratio_centered``: the same with the mean vector taken out of the full space;
    - ``nsr_safety``, ``nsr_full``: numerator and denominator of the ratio;
    - ``separation``: cross-validated AUROC of harmful against harmless along the direction, and ``separation_p``;
    - ``null_low``, ``null_median``, ``null_high``: 2.5, 50, 97.5 % of the ratio of random subspaces (null a), and
      ``null_closed``, the ratio of their mean noise to their mean signal, in closed form;
    - ``alignment_null_low``, ``alignment_null_high``: 2.5 and 97.5 % of the noise alignment of random subspaces;
    - ``status``: ``"ok"``, ``"weak"`` (separation not significant) or ``"undefined"``; ``reason`` says why;
    - ``position``: which tokens were used (``"instruction"`` or ``"template-1"``, the last template token, ...).

    Per channel (U = the channel's unit vector) there are, over ``(layer, kv, channel)`` for keys and values
    and with the prefix ``resid_`` over ``(layer, resid_channel)`` for the residual stream: ``channel_ratio``,
    ``channel_magnitude`` (root mean square of x), ``channel_noise`` (root mean square of e) and
    ``channel_loading`` (squared component of the safety direction; sums to 1). See :meth:`channels`.

    ``meta`` holds ``scheme``, ``placement``, ``kv_heads``, ``head_dim``, ``prompts`` and ``k``.
    """

    kind: ClassVar[str] = "sensitivity"

    def channels(self, site: str) -> xr.Dataset:
        """The per-channel variables of one site: ``ratio``, ``magnitude``, ``noise``, ``loading`` (layer, channel)."""
        names = ("ratio", "magnitude", "noise", "loading")
        if site == "resid":
            picked = self.data[[f"resid_channel_{name}" for name in names]].rename(resid_channel="channel")
            return picked.rename({f"resid_channel_{name}": name for name in names})
        picked = self.data[[f"channel_{name}" for name in names]].sel(kv=site, drop=True)
        return picked.rename({f"channel_{name}": name for name in names})

    def summary(self) -> str:
        return f"ratio of {self.data.sizes['layer']} layers x {list(self.data.site.values)} under {self.meta['scheme']}"

    def plot(self) -> go.Figure:
        """Map of the ratio, layer x site."""
        from kvgeom.plots.sensitivity import ratio_map

        return ratio_map(self)


@dataclass
class Moments:
    """Sums over the tokens at one layer, site and position, from which every quantity follows; no token is kept.

    Attributes
    ----------
    tokens : int
    x, x2, e2 : array [channels]
        Sums of the stored vectors, of their squares, and of the squared rounding errors.
    safety_e2 : float
        Sum of the squared projections of the error on the safety subspace.
    null_e2 : array [subspaces]
        The same for random subspaces.
    """

    x: NDArray[np.float64]
    x2: NDArray[np.float64]
    e2: NDArray[np.float64]
    null_e2: NDArray[np.float64]
    tokens: int = 0
    safety_e2: float = field(default=0.0)

    @classmethod
    def zero(cls, channels: int, subspaces: int) -> Moments:
        """Before the first token."""
        return cls(np.zeros(channels), np.zeros(channels), np.zeros(channels), np.zeros(subspaces))

    def add(
        self,
        x: NDArray[np.float64],
        e: NDArray[np.float64],
        basis: NDArray[np.float64],
        null: NDArray[np.float64],
    ) -> None:
        """Add tokens: ``x`` and ``e`` are [tokens, channels], ``basis`` [channels, k], ``null`` [subspaces, channels, k]."""
        self.tokens += len(x)
        self.x += x.sum(0)
        self.x2 += (x**2).sum(0)
        self.e2 += (e**2).sum(0)
        self.safety_e2 += float(((e @ basis) ** 2).sum())
        projected = e @ null.transpose(1, 0, 2).reshape(len(basis), -1)
        self.null_e2 += (projected**2).reshape(len(e), len(null), -1).sum((0, 2))


def quantities(
    moments: Moments, gap: NDArray[np.float64], basis: NDArray[np.float64], null: NDArray[np.float64]
) -> dict[str, float]:
    """Ratio and decomposition from sums; infinite or NaN only where the subspace has no signal.

    Parameters
    ----------
    moments : Moments
    gap : array [channels]
        Mean harmful minus mean harmless vector.
    basis : array [channels, k]
        Orthonormal basis of the safety subspace.
    null : array [subspaces, channels, k]
        Orthonormal bases of random subspaces, those that ``moments`` was summed with.

    Notes
    -----
    ``ratio = NSR_U / NSR_full`` with ``NSR_full = sum |e|^2 / sum |x|^2`` and
    ``NSR_U = mean |U'e|^2 / (|U'gap|^2 / 4)``, the between-class variance. This is the project's definition
    (docs/definitions.md): arXiv:2606.09864 reports a ratio of 10^2 to 10^3 without defining it.
    """
    channels, k = basis.shape
    n = moments.tokens
    x2, e2 = moments.x2.sum(), moments.e2.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        signal = ((gap @ basis) ** 2).sum() / 4
        nsr_full = e2 / x2
        nsr_safety = moments.safety_e2 / n / signal
        centered = x2 - (moments.x**2).sum() / n
        null_signal = (np.einsum("c,sck->sk", gap, null) ** 2).sum(-1) / 4
        null_ratio = moments.null_e2 / n / null_signal / nsr_full
        null_alignment = moments.null_e2 / k / (e2 / channels)
        low, median, high = np.quantile(null_ratio, [0.025, 0.5, 0.975])
        return {
            "ratio": nsr_safety / nsr_full,
            "ratio_centered": nsr_safety / (e2 / centered),
            "nsr_safety": nsr_safety,
            "nsr_full": nsr_full,
            "signal_gap": (x2 / n / channels) / (signal / k),
            "noise_alignment": (moments.safety_e2 / k) / (e2 / channels),
            "null_low": low,
            "null_median": median,
            "null_high": high,
            # Isotropic subspaces see k/C of the noise and, on average, k/C of the signal.
            "null_closed": (x2 / n) / ((gap**2).sum() / 4),
            "alignment_null_low": np.quantile(null_alignment, 0.025),
            "alignment_null_high": np.quantile(null_alignment, 0.975),
        }


def measure(
    space: Subspace,
    scheme: Scheme | None = None,
    *,
    noise_pairs: int | None = None,
    null_subspaces: int = 100,
    progress: bool = True,
    seed: int = 0,
) -> Sensitivity:
    """Rounding noise on the safety subspace against noise on everything, at every layer and site.

    Each prompt is run unquantized once; its keys and values are rounded with scales over exactly the tokens that
    a cache would share them over, and only sums are kept. The residual stream is not stored in a cache: for it the
    same rounding is a comparison, as if it were.

    Parameters
    ----------
    space : Subspace
    scheme : Scheme, optional
        3-bit symmetric per-tensor by default, as in the paper's layer scan.
    noise_pairs : int, optional
        Use only so many harmful and harmless prompts for the noise; all by default.
    null_subspaces : int
        Random subspaces of null (a).
    seed : int
        Of these.
    """
    scheme = scheme or Scheme(3, symmetric=True, granularity="tensor")
    model, geometry = space.model, space.model.geometry
    nulls = {
        width: random_bases(width, space.k, null_subspaces, seed) for width in {geometry.channels, geometry.d_model}
    }
    moments = {(layer, site): Moments.zero(site_width(model, site), null_subspaces) for layer, site in space.directions}
    pairs = noise_pairs or max(len(space.harmful), len(space.harmless))
    prompts = list(chain(space.harmful[:pairs], space.harmless[:pairs]))
    for prompt in track(prompts, "rounding noise", len(prompts), progress):

        def see(layer: int, site: str, x: torch.Tensor, flat: Any, prompt: Any = prompt) -> None:
            direction = space.directions[layer, site]
            at = tokens_at(prompt, direction.position)
            stored, error = (flat(t)[at].double().cpu().numpy() for t in (x, round_kv(x, scheme) - x))
            moments[layer, site].add(stored, error, direction.basis, nulls[stored.shape[1]])

        watch(model, prompt, space.placement, see)
    meta = {**space.meta(), "scheme": str(scheme), "noise_prompts": len(prompts), "seed": seed}
    return Sensitivity(_table(space, moments, nulls), meta)


def _table(
    space: Subspace, moments: dict[tuple[int, str], Moments], nulls: dict[int, NDArray[np.float64]]
) -> xr.Dataset:
    geometry = space.model.geometry
    layers = range(geometry.layers)
    cells = [[_cell(space, moments[layer, site], site, layer, nulls) for site in SITES] for layer in layers]
    data = xr.Dataset(
        {name: (("layer", "site"), np.array([[cell[name] for cell in row] for row in cells])) for name in cells[0][0]},
        coords={"layer": list(layers), "site": list(SITES)},
    )
    kv = [[_channels(space.directions[layer, s], moments[layer, s]) for s in ("k", "v")] for layer in layers]
    resid = [_channels(space.directions[layer, "resid"], moments[layer, "resid"]) for layer in layers]
    channels: dict[str, Any] = {}
    for name in resid[0]:
        channels[f"channel_{name}"] = (("layer", "kv", "channel"), np.array([[c[name] for c in row] for row in kv]))
        channels[f"resid_channel_{name}"] = (("layer", "resid_channel"), np.array([c[name] for c in resid]))
    return data.assign(channels).assign_coords(
        kv=["k", "v"], channel=np.arange(geometry.channels), resid_channel=np.arange(geometry.d_model)
    )


def _cell(
    space: Subspace, moments: Moments, site: str, layer: int, nulls: dict[int, NDArray[np.float64]]
) -> dict[str, Any]:
    direction = space.directions[layer, site]
    numbers = quantities(moments, direction.gap, direction.basis, nulls[len(direction.gap)])
    status, reason = "ok", ""
    # The position was chosen as the best of several, so each had that many chances to look significant.
    p = min(1.0, direction.separation.p * len(space.positions))
    if not direction.defined:
        status, reason = "undefined", "harmful and harmless means coincide at every position"
    elif moments.e2.sum() == 0:
        status, reason = "undefined", "rounding makes no error here"
    elif p > ALPHA:
        status = "weak"
        reason = (
            f"harmful and harmless are not significantly separated (AUROC {direction.separation.auroc:.2f}, p {p:.2g})"
        )
    if status == "undefined":
        numbers = dict.fromkeys(numbers, float("nan"))
    return {
        **numbers,
        "separation": direction.separation.auroc,
        "separation_p": p,
        "status": status,
        "reason": reason,
        "position": direction.position,
    }


def _channels(direction: Direction, moments: Moments) -> dict[str, NDArray[np.float64]]:
    """Per channel: U is the channel's unit vector. Channels without class difference or error have no ratio."""
    n = moments.tokens
    signal = direction.gap**2 / 4
    nsr_full = moments.e2.sum() / moments.x2.sum()
    defined = direction.defined & (signal > 1e-12 * moments.x2 / n) & (nsr_full > 0)
    ratio = np.full(len(signal), np.nan)
    ratio[defined] = moments.e2[defined] / n / signal[defined] / nsr_full
    return {
        "ratio": ratio,
        "magnitude": np.sqrt(moments.x2 / n),
        "noise": np.sqrt(moments.e2 / n),
        "loading": (direction.basis**2).sum(1) / direction.basis.shape[1],
    }
