"""What of a cache must be rounded for refusals to be lost: layers, sites, granularity, channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import numpy as np
import xarray as xr
from einops import reduce
from numpy.typing import NDArray

from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.models.reading import read
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Site
from kvgeom.quant.scheme import Scheme
from kvgeom.results import Result
from kvgeom.stats import mcnemar

Families = Mapping[str, Mapping[str, Recipe]]
#: Share of a layer's channels, those with the largest root mean square, that is rounded apart from the others. These are not the
#: outliers of :mod:`kvgeom.geometry.channels`, of which a layer may have none.
LARGEST_SHARE = 0.05


@dataclass(frozen=True, repr=False)
class Ablation(Result):
    """Flips under recipes that round a part of the cache, against rounding all of it.

    ``data`` has the dimension ``recipe`` and the variables ``family``, ``flips`` (of the prompts refused
    unquantized) with ``flips_complied`` and ``flips_degenerate``, ``flip_rate`` with its Wilson interval ``ci_low``,
    ``ci_high``, ``margin_drop`` (nats, mean), and ``p``: exact McNemar p-value against the reference recipe.

    ``meta`` holds ``reference``, ``prompts``, ``placement`` and what the families are about.
    """

    kind: ClassVar[str] = "ablation"

    def summary(self) -> str:
        worst = self.data.isel(recipe=int(self.data.flips.argmax()))
        return f"{self.data.sizes['recipe']} recipes, most flips {int(worst.flips)} of {self.meta['prompts']}"


def ablate(
    base: Baseline,
    families: Families,
    *,
    reference: str,
    placement: Placement | None = None,
    progress: bool = True,
    title: str = "ablations",
) -> Ablation:
    """Run families of recipes on the prompts refused unquantized.

    Parameters
    ----------
    base : Baseline
    families : mapping of family to (mapping of name to Recipe)
    reference : str
        Name of the recipe that the others are compared with.
    placement : Placement, optional

    Raises
    ------
    InputError
        If two recipes have one name, or the reference is none of them.
    """
    recipes = {name: recipe for family in families.values() for name, recipe in family.items()}
    if len(recipes) < sum(map(len, families.values())) or reference not in recipes:
        raise InputError(f"names {list(recipes)} with reference {reference!r}: give every recipe a name of its own")
    outcomes = evaluate(
        base.model, recipes, base, placement=placement, refused_only=True, progress=progress, title=title
    )
    return ablation_of(outcomes, families, reference=reference)


def ablation_of(outcomes: Outcomes, families: Mapping[str, Iterable[str]], *, reference: str) -> Ablation:
    """The ablation that follows from responses under recipes, named by family, among others."""
    outcomes = outcomes.of_refused()
    names = [name for members in families.values() for name in members]
    n, drops = outcomes.data.sizes["prompt"], outcomes.margin_drops(names)
    rows = {name: outcomes.flipped(name) for name in names}
    columns = {
        "family": np.array([family for family, members in families.items() for _ in members], dtype=object),
        **outcomes.flip_columns(names),
        "margin_drop": drops.mean(0) if n else np.full(len(names), np.nan),
        "p": [mcnemar(rows[name], rows[reference]) for name in names],
    }
    data = xr.Dataset({k: ("recipe", v) for k, v in columns.items()}, coords={"recipe": names})
    return Ablation(data, {**outcomes.made_by, "reference": reference, "prompts": n})


def whole_cache(n_layers: int, scheme: Scheme) -> dict[str, dict[str, Recipe]]:
    """Families that ask what of the whole cache matters: granularity, keys or values, first and last layers.

    Parameters
    ----------
    n_layers : int
    scheme : Scheme
        Per-tensor; the reference is called ``"all layers"``.
    """
    more, less = replace(scheme, bits=min(8, scheme.bits + 1)), replace(scheme, bits=max(2, scheme.bits - 1))
    some = sorted({1, 2, 4, 8, 16, 32, 64} & set(range(1, n_layers)))

    def over(
        layers: Sequence[int] | None = None, keys: Scheme | None = scheme, values: Scheme | None = scheme
    ) -> Recipe:
        chosen = range(n_layers) if layers is None else layers
        return Recipe(tuple((keys, values) if layer in chosen else (None, None) for layer in range(n_layers)))

    channel, group = replace(scheme, granularity="channel"), replace(scheme, granularity="group", group_size=64)
    return {
        "granularity": {
            "all layers": over(),
            "per-channel": over(keys=channel, values=channel),
            "group-64": over(keys=group, values=group),
        },
        "site": {
            "keys only": over(values=None),
            "values only": over(keys=None),
            f"K{more.bits} V{less.bits}": over(keys=more, values=less),
            f"K{less.bits} V{more.bits}": over(keys=less, values=more),
        },
        "first layers": {f"first {k}": over(range(k)) for k in some},
        "last layers": {f"last {k}": over(range(n_layers - k, n_layers)) for k in some},
    }


def channel_magnitudes(base: Baseline, placement: Placement | None = None) -> dict[Site, NDArray[np.float64]]:
    """Root mean square of every channel as it is rounded, ``[layers, channels]``, over the refused prompts.

    Costs one pass per prompt.
    """
    model, placement = base.model, placement or Placement()
    shape = (model.geometry.layers, model.geometry.channels)
    sums: dict[Site, NDArray[np.float64]] = {site: np.zeros(shape) for site in get_args(Site)}
    tokens = 0
    for index in base.refused:
        tokens += len(base.prompts[index])
        for layer, activations in enumerate(read(model, base.prompts[index], placement.where)):
            for site, total in sums.items():
                squares = getattr(activations, site).double() ** 2
                total[layer] += reduce(squares, "1 h t d -> (h d)", "sum").cpu().numpy()
    return {site: np.sqrt(total / max(tokens, 1)) for site, total in sums.items()}


def is_channel_subset(name: str) -> bool:
    """Whether a recipe's name is one of those of :func:`channel_subsets`."""
    return name in ("every channel", "largest", "all but the largest", "low magnitude") or name.startswith("random ")


