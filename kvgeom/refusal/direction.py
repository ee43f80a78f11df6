"""Directions that separate harmful from harmless requests, and how well they do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu
from sklearn.model_selection import StratifiedKFold


@dataclass(frozen=True)
class Separation:
    """How well a difference of means separates requests that it was not computed from.

    Attributes
    ----------
    auroc : float
        Area under the ROC curve of the held-out projections; 0.5 is chance.
    p : float
        One-sided Mann-Whitney p-value of the same projections.
    effect : float
        Gap between the classes over their pooled standard deviation (d'), of the same projections.
    """

    auroc: float
    p: float
    effect: float


def difference_of_means(features: NDArray[np.floating], harmful: NDArray[np.bool_]) -> NDArray[np.floating]:
    """Mean of the harmful rows minus mean of the harmless rows.

    Parameters
    ----------
    features : array [prompts, ..., channels]
    harmful : bool array [prompts]

    References
    ----------
    Arditi et al., arXiv:2406.11717, section 2.3.
    """
    gap: NDArray[np.floating] = features[harmful].mean(0) - features[~harmful].mean(0)
    return gap


def separation(
    features: NDArray[np.floating], harmful: NDArray[np.bool_], *, folds: int = 5, seed: int = 0
) -> Separation:
    """Cross-validated separation along the difference of means.

    Every prompt is projected on the unit direction from the other folds, measured from the midpoint of
    their class means, so that projections of different folds can be ranked together.

    Parameters
    ----------
    features : array [prompts, channels]
    harmful : bool array [prompts]
    folds : int
        At most the number of prompts of the smaller class.
    seed : int
        Shuffles prompts into folds.
    """
    scores = np.empty(len(features))
    folds = min(folds, int(harmful.sum()), int((~harmful).sum()))
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(features, harmful):
        bad, good = features[train][harmful[train]].mean(0), features[train][~harmful[train]].mean(0)
        norm = np.linalg.norm(bad - good)
        direction = (bad - good) / norm if norm > 0 else bad - good
        scores[test] = (features[test] - (bad + good) / 2) @ direction
    bad_scores, good_scores = scores[harmful], scores[~harmful]
    u, p = mannwhitneyu(bad_scores, good_scores, alternative="greater")
    spread = np.sqrt((bad_scores.var() + good_scores.var()) / 2)
    gap = bad_scores.mean() - good_scores.mean()
    return Separation(
        auroc=float(u / (len(bad_scores) * len(good_scores))),
        p=float(p),
        effect=float(gap / spread) if spread > 0 else 0.0,
    )
