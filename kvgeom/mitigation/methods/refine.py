"""Finer scales: fewer elements share one, so that an outlier harms fewer."""

from __future__ import annotations

from collections.abc import Iterator

from kvgeom.mitigation.candidates import Candidate
from kvgeom.mitigation.methods.registry import Setting, method
from kvgeom.mitigation.methods.schemes import alike, finer, transformed
from kvgeom.quant.recipe import Schemes


@method("refine")
def refine(setting: Setting) -> Iterator[Candidate]:
    """A scale for each channel of the keys, for each 64 or 32 channels of a token, and groups after a transform."""
    base, geometry = (setting.config.k, setting.config.v), setting.geometry
    channels = finer(base, "channel", ("k",), geometry)
    groups: dict[str, tuple[Schemes, str]] = {
        f"group-{size}": (
            finer(base, "group", ("k", "v"), geometry, size),
            f"gives every {size} channels of a token a scale",
        )
        for size in (64, 32)
    }
    yield alike(setting, "per-channel keys", "refine", channels, "gives every channel of the keys a scale")
    for name, (schemes, description) in groups.items():
        yield alike(setting, name, "refine", schemes, description)
    yield alike(
        setting,
        "per-channel keys, group-64 values",
        "refine",
        finer(channels, "group", ("v",), geometry, 64),
        "gives every channel of the keys and every 64 channels of a token's values a scale",
    )
    for name, (schemes, description) in groups.items():
        if schemes != base:
            centered, rotated = (transformed(schemes, *pair) for pair in (("center", None), ("hadamard", "hadamard")))
            also = f"subtracts the {setting.offset} before rounding and {description}"
            yield alike(setting, f"center, {name}", "combined", centered, also)
            yield alike(setting, f"hadamard, {name}", "combined", rotated, f"rotates every head and {description}")
