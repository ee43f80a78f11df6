"""Keep some tokens in 16 bits: the first ones (attention sinks), or the latest ones (a residual window)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kvgeom.mitigation.candidates import Candidate
from kvgeom.mitigation.methods.registry import Setting, method

SINKS = 4
WINDOWS = (32, 128)


@method("window", stage="placement")
def window(setting: Setting) -> Iterator[Candidate]:
    """Sink tokens and residual windows, for a cache that has none and is rounded as stored."""
    base = setting.unmitigated
    if base.placement.where != "cache":
        return
    if not base.placement.sinks:
        placement = replace(base.placement, sinks=SINKS)
        yield Candidate(
            f"{SINKS} sink tokens", "window", base.recipe, placement, f"keeps the first {SINKS} tokens in 16 bits"
        )
    if not base.placement.residual:
        for length in WINDOWS:
            placement = replace(base.placement, residual=length)
            description = f"keeps the latest {length} tokens in 16 bits"
            yield Candidate(f"residual window of {length}", "window", base.recipe, placement, description)
