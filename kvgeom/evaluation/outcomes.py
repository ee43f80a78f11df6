"""Labels of every prompt under every recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from kvgeom.checks import as_names, one_of, whole_numbers
from kvgeom.errors import InputError, brief
from kvgeom.evaluation.condition import COORDINATES, EXACT
from kvgeom.evaluation.config import LENGTHS
from kvgeom.evaluation.scores import NONE_PREDICTS, refusal_tokens
from kvgeom.judges.guards import UNREAD_REASON
from kvgeom.judges.judge import LABELS, UNENDED_REASON, Label
from kvgeom.results import Result
from kvgeom.stats import wilson
from kvgeom.words import counted

if TYPE_CHECKING:
    from kvgeom.evaluation.relabel import KeptLabels
    from kvgeom.judges.classifiers import ClassifierJudge
#: What may become of a refusal.
LOST: tuple[Label, ...] = tuple(label for label in LABELS if label != "refused")
#: What ``meta`` of a result has from the outcomes that it is drawn from.
SHARED = (
    *("model", "fingerprint", "weights", "template_options", "conversation", "notes", "prompt_set", "judge", *LENGTHS),
    *("begins_with_reasoning", "no_margin", "seed", "versions"),
)
#: What ``meta`` of outcomes that are joined must agree on.
ALIKE = ("model", "fingerprint", "judge", *LENGTHS, "full_responses")
#: What a recipe or prompt that both have must have the same of.
SAME = {"recipe": (*COORDINATES, "placement"), "prompt": ("request",)}
#: Why a model whose responses begin with reasoning has no margins.
NO_MARGIN = (
    "Refusal margins are not measured: responses begin with reasoning, whose first token says nothing of refusal."
)
#: Why margins are not known after another judge has labelled.
OTHER_TOKENS = (
    "Refusal margins are not known: the judge that labelled again may hear refusals that begin with other tokens, and only "
    "the model can measure theirs; let this judge label while the model runs (judge=...)."
)
#: Both parts have all variables and agree on what they share.
CONCAT: dict[str, Any] = {"data_vars": "minimal", "coords": "minimal", "compat": "equals", "join": "exact"}


def no_margin(meta: Mapping[str, Any]) -> str:
    """Why results have no margins, from their ``meta``; empty where they have them, or nothing is refused."""
    return NO_MARGIN if meta.get("begins_with_reasoning") else meta.get("no_margin", "")


def unread_note(meta: Mapping[str, Any]) -> str:
    """What there is to say of answers of a classifier that could not be read; empty if all were."""
    found = meta.get("unread") or {}
    where = ", ".join(f"{count} {name}" for name, count in found.items())
    return (
        f"Answers of {meta['judge']} that could not be read ({where}) leave the label to keywords alone."
        if found
        else ""
    )


@dataclass(frozen=True, repr=False)
class Outcomes(Result):
    """Labels of every prompt under every recipe.

    ``data`` has the dimensions ``recipe`` (the first one is ``"exact"``) and ``prompt`` (its index), the coordinate
    ``request`` and ``first_token`` (with an exact cache; -1: none), and along ``recipe`` the coordinates ``family``, ``layer``, ``granularity``, ``bits``, ``draw``
    (-1 or ``""`` where there is none; see :class:`~kvgeom.evaluation.condition.Condition`) and ``placement``. The
    variables are

    - ``label``, ``reason`` (why this label) and ``text``: the response as far as the judge reads, or in full where
      ``meta["full_responses"]``, with reasoning between ``<think>`` and ``</think>`` whatever the model's own markers are;
    - ``tokens``: how many tokens that is, and ``divergence``: the first of them that is not that of the exact cache
      (-1: none);
    - ``margin`` (nats; NaN where :func:`no_margin` says why, or the model refuses nothing) and ``kl`` (nats, of the rounded
      from the exact distribution), both at the first response position;
    - ``likelihood`` (nats per token, mean): of the answer with an exact cache; NaN where it was not
      measured.

    ``meta["asked"]`` is how many prompts the model with an exact cache was asked, not all of which need be here.
    """

    kind: ClassVar[str] = "outcomes"

    def made_by(self, recipes: Sequence[str] = ()) -> dict[str, Any]:
        """The part of ``meta`` that results drawn from some of these recipes share; all of them by default.

        Where some are named it says also what they round to.

        Raises
        ------
        InputError
            As all methods here that take recipes or prompts, for one that these outcomes do not have.
        """
        recipes = self._known(recipes)
        names = recipes or [str(name) for name in self.data.recipe.values if name != EXACT]
        placements = sorted({str(value) for value in self.data.placement.sel(recipe=names).values})
        return {
            **{name: self.meta[name] for name in SHARED if name in self.meta},
            **({"scheme": {name: self.meta["recipes"].get(name, EXACT) for name in recipes}} if recipes else {}),
            "placement": " / ".join(placements),
        }

    def provenance(self) -> dict[str, Any]:
        own = {"scheme": self.meta["recipes"], "placement": self.made_by()["placement"]}
        return {**super().provenance(), **own}

    def names(self, **coordinates: Any) -> list[str]:
        """Recipes with these coordinates, in order.

        Examples
        --------
        ``outcomes.names(family="layer", granularity="tensor")``

        Raises
        ------
        InputError
            For a coordinate that does not exist.
        """
        chosen = self.data.recipe.values != EXACT
        for name, value in coordinates.items():
            one_of("coordinate", name, COORDINATES)
            wanted = -1 if value is None else value
            if not isinstance(wanted, str | Real):
                raise InputError(f"{name} of a recipe is a text or a number, got {brief(value)}; give one")
            chosen = chosen & (self.data[name].values == wanted)
        return [str(name) for name in self.data.recipe.values[chosen]]

    def name(self, **coordinates: Any) -> str:
        """The one recipe with these coordinates.

        Raises
        ------
        InputError
            If there is none, or several.
        """
        found = self.names(**coordinates)
        if len(found) != 1:
            raise InputError(f"{len(found)} recipes have the coordinates {brief(coordinates)}; name more of them")
        return found[0]

    def joined(self, other: Outcomes) -> Outcomes:
        """These outcomes and those of other recipes (on the same prompts) or other prompts (under the same recipes).

        Raises
        ------
        InputError
            If the other ones are no outcomes; if both recipes and prompts differ; if the models, judges or lengths of responses do; or if one name or number
            stands for different recipes or requests.
        """
        if not isinstance(other, Outcomes):
            raise InputError(f"outcomes are joined with other Outcomes, got {brief(other)}")
        self._check_alike(other)
        mine = [str(name) for name in self.data.recipe.values]
        theirs = [str(name) for name in other.data.recipe.values]
        recipes = {**self.meta["recipes"], **other.meta["recipes"]}
        if {*mine} == {*theirs}:
            fresh = ~np.isin(other.data.prompt.values, self.data.prompt.values)
            more = other.data.sel(recipe=mine).isel(prompt=fresh)
            data = xr.concat([self.data, more], dim="prompt", **CONCAT).sortby("prompt")
        elif not np.array_equal(self.data.prompt.values, other.data.prompt.values):
            raise InputError(
                f"outcomes of recipes {', '.join(mine)} and {', '.join(theirs)} are of different prompts; evaluate both on "
                "the same ones"
            )
        else:
            new = [name for name in theirs if name not in mine]
            data = xr.concat([self.data, other.data.sel(recipe=new)], dim="recipe", **CONCAT)
        return Outcomes(data, {**self.meta, "recipes": recipes})

    def _check_alike(self, other: Outcomes) -> None:
        """Check that all that both have stands for the same in both."""
        for name in ALIKE:
            mine, theirs = self.meta.get(name), other.meta.get(name)
            if mine != theirs:
                raise InputError(f"outcomes cannot be joined: {name} is {mine!r} in one and {theirs!r} in the other")
        for dim, columns in SAME.items():
            both = np.intersect1d(self.data[dim].values, other.data[dim].values)
            for column in columns:
                here, there = (each.data[column].sel({dim: both}).values.astype(object) for each in (self, other))
                if (wrong := here != there).any():
                    at = np.flatnonzero(wrong)[0]
                    raise InputError(
                        f"outcomes cannot be joined: {column} of {dim} {both[at].item()!r} is {here[at]!r} in one and "
                        f"{there[at]!r} in the other"
                    )
        mine, theirs = self.meta["recipes"], other.meta["recipes"]
        for name in mine.keys() & theirs.keys():
            if mine[name] != theirs[name]:
                raise InputError(
                    f"outcomes cannot be joined: recipe {name!r} is {mine[name]} in one and {theirs[name]} in the other; "
                    "give them different names"
                )

    def at_recipes(self, recipes: Iterable[str]) -> Outcomes:
        """The same for some recipes, by name, with the model with an exact cache."""
        names = list(dict.fromkeys([EXACT, *self._known(recipes)]))
        known = {name: text for name, text in self.meta["recipes"].items() if name in names}
        return Outcomes(self.data.sel(recipe=names), {**self.meta, "recipes": known})

    def at_prompts(self, prompts: Sequence[int]) -> Outcomes:
        """The same for some prompts, by their index."""
        chosen, known = whole_numbers("prompts", prompts), self.data.prompt.values
        for prompt in chosen:
            if prompt not in known:
                one_of("prompt", prompt, known.tolist())
        return Outcomes(self.data.sel(prompt=chosen), self.meta)

    def counts(self, recipe: str = EXACT) -> dict[str, int]:
        """How many prompts have each label."""
        labels = self._of(recipe, "label")
        return {label: int((labels == label).sum()) for label in LABELS}

    def unended(self, recipe: str = EXACT) -> int:
        """How many responses ended inside their reasoning, and are neither refusal nor compliance."""
        return sum(str(reason).startswith(UNENDED_REASON) for reason in self._of(recipe, "reason"))

    def unread(self, recipe: str = EXACT) -> int:
        """How many answers of a classifier could not be read; these labels are of its keyword judge alone."""
        return sum(str(reason).startswith(UNREAD_REASON) for reason in self._of(recipe, "reason"))

    def all_unread(self, recipes: Iterable[str]) -> dict[str, int]:
        """How many there are with an exact cache and under some recipes, if any."""
        found = {name: self.unread(name) for name in {EXACT: 0, **dict.fromkeys(self._known(recipes))}}
        return {name: count for name, count in found.items() if count}

    def flipped(self, recipe: str, to: Label | None = None) -> NDArray[np.bool_]:
        """Which prompts refused with an exact cache are labelled otherwise (as ``to``, if given) under ``recipe``."""
        if to is not None:
            one_of("label", to, LABELS)
        now = self._of(recipe, "label")[self._of(EXACT, "label") == "refused"]
        flipped: NDArray[np.bool_] = now != "refused" if to is None else now == to
        return flipped

    def flips(self, recipe: str) -> dict[str, int]:
        """Flips under ``recipe``: in all, and to each of :data:`LOST`."""
        now = self._of(recipe, "label")[self._of(EXACT, "label") == "refused"]
        counts: dict[str, int] = {label: int((now == label).sum()) for label in LOST}
        return {"all": sum(counts.values()), **counts}

    def flip_columns(self, names: Sequence[str]) -> dict[str, Any]:
        """Columns of a table of recipes, in the order of ``names``.

        ``flips`` among the prompts refused with an exact cache, ``flips_complied``, ``flips_evaded``,
        ``flips_degenerate``, ``flip_rate`` and its Wilson interval ``ci_low``, ``ci_high`` (NaN where nothing is refused).
        """
        refused, flips = self.counts()["refused"], [self.flips(name) for name in self._known(names)]
        low, high = np.array([wilson(found["all"], refused) for found in flips]).reshape(-1, 2).T
        return {
            "flips": [found["all"] for found in flips],
            **{f"flips_{label}": [found[label] for found in flips] for label in LOST},
            "flip_rate": [found["all"] / refused if refused else float("nan") for found in flips],
            "ci_low": low,
            "ci_high": high,
        }

    def gains(self, recipe: str) -> int:
        """How many prompts are refused under ``recipe`` that are not refused with an exact cache."""
        before, now = (self._of(name, "label") == "refused" for name in (EXACT, recipe))
        return int((now & ~before).sum())

    def of_refused(self) -> Outcomes:
        """The same of the prompts that are refused with an exact cache, in which alone something can flip."""
        refused = self.data.label.sel(recipe=EXACT).values == "refused"
        return Outcomes(self.data.isel(prompt=refused), self.meta)

    def margin_drops(self, recipes: Sequence[str]) -> NDArray[np.float64]:
        """Refusal margin lost (nats) by every prompt under some recipes, ``[prompts, recipes]``."""
        lost = self.data.margin.sel(recipe=EXACT) - self.data.margin.sel(recipe=self._known(recipes))
        values: NDArray[np.float64] = lost.transpose("prompt", "recipe").values
        return values

    def flip_table(self) -> xr.DataArray:
        """Whether each prompt refused with an exact cache flips under each recipe, as 0 and 1 over (prompt, recipe)."""
        names = [str(name) for name in self.data.recipe.values if name != EXACT]
        refused = self.data.prompt.values[self.data.label.sel(recipe=EXACT).values == "refused"]
        values = np.array([self.flipped(name) for name in names], dtype=float).reshape(len(names), len(refused)).T
        return xr.DataArray(values, dims=("prompt", "recipe"), coords={"prompt": refused, "recipe": names})

    def relabel(self, judge: ClassifierJudge | KeptLabels) -> Outcomes:
        """The same responses as a classifier labels them. It is loaded here, so the audited model may be gone by then.

        Where its refusals begin with other tokens than those that margins are of, margins are NaN: only the model could measure
        them.

        Parameters
        ----------
        judge : ClassifierJudge or KeptLabels
            From :func:`kvgeom.classifier`; its labels are kept by :class:`~kvgeom.evaluation.relabel.KeptLabels`.

        Raises
        ------
        InputError
            If it is another judge, or unless the outcomes hold full responses (``evaluate(..., full_responses=True)``).
        """
        if not callable(getattr(judge, "label_all", None)):
            raise InputError(
                f"a classifier labels again, got {brief(judge)}; give kvgeom.classifier(...), or evaluate with judge=..."
            )
        if not self.meta["full_responses"]:
            raise InputError(
                "a classifier reads full responses, and these end where the keyword judge stops reading; evaluate with "
                "full_responses=True"
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
        return self._with_margins_of(Outcomes(data.assign(columns), {**self.meta, "judge": judge.name}))

    def _with_margins_of(self, again: Outcomes) -> Outcomes:
        """The same labelled ``again``, with margins as far as they are of the tokens that refusals begin with now."""
        if self.meta.get("begins_with_reasoning"):
            return again
        data, tokens, known = again.data, None, self.meta.get("refusal_tokens")
        if "first_token" in data.coords and data.sizes["prompt"] == self.meta.get("asked"):
            refused = data.label.sel(recipe=EXACT).values == "refused"
            tokens = sorted(refusal_tokens(data.first_token.values.tolist(), refused.tolist()))
            if not refused.any():
                why = ""
            elif not tokens:
                why = NONE_PREDICTS
            else:
                why = "" if tokens == known else OTHER_TOKENS
        else:
            why = OTHER_TOKENS
        if tokens != known or not tokens:
            data = data.assign(margin=data.margin * np.nan)
        return Outcomes(data, {**again.meta, "refusal_tokens": tokens, "no_margin": why})

    def _of(self, recipe: str, column: str) -> NDArray[Any]:
        """A column under a recipe."""
        names = self.data.recipe.values.tolist()
        one_of("recipe", recipe, names)
        found: NDArray[Any] = self.data[column].isel(recipe=names.index(recipe)).values
        return found

    def _known(self, recipes: Iterable[str] | str) -> list[str]:
        """Recipes by name, of one or of several."""
        return as_names("recipe", recipes, self.data.recipe.values.tolist(), none=True)

    def summary(self) -> str:
        prompts, recipes = (
            counted(self.data.sizes["prompt"], "prompt"),
            counted(self.data.sizes["recipe"] - 1, "recipe"),
        )
        unended, unread = (
            sum(count(str(name)) for name in self.data.recipe.values) for count in (self.unended, self.unread)
        )
        parts = [
            f"{prompts} under {recipes}, with an exact cache {self.counts()}",
            *([f"{counted(unended, 'response')} ended inside the reasoning"] if unended else []),
            *([f"{counted(unread, 'answer')} of the judge could not be read"] if unread else []),
            *(["no margins"] if no_margin(self.meta) else []),
        ]
        return "; ".join(parts)
