"""The noise-sensitivity ratio of the safety subspace against the full space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from kvgeom.checks import as_seed, at_coordinates, suggests, whole
from kvgeom.geometry.activations import SITES, Site, at_site, site_width, tokens_at, vectors
from kvgeom.geometry.fitted import FittedSpace
from kvgeom.geometry.ratio import (
    OUTLIER_FACTOR,
    Moments,
    channel_quantities,
    head_bases,
    head_quantities,
    quantities,
    random_bases,
)
from kvgeom.geometry.rounding import DEFAULT_SCHEME, CacheSpec, Rounding
from kvgeom.progress import shown, track
from kvgeom.prompts.sets import concept_contrasts
from kvgeom.results import Result

_STORED: tuple[Site, Site] = ("k", "v")
#: Significance of the separation, before correction for the number of positions that were tried.
ALPHA = 0.05
#: More random subspaces than this fill memory, and sharpen no quantile that is read.
MOST_NULLS = 100_000


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
    - ``contrast_ratio`` over (contrast, layer, site): the ratio of subspaces between harmless requests (null b),
      ``contrast_highest`` the highest of them, and ``specific``: ``"yes"`` where the safety ratio is above all of them,
      ``"no"`` where it is not, ``"undetermined"`` where the ratio is weak or undefined, or there is no contrast;
    - ``status``: ``"ok"``, ``"weak"`` (separation not significant) or ``"undefined"``; ``reason`` says why;
    - ``position``: which tokens were used (``"instruction"`` or ``"template-1"``, the last template token, ...).

    Per KV head, over ``(layer, kv, head)`` for keys and values, within the channels of the head: ``head_ratio``,
    ``head_signal_gap``, ``head_noise_alignment``.

    Per channel (U = the channel's unit vector) there are, over ``(layer, kv, channel)`` for keys and values
    and with the prefix ``resid_`` over ``(layer, resid_channel)`` for the residual stream: ``channel_ratio``,
    ``channel_magnitude`` (root mean square of x), ``channel_noise`` (root mean square of e) and
    ``channel_loading`` (squared component of the safety direction; sums to 1). See :meth:`channels`.

    ``to_frame()`` has a row for each layer and site; ``to_frame("heads")``, ``to_frame("channels")``,
    ``to_frame("resid_channels")`` and ``to_frame("contrasts")`` have the others.

    ``meta`` holds ``scheme``, ``placement``, ``kv_heads``, ``head_dim``, ``k`` and
    ``outlier_factor`` (see :data:`kvgeom.geometry.ratio.OUTLIER_FACTOR`).
    """

    kind: ClassVar[str] = "sensitivity"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layers": ("layer", "site"),
        "heads": ("layer", "kv", "head"),
        "channels": ("layer", "kv", "channel"),
        "resid_channels": ("layer", "resid_channel"),
        "contrasts": ("contrast", "layer", "site"),
    }

    def channels(self, site: str) -> xr.Dataset:
        """The per-channel variables of one site: ``ratio``, ``magnitude``, ``noise``, ``loading`` (layer, channel)."""
        at_coordinates(self.data, site=site)
        names = ("ratio", "magnitude", "noise", "loading")
        if site == "resid":
            picked = self.data[[f"resid_channel_{name}" for name in names]].rename(resid_channel="channel")
            return picked.rename({f"resid_channel_{name}": name for name in names})
        picked = self.data[[f"channel_{name}" for name in names]].sel(kv=site, drop=True)
        return picked.rename({f"channel_{name}": name for name in names})

    def summary(self) -> str:
        return (
            f"ratio of {self.data.sizes['layer']} layers x {self.data.site.values.tolist()} under {self.meta['scheme']}"
        )


