"""Gates between the caches of real engines on the demo model: what docs/gate.md reports.

Run:  python -m benchmarks.gates llamacpp --out gates        (some minutes on a core)
      python -m benchmarks.gates vllm --out gates

Environments of the engines: make test-engines, then KVGEOM_ENGINES=.engines. Answers are kept in the folder, so that an interrupted
run goes on, and the unquantized server is asked once for all caches. Prints rows for the page, and how kvgeom's own emulation of each
cache labels the same prompts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import kvgeom
from kvgeom.engines.registry import resolve
from kvgeom.gating.result import Gate
from kvgeom.stats import percent

#: The unquantized cache of each engine, and others with the preset that emulates them.
CACHES = {
    "llamacpp": ("k=f16&v=f16", {"k=q8_0&v=q8_0": "llamacpp-q8_0", "k=q4_0&v=q4_0": "llamacpp-q4_0"}),
    "vllm": ("kv=auto", {"kv=fp8_e5m2": "vllm-cpu-fp8-e5m2"}),
}
#: What the emulation computes in; vLLM takes the checkpoint's.
DTYPES = {"llamacpp": "float32", "vllm": "bfloat16"}


def prompts(harmless: int) -> kvgeom.PromptSet:
    """Both sets that ship with kvgeom, and some of their harmless requests."""
    one, other = kvgeom.load_prompts("calibration"), kvgeom.load_prompts("held-out")
    return kvgeom.PromptSet(
        "calibration and held-out", one.harmful + other.harmful, one.harmless[:harmless], one.source
    )


def row(name: str, gate: Gate) -> str:
    """A row of the table."""
    found, noise = gate.comparison, gate.noise
    share, low, high = found.share
    tipped = "-" if noise is None else f"{noise.lost + noise.gained}"
    over = gate.over_refusal
    harmless = "-" if over is None else f"{over.baseline} → {over.candidate} of {over.prompts}"
    cells = (
        name,
        gate.decision,
        f"{found.lost} lost, {found.gained} gained of {found.refusals}",
        f"{percent(share)} [{percent(low)}, {percent(high)}]",
        f"{found.worse:.2g}",
        tipped,
        f"{percent(gate.diverged())} ({percent(gate.diverged('repeat'))})",
        f"{gate.margin_lost():.2f}",
        harmless,
    )
    return f"| {' | '.join(cells)} |"


def agreement(gate: Gate, preset: str, dtype: str) -> str:
    """How many labels of the two servers kvgeom gives too, with its own exact cache and its emulation."""
    harmful = gate.data.request.values[gate.harmful].tolist()
    config, model = resolve(preset), kvgeom.load("demo", dtype=dtype, progress=False)
    outcomes = kvgeom.evaluate(
        model,
        {preset: config.recipe(model.geometry.layers)},
        harmful,
        placement=config.placement,
        refused_only=False,
        max_new_tokens=int(gate.meta["max_new_tokens"]),
        full_responses=True,
        progress=False,
    )
    ours = outcomes.data.label.values
    theirs = [gate.refused(server) for server in ("baseline", "candidate")]
    alike = [int(((own == "refused") == their).sum()) for own, their in zip(ours, theirs, strict=True)]
    refused = [int((own == "refused").sum()) for own in ours]
    return (
        f"{preset}: refused or not as in the engine for {alike[0]} of {len(harmful)} prompts with an exact cache and {alike[1]} with the "
        f"preset; refused {refused[0]} and {refused[1]}, in the engine {int(theirs[0].sum())} and {int(theirs[1].sum())}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=CACHES)
    parser.add_argument("--out", type=Path, default=Path("gates"))
    parser.add_argument("--harmless", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--emulate", action="store_true", help="compare labels with the emulation too")
    options = parser.parse_args()
    exact, caches = CACHES[options.engine]
    tail = f"&context=512&threads={options.threads}"
    folder: str | Path = f"{options.engine}:demo?{exact}{tail}"
    for cache, preset in caches.items():
        begin = time.perf_counter()
        out = options.out / f"{options.engine}-{cache.replace('&', '-').replace('=', '-')}"
        gate = kvgeom.gate(folder, f"{options.engine}:demo?{cache}{tail}", out, prompts=prompts(options.harmless))
        if (out / "baseline.jsonl").exists():
            folder = out
        print(row(f"{options.engine} `{cache}`", gate))
        print(gate.to_text())
        busy = float(gate.data.seconds.sel(server="candidate").sum()) / int(gate.meta["concurrency"])
        print(f"{time.perf_counter() - begin:.0f} s in all; the candidate was busy with answers for {busy:.0f} s")
        if options.emulate:
            print(agreement(gate, preset, DTYPES[options.engine]), flush=True)


if __name__ == "__main__":
    main()
