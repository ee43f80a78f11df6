"""The noise-sensitivity ratio of the safety subspace against the full space."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from kvgeom.checks import as_seed, at_coordinates, suggests, whole
from kvgeom.errors import InputError, KvgeomWarning
from kvgeom.geometry.activations import SITES, Site
from kvgeom.geometry.estimators import defined_at
from kvgeom.geometry.fitted import FittedSpace
from kvgeom.geometry.noise import NoiseSums, add_noise
from kvgeom.geometry.ratio import (
    ALPHA,
    above_all,
    channel_quantities,
    head_quantities,
    null_quantities,
    quantities,
    random_bases,
)
from kvgeom.geometry.rounding import DEFAULT_SCHEME, CacheSpec, Rounding
from kvgeom.outliers import OUTLIER_FACTOR
from kvgeom.progress import shown
from kvgeom.prompts.sets import concept_contrasts
from kvgeom.results import Result

if TYPE_CHECKING:
    from kvgeom.explorer.widget import Explorer

_STORED: tuple[Site, Site] = ("k", "v")
#: More random subspaces than this fill memory, and sharpen no quantile that is read.
MOST_NULLS = 100_000
#: Pairs of each contrast of null (b): as many as leave capture, ratio, nulls and first order at ten forward passes.
CONTRAST_PAIRS = 16
#: Contrasts that it takes: to be above all of them happens to one of twenty of a kind.
ENOUGH_CONTRASTS = round(1 / ALPHA) - 1


@dataclass(frozen=True, repr=False)
class Sensitivity(Result):
    """How much more rounding noise the safety subspace sees, relative to its signal, than the whole space.

    ``data`` has the dimensions ``layer`` and ``site`` (``"k"``, ``"v"``, ``"resid"``) and the variables

    - ``ratio`` = ``signal_gap`` * ``noise_alignment`` (dimensionless), with ``ratio_low`` and ``ratio_high``, its 95 %
      interval over pairs of requests. Where ``status`` is ``"weak"`` there is only ``ratio_low``; ``ratio_high`` is NaN too
      where the interval of the signal reaches 0;
    - ``ratio_centered``: the same with the mean vector taken out of the full space; ``ratio_plugin``: what the class
      difference of the sample gives, whose square is too large by what chance adds to it;
    - ``nsr_safety``, ``nsr_full``: numerator and denominator of the ratio;
    - ``signal``, ``signal_low``, ``signal_high``: between-class variance, unbiased (it may be negative), with its 95 %
      interval; ``signal_share``: its share of the plug-in value; ``signal_p``: how often labels that are dealt anew within
      twins make a difference as large, times the number of positions that were tried;
    - ``separation``: cross-validated AUROC of harmful against harmless along the direction, and ``separation_p``;
    - ``null_low``, ``null_median``, ``null_high``, ``null_p``: 2.5, 50, 97.5 % of the ratio if the same class difference lay
      in a random direction (null a), and the share of such directions with as much noise; ``dealt_low``, ... the same
      along differences between labels dealt anew, which lie where requests differ;
    - ``alignment_null_low``, ``alignment_null_high``: 2.5 and 97.5 % of the noise alignment of random subspaces;
    - ``contrast_ratio`` over (contrast, layer, site): the ratio of contrasts between harmless requests (null b; NaN where
      there is no signal to be told from 0), ``contrast_highest`` the highest estimate among them (NaN where one of them
      has no signal, and so no bound), ``ratio_matched`` the estimate for safety from as few pairs, ``contrasts`` how many
      are defined, ``specific_p`` the rank of ``ratio_matched`` among them, and ``specific``: ``"yes"`` where that is at most
      0.05, ``"no"`` where it is not, ``"undetermined"`` where the ratio is weak or undefined, safety has no signal in as few pairs, or contrasts are fewer than 19;
    - ``status``: ``"ok"``, ``"weak"`` (the class difference cannot be told from chance, or the noise along it from 0; then
      there is no bound either) or ``"undefined"``; ``reason`` says why;
    - ``position``: which tokens were used (``"instruction"`` or ``"template-1"``, the last template token, ...).

    At every position, over ``(layer, site, at)``, of the difference of means: ``at_ratio``, ``at_ratio_low``,
    ``at_ratio_high``, ``at_signal_gap``, ``at_noise_alignment``, ``at_signal_p`` (of that position alone).

    Per KV head, over ``(layer, kv, head)`` for keys and values, the difference of means within the channels of the head:
    ``head_ratio``, ``head_ratio_low``, ``head_ratio_high``, ``head_signal_gap``, ``head_noise_alignment``.

    Per channel (U = the channel's unit vector) there are, over ``(layer, kv, channel)`` for keys and values
    and with the prefix ``resid_`` over ``(layer, resid_channel)`` for the residual stream: ``channel_ratio``,
    ``channel_ratio_low``, ``channel_magnitude`` (root mean square of x), ``channel_noise`` (root mean square of e) and
    ``channel_loading`` (squared component of the safety direction; sums to 1). See :meth:`channels`.

    ``to_frame()`` has a row for each layer and site; ``to_frame("positions")``, ``to_frame("heads")``,
    ``to_frame("channels")``, ``to_frame("resid_channels")`` and ``to_frame("contrasts")`` have the others.

    ``meta`` holds ``scheme``, ``placement``, ``kv_heads``, ``head_dim``, ``k``, ``contrasts``, ``contrast_pairs`` and
    ``outlier_factor`` (see :data:`kvgeom.outliers.OUTLIER_FACTOR`).
    """

    kind: ClassVar[str] = "sensitivity"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layers": ("layer", "site"),
        "positions": ("layer", "site", "at"),
        "heads": ("layer", "kv", "head"),
        "channels": ("layer", "kv", "channel"),
        "resid_channels": ("layer", "resid_channel"),
        "contrasts": ("contrast", "layer", "site"),
    }

    def channels(self, site: str) -> xr.Dataset:
        """The per-channel variables of one site, over (layer, channel): ``ratio``, ``ratio_low``, ``magnitude``, ``noise``, ``loading``."""
        at_coordinates(self.data, site=site)
        prefix = "resid_channel_" if site == "resid" else "channel_"
        names = {name: name.removeprefix(prefix) for name in map(str, self.data) if name.startswith(prefix)}
        picked = self.data[list(names)].rename(names)
        return picked.rename(resid_channel="channel") if site == "resid" else picked.sel(kv=site, drop=True)

    def explore(self) -> Explorer:
        """Layers and their channels to point at: the last line of a cell, or ``.save("x.html")``."""
        from kvgeom.explorer.payload import payload
        from kvgeom.explorer.widget import Explorer

        return Explorer(payload([self]))

    @property
    def conclusion(self) -> str:
        """What null (b) says of all layers and sites together: how many are above all contrasts, and how many would be by chance."""
        count = int(self.data.sizes.get("contrast", 0))
        if count < ENOUGH_CONTRASTS:
            return f"whether any of it is about safety is not decided: that takes {ENOUGH_CONTRASTS} contrasts, got {count}"
        said = self.data.specific.values.ravel()
        above, decided = int((said == "yes").sum()), int((said != "undetermined").sum())
        return (
            f"above all {count} harmless contrasts in {above} of {decided} layers and sites where that can be decided; were safety one "
            f"more contrast of the kind, it would be in up to {ALPHA * decided:.1f} of them"
        )

    def summary(self) -> str:
        what = f"{self.data.sizes['layer']} layers x {self.data.site.values.tolist()} under {self.meta['scheme']}"
        return f"ratio of {what}; {self.conclusion}" if "specific" in self.data else f"ratio of {what}"


@suggests()
def measure(
    space: FittedSpace,
    scheme: CacheSpec = DEFAULT_SCHEME,
    *,
    noise_pairs: int | None = None,
    contrasts: Any = None,
    contrast_pairs: int = CONTRAST_PAIRS,
    null_subspaces: int = 100,
    progress: bool = True,
    seed: int = 0,
) -> Sensitivity:
    """Rounding noise on the safety subspace against noise on everything, at every layer and site.

    Keys and values are rounded with scales over exactly the tokens that a cache would share them over, and only sums
    are kept. The residual stream is not stored in a cache: it is rounded as if it were, with the scheme of the layer's keys
    and no transform. A site that a recipe leaves exact has no rounding error and no ratio; its status is ``"undefined"``.
    Costs no forward pass over the prompts of the subspace, and one over those of the contrasts, the first time: by default
    19 contrasts of 16 pairs, which share one side, 320 prompts.

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
        :func:`kvgeom.prompts.sets.concept_contrasts` by default (left out, with a warning, where the model's tokenizer cannot tell them apart), ``()`` for none. To be above 19 of them is a
        one-sided test at 5 %, and fewer decide nothing.
    contrast_pairs : int
        Use so many pairs of each contrast; safety is compared with them as measured from as many.
    null_subspaces : int
        Random subspaces of null (a), 2 to :data:`MOST_NULLS`.
    seed : int
        Of these, and of labels that are dealt anew.

    Raises
    ------
    InputError
        For fewer than one noise pair, two pairs of a contrast or two random subspaces, or if ``scheme`` or contrasts cannot be
        read.
    """
    null_subspaces, seed = whole("null_subspaces", null_subspaces, 2, MOST_NULLS), as_seed(seed)
    noise_pairs = None if noise_pairs is None else whole("noise_pairs", noise_pairs, 1)
    contrast_pairs = whole("contrast_pairs", contrast_pairs, 2)
    rounding = Rounding.at(space.model, scheme, space.placement)
    geometry = space.model.geometry
    nulls = {
        width: random_bases(width, space.k, null_subspaces, seed) for width in {geometry.channels, geometry.d_model}
    }
    with shown(progress):
        own = NoiseSums(space, noise_pairs, nulls, seed)
        found = _contrasted(space, contrasts, contrast_pairs)
        others = {name: NoiseSums(other, noise_pairs, seed=seed) for name, other in found.items()}
        # Safety as the contrasts are measured, from as many pairs.
        matched = [NoiseSums(space.first(contrast_pairs), noise_pairs, seed=seed)] if others else []
        add_noise([own, *matched], rounding, "rounding noise")
        add_noise(list(others.values()), rounding, "rounding noise of contrasts")
    pairs = noise_pairs or len(space.activations.prompts)
    meta = {
        **space.meta,
        **rounding.made,
        "noise_prompts": len(space.prompts.harmful[:pairs]) + len(space.prompts.harmless[:pairs]),
        "seed": seed,
        "contrasts": list(others),
        "contrast_pairs": contrast_pairs,
        "outlier_factor": OUTLIER_FACTOR,
    }
    return Sensitivity(_with_contrasts(_table(own, rounding), matched, others), meta)


def _contrasted(space: FittedSpace, contrasts: Any, pairs: int) -> Mapping[str, FittedSpace]:
    """The contrasts of null (b); none, said in a warning, where the model cannot tell those that nobody chose apart."""
    if contrasts is not None:
        return space.contrasted(contrasts, pairs)
    try:
        return space.contrasted(concept_contrasts(), pairs)
    except InputError as error:
        warnings.warn(f"harmless contrasts (null b) are not measured: {error}", KvgeomWarning, stacklevel=5)
        return {}


def _with_contrasts(data: xr.Dataset, matched: list[NoiseSums], others: Mapping[str, NoiseSums]) -> xr.Dataset:
    """Null (b), and whether the ratio is above it."""
    layers, sites = data.layer.values, data.site.values
    values, raw = np.full((2, len(others), len(layers), len(sites)), np.nan)
    own = np.full((len(layers), len(sites)), np.nan)
    for row, column in np.ndindex(own.shape):
        layer, site = int(layers[row]), sites[column]
        for index, other in enumerate(others.values()):
            values[index, row, column], raw[index, row, column] = _value(other, layer, site)
        if matched:
            own[row, column] = _value(matched[0], layer, site)[1]
    count = (~np.isnan(raw)).sum(0)
    # Safety without a signal in so few pairs would rank above all: nothing is known of it.
    decided = (data.status.values == "ok") & np.isfinite(own) & (count > 0)
    p = np.full(own.shape, np.nan)
    for at in zip(*np.nonzero(decided), strict=True):
        p[at] = above_all(own[at], raw[(slice(None), *at)])
    specific = np.where(p <= ALPHA, "yes", np.where(count >= ENOUGH_CONTRASTS, "no", "undetermined"))
    highest = np.where(np.isnan(raw), -np.inf, raw).max(0, initial=-np.inf)
    dims = ("layer", "site")
    return data.assign(
        contrast_ratio=(("contrast", *dims), values),
        contrast_highest=(dims, np.where(np.isfinite(highest), highest, np.nan)),
        ratio_matched=(dims, np.where(np.isfinite(own), own, np.nan)),
        contrasts=(dims, count),
        specific_p=(dims, p),
        specific=(dims, np.where(decided, specific, "undetermined").astype(object)),
    ).assign_coords(contrast=np.array(list(others), dtype=object))


def _value(sums: NoiseSums, layer: int, site: Site) -> tuple[float, float]:
    """A ratio, NaN where it cannot be known, and the number to rank it by, NaN where it is undefined."""
    if not sums.space.directions[layer, site].defined:
        return float("nan"), float("nan")
    moments, contrast = sums.of(layer, site)
    if not moments.e2.sum() > 0:
        return float("nan"), float("nan")
    found = quantities(moments, contrast)
    return found["ratio"], found["raw"]


def _table(sums: NoiseSums, rounding: Rounding) -> xr.Dataset:
    space = sums.space
    geometry = space.model.geometry
    layers = geometry.stores
    found = {(layer, site): _cell(sums, rounding, site, layer) for layer in layers for site in SITES}
    columns: dict[str, Any] = {
        name: (("layer", "site"), np.array([[found[layer, site][0][name] for site in SITES] for layer in layers]))
        for name in found[layers[0], SITES[0]][0]
    }
    for name in found[layers[0], "k"][1]:
        rows = np.array([[found[layer, site][1][name] for site in _STORED] for layer in layers])
        columns[f"head_{name}"] = (("layer", "kv", "head"), rows)
    for name in found[layers[0], "k"][2]:
        kv = np.array([[found[layer, site][2][name] for site in _STORED] for layer in layers])
        columns[f"channel_{name}"] = (("layer", "kv", "channel"), kv)
        resid = np.array([found[layer, "resid"][2][name] for layer in layers])
        columns[f"resid_channel_{name}"] = (("layer", "resid_channel"), resid)
    for name, values in _positions(sums).items():
        columns[f"at_{name}"] = (("layer", "site", "at"), values)
    return xr.Dataset(
        columns,
        coords={
            "layer": list(layers),
            "site": list(SITES),
            "kv": list(_STORED),
            "head": np.arange(geometry.kv_heads),
            "channel": np.arange(geometry.channels),
            "resid_channel": np.arange(geometry.d_model),
            "at": list(space.positions),
        },
    )


def _cell(
    sums: NoiseSums, rounding: Rounding, site: Site, layer: int
) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
    """Numbers of one layer and site, of its heads, and of its channels."""
    space = sums.space
    direction = space.directions[layer, site]
    moments, contrast = sums.of(layer, site)
    numbers = quantities(moments, contrast)
    del numbers["raw"]
    status, reason = "ok", ""
    if not direction.defined:
        where = "every position" if len(space.tried) > 1 else space.tried[0]
        status, reason = "undefined", f"harmful and harmless means coincide, but for rounding, at {where}"
    elif rounding.scheme(layer, site) is None:
        what = {"k": "keys", "v": "values", "resid": "keys, by whose scheme the residual stream is rounded,"}[site]
        status, reason = "undefined", f"the recipe leaves {what} of this layer exact"
    elif moments.e2.sum() == 0:
        status, reason = "undefined", "rounding makes no error here"
    elif not np.isfinite(numbers["ratio"]):
        status = "weak"
        reason = (
            f"method {space.method!r} found its directions in all requests, so that none is left to say how large their signal is; "
            "method='mean' has a ratio"
            if np.isnan(numbers["signal"])
            else "rounding noise along the class difference cannot be told from 0: the ratio may be small"
            if numbers["signal_p"] <= ALPHA and numbers["signal"] > 0
            else f"the class difference cannot be told from chance ({100 * max(0.0, numbers['signal_share']):.0f} % of its square "
            f"is not chance, p {numbers['signal_p']:.2g})"
        )
    if status == "undefined":
        numbers = dict.fromkeys(numbers, float("nan"))
    cell = {
        **numbers,
        **null_quantities(moments, contrast, numbers["signal_gap"]),
        "separation": direction.separation.auroc,
        "separation_p": float(space.data.p.sel(layer=layer, site=site)),
        "status": status,
        "reason": reason,
        "position": direction.position,
    }
    heads = {} if site == "resid" else head_quantities(moments, contrast)
    return cell, heads, channel_quantities(moments, contrast, direction.basis, direction.defined)


def _positions(sums: NoiseSums) -> dict[str, NDArray[np.float64]]:
    """The ratio of the difference of means at every position, ``[layers, sites, positions]``."""
    space, names = sums.space, ("ratio", "ratio_low", "ratio_high", "signal_gap", "noise_alignment", "signal_p")
    layers = space.model.geometry.stores
    found = {name: np.full((len(layers), len(SITES), len(space.positions)), np.nan) for name in names}
    for row, layer in enumerate(layers):
        for column, site in enumerate(SITES):
            features, resolution = space.features(layer, site), space.resolution(layer, site)
            defined = defined_at(features, space.is_harmful, resolution)
            for at in np.flatnonzero(defined):
                moments, contrast = sums.of(layer, site, space.positions[at])
                if moments.e2.sum() > 0:
                    one = quantities(moments, contrast)
                    for name in names:
                        found[name][row, column, at] = one[name]
    return found
