"""KIVI: keys by channel in groups of tokens, values by token in groups of channels, the newest tokens in full precision."""

from __future__ import annotations

from kvgeom.engines.engine import Engine, Preset
from kvgeom.engines.registry import register_engine
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Schemes
from kvgeom.quant.scheme import Scheme


def _schemes(bits: int) -> Schemes:
    return Scheme.parse(f"int{bits}-asym-channel-group32/f16"), Scheme.parse(f"int{bits}-asym-group32/f16")


KIVI = register_engine(
    Engine(
        name="kivi",
        title="KIVI",
        version="(arXiv:2402.02750), released code",
        source="https://github.com/jy-yuan/KIVI (models/llama_kivi.py)",
        checked="a straight-line implementation of its attention; its kernels need a GPU",
        page="engine-kivi.md",
        presets=(
            Preset(
                "kivi",
                "group 32, residual 128",
                (2, 4),
                _schemes,
                Placement(prefill_reads="exact", residual=128),
            ),
        ),
    )
)
