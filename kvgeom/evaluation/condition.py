"""One thing that is done to a cache, with its coordinates in an experiment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from kvgeom.checks import as_name, check_texts, whole
from kvgeom.engines.engine import CacheConfig
from kvgeom.engines.registry import resolve
from kvgeom.errors import InputError, brief
from kvgeom.models.model import Model
from kvgeom.models.statistics import missing_constants, with_constants
from kvgeom.prompts.sets import calibration
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Site

T = TypeVar("T")
#: What an outcome's recipe is known by, apart from its name.
COORDINATES = ("family", "layer", "granularity", "bits", "draw")
#: Name of the model with an exact cache among recipes.
EXACT = "exact"


@dataclass(frozen=True)
class Condition:
    """A recipe under a placement, and where it stands in an experiment.

    Results select by these coordinates; the name of a condition is for people.

    Attributes
    ----------
    recipe : Recipe
    placement : Placement, "cache" or "paper"
    family : str
        What is varied: ``"bits"``, ``"layer"``, ``"granularity"``, ``"channels"``, ``"mitigation"``, ...
    layer : int or None
        The layer that it is about.
    granularity : str
        What shares a scale.
    bits : int or None
    draw : int or None
        Which of several random draws.
    """

    recipe: Recipe
    placement: Placement = field(default_factory=Placement)
    family: str = ""
    layer: int | None = None
    granularity: str = ""
    bits: int | None = None
    draw: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, Recipe):
            raise InputError(f"what a condition does to the cache is a Recipe, got {brief(self.recipe)}")
        check_texts("a condition", self, "family", "granularity")
        object.__setattr__(self, "placement", Placement.parse(self.placement))
        for name in ("layer", "bits", "draw"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else whole(name, value, None))

    @property
    def key(self) -> dict[str, Any]:
        """What a journal knows it by: recipe and placement, not name or coordinates."""
        return {"recipe": self.recipe.record(), "placement": str(self.placement)}

    def __str__(self) -> str:
        return f"{self.recipe}; {self.placement}"


def as_conditions(given: Any, model: Model, placement: Placement | str | None) -> dict[str, Condition]:
    """Conditions by name, whatever a user wrote.

    Parameters
    ----------
    given : mapping of name to condition, or sequence of conditions, or one
        A condition is a :class:`Condition`, or anything that :func:`kvgeom.engines.registry.resolve` takes: a scheme or its
        name, the preset of an engine, a recipe. Constants that a transform needs are added (:func:`with_model_constants`).
    model : Model
    placement : Placement, str or None
        Of all of them, instead of what they bring.

    Raises
    ------
    InputError
        If one cannot be read, has a name that no file could keep, is for another number of layers, rounds only layers that store nothing, or has the name of
        the model with an exact cache, or if two different ones have one name.
    """
    if isinstance(given, Mapping):
        named = [(str(name), each) for name, each in given.items()]
    else:
        several = isinstance(given, Sequence) and not isinstance(given, str)
        named = [(_name(each), each) for each in (given if several else [given])]
    conditions = by_name((name, _condition(name, each, model, placement)) for name, each in named)
    return with_model_constants(model, conditions)


def check_name(name: str) -> None:
    """Raise InputError if a cache has no name that files can keep, or the one that is reserved for the exact cache."""
    as_name("the name of a recipe", name)
    if name == EXACT:
        raise InputError(f"{EXACT!r} is the name of the model with an exact cache; give the recipe another name")


def by_name(caches: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Caches by name; of equal ones with one name, one.

    Raises
    ------
    InputError
        If two different ones have one name.
    """
    found: dict[str, T] = {}
    for name, cache in caches:
        if found.setdefault(name, cache) != cache:
            raise InputError(f"two different caches have the name {name!r}; give a mapping with a name for each")
    return found


def with_model_constants(model: Model, conditions: Mapping[str, Condition]) -> dict[str, Condition]:
    """The same conditions, with the offsets and factors that their schemes need and their recipes do not bring.

    Key biases are read off the model. All else is measured over the calibration prompts (one pass each), once for all
    conditions that need the same.
    """
    prompts = calibration()
    measured: dict[tuple[frozenset[Site], frozenset[Site]], Recipe] = {}
    complete = dict(conditions)
    for name, each in conditions.items():
        recipe = each.recipe
        missing = missing_constants(recipe)
        if not any(missing):
            continue
        if missing not in measured:
            measured[missing] = with_constants(model, recipe, (*prompts.harmful, *prompts.harmless))
        known = measured[missing]
        recipe = recipe.with_statics(
            offsets=known.offsets if recipe.offsets is None else None,
            factors=known.factors if recipe.factors is None else None,
        )
        complete[name] = replace(each, recipe=recipe)
    return complete


def _name(given: Any) -> str:
    return given.name if isinstance(given, CacheConfig) else str(given)


def _condition(name: str, given: Any, model: Model, placement: Placement | str | None) -> Condition:
    geometry, layers = model.geometry, model.geometry.layers
    check_name(name)
    config = None if isinstance(given, Condition) else resolve(given, placement=placement)
    own = given.recipe if config is None else config.per_layer
    if own is not None and len(own) != layers:
        raise InputError(f"recipe {name!r} has {len(own)} layers, but {model.name} has {layers}")
    if config is not None:
        return Condition(geometry.stored(config.recipe(layers), model.name), config.placement)
    condition: Condition = replace(given, recipe=geometry.stored(given.recipe, model.name))
    return condition if placement is None else replace(condition, placement=Placement.parse(placement))
