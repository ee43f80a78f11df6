"""Which layers hold a model's refusals alone, and how far their values must be moved for it to comply."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.speculative import PartialResponse, complete
from kvgeom.organisms.carrier import Values
from kvgeom.organisms.modes import same_block

#: Strengths that are tried, in class differences; a small model needs the first, a large one the last.
LADDER = (0.15, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
#: Requests on which they are tried, the share of them that must comply, and heads in which outliers are tried.
MOST, COMPLY, HOMES = 4, 0.75, 4


@dataclass(frozen=True)
class Lost:
    """An edit: of one layer's values, or keys, only a constant is left, as when an outlier sets the scale.

    Attributes
    ----------
    layer : int
    constant : Tensor [kv_heads, head_dim]
    site : {"v", "k"}
    """

    layer: int
    constant: Tensor = field(repr=False)
    site: Literal["k", "v"] = "v"
    where: str = "cache"
    prefill_reads_exact: bool = False

    @property
    def kind(self) -> Hashable:
        """Those of one constant do the same."""
        return "lost", self.layer, self.site, id(self.constant)

    def __call__(self, layer: int, site: Literal["k", "v"], x: Tensor) -> Tensor:
        """``x`` ``[batch, kv_heads, tokens, head_dim]``, or what is left of it."""
        if layer != self.layer or site != self.site:
            return x
        return self.constant[None, :, None].to(x).expand_as(x)

    def rows(self, rows: Tensor) -> Lost:
        """The same for all rows."""
        return self

    @staticmethod
    def stack(parts: Sequence[Any]) -> Lost:
        """One for all sequences."""
        found: Lost = parts[0]
        return found


@dataclass(frozen=True)
class Reach:
    """How strongly the values of a layer must read "harmless" for refusals to turn into compliance.

    Attributes
    ----------
    base : Baseline
        Of the model before any edit, on harmful requests.
    values : Values
    homes : tuple of int or None
        Heads that may hold the outliers: such a head and its block read nothing. With None all heads read "harmless".
    """

    base: Baseline
    values: Values
    homes: tuple[int | None, ...]
    _found: dict[int, dict[int | None, float]] = field(default_factory=dict, repr=False)

    def strengths(self, layer: int) -> dict[int | None, float]:
        """The least of :data:`LADDER` that does it when this layer alone has lost its values, by home.

        Homes with which none does are left out: in a model of few heads, safety often lies in one of them. What begins
        as a refusal and breaks off is no compliance. Costs, for each prompt, home and strength, two passes above the
        layer, and a response where a refusal does not even begin.
        """
        if layer not in self._found:
            complied = self._complied(layer)
            enough = COMPLY * len(self._asked)
            # In descending order, so that the least is what stays.
            self._found[layer] = {
                home: strength
                for (home, strength), count in sorted(complied.items(), key=lambda item: -item[0][1])
                if count >= enough
            }
        return self._found[layer]

    @property
    def _asked(self) -> tuple[int, ...]:
        return self.base.refused[:MOST]

    def _complied(self, layer: int) -> dict[tuple[int | None, float], int]:
        """How many prompts comply, by home of the outliers and strength."""
        base, model = self.base, self.base.model
        named = self._lost(layer)
        edits = list(named.values())
        first = [layer if model.branches_late else 0] * len(edits)
        tried: list[tuple[tuple[int | None, float], int]] = []
        begun: list[PartialResponse] = []
        for index in self._asked:
            prompt = base.prompts[index]
            cache = model.branching_cache(edits)
            logits = model.forward_branches(prompt.ids, edits, first, cache=cache)[1:, -1]
            for row, (name, token) in enumerate(zip(named, logits.argmax(-1).tolist(), strict=True)):
                if token not in base.refusal_tokens | model.stop_tokens:
                    tried.append((name, index))
                    begun.append(PartialResponse(index, (), token, cache.row(row + 1, len(prompt))))
        complied = dict.fromkeys(named, 0)
        for (name, index), tokens in zip(tried, complete(base, begun), strict=True):
            complied[name] += base.judged(index, tokens)[1] == "complied"
        return complied

    def _lost(self, layer: int) -> dict[tuple[int | None, float], Lost]:
        """What is left of a layer, by home of the outliers and strength."""
        g = self.base.model.geometry
        carriers = [self.values.carrier(layer, head) for head in range(g.kv_heads)]
        edits = {}
        for home, strength in itertools.product(self.homes, LADDER):
            left = torch.stack([carrier.beyond(strength) @ carrier.basis for carrier in carriers])
            if home is not None:
                left[[head for head in range(g.kv_heads) if same_block(head, home, g.head_dim)]] = 0
            edits[home, strength] = Lost(layer, left)
        return edits


def some_heads(count: int) -> tuple[int, ...]:
    """At most :data:`HOMES` of a layer's heads, spread evenly from the first to the last."""
    return tuple(sorted({round(n * (count - 1) / (HOMES - 1)) for n in range(HOMES)}))
