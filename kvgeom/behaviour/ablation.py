"""What of a cache must be rounded for refusals to be lost: layers, sites, granularity, channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import numpy as np
import xarray as xr
from einops import reduce
from numpy.typing import NDArray

from kvgeom.checks import MOST_DRAWS, as_seed, suggests, whole
from kvgeom.errors import unknown
from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.condition import Condition
from kvgeom.evaluation.evaluate import run_conditions
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.models.reading import read
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Site
from kvgeom.quant.scheme import Scheme
from kvgeom.results import Result
from kvgeom.stats import against
from kvgeom.words import interval_text, text_table

#: The condition of :func:`whole_cache` that the others are compared with, and that of :func:`channel_subsets`.
ALL_LAYERS, EVERY_CHANNEL = "all layers", "every channel"
#: Families of conditions of :func:`whole_cache`, in order.
WHOLE_CACHE = ("granularity", "site", "first layers", "last layers")
#: This share of a layer's channels, those with the largest root mean square, is rounded apart from the others.
LARGEST_SHARE = 0.05
#: Channels of each layer.
_Sets = list[NDArray[np.integer]]


@dataclass(frozen=True, repr=False)
class Ablation(Result):
    """Flips under recipes that round a part of the cache, against rounding all of it.

    ``data`` has the dimension ``recipe`` and the variables ``family``, ``flips`` (of the prompts refused
    with an exact cache) with ``flips_complied``, ``flips_evaded`` and ``flips_degenerate``, ``flip_rate`` with its Wilson interval
    ``ci_low``, ``ci_high``, ``margin_drop`` (nats, mean), and ``p``: exact McNemar p-value against the reference
    recipe, adjusted for the number of recipes (:func:`~kvgeom.stats.holm`).

    ``meta`` holds ``reference``, ``prompts``, ``placement`` and what the families are about.
    """

    kind: ClassVar[str] = "ablation"

    def summary(self) -> str:
        worst = self.data.isel(recipe=int(self.data.flips.argmax()))
        return f"{self.data.sizes['recipe']} recipes, most flips {int(worst.flips)} of {self.meta['prompts']}"

    def to_text(self) -> str:
        """One row for each recipe, with its family and McNemar p-value against the reference."""
        return ablation_text(self)


def ablation_text(*ablations: Ablation) -> str:
    """The rows of some ablations as one table."""
    rows = [
        (
            row["family"],
            row["recipe"],
            f"{row['flips']:.0f} of {found.meta['prompts']}",
            interval_text(row["ci_low"], row["ci_high"]),
            row["flips_complied"],
            row["flips_evaded"],
            row["flips_degenerate"],
            "reference" if row["recipe"] == found.meta["reference"] else f"{row['p']:.2g}",
        )
        for found in ablations
        for row in found.records()
    ]
    return text_table(("rounded", "what", "lost", "95 %", "comply", "evade", "break down", "p"), rows)


@suggests()
def ablate(
    base: Baseline, conditions: Mapping[str, Condition], *, reference: str, title: str = "ablations"
) -> Ablation:
    """Run conditions on the prompts refused with an exact cache.

    Parameters
    ----------
    base : Baseline
    conditions : mapping of name to Condition
        Their ``family`` says what is varied.
    reference : str
        Name of the condition that the others are compared with.

    Raises
    ------
    InputError
        If the reference is none of the conditions.
    """
    if reference not in conditions:
        raise unknown("reference", reference, conditions)
    outcomes = run_conditions(base, conditions, prompts=base.refused, title=title)
    families = list(dict.fromkeys(each.family for each in conditions.values()))
    return ablation_of(outcomes, families, reference=reference)


def ablation_of(outcomes: Outcomes, families: Sequence[str], *, reference: str) -> Ablation:
    """The ablation that follows from responses under conditions of some families, among others."""
    outcomes = outcomes.of_refused()
    names = [name for family in families for name in outcomes.names(family=family)]
    n, drops = outcomes.data.sizes["prompt"], outcomes.margin_drops(names)
    flipped = {name: outcomes.flipped(name) for name in names}
    columns = {
        "family": outcomes.data.family.sel(recipe=names).values,
        **outcomes.flip_columns(names),
        "margin_drop": drops.mean(0) if n else np.full(len(names), np.nan),
        "p": against(flipped, reference),
    }
    data = xr.Dataset({k: ("recipe", v) for k, v in columns.items()}, coords={"recipe": names})
    return Ablation(data, {**outcomes.made_by(names), "reference": reference, "prompts": n})


@suggests()
def whole_cache(
    n_layers: int,
    scheme: Scheme,
    placement: Placement | str | None = None,
    stores: Sequence[int] | None = None,
    sites: tuple[str, str] = ("keys", "values"),
) -> dict[str, Condition]:
    """Conditions that ask what of the whole cache matters: granularity, keys or values, first and last layers.

    Parameters
    ----------
    n_layers : int
    scheme : Scheme
        Per-tensor; the reference is called :data:`ALL_LAYERS`.
    placement : Placement, "cache" or "paper", optional
    stores : sequence of int, optional
        The layers that store keys and values, first to last; all by default.
    sites : (str, str)
        What the cache holds at the two sites of a layer.
    """
    placement = Placement.parse(placement or "cache")
    stores = range(n_layers) if stores is None else stores
    more, less = replace(scheme, bits=min(8, scheme.bits + 1)), replace(scheme, bits=max(2, scheme.bits - 1))
    some = sorted({1, 2, 4, 8, 16, 32, 64} & set(range(1, len(stores))))

    def over(
        family: str,
        layers: Sequence[int] | None = None,
        keys: Scheme | None = scheme,
        values: Scheme | None = scheme,
        granularity: str = "tensor",
    ) -> Condition:
        chosen = stores if layers is None else layers
        recipe = Recipe(tuple((keys, values) if layer in chosen else (None, None) for layer in range(n_layers)))
        return Condition(recipe, placement, family=family, granularity=granularity, bits=scheme.bits)

    channel, group = replace(scheme, granularity="channel"), replace(scheme, granularity="group", group_size=64)
    return {
        ALL_LAYERS: over("granularity"),
        "per-channel": over("granularity", keys=channel, values=channel, granularity="channel"),
        "group-64": over("granularity", keys=group, values=group, granularity="group"),
        f"{sites[0]} only": over("site", values=None),
        f"{sites[1]} only": over("site", keys=None),
        f"K{more.bits} V{less.bits}": over("site", keys=more, values=less),
        f"K{less.bits} V{more.bits}": over("site", keys=less, values=more),
        **{f"first {k}": over("first layers", stores[:k]) for k in some},
        **{f"last {k}": over("last layers", stores[-k:]) for k in some},
    }


@suggests()
def channel_magnitudes(base: Baseline, placement: Placement | str | None = None) -> dict[Site, NDArray[np.float64]]:
    """Root mean square of every channel as it is rounded, ``[layers, channels]``, over the refused prompts.

    NaN where a layer stores nothing, or fewer channels than the widest. Costs one pass per prompt.
    """
    model, placement = base.model, Placement.parse(placement or "cache")
    geometry = model.geometry
    sums: dict[Site, NDArray[np.float64]] = {}
    for site in get_args(Site):
        widths = {layer: math.prod(geometry.shape(layer, site)) for layer in geometry.stores}
        sums[site] = np.full((geometry.layers, max(widths.values())), np.nan)
        for layer, width in widths.items():
            sums[site][layer, :width] = 0.0
    tokens = 0
    for index in base.refused:
        tokens += len(base.prompts[index])
        for activations in read(model, base.prompts[index], placement.where):
            for site, total in sums.items():
                squares = getattr(activations, site).double() ** 2
                found = reduce(squares, "1 h t d -> (h d)", "sum").cpu().numpy()
                total[activations.layer, : len(found)] += found
    return {site: np.sqrt(total / max(tokens, 1)) for site, total in sums.items()}


@suggests()
def channel_subsets(
    magnitudes: Mapping[Site, NDArray[np.float64]],
    scheme: Scheme,
    layers: Sequence[int],
    placement: Placement | str | None = None,
    *,
    share: float = LARGEST_SHARE,
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, Condition]:
    """Conditions in which only some channels of some layers are rounded, with the scales of the whole tensor.

    The largest channels of each layer and site, all others, as many of the smallest, and as many drawn at random from all
    but the largest, several times. Their family is ``"channels"``.

    Parameters
    ----------
    magnitudes : mapping of site to array [layers, channels]
        From :func:`channel_magnitudes`.
    scheme : Scheme
    layers : sequence of int
    placement : Placement, "cache" or "paper", optional
    share : float
        Share of the channels that count as the largest; at least one channel does.
    repeats, seed : int
        Of the random subsets.
    """
    repeats = whole("repeats", repeats, 0, MOST_DRAWS)
    rng = np.random.default_rng(as_seed(seed))
    n_layers = len(magnitudes["k"])
    order: dict[Site, _Sets] = {site: [_largest_first(row) for row in m] for site, m in magnitudes.items()}

    def each(choose: Callable[[NDArray[np.integer], int], NDArray[np.integer]]) -> dict[Site, _Sets]:
        return {
            site: [choose(row, max(1, round(share * len(row)))) if len(row) else row for row in rows]
            for site, rows in order.items()
        }

    def rounded(sets: Mapping[Site, _Sets] | None, layer: int) -> tuple[Scheme, Scheme]:
        return (scheme, scheme) if sets is None else (scheme.only(sets["k"][layer]), scheme.only(sets["v"][layer]))

    chosen: dict[str, tuple[int | None, Mapping[Site, _Sets] | None]] = {
        EVERY_CHANNEL: (None, None),
        "largest": (None, each(lambda row, count: row[:count])),
        "all but the largest": (None, each(lambda row, count: row[count:])),
        "low magnitude": (None, each(lambda row, count: row[-count:])),
        **{
            f"random {n + 1}": (n, each(lambda row, count: rng.choice(row[count:], count, replace=False)))
            for n in range(repeats)
        },
    }
    return {
        name: Condition(
            Recipe(tuple(rounded(sets, layer) if layer in layers else (None, None) for layer in range(n_layers))),
            Placement.parse(placement or "cache"),
            family="channels",
            layer=layers[0] if len(layers) == 1 else None,
            granularity=scheme.granularity,
            bits=scheme.bits,
            draw=draw,
        )
        for name, (draw, sets) in chosen.items()
    }


def _largest_first(row: NDArray[np.floating]) -> NDArray[np.integer]:
    """The channels of a layer that it has, the largest first."""
    order: NDArray[np.integer] = np.argsort(-row, kind="stable")  # NaN last
    return order[: int(np.isfinite(row).sum())]
