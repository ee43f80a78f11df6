"""Where and when keys and values are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Placement:
    """Where in the model, and over which tokens, rounding happens.

    Attributes
    ----------
    where : {"cache", "projection"}
        ``cache``: as stored, keys after RoPE. ``projection``: the output of ``k_proj``/``v_proj``, keys before RoPE.
    scales : {"prompt", "call"}
        For granularities that share scales over tokens. ``prompt``: the prompt sets them and every
        later token is rounded (and saturates) with them, as in a cache that must store a token when it
        comes. ``call``: each forward call sets its own, so that a lone decoded token gets a scale per
        channel and no error at all.
    prefill_reads : {"rounded", "exact"}
        Whether the prompt's own attention reads what is stored, or the values before rounding (as engines
        do that quantize after prefill). Only where rounding happens in the cache.

    Notes
    -----
    The default is what a quantized cache really holds. :meth:`paper` is the simulation in the code
    released with arXiv:2606.09864 (for one sequence at a time: scales are never shared across a batch here).
    """

    where: Literal["cache", "projection"] = "cache"
    scales: Literal["prompt", "call"] = "prompt"
    prefill_reads: Literal["rounded", "exact"] = "rounded"

    @classmethod
    def cache(cls) -> Placement:
        """Decode-faithful: rounded as stored, with the scales that a streaming cache has."""
        return cls()

    @classmethod
    def paper(cls) -> Placement:
        """The paper's simulation: projection outputs, fresh scales in every forward call."""
        return cls(where="projection", scales="call")

    def __str__(self) -> str:
        reads = "" if self.prefill_reads == "rounded" else ", prefill reads exact"
        return f"{self.where}, scales of the {self.scales}{reads}"
