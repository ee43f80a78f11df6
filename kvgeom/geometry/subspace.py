"""The subspace in which harmful and harmless requests differ, at every layer and site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvgeom.errors import InputError
from kvgeom.geometry.activations import SITES, ActivationStore, Site
from kvgeom.geometry.estimators import (
    METHODS,
    Separation,
    difference_of_means,
    difference_of_winsorized_means,
    estimate,
    separation,
)
from kvgeom.geometry.rounding import DEFAULT_SCHEME, CacheSpec
from kvgeom.models.load import load
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.progress import shown
from kvgeom.prompts.sets import PromptSet, calibration
from kvgeom.quant.placement import Placement

if TYPE_CHECKING:
    from kvgeom.geometry.directions import Directions
    from kvgeom.geometry.selection import Selection
    from kvgeom.geometry.sensitivity import Sensitivity

#: A class difference smaller than this share of the mean square is rounding error of the arithmetic, not signal.
COINCIDENT = 1e-10


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


@dataclass(frozen=True)
class Subspace:
    """Safety subspaces of all layers and sites of a model; made by :func:`subspace`.

    Attributes
    ----------
    activations : ActivationStore
        Keys, values and residual stream of the prompts: all that follows is computed from it, without running the model
        again.
    prompts : PromptSet
    k : int
        Dimensions of each subspace.
    method : str
        How directions were estimated.
    tried : tuple of str
        Positions that were looked at.
    directions : dict of (layer, site) to Direction
    """

    activations: ActivationStore = field(repr=False)
    prompts: PromptSet
    k: int
    method: str
    tried: tuple[str, ...]
    directions: dict[tuple[int, Site], Direction] = field(repr=False)
    contrast_activations: dict[str, ActivationStore] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> Model:
        """The model that it is a subspace of."""
        return self.activations.model

    @property
    def placement(self) -> Placement:
        """Which keys and values are meant."""
        return self.activations.placement

    @property
    def positions(self) -> tuple[str, ...]:
        """Positions that the prompts share."""
        return self.activations.positions

    @property
    def harmful(self) -> tuple[EncodedPrompt, ...]:
        """The harmful prompts as tokens."""
        return tuple(self.activations.prompts[row] for row in self.activations.indices(self.prompts.harmful))

    @property
    def harmless(self) -> tuple[EncodedPrompt, ...]:
        """The harmless prompts as tokens."""
        return tuple(self.activations.prompts[row] for row in self.activations.indices(self.prompts.harmless))

    def features(self, layer: int, site: Site) -> NDArray[np.float64]:
        """Mean vector of every prompt at every position, ``[prompts, positions, channels]``, harmful prompts first."""
        return _features(self.activations, self.prompts, layer, site)

    @property
    def is_harmful(self) -> NDArray[np.bool_]:
        """Which rows of :meth:`features` are harmful."""
        return _labels(self.prompts)

    def refit(self, *, k: int = 1, method: str = "mean", position: str | None = None) -> Subspace:
        """The same prompts, another subspace; the model is not run again. Parameters as in :func:`subspace`."""
        found = _fit(self.activations, self.prompts, k, method, position)
        return replace(found, contrast_activations=self.contrast_activations)

    def sensitivity(
        self,
        scheme: CacheSpec = DEFAULT_SCHEME,
        *,
        noise_pairs: int | None = None,
        contrasts: Sequence[PromptSet] | None = None,
        progress: bool = True,
        seed: int = 0,
    ) -> Sensitivity:
        """How exposed the subspace is to the rounding error of a scheme, an engine preset or a recipe.

        Runs no prompt of the subspace again; the harmless contrasts that it is held against are run once.
        See :func:`kvgeom.geometry.sensitivity.measure`.
        """
        from kvgeom.geometry.sensitivity import measure

        return measure(self, scheme, noise_pairs=noise_pairs, contrasts=contrasts, progress=progress, seed=seed)

    def compare(
        self,
        methods: Sequence[str] | None = None,
        positions: Sequence[str] | None = None,
        *,
        samples: int = 50,
        progress: bool = True,
        seed: int = 0,
    ) -> Directions:
        """Directions by every method, with their stability; see :func:`kvgeom.geometry.directions.compare`."""
        from kvgeom.geometry.directions import compare

        return compare(self, methods, positions, samples=samples, progress=progress, seed=seed)

    def select(self, **options: Any) -> Selection:
        """Choose the refusal direction of the residual stream by what it does; see :func:`kvgeom.geometry.directions.select`."""
        from kvgeom.geometry.directions import select_direction

        return select_direction(self, **options)

    def meta(self) -> dict[str, Any]:
        """What made it, in JSON types."""
        return {
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "placement": str(self.placement),
            "prompts": self.prompts.fingerprint,
            "k": self.k,
            "method": self.method,
            "kv_heads": self.model.geometry.kv_heads,
            "head_dim": self.model.geometry.head_dim,
        }


def subspace(
    model: Any,
    prompts: PromptSet | None = None,
    *,
    k: int = 1,
    method: str = "mean",
    position: str | None = None,
    placement: Placement | None = None,
    progress: bool = True,
    **load_options: Any,
) -> Subspace:
    """Find where harmful and harmless requests differ in keys, values and residual stream.

    At each layer and site the class difference is taken at the instruction's tokens (their mean) and at every
    template token after it, and the best separated position is kept. Costs one forward pass over the prompts, which
    are kept on disk for whatever is measured afterwards (see :class:`kvgeom.geometry.activations.ActivationStore`).

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts : PromptSet, optional
        Needs harmful and harmless requests; the calibration set by default.
    k : int
        Dimensions. With ``method="mean"`` and k > 1 the leading right singular vectors of the differences at all
        positions; with ``"pca"`` those of the paired differences at one position.
    method : {"mean", "winsorized", "pca", "logistic"}
        See :func:`kvgeom.geometry.estimators.estimate`.
    position : str, optional
        One of the shared positions (``"instruction"``, ``"template-1"``, ...) instead of the best separated.
    placement : Placement, optional
        Which keys and values are meant; as stored in the cache by default (rotary embedding taken out again).

    Raises
    ------
    InputError
        If a class has fewer than two prompts, ``k`` exceeds what the method gives, or there is no such method or
        position.

    Examples
    --------
    >>> kvgeom.subspace("demo").sensitivity().plot()  # doctest: +SKIP
    """
    loaded = load(model, **load_options)
    prompts = prompts or calibration()
    _check_classes(prompts)
    store = ActivationStore(
        loaded, tuple(dict.fromkeys([*prompts.harmful, *prompts.harmless])), placement or Placement()
    )
    with shown(progress):
        return _fit(store, prompts, k, method, position)


def fit(store: ActivationStore, prompts: PromptSet, like: Subspace) -> Subspace:
    """The subspace of some prompts of a store, found as ``like`` was."""
    position = like.tried[0] if len(like.tried) == 1 else None
    return _fit(store, prompts, like.k, like.method, position)


def _check_classes(prompts: PromptSet) -> None:
    if min(len(prompts.harmful), len(prompts.harmless)) < 2:
        raise InputError(
            f"prompt set {prompts.name!r} has {len(prompts.harmful)} harmful and {len(prompts.harmless)} harmless requests; "
            "a subspace needs at least two of each"
        )


def _fit(store: ActivationStore, prompts: PromptSet, k: int, method: str, position: str | None) -> Subspace:
    names = store.positions
    if position is not None and position not in names:
        raise InputError(f"position {position!r} was asked, but the prompts share {', '.join(names)}; choose one")
    tried = names if position is None else (position,)
    if method not in METHODS:
        raise InputError(f"direction method {method!r} was asked; choose one of {', '.join(METHODS)}")
    pairs = min(len(prompts.harmful), len(prompts.harmless))
    most = {"mean": len(tried), "pca": pairs}.get(method, 1)
    if not 1 <= k <= most:
        raise InputError(
            f"k={k} was asked, but {len(tried)} positions and {pairs} pairs of requests give method {method!r} at most "
            f"as many dimensions as {most}; method='pca' gives one for each pair"
        )
    store.features("k")
    harmful = _labels(prompts)
    directions = {
        (layer, site): _direction(_features(store, prompts, layer, site), harmful, names, tried, k, method)
        for layer in range(store.model.geometry.layers)
        for site in SITES
    }
    return Subspace(store, prompts, k, method, tuple(tried), directions)


def _labels(prompts: PromptSet) -> NDArray[np.bool_]:
    harmful: NDArray[np.bool_] = np.arange(len(prompts.harmful) + len(prompts.harmless)) < len(prompts.harmful)
    return harmful


def _features(store: ActivationStore, prompts: PromptSet, layer: int, site: Site) -> NDArray[np.float64]:
    rows = store.indices([*prompts.harmful, *prompts.harmless])
    found: NDArray[np.float64] = store.features(site)[layer][rows].astype(np.float64)
    return found


def defined_at(features: NDArray[np.float64], harmful: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """At which positions the classes differ at all: ``[prompts, positions, channels]`` to ``[positions]``."""
    gaps = difference_of_means(features, harmful)
    found: NDArray[np.bool_] = (gaps**2).sum(-1) > COINCIDENT * (features**2).sum(-1).mean(0)
    return found


def _direction(
    x: NDArray[np.float64],
    harmful: NDArray[np.bool_],
    names: Sequence[str],
    tried: Sequence[str],
    k: int,
    method: str,
) -> Direction:
    gaps = difference_of_means(x, harmful)
    defined = defined_at(x, harmful) & np.isin(names, tried)
    found = {index: separation(x[:, index], harmful, draws=0) for index in map(int, np.flatnonzero(defined))}
    if not found:
        index = list(names).index(tried[0])
        return Direction(tried[0], gaps[index], np.zeros((len(gaps[index]), k)), Separation(0.5, 1.0, 0.0), False)
    best = max(found, key=lambda index: (found[index].auroc, found[index].effect))
    if method == "mean" and k > 1:
        basis = np.linalg.svd(gaps[defined], full_matrices=False)[2][:k].T
    else:
        basis = estimate(x[:, best], harmful, method, k)
    gap = difference_of_winsorized_means(x[:, best], harmful) if method == "winsorized" else gaps[best]
    best_separation = separation(x[:, best], harmful)
    return Direction(list(names)[best], gap.astype(np.float64), basis.astype(np.float64), best_separation, True)
