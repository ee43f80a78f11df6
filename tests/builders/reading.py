"""Plain text, read through one cache."""

from __future__ import annotations

from kvgeom.evaluation.fidelity import Passages, Reading, readings
from kvgeom.models.model import Model
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe


def read(model: Model, text: Passages, recipe: Recipe | None = None, placement: Placement | None = None) -> Reading:
    """What is read, with nothing known before."""
    return readings(model, text, [(recipe, placement or Placement())], lambda _, measure: measure())[0]
