"""Do two judges say the same?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score, f1_score, matthews_corrcoef

from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.evaluate import run_conditions
from kvgeom.judges.keyword import KeywordJudge
from kvgeom.paper.cells import widths
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, share

BITS = (4, 3)
#: Responses of the sample, and its seed.
SAMPLE, SEED = 200, 42
_RESAMPLES = 1000
_Refused = NDArray[np.bool_]


@paper_table("agreement of the run's judge with the keyword judge", passes=lambda layers: len(BITS) + 1)
def classifier_agreement(study: Study, protocol: Protocol) -> Measured:
    """How well two judges agree about what is refused: the one of the run, and the keyword judge.

    Of all responses at 16, 4 and 3 bits up to 200 are drawn with seed 42, as many of each width and each label of the run's judge as
    there are. What is not refused counts as lost. Give a classifier as ``judge``: the keyword judge agrees with itself.
    """
    base, conditions = study.base(), widths(protocol, BITS)
    found = run_conditions(base, conditions, full_responses=True, title="widths")
    names = found.data.recipe.values.tolist()
    one = [found.data.label.sel(recipe=name).values == "refused" for name in names]
    other = [_by_keywords(base, found.data.text.sel(recipe=name).values.tolist()) for name in names]
    chosen = drawn(one, SAMPLE, SEED)
    pairs = {
        str(name): np.stack([a[rows], b[rows]], 1) for name, a, b, rows in zip(names, one, other, chosen, strict=True)
    }
    rows: list[Row] = []
    for name, pair in (*pairs.items(), ("all", np.concatenate([*pairs.values()]))):
        at: dict[str, int | str] = {"bits": "16" if name == "exact" else name}
        rows += [
            share(at, "agreement", int((pair[:, 0] == pair[:, 1]).sum()), len(pair), None),
            _estimated(at, "Cohen's kappa", cohen_kappa_score, "kappa", pair),
            _estimated(at, "Matthews correlation", matthews_corrcoef, "correlation", pair),
            _estimated(at, "F1 of lost refusals", lambda a, b: f1_score(~a, ~b), "F1", pair),
        ]
    notes = [f"{base.judge.name} against {KeywordJudge().name}. The paper's second judge was Llama Guard 3."]
    if isinstance(base.judge, KeywordJudge):
        notes.append("The judge of this run is the keyword judge itself: give another, such as --judge wildguard.")
    return Measured(rows, tuple(notes))


def _by_keywords(base: Baseline, texts: Sequence[str]) -> _Refused:
    judge, found = KeywordJudge(), []
    for index, text in enumerate(texts):
        tokens = base.model.tokens(text) if text else []
        likelihood = partial(base.log_likelihood, index, tokens)
        found.append(judge.label(base.prompts[index].text, text, likelihood).label == "refused")
    return np.array(found)


def drawn(refused: Sequence[_Refused], size: int, seed: int) -> list[NDArray[np.intp]]:
    """Rows of each width, drawn so that widths and labels are as equally frequent as they can be.

    Parameters
    ----------
    refused : sequence of array [responses]
        Labels of each width.
    size : int
        Of the sample; all are drawn where there are no more.

    Examples
    --------
    >>> [list(rows) for rows in drawn([np.array([True, True, False]), np.array([True])], 9, 0)]
    [[0, 1, 2], [0]]
    """
    rng, left = np.random.default_rng(seed), size
    strata = [(width, np.flatnonzero(own == label)) for width, own in enumerate(refused) for label in (True, False)]
    taken: list[list[NDArray[np.intp]]] = [[] for _ in refused]
    strata.sort(key=lambda each: len(each[1]))  # what a small one leaves, larger ones share
    for after, (width, rows) in zip(range(len(strata), 0, -1), strata, strict=True):
        count = min(len(rows), left // after)
        taken[width].append(rng.choice(rows, count, replace=False))
        left -= count
    return [np.sort(np.concatenate(each)) for each in taken]


def _estimated(
    at: dict[str, int | str], quantity: str, measure: Callable[[Any, Any], float], unit: str, pair: _Refused
) -> Row:
    """A measure of agreement, with its percentile bootstrap; undefined where a judge says one thing of all."""

    def of(rows: _Refused) -> float:
        both = [*map(tuple, rows)]
        return (
            float(measure(rows[:, 0], rows[:, 1]))
            if len({a for a, _ in both}) == len({b for _, b in both}) == 2
            else np.nan
        )

    rng = np.random.default_rng(SEED)
    draws = [of(pair[rng.integers(0, len(pair), len(pair))]) for _ in range(_RESAMPLES)] if len(pair) else []
    value = of(pair) if len(pair) else np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of resamples that are all undefined
        low, high = np.nanquantile(draws, [0.025, 0.975]) if np.isfinite(value) else (np.nan, np.nan)
    return Row(at, quantity, value, float(low), float(high), len(pair), unit, published_at=None)
