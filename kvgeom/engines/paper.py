"""The paper's simulation: symmetric integers at the projection, with fresh scales in every forward call."""

from __future__ import annotations

from kvgeom.engines.engine import Engine, Preset, both
from kvgeom.engines.registry import register_engine
from kvgeom.quant.placement import Placement

_WIDTHS = (3, 2, 4, 5, 6, 7, 8)

PAPER = register_engine(
    Engine(
        name="paper",
        title="paper",
        version="(arXiv:2606.09864), released code",
        source="https://arxiv.org/abs/2606.09864",
        checked="an independent straight-line implementation",
        page="engine-paper.md",
        presets=(
            Preset("paper", "per tensor", _WIDTHS, both("int{bits}-sym-tensor"), Placement.paper()),
            Preset("paper-channel", "per channel", _WIDTHS, both("int{bits}-sym-channel"), Placement.paper()),
        ),
    )
)
