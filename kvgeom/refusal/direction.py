"""Directions that separate harmful from harmless requests: how they are estimated, how well they do, how stable they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from kvgeom.errors import InputError

Floats = NDArray[np.floating]
Estimator = Callable[[Floats, NDArray[np.bool_], int], Floats]

#: Share of each end of a class that the winsorized mean pulls in, channel by channel.
WINSOR = 0.1


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


def difference_of_means(features: Floats, harmful: NDArray[np.bool_]) -> Floats:
    """Mean of the harmful rows minus mean of the harmless rows.

    Parameters
    ----------
    features : array [prompts, ..., channels]
    harmful : bool array [prompts]

    References
    ----------
    Arditi et al., arXiv:2406.11717, section 2.3.
    """
    gap: Floats = features[harmful].mean(0) - features[~harmful].mean(0)
    return gap


def difference_of_winsorized_means(features: Floats, harmful: NDArray[np.bool_]) -> Floats:
    """The same, with the lowest and highest tenth of each class pulled in to the rest, channel by channel.

    A few prompts with massive activations move a mean far, and this hardly.

    Parameters
    ----------
    features : array [prompts, ..., channels]
    harmful : bool array [prompts]
    """

    def mean(rows: Floats) -> Floats:
        low, high = np.quantile(rows, [WINSOR, 1 - WINSOR], axis=0)
        found: Floats = np.clip(rows, low, high).mean(0)
        return found

    return mean(features[harmful]) - mean(features[~harmful])


def principal_differences(features: Floats, harmful: NDArray[np.bool_], k: int = 1) -> Floats:
    """Leading right singular vectors of the differences between paired requests.

    The differences are not centred: what they have in common is what is looked for. Further vectors are what varies
    most from pair to pair.

    Parameters
    ----------
    features : array [prompts, channels]
        The n-th harmful row is paired with the n-th harmless row.
    harmful : bool array [prompts]
    k : int
        At most the number of pairs.

    Returns
    -------
    array [channels, k]
        Orthonormal columns.
    """
    bad, good = features[harmful], features[~harmful]
    pairs = min(len(bad), len(good))
    if not 1 <= k <= min(pairs, features.shape[1]):
        raise InputError(
            f"{k} principal differences were asked, but there are {pairs} pairs of {features.shape[1]} channels"
        )
    basis: Floats = np.linalg.svd(bad[:pairs] - good[:pairs], full_matrices=False)[2][:k].T
    return basis


def logistic_weights(
    features: Floats, harmful: NDArray[np.bool_], *, strength: float | None = None, seed: int = 0
) -> tuple[Floats, float]:
    """Weights of an L2-regularised logistic probe, and the regularisation that cross-validation chose.

    Parameters
    ----------
    features : array [prompts, channels]
        Scaled by one number (their spread), not channel by channel: the direction turns with the space.
    harmful : bool array [prompts]
    strength : float, optional
        Inverse regularisation (scikit-learn's ``C``); chosen by five-fold log-loss without it.
    seed : int
        Of the folds.

    Returns
    -------
    (array [channels], float)
    """
    centred = features - features.mean(0)
    # An L2 penalty never leaves the span of the data: in its coordinates the problem is the same and far smaller.
    u, s, basis = np.linalg.svd(centred, full_matrices=False)
    scores = u * (s / max(float(np.sqrt((s**2).mean() / len(s))), np.finfo(float).tiny))
    if strength is None:
        folds = min(5, int(harmful.sum()), int((~harmful).sum()))
        search = GridSearchCV(
            LogisticRegression(max_iter=2000),
            {"C": np.logspace(-4, 2, 4)},
            scoring="neg_log_loss",
            cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
        ).fit(scores, harmful)
        probe, strength = search.best_estimator_, float(search.best_params_["C"])
    else:
        probe = LogisticRegression(C=strength, max_iter=2000).fit(scores, harmful)
    weights: Floats = probe.coef_[0] @ basis
    return weights, strength


def _mean(features: Floats, harmful: NDArray[np.bool_], k: int) -> Floats:
    return difference_of_means(features, harmful)[:, None]


def _winsorized(features: Floats, harmful: NDArray[np.bool_], k: int) -> Floats:
    return difference_of_winsorized_means(features, harmful)[:, None]


def _logistic(features: Floats, harmful: NDArray[np.bool_], k: int) -> Floats:
    return logistic_weights(features, harmful)[0][:, None]


#: Ways to estimate a direction from features [prompts, channels]; columns come out orthonormal, harmful side positive.
METHODS: dict[str, Estimator] = {
    "mean": _mean,
    "winsorized": _winsorized,
    "pca": principal_differences,
    "logistic": _logistic,
}


def estimate(features: Floats, harmful: NDArray[np.bool_], method: str = "mean", k: int = 1) -> Floats:
    """Direction (or, with ``"pca"``, up to k of them) that tells harmful from harmless requests.

    Parameters
    ----------
    features : array [prompts, channels]
    harmful : bool array [prompts]
    method : {"mean", "winsorized", "pca", "logistic"}
        Difference of means; of winsorized means; leading singular vectors of paired differences; weights of a
        cross-validated logistic probe. All aim at the same direction where the classes differ by a shift and their
        spread is isotropic; where it is not, the probe turns away from directions of large spread.
    k : int
        Columns; above 1 for ``"pca"`` alone.

    Returns
    -------
    array [channels, k]
        Orthonormal; each column has the harmful mean on its positive side. Zero where the classes coincide.

    Raises
    ------
    InputError
        For an unknown method, or a ``k`` that it cannot give.
    """
    if method not in METHODS:
        raise InputError(f"direction method {method!r} was asked; choose one of {', '.join(METHODS)}")
    if k > 1 and method != "pca":
        raise InputError(f"k={k} directions were asked of method {method!r}, which gives one; use method='pca'")
    found = METHODS[method](features, harmful, k)
    norms = np.linalg.norm(found, axis=0)
    sign = np.where(difference_of_means(features, harmful) @ found < 0, -1.0, 1.0)
    basis: Floats = found * sign / np.where(norms > 0, norms, 1.0)
    return basis


def resampled(harmful: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """Row numbers of one bootstrap sample: pairs are drawn together where both classes are of one size."""
    bad, good = np.flatnonzero(harmful), np.flatnonzero(~harmful)
    drawn = rng.integers(0, len(bad), len(bad))
    other = drawn if len(bad) == len(good) else rng.integers(0, len(good), len(good))
    return np.concatenate([bad[drawn], good[other]])


def bootstrap(
    features: Floats, harmful: NDArray[np.bool_], method: str = "mean", *, samples: int = 50, seed: int = 0
) -> tuple[Floats, Floats]:
    """The direction, and its cosine with those of bootstrap samples of the prompts.

    Parameters
    ----------
    features : array [prompts, channels]
    harmful : bool array [prompts]
    method : str
        As in :func:`estimate`. The probe keeps the regularisation that the full data chose.
    samples, seed : int

    Returns
    -------
    direction : array [channels]
        As :func:`estimate` gives it.
    cosines : array [samples]
        Near 1: a direction that does not hang on single prompts. Two directions estimated from halves of the data
        would agree less.
    """
    # Every method but the channel-wise one turns with the space, so the span of the data is space enough.
    basis = None
    if method != "winsorized" and len(features) < features.shape[1]:
        u, s, basis = np.linalg.svd(features, full_matrices=False)
        features = u * s
    strength: float | None = None
    if method == "logistic":
        weights, strength = logistic_weights(features, harmful)
        whole = weights / max(float(np.linalg.norm(weights)), np.finfo(float).tiny)
    else:
        whole = estimate(features, harmful, method)[:, 0]
    rng = np.random.default_rng(seed)
    cosines = np.zeros(samples)
    for number in range(samples):
        rows = resampled(harmful, rng)
        if method == "logistic":
            drawn = logistic_weights(features[rows], harmful[rows], strength=strength)[0]
        else:
            drawn = estimate(features[rows], harmful[rows], method)[:, 0]
        size = float(np.linalg.norm(drawn))
        cosines[number] = drawn @ whole / size if size > 0 else 0.0
    return (whole if basis is None else whole @ basis), cosines


def separation(features: Floats, harmful: NDArray[np.bool_], *, folds: int = 5, seed: int = 0) -> Separation:
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
