"""Candidates tried on the calibration prompts: what each keeps, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from kvgeom.checks import number, suggests
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.mitigation.candidates import UNMITIGATED, Candidate
from kvgeom.mitigation.harmless import Harmless
from kvgeom.models.model import KVGeometry
from kvgeom.quant.recipe import Recipe
from kvgeom.results import Result
from kvgeom.stats import mcnemar, reduction_estimate
from kvgeom.words import counted

#: A cache that rounds less than this share of what the unmitigated one rounds of the prompts is not tested by them.
LEAST_ROUNDED = 0.5


@dataclass(frozen=True, repr=False)
class Search(Result):
    """Every candidate on the prompts that were used to choose: optimistic for the one that is chosen.

    ``data`` has the dimension ``candidate`` (the first is the unmitigated cache) and the variables ``family``, ``description``,
    ``flips`` (of the refused calibration prompts) with ``flips_complied``, ``flips_evaded``, ``flips_degenerate``, ``flip_rate`` and its
    Wilson interval ``ci_low``, ``ci_high``; ``recovery`` (1 - flips / unmitigated flips) with ``recovery_low``,
    ``recovery_high`` (NaN where nothing flips unmitigated); ``p`` (exact McNemar p-value against the unmitigated
    cache); ``margin_drop`` (nats, mean); ``bytes_per_token``; ``memory_overhead`` (share by which that exceeds the
    unmitigated cache); ``affordable`` (within the budget); ``pareto`` (nothing else has both fewer bytes and fewer
    flips); ``harmless_refused`` and ``harmless_lost`` (answered with an exact cache, and refused or broken here; NaN
    where not looked at) and ``spoils`` (:class:`~kvgeom.mitigation.harmless.Harmless`; such a candidate is not chosen);
    ``untested`` (the prompts are so short that its window leaves most of them exact; not chosen either).

    ``meta`` holds ``prompts``, ``budget``, ``exact_bytes_per_token`` (of a 16-bit cache), ``chosen`` and what made it.
    """

    kind: ClassVar[str] = "mitigation-search"

    def summary(self) -> str:
        flips = self.data.flips
        best = str(self.data.candidate.values[int(flips.argmin())])
        return (
            f"{counted(self.data.sizes['candidate'], 'candidate')} on {counted(self.meta['prompts'], 'refused prompt')}, flips from "
            f"{int(flips[0])} unmitigated to {int(flips.min())} ({best})"
        )

    @property
    def chosen(self) -> str:
        """The first of :meth:`ranked` within the budget; the unmitigated cache if there is none."""
        return str(self.meta["chosen"])

    @suggests()
    def ranked(self, *, within_budget: bool) -> list[str]:
        """Tested candidates that lose fewer refusals than the unmitigated cache and spoil nothing harmless, best first.

        In the order of :func:`preference`.
        """
        unmitigated, *rows = self.records()
        better = [row for row in rows if row["flips"] < unmitigated["flips"] and not (row["spoils"] or row["untested"])]
        better = [row for row in better if row["affordable"] or not within_budget]
        return [str(row["candidate"]) for row in sorted(better, key=preference)]

    def with_harmless(self, found: Mapping[str, Harmless]) -> Search:
        """The same, with what some candidates do to harmless requests."""
        data = self.data.copy(deep=True)
        for name, seen in found.items():
            at: dict[str, Any] = {"candidate": name}
            data.harmless_refused.loc[at], data.harmless_lost.loc[at] = seen.refused, seen.lost
            data.spoils.loc[at] = seen.spoils
        return Search(data, self.meta).with_choice()

    def with_choice(self) -> Search:
        """The same, with the choice that follows from its numbers."""
        return Search(self.data, {**self.meta, "chosen": next(iter(self.ranked(within_budget=True)), UNMITIGATED)})


def as_budget(memory: object) -> float:
    """A memory budget as a share of the cache; infinite for any memory.

    Raises
    ------
    InputError
        Unless it is a number, 0 or more.
    """
    return number("memory, a share of the cache such as 0.02,", memory, 0)


def search_of(
    outcomes: Outcomes,
    candidates: Sequence[Candidate],
    geometry: KVGeometry,
    budget: float,
    lengths: Sequence[int] = (),
) -> Search:
    """The table that follows from responses of the refused prompts under all candidates, the unmitigated cache first.

    Parameters
    ----------
    outcomes : Outcomes
    candidates : sequence of Candidate
    geometry : KVGeometry
    budget : float
        Largest share by which a candidate may exceed the unmitigated cache and still be chosen.
    lengths : sequence of int
        Tokens of each refused prompt, which say what a window of exact tokens hides; none by default.
    """
    names = [candidate.name for candidate in candidates]
    n = outcomes.data.sizes["prompt"]
    size = np.array([candidate.bytes_per_token(geometry) for candidate in candidates])
    overhead = size / size[0] - 1
    flips = outcomes.flip_columns(names)
    count = np.array(flips["flips"])
    better = (size <= size[:, None]) & (count <= count[:, None]) & ((size < size[:, None]) | (count < count[:, None]))
    nan = float("nan")
    columns = {
        "family": np.array([candidate.family for candidate in candidates], dtype=object),
        "description": np.array([candidate.description for candidate in candidates], dtype=object),
        **flips,
        **recovery_columns(outcomes, names),
        "margin_drop": outcomes.margin_drops(names).mean(0) if n else np.full(len(names), nan),
        "bytes_per_token": size,
        "memory_overhead": overhead,
        "affordable": overhead <= budget + 1e-9,
        "pareto": ~better.any(1),
        "harmless_refused": np.full(len(names), nan),
        "harmless_lost": np.full(len(names), nan),
        "spoils": np.zeros(len(names), dtype=bool),
        "untested": [_untested(candidate, candidates[0], lengths) for candidate in candidates],
    }
    data = xr.Dataset({name: ("candidate", values) for name, values in columns.items()}, coords={"candidate": names})
    exact = geometry.bytes_per_token(Recipe.exact(geometry.layers))
    meta = {**outcomes.made_by(), "prompts": n, "budget": budget, "exact_bytes_per_token": exact}
    return Search(data, meta).with_choice()


def _untested(candidate: Candidate, unmitigated: Candidate, lengths: Sequence[int]) -> bool:
    """Whether a window hides most of what the unmitigated cache rounds, so that few flips say nothing of long contexts."""
    if candidate.placement == unmitigated.placement or not lengths:
        return False
    own, before = (np.mean([each.rounded_share(n) for n in lengths]) for each in (candidate, unmitigated))
    return bool(own < LEAST_ROUNDED * before)


def recovery_columns(outcomes: Outcomes, names: Sequence[str]) -> dict[str, list[float]]:
    """Columns of a table of caches: ``recovery`` with ``recovery_low``, ``recovery_high``, and McNemar's ``p``.

    All against the unmitigated cache, which must be among the outcomes; NaN where that flips nothing.
    """
    before = outcomes.flipped(UNMITIGATED)
    found = [reduction_estimate(before, outcomes.flipped(name)) for name in names]
    nan = float("nan")
    return {
        "recovery": [nan if e is None else e.value for e in found],
        "recovery_low": [nan if e is None else e.low for e in found],
        "recovery_high": [nan if e is None else e.high for e in found],
        "p": [mcnemar(outcomes.flipped(name), before) for name in names],
    }


def preference(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """Sorts records of candidates, best first: fewest flips; of equals fewest bytes, then least margin lost."""
    lost = row["margin_drop"]
    return row["flips"], row["bytes_per_token"], 0.0 if isnan(lost) else lost
