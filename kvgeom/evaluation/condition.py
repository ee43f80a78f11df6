"""One thing that is done to a cache, with its coordinates in an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvgeom.engines.registry import resolve
from kvgeom.errors import InputError
from kvgeom.models.model import Model
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe

#: What an outcome's recipe is known by, apart from its name.
COORDINATES = ("family", "layer", "granularity", "bits", "draw")
#: Name of the unquantized model among recipes.
UNQUANTIZED = "unquantized"


@dataclass(frozen=True)
class Condition:
    """A recipe under a placement, and where it stands in an experiment.

    Results select by these coordinates; the name of a condition is for people.

    Attributes
    ----------
    recipe : Recipe
    placement : Placement
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

    @property
    def key(self) -> dict[str, Any]:
        """What a journal knows it by: recipe and placement, not name or coordinates."""
        return {"recipe": self.recipe.record(), "placement": str(self.placement)}


def as_conditions(given: Any, model: Model, placement: Placement | str | None) -> dict[str, Condition]:
    """Conditions by name, whatever a user wrote.

    Parameters
    ----------
    given : mapping of name to condition, or sequence of conditions, or one
        A condition is a :class:`Condition`, or anything that :func:`kvgeom.engines.registry.resolve` takes: a scheme, a
        spelling, the preset of an engine, a recipe.
    model : Model
    placement : Placement, str or None
        Of those that do not bring their own.

    Raises
    ------
    InputError
        If one cannot be read, is for another number of layers, or has the name of the unquantized model.
    """
    if isinstance(given, Mapping):
        named = dict(given)
    elif isinstance(given, Sequence) and not isinstance(given, str):
        named = {str(each): each for each in given}
    else:
        named = {str(given): given}
    return {str(name): _condition(str(name), each, model, placement) for name, each in named.items()}


def _condition(name: str, given: Any, model: Model, placement: Placement | str | None) -> Condition:
    layers = model.geometry.layers
    if name == UNQUANTIZED:
        raise InputError(f"{UNQUANTIZED!r} is the name of the unquantized model; give the recipe another name")
    if isinstance(given, Condition):
        found = given
    elif isinstance(given, Recipe):
        found = Condition(given, _placement(placement))
    else:
        config = resolve(given, placement=placement)
        found = Condition(config.recipe(layers), config.placement)
    if len(found.recipe) != layers:
        raise InputError(f"recipe {name!r} has {len(found.recipe)} layers, but {model.name} has {layers}")
    return found


def _placement(given: Placement | str | None) -> Placement:
    return given if isinstance(given, Placement) else resolve("int4-asym-token", placement=given).placement
