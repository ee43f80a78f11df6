"""Which layers to keep in 16 bits: by what they cost the refusal margin, against simpler rules at equal memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import ClassVar, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from kvgeom.errors import ModelError
from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.geometry.attention import attention_to_request
from kvgeom.geometry.causal import patch_layers
from kvgeom.mitigation.candidates import UNMITIGATED, Candidate, protect
from kvgeom.mitigation.harmless import SIGNIFICANT
from kvgeom.models.model import KVGeometry
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.results import Result
from kvgeom.stats import mcnemar, wilson
from kvgeom.words import counted

#: Rules that draw layers at random, to compare with; fewer where a model has no three sets of layers that differ.
RANDOM_RULES = ("random 1", "random 2", "random 3")
#: What a comparison of rules says of choosing by attention. ``worse than causal``: it loses significantly more.
#: ``no better than random``: no less than any random draw, and more than the causal rule (both are as the paper claims).
#: ``better than random``: less than each of them. ``nothing``: the unmitigated cache loses nothing. ``not compared``:
#: attention of the model cannot be rebuilt.
AttentionClaim = Literal[
    "worse than causal", "no better than random", "better than random", "undetermined", "not compared", "nothing"
]


@dataclass(frozen=True, repr=False)
class LayerSelection(Result):
    """Flips that remain when the same number of layers is kept in 16 bits, chosen by different rules.

    ``data`` has the dimensions ``rule`` and ``kept`` (number of layers) and the variables ``flips`` (of the refused
    calibration prompts), ``flip_rate`` with its Wilson interval ``ci_low``, ``ci_high``, ``p`` (exact McNemar p-value
    against ``"causal"`` at the same number), ``layers`` (which, as text) and ``bytes_per_token``. The rules are

    - ``causal``: the layers that, rounded alone, take most of the refusal margin;
    - ``first``: the first ones;
    - ``attention``: where the last prompt token attends most to the request;
    - ``random 1``, ...: drawn, each time other ones; up to three times.

    ``meta`` holds ``order`` (every layer by every rule, best first), ``drawn`` (which rules draw at random), ``prompts`` and
    ``unmitigated`` (flips without any).
    """

    kind: ClassVar[str] = "layer-selection"

    @property
    def flips(self) -> dict[str, int]:
        """Flips at the largest number of layers, by rule; those drawn at random apart (:attr:`random_flips`)."""
        return {rule: count for rule, count in self._flips().items() if not is_random(rule)}

    @property
    def random_flips(self) -> list[int]:
        """Flips at the largest number of layers of each random draw."""
        return [count for rule, count in self._flips().items() if is_random(rule)]

    def _flips(self) -> dict[str, int]:
        at = self.data.isel(kept=-1)
        return {str(rule): int(at.flips.sel(rule=rule)) for rule in at.rule.values}

    @property
    def attention_claim(self) -> AttentionClaim:
        """What was found of the paper's claim that choosing layers by attention fails, at the largest number of layers."""
        if self.meta["unmitigated"] == 0:
            return "nothing"
        if "attention" not in self.data.rule:
            return "not compared"
        flips, drawn = self.flips, self.random_flips
        p = float(self.data.p.isel(kept=-1).sel(rule="attention"))
        if p < SIGNIFICANT and flips["attention"] > flips["causal"]:
            return "worse than causal"
        if flips["attention"] < min(drawn):
            return "better than random"
        # Where the causal rule loses as many, or nothing is lost, no rule is shown to be better than chance.
        as_claimed = flips["attention"] >= max(drawn) and flips["attention"] > max(0, flips["causal"])
        return "no better than random" if as_claimed else "undetermined"

    def summary(self) -> str:
        kept = int(self.data.kept[-1])
        flips = ", ".join(f"{rule} {int(self.data.flips.sel(rule=rule, kept=kept))}" for rule in self.data.rule.values)
        return f"{counted(kept, 'layer')} in 16 bits, flips left of {self.meta['unmitigated']}: {flips}"


def is_random(rule: str) -> bool:
    """Whether a rule of :class:`LayerSelection` draws layers at random, as something to compare with."""
    return rule in RANDOM_RULES


