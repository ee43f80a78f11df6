"""Directions that separate harmful from harmless requests: how they are estimated, how well they do, how stable they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit

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
        Share of random labelings, the true one among them, with an AUROC as high (one-sided permutation test).
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
        search = GridSearchCV(
            LogisticRegression(max_iter=2000),
            {"C": np.logspace(-4, 2, 4)},
            scoring="neg_log_loss",
            cv=PredefinedSplit(folds_of(harmful, 5, seed)),
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
    """Cross-validated separation along the difference of means, held against chance.

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
