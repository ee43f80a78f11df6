"""The subspace in which harmful and harmless requests differ, at every layer and site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvgeom.engines.registry import resolve
from kvgeom.errors import InputError, unknown, unknown_option
from kvgeom.geometry.activations import SITES, ActivationStore, Site
from kvgeom.geometry.estimators import METHODS, Direction, as_dataset, direction_of, fit_direction
from kvgeom.geometry.rounding import DEFAULT_SCHEME, CacheSpec
from kvgeom.models.load import load, load_option_names
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.progress import shown
from kvgeom.prompts.load import as_prompt_set
from kvgeom.prompts.sets import PromptSet, calibration
from kvgeom.quant.placement import Placement
from kvgeom.results import Result

if TYPE_CHECKING:
    from kvgeom.geometry.directions import Directions
    from kvgeom.geometry.selection import Selection
    from kvgeom.geometry.sensitivity import Sensitivity


@dataclass(frozen=True)
class Source:
    """What a subspace was found in, from which everything else is measured.

    Attributes
    ----------
    activations : ActivationStore
    prompts : PromptSet
        Those of ``activations`` that the subspace tells apart.
    contrasts : dict of str to ActivationStore
        Activations of harmless requests by the fingerprint of their set, shared by all subspaces of one model run.
    """

    activations: ActivationStore
    prompts: PromptSet
    contrasts: dict[str, ActivationStore] = field(default_factory=dict)

    def features(self, layer: int, site: Site) -> NDArray[np.float64]:
        """See :meth:`Subspace.features`."""
        rows = self.activations.indices([*self.prompts.harmful, *self.prompts.harmless])
        found: NDArray[np.float64] = self.activations.features(site)[layer][rows].astype(np.float64)
        return found

    @property
    def is_harmful(self) -> NDArray[np.bool_]:
        """See :attr:`Subspace.is_harmful`."""
        return np.repeat([True, False], [len(self.prompts.harmful), len(self.prompts.harmless)])


@dataclass(frozen=True, repr=False)
class Subspace(Result):
    """Safety subspaces of all layers and sites of a model. Made by :func:`subspace`.

    ``data`` has the dimensions ``layer`` and ``site`` (``"k"``, ``"v"``, ``"resid"``) and the variables

    - ``position``: tokens at which the direction was found (``"instruction"``, ``"template-1"``, ...);
    - ``separation``: cross-validated AUROC of harmful against harmless along the difference of means, and ``effect``, the
      gap over the pooled standard deviation;
    - ``p``: one-sided permutation p-value of the separation, corrected for the number of positions tried; ``p_position``
      is that of the position alone;
    - ``defined``: False where the classes coincide at every position tried.

    ``gap`` (mean harmful minus mean harmless vector) over ``(layer, kv, channel)`` and ``basis`` (orthonormal) over
    ``(layer, kv, channel, dimension)`` describe keys and values; ``resid_gap`` and ``resid_basis`` over
    ``resid_channel`` the residual stream. A basis is NaN in dimensions that the classes do not span there.
    :attr:`directions` has the same by layer and site.

    A subspace that :meth:`load` returns has its directions, and nothing that would need the model: neither activations nor
    prompts, so it cannot measure a sensitivity.
    """

    source: Source | None = field(default=None, compare=False)

    kind: ClassVar[str] = "subspace"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layers": ("layer", "site"),
        "channels": ("layer", "kv", "channel", "dimension"),
        "resid_channels": ("layer", "resid_channel", "dimension"),
    }

    @property
    def k(self) -> int:
        """Dimensions of each subspace."""
        return int(self.meta["k"])

    @property
    def method(self) -> str:
        """How directions were estimated."""
        return str(self.meta["method"])

    @property
    def tried(self) -> tuple[str, ...]:
        """Positions that were looked at."""
        return tuple(self.meta["tried"])

    @cached_property
    def directions(self) -> dict[tuple[int, Site], Direction]:
        """The subspace of every layer and site."""
        return {
            (int(layer), site): direction_of(self.data, int(layer), site) for layer in self.data.layer for site in SITES
        }

    def _found_in(self) -> Source:
        if self.source is None:
            raise InputError(
                "this subspace was read from a file and has no activations; find it again with "
                f"kvgeom.subspace({self.meta['model']!r}, prompts) to measure anything"
            )
        return self.source

    @property
    def activations(self) -> ActivationStore:
        """Keys, values and residual stream of the prompts.

        Raises
        ------
        InputError
            For a subspace that was read from a file, as for everything below that needs them.
        """
        return self._found_in().activations

    @property
    def prompts(self) -> PromptSet:
        """The requests that it tells apart."""
        return self._found_in().prompts

    @property
    def model(self) -> Model:
        """The model that it is a subspace of."""
        return self.activations.model

    @property
    def placement(self) -> Placement:
        """Where keys and values were read."""
        return self.activations.placement

    @property
    def positions(self) -> tuple[str, ...]:
        """Positions that the prompts share."""
        return self.activations.positions

    @property
    def harmful(self) -> tuple[EncodedPrompt, ...]:
        """The harmful prompts as tokens."""
        return self.activations.encoded(self.prompts.harmful)

    @property
    def harmless(self) -> tuple[EncodedPrompt, ...]:
        """The harmless prompts as tokens."""
        return self.activations.encoded(self.prompts.harmless)

    def features(self, layer: int, site: Site) -> NDArray[np.float64]:
        """Mean vector of every prompt at every position, ``[prompts, positions, channels]``, harmful prompts first."""
        return self._found_in().features(layer, site)

    @property
    def is_harmful(self) -> NDArray[np.bool_]:
        """Which rows of :meth:`features` are harmful."""
        return self._found_in().is_harmful

    def refit(
        self, *, k: int = 1, method: str = "mean", position: str | None = None, prompts: PromptSet | None = None
    ) -> Subspace:
        """Another subspace of the same activations; the model is not run again.

        Parameters
        ----------
        k, method, position
            As in :func:`subspace`.
        prompts : PromptSet, optional
            Some of the same requests, perhaps with other labels.

        Raises
        ------
        InputError
            As :func:`subspace`, or for requests that were not run.
        """
        found_in = self._found_in()
        return _fit(Source(found_in.activations, prompts or found_in.prompts, found_in.contrasts), k, method, position)

    def contrasted(self, contrasts: Sequence[PromptSet]) -> dict[str, Subspace]:
        """Subspaces of contrasts between harmless requests (null b), found as this one was, by name.

        Their prompts are run once, whatever number of contrasts they are part of, and once for all schemes.

        Parameters
        ----------
        contrasts : sequence of PromptSet
            The two classes stand in the places of harmful and harmless. No more of each are used than this subspace has:
            a direction from fewer prompts has more noise in it, and more noise looks like more signal.
        """
        size = min(len(self.prompts.harmful), len(self.prompts.harmless))
        small = [contrast.take(size) for contrast in contrasts]
        requests = tuple(dict.fromkeys(text for contrast in small for text in (*contrast.harmful, *contrast.harmless)))
        if not requests:
            return {}
        key, stores = PromptSet("", requests, (), "").fingerprint, self._found_in().contrasts
        if key not in stores:
            stores[key] = ActivationStore(self.model, requests, self.placement)
        position = self.tried[0] if len(self.tried) == 1 else None
        return {one.name: _fit(Source(stores[key], one), self.k, self.method, position) for one in small}

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

        Runs no prompt of the subspace again; the harmless contrasts that it is compared with are run once.
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
        """Choose the refusal direction by what it does; see :func:`kvgeom.geometry.selection.select_direction`.

        Raises
        ------
        InputError
            For an unknown option, and as that function.
        """
        from kvgeom.geometry.selection import select_direction

        known = [name for name in signature(select_direction).parameters if name != "space"]
        for name in options:
            if name not in known:
                raise unknown_option(name, known)
        return select_direction(self, **options)

    def summary(self) -> str:
        defined = self.data.defined.values
        return (
            f"{self.meta['model']}: {self.data.sizes['layer']} layers x {list(self.data.site.values)}, k={self.k}, "
            f"{self.method}; defined at {int(defined.sum())} of {defined.size}"
        )


def subspace(
    model: Any,
    prompts: PromptSet | str | None = None,
    *,
    k: int = 1,
    method: str = "mean",
    position: str | None = None,
    placement: Placement | str | None = None,
    progress: bool = True,
    **load_options: Any,
) -> Subspace:
    """Find where harmful and harmless requests differ in keys, values and residual stream.

    At each layer and site the class difference is taken at the instruction's tokens (their mean) and at every
    template token after it, and the best separated position is kept. Costs one forward pass over the prompts, whose
    activations are kept on disk for whatever is measured afterwards (see
    :class:`kvgeom.geometry.activations.ActivationStore`).

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts : anything that :func:`kvgeom.prompts.load.as_prompt_set` takes, optional
        Needs harmful and harmless requests, for instance ``"held-out"`` or a file; the calibration set by default.
    k : int
        Dimensions. With ``method="mean"`` and k > 1 the leading right singular vectors of the differences at all
        positions; with ``"pca"`` those of the paired differences at one position.
    method : {"mean", "winsorized", "pca", "logistic"}
        See :func:`kvgeom.geometry.estimators.estimate`.
    position : str, optional
        One of the shared positions (``"instruction"``, ``"template-1"``, ...) instead of the best separated.
    placement : Placement or {"cache", "paper"}, optional
        Where keys and values are read; as stored in the cache by default (rotary embedding taken out again).
    progress : bool
    **load_options
        Of :func:`kvgeom.load`.

    Raises
    ------
    InputError
        If a class has fewer than two prompts, ``k`` exceeds what the method gives, or an option, method, position, placement
        or prompt set is unknown.

    Examples
    --------
    >>> kvgeom.subspace("demo").sensitivity().plot()  # doctest: +SKIP
    """
    known = load_option_names() | {*signature(subspace).parameters} - {"model", "load_options"}
    for name in load_options:
        if name not in known:
            raise unknown_option(name, known)
    at = resolve(DEFAULT_SCHEME, placement=placement).placement
    chosen = calibration() if prompts is None else as_prompt_set(prompts)
    _check(chosen, k, method)
    with shown(progress):
        loaded = load(model, progress=progress, **load_options)
        requests = tuple(dict.fromkeys([*chosen.harmful, *chosen.harmless]))
        return _fit(Source(ActivationStore(loaded, requests, at), chosen), k, method, position)


def _check(prompts: PromptSet, k: int, method: str) -> None:
    """Checks that need no model."""
    if min(len(prompts.harmful), len(prompts.harmless)) < 2:
        raise InputError(
            f"prompt set {prompts.name!r} has {len(prompts.harmful)} harmful and {len(prompts.harmless)} harmless requests; "
            "a subspace needs at least two of each"
        )
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")


def _fit(source: Source, k: int, method: str, position: str | None) -> Subspace:
    store, prompts, names = source.activations, source.prompts, source.activations.positions
    _check(prompts, k, method)
    if position is not None and position not in names:
        raise unknown("position", position, names)
    tried = names if position is None else (position,)
    pairs = min(len(prompts.harmful), len(prompts.harmless))
    most = {"mean": len(tried), "pca": pairs}.get(method, 1)
    if k > most:
        raise InputError(
            f"method {method!r} gives at most k={most} with {len(tried)} positions and {pairs} pairs of requests, got k={k}; "
            "method='pca' gives one dimension for each pair"
        )
    harmful, geometry = source.is_harmful, store.model.geometry
    found = {
        (layer, site): fit_direction(source.features(layer, site), harmful, names, tried, k, method)
        for layer in range(geometry.layers)
        for site in SITES
    }
    meta = {
        "model": store.model.name,
        "fingerprint": store.model.fingerprint,
        "placement": str(store.placement),
        "prompts": prompts.fingerprint,
        "k": k,
        "method": method,
        "tried": list(tried),
        "kv_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
    }
    return Subspace(as_dataset(found, geometry.layers, len(tried)), meta, source)
