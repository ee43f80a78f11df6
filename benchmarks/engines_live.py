"""Emulations held against the engines themselves on the demo model: greedy tokens and first-token log-probabilities.

Run:  python -m benchmarks.engines_live llamacpp vllm mlx transformers      (some minutes an engine on a core)

Environments of the engines: make test-engines, then KVGEOM_ENGINES=.engines. 24 requests, 48 tokens each; every cache of an engine is compared
with kvgeom's emulation of it, and so is the unquantized one, which says what weights and kernels alone are apart. Prints the rows of
docs/engines.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import takewhile
from typing import cast

import numpy as np

import kvgeom
from kvgeom.engines.registry import resolve
from kvgeom.engines.serve import serve
from kvgeom.evaluation.journal import NoJournal
from kvgeom.evaluation.respond import respond
from kvgeom.gating.client import Answer, Client
from kvgeom.gating.collect import collect
from kvgeom.gating.config import GateConfig
from kvgeom.models.hf import HFModel
from kvgeom.quant.quantizer import Quantizer

#: For each engine the dtype of the emulation, and its caches with the presets that emulate them and their widths; the unquantized one
#: first.
ENGINES: dict[str, tuple[str, dict[str, tuple[str, int] | None]]] = {
    "llamacpp": (
        "float32",
        {"k=f16&v=f16": None, "k=q8_0&v=q8_0": ("llamacpp-q8_0", 8), "k=q4_0&v=q4_0": ("llamacpp-q4_0", 4)},
    ),
    "vllm": (
        "bfloat16",
        {"kv=auto": None, "kv=fp8_e4m3": ("vllm-cpu-fp8-e4m3", 8), "kv=fp8_e5m2": ("vllm-cpu-fp8-e5m2", 8)},
    ),
    "mlx": ("float32", {"bits=16": None, "bits=8": ("mlx-g64", 8), "bits=4": ("mlx-g64", 4)}),
    "transformers": (
        "float32",
        {"cache=exact": None, "cache=int4-asym-token": ("int4-asym-token", 4), "cache=q4_0": ("q4_0", 4)},
    ),
}
TOKENS = 48


def theirs(spec: str, prompts: kvgeom.PromptSet) -> list[Answer]:
    """What an engine answers."""
    config = GateConfig(max_new_tokens=TOKENS, timeout=600)
    with serve(spec) as server, Client(server.url, timeout=600.0) as client:
        return collect(client, config.asks(prompts, server.model), NoJournal(), 4, spec)


def ours(
    model: HFModel, preset: tuple[str, int] | None, prompts: kvgeom.PromptSet
) -> tuple[list[list[str]], list[dict[str, float]], list[int]]:
    """Tokens as text, log-probabilities of all first tokens, and how many tokens each prompt has."""
    encoded = model.encode([*prompts.harmful, *prompts.harmless])
    edit = None
    if preset is not None:
        config = resolve(preset[0], bits=preset[1])
        edit = Quantizer(config.recipe(model.geometry.layers), config.placement)
    found = respond(model, encoded, TOKENS, caches=[model.new_cache(edit) for _ in encoded], batch_size=24)
    first = found.first_logits.float().log_softmax(-1)
    best = first.topk(200).indices
    # As servers write them: Model.decode is for whole responses, and takes spaces off their ends.
    word = model.tokenizer.decode
    top = [{word([int(t)]): float(row[t]) for t in ids} for row, ids in zip(first, best, strict=True)]
    return [[word([t]) for t in tokens] for tokens in found.tokens], top, [len(each) for each in encoded]


def agreed(one: Sequence[str], other: Sequence[str]) -> int:
    """Tokens until the first that differs."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def apart(one: dict[str, float], other: dict[str, float]) -> float:
    """Mean difference (nats) of the log-probabilities of the first tokens that both list."""
    return float(np.mean([abs(one[token] - other[token]) for token in one.keys() & other.keys()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs="+", choices=ENGINES)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    prompts = kvgeom.load_prompts("held-out").take(12)
    for engine in options.engines:
        dtype, caches = ENGINES[engine]
        model = cast(HFModel, kvgeom.load("demo", dtype=dtype, progress=False))
        exact: list[Answer] = []
        for cache, preset in caches.items():
            answers = theirs(f"{engine}:demo?{cache}&context=512&threads={options.threads}", prompts)
            exact = exact or answers
            tokens, top, lengths = ours(model, preset, prompts)
            assert [each.prompt_tokens for each in answers] == lengths
            cells = (
                f"{engine} `{cache}`",
                "exact" if preset is None else preset[0],
                f"{sum(map(agreed, tokens, (a.tokens for a in answers)))} of {sum(len(a.tokens) for a in answers)}",
                f"{sum(t[:1] == a.tokens[:1] for t, a in zip(tokens, answers, strict=True))} of {len(answers)}",
                f"{np.mean([apart(t, a.top) for t, a in zip(top, answers, strict=True)]):.3f}",
                ""
                if preset is None
                else f"{np.mean([apart(e.top, a.top) for e, a in zip(exact, answers, strict=True)]):.3f}",
                ""
                if preset is None
                else f"{sum(agreed(e.tokens, a.tokens) for e, a in zip(exact, answers, strict=True))}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
