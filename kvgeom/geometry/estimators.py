"""Directions that separate harmful from harmless requests: how they are estimated, and how stable they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import rankdata

from kvgeom.checks import one_of
from kvgeom.errors import InputError, brief
from kvgeom.geometry.activations import SITES, Site
from kvgeom.geometry.bases import agreement, along, oriented
from kvgeom.geometry.methods.mean import difference_of_means
from kvgeom.geometry.methods.registry import Floats, Method, as_method
from kvgeom.geometry.separation import Separation, folds_of, separation

#: A class difference smaller than this share of the mean square is rounding error of the arithmetic, not signal.
COINCIDENT = 1e-10
#: What a direction stands for by where it is read (Zhao et al., arXiv:2507.11878): whether a request is harmful is known at its
#: own tokens, whether it will be refused at the last token of the template, from which the answer begins.
CONCEPTS: Mapping[str, str] = {"harmfulness": "instruction", "refusal": "template-1"}


def position_of(concept: Any, position: str | None = None) -> str | None:
    """The position of one of :data:`CONCEPTS`; without a concept the position that was given.

    Raises
    ------
    InputError
        For an unknown concept, or if both are given.
    """
    if concept is None:
        return position
    one_of("concept", concept, CONCEPTS)
    if position is not None:
        raise InputError(
            f"concept {concept!r} is read at {CONCEPTS[concept]!r}; give a concept or a position, not both"
        )
    return CONCEPTS[concept]


def most_dimensions(method: Any, positions: int, pairs: int) -> int:
    """How many dimensions a method gives at most; see :meth:`kvgeom.geometry.methods.registry.Method.most`."""
    return as_method(method).most(positions, pairs)


def estimate(features: Floats, harmful: NDArray[np.bool_], method: str | Method = "mean", k: int = 1) -> Floats:
    """Directions that tell harmful from harmless requests, at one position.

    Parameters
    ----------
    features : array [prompts, channels]
        The n-th harmful row and the n-th harmless row are a pair.
    harmful : bool array [prompts]
    method : str or Method
        One of :data:`~kvgeom.geometry.methods.registry.METHODS`; see the modules of :mod:`kvgeom.geometry.methods`. All aim at
        the same direction where the classes differ by a shift and their spread is isotropic.
    k : int
        Columns; how many a method has at most depends on it.

    Returns
    -------
    array [channels, at most k]
        Orthonormal; each column has the harmful mean on its positive side. Zero where the classes coincide. Fewer columns
        than asked where directions depend on each other.

    Raises
    ------
    InputError
        For an unknown method, one that needs the model, or a ``k`` that it cannot give.
    """
    found = as_method(method)
    if found.needs_model:
        raise InputError(f"method {found.name!r} needs the model; use kvgeom.subspace(model, method={found.name!r})")
    pairs = int(min(harmful.sum(), (~harmful).sum()))
    most = found.most(1, pairs)
    if not 1 <= k <= most:
        raise InputError(
            f"method {found.name!r} gives 1 to {most} directions at one position with {pairs} pairs, got k={brief(k)}"
            + ("; use method='pca'" if most == 1 else "")
        )
    return oriented(found.directions(features, harmful, k), difference_of_means(features, harmful))


def resampled(harmful: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """Row numbers of one bootstrap sample: pairs are drawn together where both classes are of one size."""
    bad, good = np.flatnonzero(harmful), np.flatnonzero(~harmful)
    drawn = rng.integers(0, len(bad), len(bad))
    other = drawn if len(bad) == len(good) else rng.integers(0, len(good), len(good))
    return np.concatenate([bad[drawn], good[other]])


def bootstrap(
    features: Floats,
    harmful: NDArray[np.bool_],
    method: str | Method = "mean",
    *,
    k: int = 1,
    samples: int = 50,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """The directions, and their agreement with those of bootstrap samples of the prompts.

    Parameters
    ----------
    features : array [prompts, channels]
    harmful : bool array [prompts]
    method : str or Method
        As in :func:`estimate`. What it chooses by the data (the penalty of the probe) is chosen once.
    k : int
    samples, seed : int

    Returns
    -------
    basis : array [channels, at most k]
        As :func:`estimate` gives it.
    agreement : array [samples]
        Cosine of the two directions; of more dimensions, the root mean square cosine of the principal angles
        (:func:`agreement`). Near 1: directions that do not hang on single prompts. Those of halves of the data would agree less.
    """
    found = as_method(method)
    turn = None
    if found.in_span and len(features) < features.shape[1]:
        u, s, turn = np.linalg.svd(features, full_matrices=False)
        features = u * s
    whole = estimate(features, harmful, found, k)
    drawing = found.resampled(features, harmful)
    rng = np.random.default_rng(seed)
    agreements = np.zeros(samples)
    for number in range(samples):
        rows = resampled(harmful, rng)
        agreements[number] = agreement(whole, estimate(features[rows], harmful[rows], drawing, k))
    return (whole if turn is None else turn.T @ whole), agreements


def held_out(
    features: Floats,
    harmful: NDArray[np.bool_],
    method: str | Method = "mean",
    *,
    k: int = 1,
    folds: int = 5,
    seed: int = 0,
) -> float:
    """Area under the ROC curve of requests along directions that were found without them.

    Every request is projected on the direction that the method finds in the other folds, measured from the midpoint of their
    class means; the two requests of a pair are in the same fold. Of more dimensions the direction is that of
    :func:`along`. What a method chooses by the data (the penalty of the probe) it has chosen from all requests.

    Parameters
    ----------
    features : array [prompts, channels]
    harmful : bool array [prompts]
    method, k
        As in :func:`estimate`.
    folds, seed : int
        As in :func:`kvgeom.geometry.separation.folds_of`.

    Returns
    -------
    float
        0.5 is chance; NaN where a fold leaves fewer than two pairs.
    """
    found = as_method(method).resampled(features, harmful)
    fold = folds_of(harmful, folds, seed)
    scores = np.zeros(len(features))
    for out in np.unique(fold):
        test = fold == out
        rest, labels = features[~test], harmful[~test]
        pairs = int(min(labels.sum(), (~labels).sum()))
        if pairs < 2:
            return float("nan")
        gap = difference_of_means(rest, labels)
        unit = along(gap, estimate(rest, labels, found, min(k, found.most(1, pairs))))
        middle = (rest[labels].mean(0) + rest[~labels].mean(0)) / 2
        scores[test] = (features[test] - middle) @ unit
    ranks, positives = rankdata(scores), int(harmful.sum())
    wins = float(ranks[harmful].sum()) - positives * (positives + 1) / 2
    return wins / (positives * (len(harmful) - positives))


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
    method: str | Method,
    resolution: NDArray[np.float64],
    *,
    stacked: Sequence[str] | None = None,
    draws: int = 999,
    found_before: Floats | None = None,
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
    method : str or Method
        As in :func:`estimate`; ``"mean"`` with k > 1 takes the leading singular vectors of the differences at several
        positions.
    resolution : array [positions, channels]
        As in :func:`defined_at`.
    stacked : sequence of str, optional
        These positions; those tried by default.
    draws : int
        Labelings of the separation's p-value.
    found_before : array [positions, channels, k], optional
        Directions at every position, of a method that needs the model (:meth:`~kvgeom.geometry.methods.registry.Method.bases`).
    """
    by = as_method(method)
    gaps = difference_of_means(x, harmful)
    differ = defined_at(x, harmful, resolution)
    defined = differ & np.isin(names, tried)
    found = {index: separation(x[:, index], harmful, draws=0) for index in map(int, np.flatnonzero(defined))}
    if not found:
        index = list(names).index(tried[0])
        return Direction(tried[0], gaps[index], np.zeros((len(gaps[index]), k)), Separation(0.5, 1.0, 0.0), False)
    best = max(found, key=lambda index: (found[index].auroc, found[index].effect))
    several = differ & np.isin(names, tried if stacked is None else stacked)
    basis = basis_at(x, harmful, best, several, k, by, found_before)
    gap = by.gap(x[:, best], harmful)
    best_separation = separation(x[:, best], harmful, draws=draws)
    return Direction(list(names)[best], gap.astype(np.float64), basis.astype(np.float64), best_separation, True)


def basis_at(
    x: NDArray[np.float64],
    harmful: NDArray[np.bool_],
    position: int,
    stacked: NDArray[np.bool_],
    k: int,
    method: str | Method,
    found_before: Floats | None = None,
) -> Floats:
    """Orthonormal basis ``[channels, at most k]`` at one position, of ``"mean"`` with k > 1 from the gaps at several.

    Directions that were found before stay on the side that they have, which for a cone is the one that causes refusal.
    """
    if found_before is not None:
        return oriented(found_before[position], None)
    gap = difference_of_means(x[:, position], harmful)
    return oriented(as_method(method).subspace(x, harmful, position, stacked, k), gap)


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
