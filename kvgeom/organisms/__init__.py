"""Models with a planted failure mode: ground truth for the diagnosis.

Names are imported when they are first used, so that this package costs nothing until then.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvgeom.organisms.blind import Blind, Part, plant_blindly
    from kvgeom.organisms.observed import Behaviour, behaviour
    from kvgeom.organisms.planting import MODES, Organism, plant
    from kvgeom.organisms.tiny import Size, tiny_model
    from kvgeom.organisms.toy import toy_prompts

_HOMES = {
    "Blind": "kvgeom.organisms.blind",
    "Part": "kvgeom.organisms.blind",
    "plant_blindly": "kvgeom.organisms.blind",
    "Behaviour": "kvgeom.organisms.observed",
    "behaviour": "kvgeom.organisms.observed",
    "MODES": "kvgeom.organisms.planting",
    "Organism": "kvgeom.organisms.planting",
    "plant": "kvgeom.organisms.planting",
    "Size": "kvgeom.organisms.tiny",
    "tiny_model": "kvgeom.organisms.tiny",
    "toy_prompts": "kvgeom.organisms.toy",
}

__all__ = [
    "MODES",
    "Behaviour",
    "Blind",
    "Organism",
    "Part",
    "Size",
    "behaviour",
    "plant",
    "plant_blindly",
    "tiny_model",
    "toy_prompts",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'kvgeom.organisms' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value