def channel_subsets(
    magnitudes: Mapping[Site, NDArray[np.float64]],
    scheme: Scheme,
    layers: Sequence[int],
    *,
    share: float = LARGEST_SHARE,
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, dict[str, Recipe]]:
    """One family: only some channels of some layers are rounded, with the scales of the whole tensor.

    The largest channels of each layer and site, all others, as many of the smallest, and as many drawn at random from all
    but the largest, several times.

    Parameters
    ----------
    magnitudes : mapping of site to array [layers, channels]
        From :func:`channel_magnitudes`.
    scheme : Scheme
    layers : sequence of int
    share : float
        Share of the channels that count as the largest; at least one channel does.
    repeats, seed : int
        Of the random subsets.
    """
    rng = np.random.default_rng(seed)
    n_layers, channels = magnitudes["k"].shape
    count = max(1, round(share * channels))
    order = {site: np.argsort(-m, axis=1, kind="stable") for site, m in magnitudes.items()}

    def drawn() -> dict[Site, NDArray[np.integer]]:
        return {s: np.stack([rng.choice(row[count:], count, replace=False) for row in o]) for s, o in order.items()}

    def rounded(sets: Mapping[Site, NDArray[np.integer]] | None, layer: int) -> tuple[Scheme, Scheme]:
        return (scheme, scheme) if sets is None else (scheme.only(sets["k"][layer]), scheme.only(sets["v"][layer]))

    chosen: dict[str, Mapping[Site, NDArray[np.integer]] | None] = {
        "every channel": None,
        "largest": {site: o[:, :count] for site, o in order.items()},
        "all but the largest": {site: o[:, count:] for site, o in order.items()},
        "low magnitude": {site: o[:, -count:] for site, o in order.items()},
        **{f"random {n + 1}": drawn() for n in range(repeats)},
    }
    return {
        "channels": {
            name: Recipe(tuple(rounded(sets, layer) if layer in layers else (None, None) for layer in range(n_layers)))
            for name, sets in chosen.items()
        }
    }
