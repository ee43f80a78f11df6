"""Rotate every head before rounding, so that an outlier is spread over its head."""

from __future__ import annotations

from collections.abc import Iterator

from kvgeom.mitigation.candidates import Candidate
from kvgeom.mitigation.methods.registry import Setting, method
from kvgeom.mitigation.methods.schemes import alike, transformed


@method("hadamard")
def hadamard(setting: Setting) -> Iterator[Candidate]:
    """Keys and values, or values alone beside centred keys. Takes no memory."""
    base = (setting.config.k, setting.config.v)
    rotated = transformed(base, "hadamard", "hadamard")
    yield alike(setting, "hadamard", "hadamard", rotated, "rotates every head before rounding")
    yield alike(
        setting,
        "center keys, hadamard values",
        "combined",
        transformed(base, "center", "hadamard"),
        f"subtracts the {setting.offset} from keys and rotates values before rounding",
    )
