"""The trained models that modes are planted in."""

from __future__ import annotations

from kvgeom.models.model import Model
from kvgeom.organisms import Size, tiny_model


def size_of(mode: str) -> Size:
    """Dilution needs a model that still speaks when two layers are lost."""
    return Size(4, 2, 64) if mode == "multi-layer dilution" else Size(3)


def trained_for(mode: str) -> Model:
    """Trained on first use, in half a minute, and kept on disk; offsets in two layers need float64."""
    return tiny_model(size_of(mode), dtype="float64" if mode == "multi-layer dilution" else "float32")