@suggests()
def measure(
    space: FittedSpace,
    scheme: CacheSpec = DEFAULT_SCHEME,
    *,
    noise_pairs: int | None = None,
    contrasts: Any = None,
    null_subspaces: int = 100,
    progress: bool = True,
    seed: int = 0,
) -> Sensitivity:
    """Rounding noise on the safety subspace against noise on everything, at every layer and site.

    Keys and values are rounded with scales over exactly the tokens that a cache would share them over, and only sums
    are kept. The residual stream is not stored in a cache: it is rounded as if it were, with the scheme of the layer's keys
    and no transform. A site that a recipe leaves exact has no rounding error and no ratio; its status is ``"undefined"``.
    Costs no forward pass over the prompts of the subspace, and one over those of the contrasts, the first time.

    Parameters
    ----------
    space : Subspace
    scheme : CacheConfig, Recipe, Scheme or str
        Anything that :func:`kvgeom.engines.registry.resolve` takes: ``"int3-asym-tensor+center"``, ``"kivi"``, a recipe; see
        :class:`~kvgeom.geometry.rounding.Rounding`. 3-bit symmetric per-tensor by default, as in the paper's layer scan.
        An engine preset keeps its placement, which must be where the subspace was read; all else takes the subspace's.
    noise_pairs : int, optional
        Use only so many harmful and harmless prompts for the noise; all by default.
    contrasts : sequence of prompt sets, or one, optional
        What has nothing to do with safety (null b), two classes of harmless requests each, in anything that
        :func:`kvgeom.prompts.load.as_prompt_set` takes;
        :func:`kvgeom.prompts.sets.concept_contrasts` by default, ``()`` for none.
    null_subspaces : int
        Random subspaces of null (a), 2 to :data:`MOST_NULLS`.
    seed : int
        Of these.

    Raises
    ------
    InputError
        For fewer than one noise pair or fewer than two random subspaces, or if ``scheme`` or contrasts cannot be read.
    """
    null_subspaces, seed = whole("null_subspaces", null_subspaces, 2, MOST_NULLS), as_seed(seed)
    noise_pairs = None if noise_pairs is None else whole("noise_pairs", noise_pairs, 1)
    rounding = Rounding.at(space.model, scheme, space.placement)
    geometry = space.model.geometry
    nulls = {
        width: random_bases(width, space.k, null_subspaces, seed) for width in {geometry.channels, geometry.d_model}
    }
    with shown(progress):
        moments = _moments(space, rounding, noise_pairs, nulls, "rounding noise")
        others = space.contrasted(concept_contrasts() if contrasts is None else contrasts)
        beside = {
            name: (other, _moments(other, rounding, noise_pairs, None, f"null: {name}"))
            for name, other in others.items()
        }
    pairs = noise_pairs or len(space.activations.prompts)
    meta = {
        **space.meta,
        "scheme": rounding.stored,
        "recipe": str(rounding.recipe),
        "placement": str(rounding.placement),
        "noise_prompts": len(space.prompts.harmful[:pairs]) + len(space.prompts.harmless[:pairs]),
        "seed": seed,
        "contrasts": list(others),
        "outlier_factor": OUTLIER_FACTOR,
    }
    return Sensitivity(_with_contrasts(_table(space, rounding, moments, nulls), beside), meta)


def _moments(
    space: FittedSpace,
    rounding: Rounding,
    pairs: int | None,
    nulls: dict[int, NDArray[np.float64]] | None,
    title: str,
) -> dict[tuple[int, Site], Moments]:
    """Sums over the prompts, or over the first ``pairs`` of each class; with heads and ``nulls`` if these are given."""
    heads: dict[tuple[int, Site], NDArray[np.float64]] = {}
    if nulls is not None:
        count = space.model.geometry.kv_heads
        heads = {key: head_bases(d.basis, count) for key, d in space.directions.items() if key[1] != "resid"}
    moments = {
        (layer, site): Moments.zero(
            site_width(space.model, site),
            len(next(iter(nulls.values()))) if nulls else 0,
            len(heads.get((layer, site), ())),
        )
        for layer, site in space.directions
    }
    chosen = [*space.prompts.harmful[:pairs], *space.prompts.harmless[:pairs]]
    for index in track(map(int, space.activations.indices(chosen)), title, len(chosen)):
        prompt = space.activations.prompts[index]
        for activations in space.activations.layers(index):
            layer = activations.layer
            for site in SITES:
                direction, x = space.directions[layer, site], at_site(activations, site)
                rounded = rounding(layer, site, x, activations.rotation if site == "k" else None)
                error = rounded.float() - x.float()
                at = tokens_at(prompt, direction.position)
                exact, noise = (vectors(activations, site, y)[at].double().cpu().numpy() for y in (x, error))
                null = None if nulls is None else nulls[exact.shape[1]]
                moments[layer, site].add(exact, noise, direction.basis, null, heads.get((layer, site)))
    return moments


