"""The channels of a layer: which are outliers, which carry safety, and whether these are the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from einops import rearrange
from numpy.typing import NDArray

from kvgeom.checks import MOST_DRAWS, as_seed, at_coordinates, one_of, suggests, whole
from kvgeom.geometry.activations import SITES, Site, at_site
from kvgeom.geometry.fitted import FittedSpace
from kvgeom.geometry.rounding import DEFAULT_SCHEME, CacheSpec, Rounding
from kvgeom.geometry.sensitivity import Sensitivity
from kvgeom.outliers import OUTLIER_FACTOR, outlier_border
from kvgeom.words import counted


@suggests()
def overlap(
    energy: NDArray[np.floating], loading: NDArray[np.floating], *, permutations: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Does one distribution over channels lie where the other does?

    Parameters
    ----------
    energy, loading : array [channels]
        Not negative; scaled here to sum to 1.
    permutations : int
        Of the channels of ``loading``.
    seed : int

    Returns
    -------
    overlap : float
        ``channels * sum(energy * loading)``: the mean energy of a channel as the loading weights channels, over the
        plain mean. 1 for channels that have nothing to do with each other, below for loading that avoids energy.
    p : float
        Two-sided permutation p-value of that.
    """
    permutations, seed = whole("permutations", permutations, 1, MOST_DRAWS), as_seed(seed)
    p, q = (np.asarray(x, dtype=float) / np.sum(x) for x in (energy, loading))
    rng = np.random.default_rng(seed)
    found = len(p) * float(p @ q)
    draws = len(p) * (rng.permuted(np.tile(q, (permutations, 1)), axis=1) @ p)
    # Two-sided as twice the smaller tail: the permutation distribution is skewed where a few channels dominate.
    # Draws that differ by the last digit of a sum are equal.
    slack = 1e-9 * max(found, 1.0)
    tails = (1 + int((draws >= found - slack).sum()), 1 + int((draws <= found + slack).sum()))
    return found, min(1.0, 2 * min(tails) / (permutations + 1))


