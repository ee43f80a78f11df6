"""Cost of simulated rounding, as ratios in one run.

The simulated cache over transformers' default one, prefill and generation; and rounding of one large tensor over the
quantize-dequantize of quanto and HQQ, where they are installed (pip install 'kvgeom[engines]').

Run:  python benchmarks/quant.py [MODEL]      (the demo model by default; some minutes on two cores)
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from transformers import DynamicCache

import kvgeom
from kvgeom.engines.registry import presets, resolve
from kvgeom.quant.fake_quantize import fake_quantize
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.scheme import Scheme

SCHEMES = [
    f"int4-asym-{name}" for name in ("tensor", "token", "channel", "head", "token-head", "group64", "channel-group32")
]
OTHERS = ["int4-sym-tensor", "fp8_e4m3", "q8_0", "q4_0", "iq4_nl", "nvfp4", "mxfp4", "int4-asym-token-head+hadamard"]
NEW_TOKENS, REPEATS = 16, 5


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def ratio(work: Callable[[], object], plain: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median over pairs that are timed one after the other."""
    work(), plain()
    return statistics.median(seconds(work) / seconds(plain) for _ in range(repeats))


@torch.inference_mode()
def cache_cost(name: str) -> None:
    model = kvgeom.load(name)
    layers = model.geometry.layers
    prompt = model.encode(["Explain in some detail how a bicycle stays upright. " * 8])[0].ids
    ids = torch.tensor([list(prompt)])

    def call(tokens: torch.Tensor, cache: object, past: int) -> None:
        positions = torch.arange(past, past + tokens.shape[1])[None]
        model.hf_model(input_ids=tokens, past_key_values=cache, position_ids=positions, logits_to_keep=1)  # type: ignore[attr-defined]

    def prefill(make: Callable[[], object]) -> Callable[[], object]:
        return lambda: call(ids, make(), 0)

    def generation(make: Callable[[], object]) -> Callable[[], object]:
        cache = make()
        call(ids, cache, 0)
        length = [len(prompt)]

        def steps() -> None:
            for _ in range(NEW_TOKENS):
                call(ids[:, :1], cache, length[0])
                length[0] += 1

        return steps

    print(f"{model!r}, prompt of {len(prompt)} tokens, {NEW_TOKENS} new; over transformers' DynamicCache")
    engines = [resolve(text) for text in (*SCHEMES, *OTHERS)]
    engines += [resolve(known.name) for known in presets() if known.placement.windowed and known.name != "hf-hqq"]
    for engine in engines:

        def simulated(engine: object = engine) -> object:
            return model.new_cache(Quantizer(engine.recipe(layers), engine.placement))  # type: ignore[attr-defined]

        first, later = prefill(simulated), generation(simulated)
        print(
            f"{engine.name:<34} prefill {ratio(first, prefill(DynamicCache)):5.2f} (budget 1.10)"
            f"   generation {ratio(later, generation(DynamicCache)):5.2f} (budget 1.15)",
            flush=True,
        )


def tensor_cost() -> None:
    x = torch.randn(1, 8, 4096, 128)
    ours: dict[str, Callable[[], object]] = {
        text: partial(fake_quantize, x, Scheme.parse(text)) for text in (*SCHEMES, "int4-sym-tensor", "hqq4-group64")
    }
    theirs: dict[str, Callable[[], object]] = {}
    if find_spec("optimum"):
        from optimum.quanto import MaxOptimizer, qint4, quantize_weight

        def quanto() -> object:
            step, shift = MaxOptimizer()(x, qint4, 0, 64)
            return quantize_weight(x, qint4, 0, step, shift, 64).dequantize()

        theirs["quanto int4, group 64"] = quanto
    if find_spec("hqq"):
        from hqq.core.quantize import Quantizer

        def hqq(optimize: bool) -> object:
            options = {"nbits": 4, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
            codes, meta = Quantizer.quantize(x, group_size=64, optimize=optimize, **options)
            return Quantizer.dequantize(codes, {**meta, "compute_dtype": torch.float32})

        theirs["HQQ int4, group 64, solver"] = lambda: hqq(True)
        theirs["HQQ int4, group 64, no solver"] = lambda: hqq(False)
    print(f"rounding {tuple(x.shape)}, milliseconds; below 1.00 ours is faster")
    for name, work in ours.items():
        work()
        own = statistics.median(seconds(work) for _ in range(REPEATS))
        beside = "   ".join(f"{ratio(work, other, 3):5.2f} of {label}" for label, other in theirs.items())
        print(f"{name:<28} {1000 * own:7.1f}   {beside}", flush=True)


if __name__ == "__main__":
    tensor_cost()
    cache_cost(sys.argv[1] if len(sys.argv) > 1 else "demo")
