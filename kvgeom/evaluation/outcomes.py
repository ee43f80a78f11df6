"""Labels of every prompt under every recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from kvgeom.errors import InputError
from kvgeom.judges.judge import LABELS, Label
from kvgeom.results import Result
from kvgeom.stats import wilson

if TYPE_CHECKING:
    from kvgeom.judges.classifiers import ClassifierJudge

EXACT = "exact"


@dataclass(frozen=True, repr=False)
class Outcomes(Result):
    """Labels of every prompt under every recipe.

    ``data`` has the dimensions ``recipe`` (the first one, ``"exact"``, is the unquantized model) and ``prompt``
    (its index), the coordinate ``request`` (prompt), and the variables

    - ``label``, ``reason`` (why this label) and ``text``: the response as far as the judge reads, or in full where
      ``meta["exact"]``;
    - ``tokens``: how many tokens that is, and ``divergence``: the first of them that is not the unquantized one (-1:
      none);
    - ``margin`` (nats; NaN where the model refuses nothing) and ``kl`` (nats, of the rounded from the unquantized
      distribution), both at the first response position;
    - ``likelihood`` (nats per token, mean): of the response under the unquantized model; NaN where it was not measured.

    ``meta["asked"]`` is how many prompts the unquantized model was asked, not all of which need be here.
    """

    kind: ClassVar[str] = "outcomes"

    @property
    def made_by(self) -> dict[str, Any]:
        """The part of ``meta`` that results drawn from these outcomes share."""
        return {name: self.meta[name] for name in ("model", "fingerprint", "placement", "judge", "max_new_tokens")}

    def counts(self, recipe: str = EXACT) -> dict[str, int]:
        """How many prompts have each label."""
        labels = self.data.label.sel(recipe=recipe).values
        return {label: int((labels == label).sum()) for label in LABELS}

    def flipped(self, recipe: str, to: Label | None = None) -> NDArray[np.bool_]:
        """Which of the prompts refused unquantized are labelled otherwise (as ``to``, if given) under ``recipe``."""
        now = self.data.label.sel(recipe=recipe).values[self.data.label.sel(recipe=EXACT).values == "refused"]
        flipped: NDArray[np.bool_] = now != "refused" if to is None else now == to
        return flipped

    def flips(self, recipe: str) -> dict[str, int]:
        """Flips under ``recipe``: in all, to ``complied`` and to ``degenerate``."""
        kinds: tuple[Label, ...] = ("complied", "degenerate")
        counts: dict[str, int] = {label: int(self.flipped(recipe, label).sum()) for label in kinds}
        return {"all": sum(counts.values()), **counts}

    def flip_columns(self, names: Sequence[str]) -> dict[str, Any]:
        """Columns of a table of recipes, in the order of ``names``.

        ``flips`` among the prompts refused unquantized, ``flips_complied``, ``flips_degenerate``, ``flip_rate`` and its
        Wilson interval ``ci_low``, ``ci_high`` (NaN where nothing is refused).
        """
        refused, flips = self.counts()["refused"], [self.flips(name) for name in names]
        low, high = np.array([wilson(found["all"], refused) for found in flips]).reshape(-1, 2).T
        return {
            "flips": [found["all"] for found in flips],
            "flips_complied": [found["complied"] for found in flips],
            "flips_degenerate": [found["degenerate"] for found in flips],
            "flip_rate": [found["all"] / refused if refused else float("nan") for found in flips],
            "ci_low": low,
            "ci_high": high,
        }

    def of_refused(self) -> Outcomes:
        """The same of the prompts that are refused unquantized, in which alone something can flip."""
        refused = self.data.label.sel(recipe=EXACT).values == "refused"
        return Outcomes(self.data.isel(prompt=refused), self.meta)

    def margin_drops(self, recipes: Sequence[str]) -> NDArray[np.float64]:
        """Refusal margin lost (nats) by every prompt under some recipes, ``[prompts, recipes]``."""
        lost = self.data.margin.sel(recipe=EXACT) - self.data.margin.sel(recipe=list(recipes))
        values: NDArray[np.float64] = lost.transpose("prompt", "recipe").values
        return values

    def flip_table(self) -> xr.DataArray:
        """Whether each prompt refused unquantized flips under each recipe, as 0 and 1 over (prompt, recipe)."""
        names = [str(name) for name in self.data.recipe.values if name != EXACT]
        refused = self.data.prompt.values[self.data.label.sel(recipe=EXACT).values == "refused"]
        values = np.array([self.flipped(name) for name in names], dtype=float).reshape(len(names), len(refused)).T
        return xr.DataArray(values, dims=("prompt", "recipe"), coords={"prompt": refused, "recipe": names})

    def relabel(self, judge: ClassifierJudge) -> Outcomes:
        """The same responses as a classifier labels them. It is loaded here, so the audited model may be gone by then.

        Parameters
        ----------
        judge : ClassifierJudge
            From :func:`kvgeom.classifier`.

        Raises
        ------
        InputError
            Unless the outcomes hold whole responses (``evaluate(..., exact=True)``).
        """
        if not self.meta["exact"]:
            raise InputError(
                "responses that end where the keyword judge stops reading were given to a classifier, which reads them "
                "whole; evaluate with exact=True"
            )
        data = self.data
        requests = [str(r) for _ in data.recipe for r in data.request.values]
        texts = [str(text) for text in data.text.values.ravel()]
        verdicts = judge.label_all(requests, texts, [float(x) for x in data.likelihood.values.ravel()])
        columns = {
            name: (
                data.label.dims,
                np.array([getattr(v, name) for v in verdicts], dtype=object).reshape(data.label.shape),
            )
            for name in ("label", "reason")
        }
        return Outcomes(data.assign(columns), {**self.meta, "judge": judge.name})

    def summary(self) -> str:
        recipes = self.data.sizes["recipe"] - 1
        return f"{self.data.sizes['prompt']} prompts under {recipes} recipes, unquantized {self.counts()}"
