"""Perplexity of plain text read through a rounded cache, and how sure its ratio to the exact one is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from kvgeom.errors import InputError
from kvgeom.models.model import Model
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.stats import Estimate, mean_of_blocks
from kvgeom.words import span

#: So many first tokens of a text are read, in passages of up to so many that know nothing of each other.
TOKENS, PASSAGE = 1536, 384
#: Losses are summed over about so many neighbouring tokens, and over half of a passage at most: whole blocks are compared,
#: because neighbours err alike.
BLOCK = 64
#: Last tokens of a passage that are read one by one where one pass would round nothing.
STEPS = 32
#: Columns of a ratio of perplexities and of its interval.
RATIO = ("perplexity_ratio", "perplexity_ratio_low", "perplexity_ratio_high")


@dataclass(frozen=True)
class Passages:
    """The tokens of a text that are read; made by :func:`passages`.

    Attributes
    ----------
    ids : tuple of tuple of int
    total : int
        Tokens of the whole text.
    """

    ids: tuple[tuple[int, ...], ...]
    total: int

    def __str__(self) -> str:
        read, count = sum(map(len, self.ids)), len(self.ids)
        which = f"{read:,} tokens" if read == self.total else f"the first {read:,} of {self.total:,} tokens"
        if count == 1:
            return f"{which} of plain text, in 1 passage (its interval is about this passage alone)"
        return f"{which} of plain text, in {count} passages"

    def scored(self, placement: Placement) -> int:
        """How many tokens count, and read what has been rounded."""
        if placement.one_pass:
            return sum(len(ids) - 1 for ids in self.ids)
        steps = ((_counted(ids, placement), len(ids)) for ids in self.ids)
        return sum(n for n, length in steps if placement.rounds(length - n, length - 1, True))

    def described(self, placements: Iterable[Placement]) -> str:
        """What is read, and how many tokens are scored where caches of these placements are rounded only after a while."""
        each = [*dict.fromkeys(placements)]
        late = [self.scored(placement) for placement in each if not placement.one_pass]
        if not late:
            return str(self)
        where = "rounding" if len(late) == len(each) else "caches that round later"
        return f"{self}, {span(sorted(late))} tokens of which are scored under {where}"


def passages(model: Model, text: str) -> Passages:
    """Cut the first :data:`TOKENS` tokens of a text into passages of one length, of no more than :data:`PASSAGE` tokens.

    Fewer where the model's context holds fewer.

    Raises
    ------
    InputError
        If the text has fewer than two tokens.
    """
    tokens = model.tokens(text)
    read = tokens[:TOKENS]
    if len(read) < 2:
        raise InputError(f"perplexity needs a text of at least two tokens, got {len(tokens)}; give a longer text")
    count = math.ceil(len(read) / min(PASSAGE, model.max_context))
    ends = [len(read) * number // count for number in range(count + 1)]
    return Passages(tuple(tuple(read[start:end]) for start, end in pairwise(ends)), len(tokens))


@dataclass(frozen=True)
class Reading:
    """What a text costs a model: negative log-likelihood, summed over blocks of neighbouring tokens. Made by :func:`read`.

    Attributes
    ----------
    nats : tuple of float
    tokens : tuple of int
        How many tokens each block has.
    passages : tuple of int
        The number of the passage that each block is of.
    """

    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    passages: tuple[int, ...]

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean negative log-likelihood."""
        return _exp(sum(self.nats) / sum(self.tokens))

    def ratio(self, exact: Reading) -> Estimate:
        """Perplexity over that of another reading of the same tokens, with the interval of :func:`~kvgeom.stats.mean_of_blocks`.

        Differences are taken token by token, so that what makes a text hard for both is no error. The interval is that of
        blocks or of passages, whichever is wider: it covers other text like this, of other subjects. Of a single passage it
        is about that passage alone.
        """
        differences = [a - b for a, b in zip(self.nats, exact.nats, strict=True)]
        grown = mean_of_blocks(differences, self.tokens, self.passages)
        return Estimate(_exp(grown.value), _exp(grown.low), _exp(grown.high))


def read(model: Model, text: Passages, recipe: Recipe | None = None, *, placement: Placement | None = None) -> Reading:
    """Read a text through the cache, each passage by itself.

    Every token attends to rounded keys and values, as a prompt does. Where a placement rounds only after tokens were read
    exactly, one pass would round nothing: then all but the last :data:`STEPS` tokens of a passage are the prompt, the others
    come one by one, and it is they that count.

    Parameters
    ----------
    model : Model
    text : Passages
    recipe : Recipe, optional
        None for the exact cache. Its placement says which tokens count.
    placement : Placement, optional
    """
    placement = placement or Placement()
    nats: list[float] = []
    tokens: list[int] = []
    members: list[int] = []
    for number, ids in enumerate(text.ids):
        counts = _counted(ids, placement)
        cache = model.new_cache(Quantizer(recipe, placement) if recipe else None)
        if placement.one_pass or not recipe:
            logits = model.forward(ids, cache, all_logits=True)[-counts - 1 : -1]
        else:
            parts = [ids[:-counts], *([token] for token in ids[-counts:-1])]
            logits = torch.cat([model.forward(part, cache) for part in parts])
        targets = torch.tensor(ids[-counts:], device=logits.device)
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu().double()
        blocks = losses.tensor_split(min(counts, max(2, round(counts / BLOCK))))
        nats += [float(block.sum()) for block in blocks]
        tokens += [len(block) for block in blocks]
        members += [number] * len(blocks)
    return Reading(tuple(nats), tuple(tokens), tuple(members))


def _counted(ids: Sequence[int], placement: Placement) -> int:
    """How many tokens of a passage are predicted, the last ones."""
    return len(ids) - 1 if placement.one_pass else min(STEPS, len(ids) - 1)


def ratio_columns(ratios: Sequence[Estimate]) -> dict[str, list[float]]:
    """The columns :data:`RATIO` of a table of caches."""
    values = [(ratio.value, ratio.low, ratio.high) for ratio in ratios]
    return {name: [row[n] for row in values] for n, name in enumerate(RATIO)}


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # beyond, exp would overflow, and nobody would tell the difference
