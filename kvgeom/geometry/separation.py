"""How well harmful and harmless requests are separated along a direction, cross-validated and compared with chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Separation:
    """How well a difference of means separates requests that it was not computed from.

    Attributes
    ----------
    auroc : float
        Area under the ROC curve of the held-out projections; 0.5 is chance.
    p : float
        Share of random labelings, the true one among them, with an AUROC as high (one-sided permutation test).
    effect : float
        Gap between the classes over their pooled standard deviation (d'), of the same projections.
    """

    auroc: float
    p: float
    effect: float


def folds_of(harmful: NDArray[np.bool_], folds: int, seed: int = 0) -> NDArray[np.int64]:
    """Which fold of a cross-validation each request is in; the n-th of both classes are in the same one.

    Requests often come as twins that differ in what is harmful and share everything else. A request whose twin is among
    those that a direction is computed from lies on the twin's side of it: with nothing to be found, AUROC is then far
    below 0.5.

    Parameters
    ----------
    harmful : bool array [prompts]
    folds : int
        At most the number of prompts of the smaller class. Numbers of a class in two folds differ by one at most, and by
        two in the larger class.
    seed : int
        Shuffles prompts into folds.

    Returns
    -------
    int array [prompts]
    """
    few, many = sorted((int(harmful.sum()), int((~harmful).sum())))
    rng, folds = np.random.default_rng(seed), min(folds, few)
    fold = np.concatenate([rng.permutation(few), rng.permutation(many - few)]) % folds
    found: NDArray[np.int64] = fold[_place(harmful)]
    return found


def separation(
    features: Floats, harmful: NDArray[np.bool_], *, folds: int = 5, draws: int = 999, seed: int = 0
) -> Separation:
    """Cross-validated separation along the difference of means, compared with chance.

    Every prompt is projected on the unit direction from the other folds, measured from the midpoint of
    their class means, so that projections of different folds can be ranked together. They share prompts, so a test that
    takes them for independent would be wrong; chance is what the same computation finds when labels are dealt anew,
    within the pair where classes are of one size and within the fold where they are not.

    Parameters
    ----------
    features : array [prompts, channels]
    harmful : bool array [prompts]
    folds : int
        At most the number of prompts of the smaller class; see :func:`folds_of`.
    draws : int
        How often labels are dealt; with 0 there is no p-value.
    seed : int
        Of folds and labels.
    """
    fold = folds_of(harmful, folds, seed)
    if draws and len(features) < features.shape[1]:
        # Projections on differences of rows are the same in the span of the rows.
        features = np.linalg.qr((features - features.mean(0)).T).R.T
    paired = 2 * int(harmful.sum()) == len(harmful)
    labels = np.vstack([harmful, _dealt(harmful, _place(harmful) if paired else fold, draws, seed)])
    scores = _held_out(features, labels, fold)
    ranks, positives = rankdata(scores, axis=1), int(harmful.sum())
    wins = (ranks * labels).sum(1) - positives * (positives + 1) / 2
    auroc = wins / (positives * (len(harmful) - positives))
    bad, good = scores[0, harmful], scores[0, ~harmful]
    spread = np.sqrt((bad.var() + good.var()) / 2)
    return Separation(
        auroc=float(auroc[0]),
        p=float((auroc >= auroc[0]).mean()) if draws else float("nan"),
        effect=float((bad.mean() - good.mean()) / spread) if spread > 0 else 0.0,
    )


def _place(harmful: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Which of its class each prompt is, from 0."""
    found: NDArray[np.int64] = np.where(harmful, harmful.cumsum(), (~harmful).cumsum()) - 1
    return found


def _dealt(harmful: NDArray[np.bool_], group: NDArray[np.int64], draws: int, seed: int) -> NDArray[np.bool_]:
    """The labels of each group in random order, ``[draws, prompts]``."""
    chance = np.random.default_rng(seed).random((draws, len(harmful)))
    labels = np.empty((draws, len(harmful)), dtype=bool)
    order = np.lexsort((chance, np.broadcast_to(group, chance.shape)))
    np.put_along_axis(labels, order, harmful[np.argsort(group, kind="stable")][None], axis=1)
    return labels


def _held_out(features: Floats, labels: NDArray[np.bool_], fold: NDArray[np.int64]) -> Floats:
    """Projections ``[labelings, prompts]`` of ``features`` ``[prompts, channels]`` under each row of ``labels``."""
    scores = np.zeros(labels.shape)
    for held_out in np.unique(fold):
        test = fold == held_out
        bad, good = (((labels == harmful) & ~test).astype(float) for harmful in (True, False))
        bad_mean, good_mean = (rows @ features / rows.sum(1, keepdims=True) for rows in (bad, good))
        gap, middle = bad_mean - good_mean, (bad_mean + good_mean) / 2
        size = np.linalg.norm(gap, axis=1, keepdims=True)
        along = gap @ features[test].T - (gap * middle).sum(1, keepdims=True)
        scores[:, test] = np.divide(along, size, out=np.zeros_like(along), where=size > 0)
    return scores
