"""Cost of the geometry in forward-pass equivalents over the same prompts, measured as ratios in one run.

Run:  python benchmarks/geometry.py [MODEL]      (the demo model by default; some minutes on two cores)

The unit is one forward pass over the same prompts, one by one: 20 of the calibration set, and all 64 for the ratio with its
nulls, whose contrasts have as many pairs whatever the subspace has from 16 on. Capture, ratio with all nulls and first order
together are to cost at most 10.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import kvgeom
from kvgeom.geometry.causal import first_order, patch_layers
from kvgeom.geometry.error_paths import follow_errors
from kvgeom.geometry.sensitivity import measure
from kvgeom.quant.scheme import Scheme
from kvgeom.stats import rank_correlation

PAIRS = 10  # 20 prompts
FIRST = "first order, all layers and channels"
#: Of capture, ratio with all nulls and first order together.
BUDGET = 10.0
TENSOR, CHANNEL = Scheme(3, True, "tensor"), Scheme(3, True, "channel")


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    model = kvgeom.load(sys.argv[1] if len(sys.argv) > 1 else "demo")
    prompts = kvgeom.calibration().take(PAIRS)
    encoded = model.encode([*prompts.harmful, *prompts.harmless])
    opening = {int(model.forward(prompt.ids)[-1].argmax()) for prompt in encoded[:PAIRS]}
    layers = model.geometry.layers
    results: dict[str, object] = {}

    def plain() -> None:
        for prompt in encoded:
            model.forward(prompt.ids)

    def exact() -> None:
        results["exact"] = patch_layers(model, encoded, [TENSOR, CHANNEL], opening, progress=False)

    def estimate() -> None:
        results["first"] = first_order(model, encoded, TENSOR, opening, progress=False)

    whole = kvgeom.calibration()
    everything = model.encode([*whole.harmful, *whole.harmless])

    def plain_whole() -> None:
        for prompt in everything:
            model.forward(prompt.ids)

    work: dict[str, tuple[Callable[[], object], float]] = {
        "capture + ratio, all layers, sites, channels": (
            lambda: measure(kvgeom.subspace(model, prompts, progress=False), TENSOR, contrasts=(), progress=False),
            1.5,
        ),
        FIRST: (estimate, 6.0),
        "errors through attention, all heads and channels": (
            lambda: follow_errors(model, encoded, TENSOR, opening, progress=False),
            6.0,
        ),
        "exact single-layer margins, two recipes": (exact, 1.1 * layers),
    }
    seconds(plain)  # warm up
    print(f"{model!r}, {len(encoded)} prompts; plain passes are timed before and after each line")
    total: dict[str, float] = {}
    for name, (run, budget) in work.items():
        before = seconds(plain)
        took = seconds(run)
        passes = took / statistics.mean((before, seconds(plain)))
        total[name] = passes
        print(f"{name:<50} {passes:6.2f} forward-pass equivalents (budget {budget:.1f})", flush=True)
    before = seconds(plain_whole)
    took = seconds(lambda: measure(kvgeom.subspace(model, whole, progress=False), TENSOR, progress=False))
    nulls = took / statistics.mean((before, seconds(plain_whole)))
    print(f"{'capture + ratio with all nulls':<50} {nulls:6.2f} forward-pass equivalents")
    print(f"{'  and first order':<50} {nulls + total[FIRST]:6.2f} forward-pass equivalents (budget {BUDGET:.1f})")
    found = rank_correlation(
        results["first"].by_layer,  # type: ignore[attr-defined]
        results["exact"].margin_drop.sel(scheme=str(TENSOR), drop=True),  # type: ignore[attr-defined]
    )
    print(f"first order against exact: {found}")


if __name__ == "__main__":
    main()
