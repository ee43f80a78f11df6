"""Subtract a constant from keys (and values) before rounding: outliers of many models are a constant offset of the keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kvgeom.mitigation.candidates import Candidate
from kvgeom.mitigation.methods.registry import Setting, method
from kvgeom.mitigation.methods.schemes import alike, transformed


@method("center")
def center(setting: Setting) -> Iterator[Candidate]:
    """The key bias, or the mean key where a model has none; of values the mean. Takes no memory."""
    base = (setting.config.k, setting.config.v)
    centered, keys, mean = transformed(base, "center", None), setting.offset, setting.constants.mean_keys
    yield alike(setting, "center", "center", centered, f"subtracts the {keys} before rounding")
    yield alike(
        setting,
        "center keys and values",
        "center",
        transformed(base, "center", "center"),
        f"subtracts the {keys} and the mean value before rounding",
    )
    if mean is not None and centered != base:
        at_mean = replace(setting, constants=replace(setting.constants, keys=mean))
        description = "subtracts the mean key of the calibration prompts before rounding"
        yield alike(at_mean, "center at the mean key", "center", centered, description)