def outliers(magnitude: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Which channels are outliers, along the last axis, by their root mean square.

    Above :data:`OUTLIER_FACTOR` times the median's, and not below the largest's by more than that factor. The one definition
    of an outlier: figures, tables, reports and :func:`~kvgeom.geometry.channel_damage.channel_damage` have no other. (The
    ablations of a diagnosis round the *largest* twentieth, whether or not these are outliers.)
    """
    found: NDArray[np.bool_] = magnitude > outlier_border(magnitude)
    return found


@dataclass(frozen=True)
class OutlierShare:
    """What the outlier channels of a layer hold.

    Attributes
    ----------
    outliers, channels : int
    energy : float
        Share of the mean square of the stored vectors that lies in them.
    loading : float
        Share of the squared class difference that lies in them; NaN where there is no direction. It is about size, not
        about what the model reads: a channel that is scaled up holds more of it.
    """

    outliers: int
    channels: int
    energy: float
    loading: float

    def __str__(self) -> str:
        if self.outliers == 0:
            return f"No channel is an outlier (root mean square above {OUTLIER_FACTOR:g} × the median channel's)"
        loading = "" if not np.isfinite(self.loading) else f" and {100 * self.loading:.0f} % of the class difference"
        these = f"{counted(self.outliers, 'outlier channel')} of {self.channels}"
        return f"{these} hold{'s' if self.outliers == 1 else ''} {100 * self.energy:.0f} % of the energy{loading}"


@suggests()
def outlier_share(sensitivity: Sensitivity, layer: int, site: str = "k") -> OutlierShare:
    """Count the outlier channels of one layer, with their share of the energy and of the class difference.

    Neither share says what rounding them costs: :func:`kvgeom.geometry.channel_damage.channel_damage` does.
    """
    at_coordinates(sensitivity.data, layer=layer)
    channels = sensitivity.channels(site).sel(layer=layer)
    magnitude, loading = (channels[name].values.astype(float) for name in ("magnitude", "loading"))
    above = outliers(magnitude)
    energy = float((magnitude[above] ** 2).sum() / max((magnitude**2).sum(), 1e-30))
    status = str(sensitivity.data.status.sel(layer=layer, site=site).item())
    known = status != "undefined" and bool(np.isfinite(loading).all())
    return OutlierShare(int(above.sum()), len(above), energy, float(loading[above].sum()) if known else float("nan"))


@suggests()
def channel_view(sensitivity: Sensitivity, site: str = "k", *, permutations: int = 2000, seed: int = 0) -> xr.Dataset:
    """Outliers, class difference and noise by channel, and by layer whether the first two lie together.

    Static: it says where the classes differ, in the units of the cache, not what the model reads. A channel that is scaled up
    and read with a smaller weight holds a larger share of the class difference and does the same. Which site fails,
    and whether its outliers carry what is lost or crush it, is measured by
    :func:`kvgeom.geometry.channel_damage.channel_damage`.

    Parameters
    ----------
    sensitivity : Sensitivity
    site : {"k", "v", "resid"}
    permutations, seed : int
        See :func:`overlap`.

    Returns
    -------
    xarray.Dataset
        Over (layer, channel): ``outlier_score`` (root mean square over that of the median channel),
        ``safety_loading`` (share of the squared class difference) and ``noise_share`` (share of the squared rounding error).
        Over (layer): ``overlap`` of energy with safety loading (1: unrelated) and its permutation p-value
        ``overlap_p``; NaN where the direction is undefined.
    """
    channels = sensitivity.channels(site)
    magnitude, noise, loading = (channels[name].values.astype(float) for name in ("magnitude", "noise", "loading"))
    median = np.median(magnitude, axis=1, keepdims=True)
    noise2 = (noise**2).sum(1, keepdims=True)
    status = sensitivity.data.status.sel(site=site).values
    found = np.full((len(magnitude), 2), np.nan)
    for row in np.flatnonzero(status != "undefined"):
        found[row] = overlap(magnitude[row] ** 2, loading[row], permutations=permutations, seed=seed)
    dims = ("layer", "channel")
    return xr.Dataset(
        {
            "outlier_score": (
                dims,
                np.divide(magnitude, median, out=np.full_like(magnitude, np.nan), where=median > 0),
            ),
            "safety_loading": (dims, loading),
            "noise_share": (dims, np.divide(noise**2, noise2, out=np.full_like(noise, np.nan), where=noise2 > 0)),
            "overlap": ("layer", found[:, 0]),
            "overlap_p": ("layer", found[:, 1]),
        },
        coords={"layer": sensitivity.data.layer.values, "channel": channels.channel.values},
    )


@suggests()
def stored(
    space: FittedSpace, layer: int, site: Site = "k", scheme: CacheSpec = DEFAULT_SCHEME, *, row: int = 0
) -> xr.Dataset:
    """One prompt's vectors at one layer, before and after rounding, in the frame in which they are rounded.

    Parameters
    ----------
    space : Subspace
    layer : int
    site : {"k", "v", "resid"}
    scheme : CacheConfig, Recipe, Scheme or str
        Anything that :func:`kvgeom.engines.registry.resolve` takes; see :class:`~kvgeom.geometry.rounding.Rounding`.
        3-bit symmetric per-tensor by default.
    row : int
        Which prompt of the subspace, harmful ones first.

    Returns
    -------
    xarray.Dataset
        ``before`` and ``after`` over (token, channel); ``text`` over (token).

    Raises
    ------
    InputError
        For a layer, site or prompt that does not exist, or if ``scheme`` cannot be resolved.
    """
    store, geometry = space.activations, space.model.geometry
    one_of("layer", layer, geometry.stores)
    one_of("site", site, SITES)
    one_of("prompt", row, range(len(store.prompts)))
    rounding = Rounding.at(space.model, scheme, space.placement)
    activations = next(one for one in store.layers(row) if one.layer == layer)
    x = at_site(activations, site)
    rounded = rounding(layer, site, x, activations.rotation if site == "k" else None)
    found = {
        name: rearrange(y[0], "h t d -> t (h d)").float().cpu().numpy()
        for name, y in (("before", x), ("after", rounded))
    }
    text = np.array([space.model.decode([token]) for token in store.prompts[row].ids], dtype=object)
    return xr.Dataset(
        {name: (("token", "channel"), values) for name, values in found.items()} | {"text": ("token", text)},
        coords={"token": np.arange(len(text)), "channel": np.arange(found["before"].shape[1])},
        attrs={"layer": layer, "site": site, "scheme": rounding.stored, "kv_heads": geometry.kv_heads},
    )
