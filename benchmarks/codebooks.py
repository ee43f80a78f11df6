"""How far TurboQuant and integers of the same width move the demo model's keys and values.

``python -m benchmarks.codebooks`` prints, for each scheme, the bits of an element with all that is stored beside the codes, and the mean
over layers of the squared error, as a share of the squared size: of keys (after rotary embedding), of values, and of vectors that are
zero but for one channel. Half a minute on one core.
"""

from __future__ import annotations

import torch
from torch import Tensor

import kvgeom
from kvgeom.quant.fake_quantize import fake_quantize
from kvgeom.quant.memory import bits_per_element
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme

SCHEMES = [
    f"{text.format(bits=bits)}"
    for bits in (4, 3, 2)
    for text in (
        "int{bits}-asym-token-head/f16",
        "int{bits}-asym-token-head/f16+hadamard",
        "turboquant{bits}+rotation",
        "turboquant{bits}+hadamard",
        "turboquant_prod{bits}+rotation",
    )
]
SCHEMES += [
    "vllm_turboquant4+hadamard",
    "vllm_turboquant3+hadamard",
    "lmdeploy_qjl+hadamard",
    "lmdeploy_lloyd+hadamard",
]
PROMPTS = 8


def share(x: Tensor, scheme: Scheme) -> float:
    """Squared error over squared size, mean over vectors."""
    error = (fake_quantize(x, scheme) - x).square().sum(-1) / x.square().sum(-1)
    return float(error.mean())


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    model = kvgeom.load("demo")
    caches = []
    for prompt in model.encode(kvgeom.calibration().harmless[:PROMPTS]):
        caches.append(model.new_cache())
        model.forward(prompt.ids, caches[-1])
    shape = model.geometry.kv_heads, model.geometry.head_dim
    spikes = 10 * torch.eye(shape[1])[None, None]
    print(f"{'scheme':42}{'bits':>6}{'keys':>9}{'values':>9}{'spikes':>9}")
    for text in SCHEMES:
        scheme = Scheme.parse(text)
        found = {
            site: torch.tensor(
                [share(getattr(layer, site).float(), scheme) for cache in caches for layer in cache.layers]
            )
            for site in ("keys", "values")
        }
        bits = bits_per_element(Recipe.uniform(1, scheme), None, *shape)
        columns = float(found["keys"].mean()), float(found["values"].mean()), share(spikes, scheme)
        print(f"{text:42}{bits:6.2f}" + "".join(f"{value:9.4f}" for value in columns), flush=True)


if __name__ == "__main__":
    main()
