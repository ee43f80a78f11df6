"""Directions that separate harmful from harmless requests: how they are estimated, and how stable they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit

from kvgeom.errors import InputError, unknown
from kvgeom.geometry.activations import SITES, Site
from kvgeom.geometry.separation import Separation, folds_of, separation

Floats = NDArray[np.floating]
Estimator = Callable[[Floats, NDArray[np.bool_], int], Floats]

#: A class difference smaller than this share of the mean square is rounding error of the arithmetic, not signal.
COINCIDENT = 1e-10
#: Share of each end of a class that the winsorized mean pulls in, channel by channel.
WINSOR = 0.1


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
            f"k must be 1 to {min(pairs, features.shape[1])} for {pairs} pairs of {features.shape[1]} channels, got {k}"
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
        Scaled by one number (their spread), not channel by channel: the direction rotates with the space.
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
        raise unknown("method", method, METHODS)
    if k > 1 and method != "pca":
        raise InputError(f"method {method!r} gives one direction, got k={k}; use method='pca'")
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
    # Every method but the channel-wise one rotates with the space, so the span of the data is enough.
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


@dataclass(frozen=True)
class Direction:
    """The safety subspace of one layer and site.

    Attributes
    ----------
    position : str
        Tokens at which it was found.
    gap : array [channels]
        Mean harmful minus mean harmless vector there (of winsorized means where that is the method).
    basis : array [channels, k]
        Orthonormal.
    separation : Separation
        Cross-validated, along the difference of means.
    defined : bool
        False where the classes coincide at every position that was looked at.
    """

    position: str
    gap: NDArray[np.float64]
    basis: NDArray[np.float64]
    separation: Separation
    defined: bool


def defined_at(
    features: NDArray[np.float64], harmful: NDArray[np.bool_], resolution: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """At which positions the classes differ at all.

    Parameters
    ----------
    features : array [prompts, positions, channels]
    harmful : bool array [prompts]
    resolution : array [positions, channels]
        Differences that may be rounding, :meth:`kvgeom.geometry.activations.ActivationStore.resolution`.

    Returns
    -------
    bool array [positions]
    """
    gaps = difference_of_means(features, harmful)
    beyond = (np.abs(gaps) > resolution).any(-1)
    found: NDArray[np.bool_] = beyond & ((gaps**2).sum(-1) > COINCIDENT * (features**2).sum(-1).mean(0))
    return found


def fit_direction(
    x: NDArray[np.float64],
    harmful: NDArray[np.bool_],
    names: Sequence[str],
    tried: Sequence[str],
    k: int,
    method: str,
    resolution: NDArray[np.float64],
    *,
    stacked: Sequence[str] | None = None,
    draws: int = 999,
) -> Direction:
    """The subspace of one layer and site, at the best separated of some positions.

    Parameters
    ----------
    x : array [prompts, positions, channels]
    harmful : bool array [prompts]
    names : sequence of str
        Of the positions.
    tried : sequence of str
        Those to choose from.
    k : int
    method : str
        As in :func:`estimate`; ``"mean"`` with k > 1 takes the leading singular vectors of the differences at several
        positions.
    resolution : array [positions, channels]
        As in :func:`defined_at`.
    stacked : sequence of str, optional
        These positions; those tried by default.
    draws : int
        Labelings of the separation's p-value.
    """
    gaps = difference_of_means(x, harmful)
    differ = defined_at(x, harmful, resolution)
    defined = differ & np.isin(names, tried)
    found = {index: separation(x[:, index], harmful, draws=0) for index in map(int, np.flatnonzero(defined))}
    if not found:
        index = list(names).index(tried[0])
        return Direction(tried[0], gaps[index], np.zeros((len(gaps[index]), k)), Separation(0.5, 1.0, 0.0), False)
    best = max(found, key=lambda index: (found[index].auroc, found[index].effect))
    basis = basis_at(x, harmful, best, differ & np.isin(names, tried if stacked is None else stacked), k, method)
    gap = difference_of_winsorized_means(x[:, best], harmful) if method == "winsorized" else gaps[best]
    best_separation = separation(x[:, best], harmful, draws=draws)
    return Direction(list(names)[best], gap.astype(np.float64), basis.astype(np.float64), best_separation, True)


def basis_at(
    x: NDArray[np.float64],
    harmful: NDArray[np.bool_],
    position: int,
    stacked: NDArray[np.bool_],
    k: int,
    method: str,
) -> Floats:
    """Orthonormal basis ``[channels, k]`` at one position, of ``"mean"`` with k > 1 from the gaps at several."""
    if method == "mean" and k > 1:
        basis: Floats = np.linalg.svd(difference_of_means(x, harmful)[stacked], full_matrices=False)[2][:k].T
        return basis
    return estimate(x[:, position], harmful, method, k)


def as_dataset(found: Mapping[tuple[int, Site], Direction], layers: Sequence[int], tried: int) -> xr.Dataset:
    """Directions by layer and site as the data of a :class:`~kvgeom.geometry.subspace.Subspace`.

    Parameters
    ----------
    found : mapping of (layer, site) to Direction
    layers : sequence of int
    tried : int
        Positions that were looked at; p-values are corrected for them.
    """
    cells = [[found[layer, site] for site in SITES] for layer in layers]
    p = np.array([[one.separation.p for one in row] for row in cells])
    variables: dict[str, Any] = {
        "position": np.array([[one.position for one in row] for row in cells]),
        "separation": np.array([[one.separation.auroc for one in row] for row in cells]),
        # The position was chosen as the best of several, so each had that many chances to look significant.
        "p": np.minimum(1.0, p * tried),
        "p_position": p,
        "effect": np.array([[one.separation.effect for one in row] for row in cells]),
        "defined": np.array([[one.defined for one in row] for row in cells]),
    }
    data: dict[str, Any] = {name: (("layer", "site"), values) for name, values in variables.items()}
    most = max(one.basis.shape[1] for one in found.values())
    for name, more in (("gap", ()), ("basis", ("dimension",))):
        k, v, resid = (np.stack([_padded(getattr(row[at], name), most) for row in cells]) for at in range(len(SITES)))
        data[name] = (("layer", "kv", "channel", *more), np.stack([k, v], axis=1))
        data[f"resid_{name}"] = (("layer", "resid_channel", *more), resid)
    return xr.Dataset(data, coords={"layer": list(layers), "site": list(SITES), "kv": ["k", "v"]})


def direction_of(data: xr.Dataset, layer: int, site: Site) -> Direction:
    """The inverse of :func:`as_dataset` at one layer and site."""
    cell = data.sel(layer=layer, site=site)
    at = data.sel(layer=layer, drop=True)
    gap, basis = (at.resid_gap, at.resid_basis) if site == "resid" else (at.gap.sel(kv=site), at.basis.sel(kv=site))
    separated = Separation(float(cell.separation), float(cell.p_position), float(cell.effect))
    columns = basis.values[:, np.isfinite(basis.values).all(0)]
    return Direction(str(cell.position.values), gap.values, columns, separated, bool(cell.defined))


def _padded(x: NDArray[np.float64], columns: int) -> NDArray[np.float64]:
    """A basis with columns of NaN up to a number; a vector as it is."""
    return x if x.ndim == 1 else np.pad(x, ((0, 0), (0, columns - x.shape[1])), constant_values=np.nan)
