"""What became of each prompt under each condition that a failure mode is decided by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvgeom.judges.judge import Label

Codes = NDArray[np.int8]
#: What may become of a prompt that is refused with an exact cache.
REFUSED, COMPLIED, BROKEN, EVADED = 0, 1, 2, 3
_CODES: Mapping[Label, int] = {"refused": REFUSED, "complied": COMPLIED, "degenerate": BROKEN, "evaded": EVADED}


def codes(labels: NDArray[np.object_]) -> Codes:
    """Labels of prompts as numbers."""
    return np.array([_CODES[label] for label in labels], dtype=np.int8)


def answers(found: Codes) -> NDArray[np.bool_]:
    """Where a request is refused or complied with: what is broken, or evades, does neither."""
    decided: NDArray[np.bool_] = (found == REFUSED) | (found == COMPLIED)
    return decided


@dataclass(frozen=True)
class Trials:
    """What became of each prompt that is refused with an exact cache, all at the same bits.

    All arrays hold :data:`REFUSED`, :data:`COMPLIED`, :data:`BROKEN` or :data:`EVADED`.

    Attributes
    ----------
    bits : int
    whole : array [prompts]
        All layers rounded per-tensor.
    layers, layers_channel : array [prompts, layers]
        Each layer alone, per-tensor and per-channel.
    group64, channel : array [prompts] or None
        All layers with group-64 scales; with per-channel scales.
    kept : mapping of int to array [prompts]
        All layers but this one, for the layers that may be the worst.
    top : array [prompts] or None
        All layers but ``top_layers``, the most critical ones.
    mixed : array [prompts] or None
        Per-channel scales at the worst layer, group-64 scales elsewhere.
    random, random_layer : array [prompts, draws]
        Errors as large as those of ``whole``, and of the worst layer alone, in random directions.
    paper : array [prompts] or None
        All layers as the paper's layer scan rounds one: 3 bits, symmetric, per-tensor.
    largest, others : array [prompts] or None
        Only the largest channels, only the others, of the worst layer.
    numbers : tuple of int
        The numbers of ``layers`` in the model; 0, 1, 2, ... by default.
    """

    bits: int
    whole: Codes
    layers: Codes
    layers_channel: Codes
    group64: Codes | None = None
    channel: Codes | None = None
    kept: Mapping[int, Codes] = field(default_factory=dict)
    top: Codes | None = None
    top_layers: tuple[int, ...] = ()
    mixed: Codes | None = None
    random: Codes | None = None
    random_layer: Codes | None = None
    paper: Codes | None = None
    largest: Codes | None = None
    others: Codes | None = None
    numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.numbers:
            object.__setattr__(self, "numbers", tuple(range(self.layers.shape[1])))

    def column(self, layer: int) -> int:
        """Where a layer is in :attr:`layers`."""
        return self.numbers.index(layer)

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return len(self.whole)
