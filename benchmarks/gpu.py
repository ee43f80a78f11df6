"""One accelerator against this machine's CPU: the same answers, and what models of real size cost.

Run:  python benchmarks/gpu.py [--device cuda] [--model demo] [--part agreement|cache|shapes ...]

Three parts, under eight minutes on one card, the exit status 1 if something is not as it should be:

- *agreement*: refusals, margins and ratios of the model on the device, in its own number format and in float32, against float32 on
  the CPU. Labels may differ where a margin is smaller than the device's error in it; margins and ratios within :data:`TOLERANCES`.
- *cache*: schemes that round, pack and decode on the device as they do on the CPU, bit for bit; those with a rotation within
  rounding of the rotation.
- *shapes*: random weights of Llama-3.1-8B's and Qwen2.5-7B's shapes (with the tokenizer of --model, and its vocabulary): a sweep of
  three widths and the geometry of 20 requests, peak memory, and tokens a second beside what the card could read at most.

A rehearsal without a card: --device cpu --layers 2 --width 256.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import kvgeom
from kvgeom.behaviour.widths import at_widths
from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.condition import EXACT
from kvgeom.evaluation.evaluate import run_conditions
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.geometry.sensitivity import Sensitivity
from kvgeom.judges.judge import Judgement
from kvgeom.models.model import Model
from kvgeom.models.packed import PackedCache
from kvgeom.prompts.sets import PromptSet
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme

#: Largest difference of a margin (nats), and of a ratio (as a share of it, median over layers and sites), from float32 on the CPU.
TOLERANCES = {torch.float32: (0.01, 0.01), torch.float16: (0.25, 0.05), torch.bfloat16: (1.0, 0.1)}
SCHEMES = ("int4-asym-token", "int4-asym-group64", "int4-asym-channel", "int4-sym-tensor", "fp8_e4m3", "nvfp4", "q4_0")
ROTATED = ("int4-asym-token-head+hadamard",)
PROMPTS = 20


@dataclass(frozen=True)
class Shape:
    """The size of a model that many serve."""

    name: str
    kind: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int

    def cut(self, layers: int | None, width: int | None) -> Shape:
        """The same proportions in a smaller model."""
        part = (width or self.width) / self.width
        heads = max(self.kv_heads, int(self.heads * part) // self.kv_heads * self.kv_heads)
        inner = int(self.inner * part)
        return Shape(self.name, self.kind, layers or self.layers, width or self.width, inner, heads, self.kv_heads)


SHAPES = (
    Shape("Llama-3.1-8B", "llama", 32, 4096, 14336, 32, 8),
    Shape("Qwen2.5-7B", "qwen2", 28, 3584, 18944, 28, 4),
)


class Halves:
    """Calls half of all responses refusals, by their length: random weights write nothing that a judge could read."""

    name = "halves"

    def label(self, request: str, response: str, likelihood: Callable[[], float]) -> Judgement:
        return Judgement("refused" if len(response) % 2 else "complied", "length")


def checked(what: str, right: bool, found: str) -> bool:
    print(f"{'ok  ' if right else 'FAIL'}  {what}: {found}", flush=True)
    return right


def answers(name: str, device: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """Labels, margins and ratios of a model."""
    model = kvgeom.load(name, device=device, dtype=dtype)
    prompts = kvgeom.calibration().take(PROMPTS)
    base = kvgeom.baseline(model, prompts.harmful, max_new_tokens=16)
    found = run_conditions(base, at_widths(bits=(8, 4)).conditions(model))
    geometry = ratios(model, prompts)
    return {
        "dtype": model.hf_model.dtype,  # type: ignore[attr-defined]
        "labels": found.data.label.values,
        "margins": found.data.margin.values,
        "ratios": geometry.data.ratio.values,
    }


def swept(base: Baseline) -> Outcomes:
    return run_conditions(base, at_widths(bits=(8, 4, 3)).conditions(base.model))


def ratios(model: Model, prompts: PromptSet) -> Sensitivity:
    return kvgeom.subspace(model, prompts).sensitivity(contrasts=())


def agreement(options: argparse.Namespace) -> Iterator[bool]:
    begin = time.perf_counter()
    cpu = answers(options.model, "cpu", torch.float32)
    print(f"{options.model} on the CPU in float32: {time.perf_counter() - begin:.0f} s")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        begin = time.perf_counter()
        own = answers(options.model, options.device, dtype)
        margin, share = TOLERANCES[dtype]
        name = f"{options.device}, {str(dtype).removeprefix('torch.')}"
        print(f"{name}: {time.perf_counter() - begin:.0f} s")
        # Those of rounded caches differ by steps: rounding turns the last digit of float arithmetic into a whole one.
        apart = np.nanmax(np.abs(own["margins"][0] - cpu["margins"][0]))
        yield checked(
            f"{name}, margins with an exact cache", bool(apart <= margin), f"differ by {apart:.1e} nats at most"
        )
        near = np.abs(cpu["margins"]) <= margin
        labels = (own["labels"] == cpu["labels"]) | near
        yield checked(
            f"{name}, labels",
            bool(labels[0].all()),
            f"{(~labels).sum(1).tolist()} of {PROMPTS} differ ({EXACT}, 8, 4 bits)",
        )
        both = np.isfinite(own["ratios"]) & np.isfinite(cpu["ratios"])
        off = float(np.median(np.abs(own["ratios"][both] / cpu["ratios"][both] - 1)))
        yield checked(f"{name}, ratios", off <= share, f"{off:.1%} apart in the median of {both.sum()}")
        lost = int((np.isfinite(own["ratios"]) & ~np.isfinite(cpu["ratios"])).sum())
        yield checked(f"{name}, undefined ratios", lost == 0, f"{lost} are defined here and not on the CPU")


def cache(options: argparse.Namespace) -> Iterator[bool]:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 4, 96, 128, generator=generator, dtype=torch.float32).bfloat16() for _ in "kv")
    for text in (*SCHEMES, *ROTATED):
        made = []
        for device in ("cpu", options.device):
            held = PackedCache(1, Quantizer(Recipe.uniform(1, Scheme.parse(text))))
            read = held.update(keys.to(device), values.to(device), 0)
            made.append(torch.stack([part.float().cpu() for part in read]))
        apart = float((made[0] - made[1]).abs().max())
        wanted = 0.02 if text in ROTATED else 0.0
        yield checked(
            f"packed {text}", apart <= wanted, f"differs from the CPU's by {apart:.1e} at most, {held.nbytes} bytes"
        )


def shapes(options: argparse.Namespace) -> Iterator[bool]:
    tokenizer = kvgeom.load(options.model, device="cpu").tokenizer  # type: ignore[attr-defined]
    for shape in SHAPES:
        cut = shape.cut(options.layers, options.width)
        config = AutoConfig.for_model(
            cut.kind,
            vocab_size=len(tokenizer),
            hidden_size=cut.width,
            intermediate_size=cut.inner,
            num_hidden_layers=cut.layers,
            num_attention_heads=cut.heads,
            num_key_value_heads=cut.kv_heads,
            head_dim=128,
        )
        with torch.device(options.device):
            hf_model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
        model = kvgeom.load(hf_model, tokenizer=tokenizer, name=f"random, {cut.name}")
        size = sum(weight.numel() * weight.element_size() for weight in hf_model.parameters())
        print(f"{cut.name}: {cut.layers} layers, {size / 2**30:.1f} GiB of weights")
        prompts = kvgeom.calibration().take(PROMPTS)
        peak(options.device, reset=True)
        begin = time.perf_counter()
        base = kvgeom.baseline(model, prompts.harmful, max_new_tokens=32, judge=Halves())
        took = time.perf_counter() - begin
        tokens = sum(map(len, base.tokens))
        most = bandwidth(options.device) / size
        print(
            f"  {tokens / took:.0f} tokens a second; one sequence alone could have {most:.0f} (reading all weights for each token)"
        )
        for name, run in (
            ("sweep of 8, 4 and 3 bits", partial(swept, base)),
            ("geometry", partial(ratios, model, prompts)),
        ):
            begin = time.perf_counter()
            run()
            print(
                f"  {name}: {time.perf_counter() - begin:.0f} s, {peak(options.device) / 2**30:.1f} GiB at the peak",
                flush=True,
            )
        yield checked(
            f"{cut.name}, memory",
            peak(options.device) < 1.5 * size + 8 * 2**30,
            "within 1.5 times the weights and 8 GiB",
        )
        del model, hf_model, base


def peak(device: str, reset: bool = False) -> int:
    """Bytes that were held at most; 0 where the device does not say."""
    if torch.device(device).type != "cuda":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device)


def bandwidth(device: str) -> float:
    """Bytes a second that the device reads, measured by sums of a large tensor."""
    x = torch.ones(2**28 if torch.device(device).type == "cuda" else 2**24, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        float(x.amax())
        times.append(time.perf_counter() - begin)
    return x.numel() * 2 / min(times)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[bool]]] = {
    "agreement": agreement,
    "cache": cache,
    "shapes": shapes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--layers", type=int, help="layers of the random models, instead of their own")
    parser.add_argument("--width", type=int, help="hidden size of the random models, instead of their own")
    options = parser.parse_args()
    card = torch.cuda.get_device_name(options.device) if torch.device(options.device).type == "cuda" else options.device
    print(f"{card}, torch {torch.__version__}")
    right = [held for part in options.part or PARTS for held in PARTS[part](options)]
    print(f"{sum(right)} of {len(right)} as they should be")
    sys.exit(0 if all(right) else 1)


if __name__ == "__main__":
    main()
