"""Tiny random models whose layers do not all store keys and values of one shape, one of each kind."""

from __future__ import annotations

from functools import cache

from benchmarks import architectures
from kvgeom.models.hf import HFModel
from tests.builders.tiny import tiny_tokenizer

#: Architecture by what is special in it.
HYBRIDS = {
    "linear attention": "qwen3_next",
    "state space": "jamba",
    "state space beside attention": "falcon_h1",
    "layers of experts alone": "nemotron_h",
    "convolutions": "lfm2",
    "one attention for several layers": "zamba2",
    "latent": "deepseek_v3",
    "latent and linear attention": "kimi_linear",
    "latent and an index": "deepseek_v32",
    "shared caches": "gemma3n_text",
    "shared caches of two shapes": "gemma4_text",
    "values of other sizes than keys": "mimo_v2_flash",
}


@cache
def hybrid(kind: str) -> HFModel:
    """The model of an architecture; it is not to be changed."""
    return HFModel(architectures.tiny(kind), tiny_tokenizer(), name=f"tiny-{kind}")
