"""Mitigations by name.

A mitigation is one file: a function of a :class:`Setting` that yields candidates, with :func:`method` above it. The modules
of this package register themselves; yours does the same, from wherever it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from kvgeom.engines.engine import CacheConfig
from kvgeom.errors import InputError, unknown
from kvgeom.mitigation.candidates import UNMITIGATED, Candidate
from kvgeom.models.model import KVGeometry
from kvgeom.models.statistics import Constants
from kvgeom.quant.recipe import Recipe
from kvgeom.registry import check_free, import_modules

#: What a method changes, in the order in which candidates are tried; see :class:`Method`.
Stage = Literal["cache", "layers", "placement"]

_METHODS: dict[str, Method] = {}
_PACKAGE = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Setting:
    """What a method knows when it is asked for candidates.

    Attributes
    ----------
    config : CacheConfig
        The cache to mitigate: one scheme for the keys and one for the values of all layers, and a placement.
    geometry : KVGeometry
    constants : Constants
        Offsets and channel sizes, measured on the calibration prompts.
    orders : mapping of rule to sequence of int
        Every layer by every rule of :class:`~kvgeom.mitigation.layers.LayerSelection`, best first; empty if layers were not
        ranked.
    """

    config: CacheConfig
    geometry: KVGeometry
    constants: Constants
    orders: Mapping[str, Sequence[int]]

    @property
    def unmitigated(self) -> Candidate:
        """The cache as its engine makes it."""
        recipe = self.constants_for(self.config.recipe(self.geometry.layers))
        return Candidate(
            UNMITIGATED, "unmitigated", recipe, self.config.placement, f"is the cache of {self.config.name}, unchanged"
        )

    def constants_for(self, recipe: Recipe) -> Recipe:
        """The same recipe in the layers that store something, with only those measured constants that its schemes use."""
        recipe = recipe.only(self.geometry.stores)
        known, centred = self.constants, recipe.sites_with("offsets")
        offsets = known.both if "v" in centred else known.keys if centred else None
        return recipe.with_statics(offsets=offsets, factors=known.factors if recipe.sites_with("factors") else None)

    @property
    def offset(self) -> str:
        """What the offset of the keys is, for descriptions."""
        bias = self.constants.keys.name == "key bias"
        return "bias of the key projection" if bias else "mean key of the calibration prompts"


@dataclass(frozen=True)
class Method:
    """A mitigation; made by :func:`method`.

    Attributes
    ----------
    name : str
    candidates : callable (Setting) -> iterable of Candidate
        Those that make no difference, because they are the unmitigated cache or another candidate, are dropped.
    stage : {"cache", "layers", "placement"}
        ``cache``: treats all layers alike; the best of these are tried again with layers kept in 16 bits. ``layers``:
        treats layers differently. ``placement``: changes which tokens are quantized.
    """

    name: str
    candidates: Callable[[Setting], Iterable[Candidate]]
    stage: Stage


def method(
    name: str, stage: Stage = "cache"
) -> Callable[[Callable[[Setting], Iterable[Candidate]]], Callable[[Setting], Iterable[Candidate]]]:
    """Register the function below as a mitigation; it takes part in every search from then on.

    Parameters
    ----------
    name : str
    stage : {"cache", "layers", "placement"}
        See :class:`Method`.

    Examples
    --------
    ::

        @method("sinks of 16 tokens", stage="placement")
        def sinks(setting: Setting) -> Iterable[Candidate]:
            base = setting.unmitigated
            yield replace(base, name="16 sinks", family="sinks of 16 tokens", placement=replace(base.placement, sinks=16))
    """

    def register(
        candidates: Callable[[Setting], Iterable[Candidate]],
    ) -> Callable[[Setting], Iterable[Candidate]]:
        register_method(Method(name, candidates, stage))
        return candidates

    return register


def register_method(new: Method) -> Method:
    """Let a mitigation take part in every search; returns it.

    Raises
    ------
    InputError
        If the name is taken, or the stage is unknown.
    """
    import_modules(_PACKAGE)
    check_free("a mitigation named", new.name, _METHODS)
    if new.stage not in get_args(Stage):
        raise unknown("stage", new.stage, get_args(Stage))
    _METHODS[new.name] = new
    return new


def methods(stage: Stage | None = None) -> tuple[Method, ...]:
    """All registered mitigations, or those of one stage, in the order in which they are tried."""
    import_modules(_PACKAGE)
    stages = get_args(Stage)
    found = sorted(_METHODS.values(), key=lambda each: stages.index(each.stage))  # of equals in order of registration
    return tuple(each for each in found if stage in (None, each.stage))


def candidates_of(setting: Setting, stage: Stage, known: Sequence[Candidate] = ()) -> list[Candidate]:
    """What the methods of one stage offer, after the candidates ``known`` so far; each cache once.

    Raises
    ------
    InputError
        If a method gives another cache a name that is taken.
    """
    seen = {(each.recipe, each.placement) for each in known}
    names, found = {each.name for each in known}, list[Candidate]()
    for each in methods(stage):
        for candidate in each.candidates(setting):
            key = (candidate.recipe, candidate.placement)
            if key in seen:
                continue
            if candidate.name in names:
                raise InputError(
                    f"mitigation {each.name!r} offers a candidate named {candidate.name!r}, but there is another of that "
                    "name; give it another name"
                )
            seen.add(key)
            names.add(candidate.name)
            found.append(candidate)
    return found
