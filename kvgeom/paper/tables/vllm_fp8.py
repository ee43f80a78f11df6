"""FP8 caches of vLLM, beside the simulated cache of 8 bits."""

from __future__ import annotations

from kvgeom.engines.registry import resolve
from kvgeom.evaluation.condition import Condition
from kvgeom.paper.cells import flip_rows
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row

#: Presets by what the paper calls the cache.
CACHES = {"fp8_e5m2": "vllm-fp8-e5m2", "fp8_e4m3": "vllm-fp8-e4m3"}
SIMULATED = "simulated 8 bits"


@paper_table("flips under the FP8 caches of vLLM", suites=["advbench"], passes=lambda layers: 3)
def vllm_fp8(study: Study, protocol: Protocol) -> Measured:
    """Flips under vLLM's two FP8 caches, rounded as its kernels do, and under the simulated cache of 8 bits.

    The formats are emulated here, bit by bit; a server differs also by its kernels, its batches and its weights' type.
    ``kvgeom gate 'vllm:MODEL?kv=auto' 'vllm:MODEL?kv=fp8_e5m2'`` asks the real one.
    """
    layers = protocol.geometry.layers
    conditions: dict[str, Condition] = {}
    for name, preset in CACHES.items():
        cache = resolve(preset)
        conditions[name] = Condition(
            cache.recipe(layers).only(protocol.geometry.stores), cache.placement, family="preset"
        )
    conditions[SIMULATED] = protocol.over(protocol.by_token(8), family="bits")
    found = study.outcomes(conditions, "advbench", "FP8 caches")
    rows: list[Row] = []
    for name in conditions:
        rows += flip_rows({"cache": name}, found, name, quantity="conditional flip")
    return Measured(rows, ("Emulated: a real server is asked by kvgeom gate (docs/gate.md).",))
