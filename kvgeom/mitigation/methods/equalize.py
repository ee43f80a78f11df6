"""Divide every channel by its size before rounding, so that no channel sets the scale of all."""

from __future__ import annotations

from collections.abc import Iterator

from kvgeom.mitigation.candidates import Candidate
from kvgeom.mitigation.methods.registry import Setting, method
from kvgeom.mitigation.methods.schemes import alike, transformed


@method("equalize")
def equalize(setting: Setting) -> Iterator[Candidate]:
    """Sizes over the calibration prompts; they can be folded into weights. Takes no memory."""
    schemes = transformed((setting.config.k, setting.config.v), "equalize", "equalize")
    yield alike(setting, "equalize", "equalize", schemes, "divides every channel by its size before rounding")