def _with_contrasts(
    data: xr.Dataset, beside: dict[str, tuple[FittedSpace, dict[tuple[int, Site], Moments]]]
) -> xr.Dataset:
    """Null (b), and whether the ratio is above it."""
    layers, sites = data.layer.values, data.site.values
    ratios = np.full((len(beside), len(layers), len(sites)), np.nan)
    for index, (other, moments) in enumerate(beside.values()):
        for row, layer in enumerate(layers):
            for column, site in enumerate(sites):
                direction = other.directions[layer, site]
                if direction.defined and moments[layer, site].e2.sum() > 0:
                    found = quantities(moments[layer, site], direction.gap, direction.basis)
                    ratios[index, row, column] = found["ratio"]
    highest = np.where(np.isfinite(ratios), ratios, -np.inf).max(0, initial=-np.inf)
    decided = (data.status.values == "ok") & np.isfinite(highest)
    specific = np.where(decided, np.where(data.ratio.values > highest, "yes", "no"), "undetermined")
    return data.assign(
        contrast_ratio=(("contrast", "layer", "site"), ratios),
        contrast_highest=(("layer", "site"), np.where(np.isfinite(highest), highest, np.nan)),
        specific=(("layer", "site"), specific.astype(object)),
    ).assign_coords(contrast=np.array(list(beside), dtype=object))


def _table(
    space: FittedSpace,
    rounding: Rounding,
    moments: dict[tuple[int, Site], Moments],
    nulls: dict[int, NDArray[np.float64]],
) -> xr.Dataset:
    geometry = space.model.geometry
    layers = geometry.stores
    cells = [[_cell(space, rounding, moments[layer, site], site, layer, nulls) for site in SITES] for layer in layers]
    data = xr.Dataset(
        {name: (("layer", "site"), np.array([[cell[name] for cell in row] for row in cells])) for name in cells[0][0]},
        coords={"layer": list(layers), "site": list(SITES)},
    )
    kv = [[_channels(space, moments, layer, s) for s in _STORED] for layer in layers]
    resid = [_channels(space, moments, layer, "resid") for layer in layers]
    heads = [[_heads(space, moments, layer, s) for s in _STORED] for layer in layers]
    channels: dict[str, Any] = {
        f"head_{name}": (("layer", "kv", "head"), np.array([[h[name] for h in row] for row in heads]))
        for name in heads[0][0]
    }
    for name in resid[0]:
        channels[f"channel_{name}"] = (("layer", "kv", "channel"), np.array([[c[name] for c in row] for row in kv]))
        channels[f"resid_channel_{name}"] = (("layer", "resid_channel"), np.array([c[name] for c in resid]))
    return data.assign(channels).assign_coords(
        kv=["k", "v"],
        head=np.arange(geometry.kv_heads),
        channel=np.arange(geometry.channels),
        resid_channel=np.arange(geometry.d_model),
    )


def _cell(
    space: FittedSpace,
    rounding: Rounding,
    moments: Moments,
    site: Site,
    layer: int,
    nulls: dict[int, NDArray[np.float64]],
) -> dict[str, Any]:
    direction = space.directions[layer, site]
    numbers = quantities(moments, direction.gap, direction.basis, nulls[len(direction.gap)])
    status, reason = "ok", ""
    p = float(space.data.p.sel(layer=layer, site=site))
    if not direction.defined:
        status, reason = (
            "undefined",
            f"harmful and harmless means coincide, but for rounding, at {'every position' if len(space.tried) > 1 else space.tried[0]}",
        )
    elif rounding.scheme(layer, site) is None:
        what = {"k": "keys", "v": "values", "resid": "keys, by whose scheme the residual stream is rounded,"}[site]
        status, reason = "undefined", f"the recipe leaves {what} of this layer exact"
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


def _heads(
    space: FittedSpace, moments: dict[tuple[int, Site], Moments], layer: int, site: Site
) -> dict[str, NDArray[np.float64]]:
    direction = space.directions[layer, site]
    heads = head_bases(direction.basis, space.model.geometry.kv_heads)
    return head_quantities(moments[layer, site], direction.gap, heads)


def _channels(
    space: FittedSpace, moments: dict[tuple[int, Site], Moments], layer: int, site: Site
) -> dict[str, NDArray[np.float64]]:
    direction = space.directions[layer, site]
    return channel_quantities(moments[layer, site], direction.gap, direction.basis, direction.defined)