def layer_orders(base: Baseline, recipe: Recipe, placement: Placement) -> dict[str, list[int]]:
    """Every layer by every rule of :class:`LayerSelection`, best first.

    Margins are those of the first response token. Where it says nothing of refusal (no R), the divergence of its distribution
    stands for them. Under a placement whose prompt reads exact values they could not change, so they are measured there as if
    it read rounded ones.

    Costs, per refused prompt, two passes and half a pass for every layer.
    """
    model, stores = base.model, base.model.geometry.stores
    placement = placement if placement.one_pass else Placement()
    prompts = [base.prompts[index] for index in base.refused]

    def measure() -> list[float]:
        patched = patch_layers(
            model,
            prompts,
            {UNMITIGATED: recipe},
            base.refusal_tokens,
            placement=placement,
            title="layers by margin lost",
        )
        lost = patched.margin_drop if base.refusal_tokens else patched.data.kl
        return [float(drop) for drop in lost.mean(("prompt", "scheme")).values]

    key = {"measure": "margin lost by layer", "recipe": recipe.record(), "placement": str(placement)}
    drop = np.array(base.journal.remember(key, measure))
    rng = np.random.default_rng(base.run.seed)
    try:
        attention = {"attention": _descending(attention_to_request(model, prompts), stores)}
    except ModelError:  # attention of this model cannot be rebuilt: one rule fewer to compare with
        attention = {}
    return {
        "causal": _descending(drop, stores),
        "first": list(stores),
        **attention,
        **dict(zip(RANDOM_RULES, _drawn(stores, rng), strict=False)),
    }


def _drawn(stores: Sequence[int], rng: np.random.Generator) -> list[list[int]]:
    """Random orders whose sets of layers differ at every number that is compared; as many as there are rules and sets."""
    kept = counts(len(stores))
    enough = min(len(RANDOM_RULES), *(comb(len(stores), k) for k in kept))
    orders: list[list[int]] = []
    while len(orders) < enough:
        order = [int(layer) for layer in rng.permutation(stores)]
        if all({*order[:k]} != {*other[:k]} for other in orders for k in kept):
            orders.append(order)
    return orders


def counts(n_layers: int) -> tuple[int, ...]:
    """How many layers are kept in the comparison: about a twelfth, a sixth and a third of those that store something."""
    return tuple(sorted({max(1, round(n_layers / part)) for part in (12, 6, 3)}))


def protections(
    base: Candidate, orders: Mapping[str, Sequence[int]], kept: Sequence[int]
) -> dict[tuple[str, int], Candidate]:
    """A candidate for every rule and number of layers."""
    return {(rule, n): protect(base, order[:n], how=rule) for rule, order in orders.items() for n in kept}


def selection_of(
    outcomes: Outcomes,
    tried: Mapping[tuple[str, int], Candidate],
    orders: Mapping[str, Sequence[int]],
    geometry: KVGeometry,
) -> LayerSelection:
    """The comparison that follows from responses under the candidates of :func:`protections`, among others.

    Parameters
    ----------
    outcomes : Outcomes
        Of the refused prompts.
    tried : mapping of (rule, number of layers) to Candidate
    orders : mapping of rule to layers
    geometry : KVGeometry
    """
    rules, kept = list(orders), sorted({n for _, n in tried})
    n = outcomes.data.sizes["prompt"]
    flipped = {key: outcomes.flipped(candidate.name) for key, candidate in tried.items()}

    def grid(values: Mapping[tuple[str, int], object], dtype: type = float) -> NDArray[np.generic]:
        return np.array([[values[rule, count] for count in kept] for rule in rules], dtype=dtype)

    flips = {key: int(rows.sum()) for key, rows in flipped.items()}
    intervals = {key: wilson(count, n) for key, count in flips.items()}
    columns = {
        "flips": grid(flips, int),
        "flip_rate": grid({key: count / n if n else np.nan for key, count in flips.items()}),
        "ci_low": grid({key: low for key, (low, _) in intervals.items()}),
        "ci_high": grid({key: high for key, (_, high) in intervals.items()}),
        "p": grid({(rule, k): mcnemar(rows, flipped["causal", k]) for (rule, k), rows in flipped.items()}),
        "layers": grid({(rule, k): ", ".join(map(str, sorted(orders[rule][:k]))) for rule, k in tried}, object),
        "bytes_per_token": grid({key: c.bytes_per_token(geometry) for key, c in tried.items()}),
    }
    data = xr.Dataset(
        {name: (("rule", "kept"), values) for name, values in columns.items()}, coords={"rule": rules, "kept": kept}
    )
    meta = {
        **outcomes.made_by(),
        "order": {rule: list(order) for rule, order in orders.items()},
        "drawn": [rule for rule in orders if is_random(rule)],
        "prompts": n,
        "unmitigated": int(outcomes.flipped(UNMITIGATED).sum()),
    }
    return LayerSelection(data, meta)


def _descending(values: NDArray[np.floating], layers: Sequence[int]) -> list[int]:
    return [layers[at] for at in np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")]
