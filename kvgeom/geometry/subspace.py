"""The subspace in which harmful and harmless requests differ, at every layer and site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar

from kvgeom.checks import suggests
from kvgeom.engines.registry import resolve
from kvgeom.evaluation.config import LOAD_OPTIONS
from kvgeom.geometry.activations import ActivationStore
from kvgeom.geometry.directions import Directions, compare
from kvgeom.geometry.effects import Effects, effects
from kvgeom.geometry.estimators import position_of
from kvgeom.geometry.fitted import FittedSpace, Source, check_prompts
from kvgeom.geometry.methods.registry import Method
from kvgeom.geometry.rounding import DEFAULT_SCHEME, CacheSpec
from kvgeom.geometry.selection import Selection, select_direction
from kvgeom.geometry.sensitivity import CONTRAST_PAIRS, Sensitivity, measure
from kvgeom.models.load import load
from kvgeom.progress import shown
from kvgeom.prompts.load import as_prompt_set
from kvgeom.prompts.sets import PromptSet, calibration
from kvgeom.quant.placement import Placement


@dataclass(frozen=True, repr=False)
class Subspace(FittedSpace):
    """Safety subspaces of all layers and sites of a model. Made by :func:`subspace`.

    What it holds is described in :class:`~kvgeom.geometry.fitted.FittedSpace`; here is what can be measured of it.
    """

    kind: ClassVar[str] = "subspace"

    @suggests()
    def sensitivity(
        self,
        scheme: CacheSpec = DEFAULT_SCHEME,
        *,
        noise_pairs: int | None = None,
        contrasts: Any = None,
        contrast_pairs: int = CONTRAST_PAIRS,
        null_subspaces: int = 100,
        progress: bool = True,
        seed: int = 0,
    ) -> Sensitivity:
        """How exposed the subspace is to the rounding error of a scheme, an engine preset or a recipe.

        Runs no prompt of the subspace again; the harmless contrasts that it is compared with are run once.
        See :func:`kvgeom.geometry.sensitivity.measure`.
        """
        return measure(
            self,
            scheme,
            noise_pairs=noise_pairs,
            contrasts=contrasts,
            contrast_pairs=contrast_pairs,
            null_subspaces=null_subspaces,
            progress=progress,
            seed=seed,
        )

    @suggests()
    def compare(
        self,
        methods: Sequence[str | Method] | str | Method | None = None,
        positions: Sequence[str] | str | None = None,
        *,
        k: int = 1,
        heads: bool = False,
        samples: int = 50,
        progress: bool = True,
        seed: int = 0,
    ) -> Directions:
        """Directions by every method, with their stability; see :func:`kvgeom.geometry.directions.compare`."""
        return compare(self, methods, positions, k=k, heads=heads, samples=samples, progress=progress, seed=seed)

    @suggests(name for name in signature(effects).parameters if name != "space")
    def effects(self, methods: Sequence[str | Method] | str | Method | None = None, **options: Any) -> Effects:
        """What directions do when they are ablated and added; see :func:`kvgeom.geometry.effects.effects`.

        Raises
        ------
        InputError
            For an unknown option, and as that function.
        """
        return effects(self, methods, **options)

    @suggests(name for name in signature(select_direction).parameters if name != "space")
    def select(self, **options: Any) -> Selection:
        """Choose the refusal direction by what it does; see :func:`kvgeom.geometry.selection.select_direction`.

        Raises
        ------
        InputError
            For an unknown option, and as that function.
        """
        return select_direction(self, **options)


@suggests(LOAD_OPTIONS)
def subspace(
    model: Any,
    prompts: PromptSet | str | None = None,
    *,
    k: int = 1,
    method: str | Method = "mean",
    concept: str | None = None,
    position: str | None = None,
    placement: Placement | str | None = None,
    progress: bool = True,
    **load_options: Any,
) -> Subspace:
    """Find where harmful and harmless requests differ in keys, values and residual stream.

    At each layer and site the class difference is taken at the instruction's tokens (their mean), a rule that is fixed in
    advance: docs/definitions.md says why. ``sensitivity().plot("positions")`` shows all others. Costs one forward pass over the prompts, whose
    activations are kept on disk for whatever is measured afterwards (see
    :class:`kvgeom.geometry.activations.ActivationStore`).

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts : anything that :func:`kvgeom.prompts.load.as_prompt_set` takes, optional
        Needs harmful and harmless requests, for instance ``"held-out"`` or a file; the calibration set by default.
    k : int
        Dimensions. With ``method="mean"`` and k > 1 the leading right singular vectors of the differences at all
        positions, where none is given or it is ``"best"``; with ``"pca"`` those of the paired differences at one position.
    method : {"mean", "winsorized", "pca", "logistic", "projected", "whitened", "clusters", "som", "cone"} or Method
        How directions are found, each in a module of :mod:`kvgeom.geometry.methods`. A method with other options than the
        defaults is given itself, such as ``Cone(steps=200)``.
    concept : {"harmfulness", "refusal"}, optional
        Which of two things that harmful requests have in common: that they are harmful, read at the instruction's own tokens,
        or that they will be refused, read at the last template token, from which the answer begins. A position by its
        meaning; give one or the other.
    position : str, optional
        Another of the shared positions (``"template-1"``, the last prompt token, ...), or ``"best"``: the best separated of
        all, at each layer and site, with p-values that are corrected for the choice.
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
    at = resolve(DEFAULT_SCHEME, placement=placement).placement
    position = position_of(concept, position)
    chosen = calibration() if prompts is None else as_prompt_set(prompts)
    check_prompts(chosen, k, method)
    with shown(progress):
        loaded = load(model, progress=progress, **load_options)
        requests = tuple(dict.fromkeys([*chosen.harmful, *chosen.harmless]))
        return Subspace.fit(Source(ActivationStore(loaded, requests, at), chosen), k, method, position)
