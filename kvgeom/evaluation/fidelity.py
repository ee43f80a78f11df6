"""How faithfully plain text is read through a rounded cache: perplexity, KL divergence and agreement on the next token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike
from torch import Tensor

from kvgeom.errors import InputError
from kvgeom.models.model import Model
from kvgeom.progress import bar
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.stats import Estimate, mean_of_blocks
from kvgeom.words import counted, span, times_text

#: So many first tokens of a text are read, as one window where the model's context holds as many.
TOKENS = 2048
#: A window is divided into passages of up to so many tokens, which differ in their subjects as others would: intervals are about
#: these. Where a cache rounds only after a while, passages are read one by one and know nothing of each other.
PASSAGE = 384
#: Losses are summed over about so many neighbouring tokens, and over half of a passage at most: whole blocks are compared,
#: because neighbours err alike.
BLOCK = 64
#: Last tokens of a passage that are read one by one where one pass would round nothing.
STEPS = 32
#: Columns of a table of caches, each of which is followed by those of its 95 % interval, ``_low`` and ``_high``.
FIDELITY = ("perplexity_ratio", "text_kl", "text_top1")
ENDS = ("", "_low", "_high")
#: What :func:`fidelity_cells` are headed by.
HEADINGS = ("perplexity", "KL", "same token")
#: Those of the ratio of perplexities.
RATIO = tuple(f"{FIDELITY[0]}{end}" for end in ENDS)
#: Tokens whose distributions are compared at once: several copies of their logits are made.
_COMPARED = 256


@dataclass(frozen=True)
class Window:
    """Passages that are read as one text.

    Attributes
    ----------
    passages : tuple of tuple of int
        Their tokens.
    first : int
        The number of the first of them in the text.
    """

    passages: tuple[tuple[int, ...], ...]
    first: int

    @property
    def ids(self) -> list[int]:
        """All tokens."""
        return [token for part in self.passages for token in part]


@dataclass(frozen=True)
class Passages:
    """The tokens of a text that are read; made by :func:`passages`.

    Attributes
    ----------
    ids : tuple of tuple of int
    total : int
        Tokens of the whole text.
    window : int
        Most tokens that are read as one.
    """

    ids: tuple[tuple[int, ...], ...]
    total: int
    window: int

    def __str__(self) -> str:
        windows = sorted(len(window.ids) for window in self.windows(True))
        how = "1 window" if len(windows) == 1 else f"{len(windows)} windows of {span(windows)}"
        alone = " (its interval is about this passage alone)" if len(self.ids) == 1 else ""
        return f"{self._read} of plain text, in {how}{alone}"

    @property
    def _read(self) -> str:
        read = sum(map(len, self.ids))
        return f"{read:,} tokens" if read == self.total else f"the first {read:,} of {self.total:,} tokens"

    def windows(self, one_pass: bool) -> list[Window]:
        """As many passages at once as a window holds, or where one pass would round nothing each passage by itself."""
        found: list[list[int]] = []
        for number, ids in enumerate(self.ids):
            if found and one_pass and sum(len(self.ids[n]) for n in found[-1]) + len(ids) <= self.window:
                found[-1].append(number)
            else:
                found.append([number])
        return [Window(tuple(self.ids[n] for n in numbers), numbers[0]) for numbers in found]

    def scored(self, placement: Placement) -> int:
        """How many tokens count, and read what has been rounded."""
        if placement.one_pass:
            return sum(map(len, self.ids)) - len(self.windows(True))
        steps = ((_counted(len(ids), placement), len(ids)) for ids in self.ids)
        return sum(n for n, length in steps if placement.rounds(length - n, length - 1, True))

    def described(self, placements: Iterable[Placement]) -> str:
        """What is read, and how many tokens are scored where caches of these placements are rounded only after a while."""
        each = [*dict.fromkeys(placements)]
        late = [self.scored(placement) for placement in each if not placement.one_pass]
        if not late:
            return str(self)
        passages = counted(len(self.ids), "passage")
        if len(late) == len(each):
            return f"{self._read} of plain text, in {passages}, {span(sorted(late))} tokens of which are scored under rounding"
        return f"{self}; under caches that round later in {passages}, {span(sorted(late))} tokens of which are scored"


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
    window = min(TOKENS, model.max_context)
    count = math.ceil(len(read) / min(PASSAGE, window))
    ends = [len(read) * number // count for number in range(count + 1)]
    return Passages(tuple(tuple(read[start:end]) for start, end in pairwise(ends)), len(tokens), window)


@dataclass(frozen=True)
class TextFidelity:
    """What a cache does to the reading of plain text, beside the exact one; made by :meth:`Reading.against`.

    Attributes
    ----------
    perplexity_ratio : Estimate
        Perplexity over that with the exact cache.
    kl : Estimate
        Mean Kullback-Leibler divergence (nats per token) of the next-token distribution from that with the exact cache,
        ``sum p_exact (log p_exact - log p)``.
    top1 : Estimate
        Share of tokens at which both hold the same next token for the most likely one.
    """

    perplexity_ratio: Estimate
    kl: Estimate
    top1: Estimate


#: Of the exact cache itself.
SAME = TextFidelity(Estimate(1.0, 1.0, 1.0), Estimate(0.0, 0.0, 0.0), Estimate(1.0, 1.0, 1.0))
#: Of a cache that nothing was read with.
UNREAD = TextFidelity(*[Estimate(float("nan"), float("nan"), float("nan"))] * 3)


@dataclass(frozen=True)
class Reading:
    """What reading a text costs a model, summed over blocks of neighbouring tokens. Made by :func:`read`.

    Attributes
    ----------
    nats : tuple of float
        Negative log-likelihood.
    kl : tuple of float
        Kullback-Leibler divergence (nats) from the exact cache; 0 for the exact cache itself.
    agreed : tuple of int
        Tokens at which the most likely next token is that of the exact cache.
    tokens : tuple of int
        How many tokens each block has.
    passages : tuple of int
        The number of the passage that each block is of.
    """

    nats: tuple[float, ...]
    kl: tuple[float, ...]
    agreed: tuple[int, ...]
    tokens: tuple[int, ...]
    passages: tuple[int, ...]

    @classmethod
    def of(cls, nats: ArrayLike, kl: ArrayLike, agreed: ArrayLike, lengths: Sequence[int], first: int = 0) -> Reading:
        """Sum values of tokens over blocks.

        Parameters
        ----------
        nats, kl, agreed : array [tokens]
            Negative log-likelihood, divergence, and whether the most likely next token is that of the exact cache.
        lengths : sequence of int
            Tokens of each passage.
        first : int
            The number of the first passage.
        """
        sums: list[tuple[float, float, int, int, int]] = []
        ends = np.cumsum(lengths)
        values = [np.split(np.asarray(each), ends[:-1]) for each in (nats, kl, agreed)]
        for number, passage in enumerate(zip(*values, strict=True), first):
            size = len(passage[0])
            blocks = (np.array_split(each, min(size, max(2, round(size / BLOCK)))) for each in passage)
            sums += [
                (float(loss.sum()), float(apart.sum()), int(same.sum()), len(loss), number)
                for loss, apart, same in zip(*blocks, strict=True)
            ]
        return cls(*zip(*sums, strict=True))

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

    def against(self, exact: Reading) -> TextFidelity:
        """Beside the reading with an exact cache; intervals as in :meth:`ratio`, and within what is possible."""
        kl = mean_of_blocks(self.kl, self.tokens, self.passages)
        # Of the share that differs, so that full agreement is known as 1; of logits that are no numbers nothing is known.
        differing = [count - agreed for count, agreed in zip(self.tokens, self.agreed, strict=True)]
        differs = mean_of_blocks(differing, self.tokens, self.passages)
        low, high = np.clip([1 - differs.high, 1 - differs.low], 0.0, 1.0)
        top1 = Estimate(1 - differs.value, float(low), float(high))
        return TextFidelity(
            self.ratio(exact),
            Estimate(kl.value, float(np.maximum(kl.low, 0.0)), kl.high),
            UNREAD.top1 if math.isnan(kl.value) else top1,
        )


def read(
    model: Model, window: Window, recipe: Recipe | None, placement: Placement, exact: Callable[[], Tensor]
) -> Reading:
    """Read a window through a cache.

    Every token attends to rounded keys and values, as a prompt does. Where a placement rounds only after tokens were read
    exactly, one pass would round nothing: then all but the last :data:`STEPS` tokens are the prompt, the others come one by
    one, and it is they that count.

    Parameters
    ----------
    model : Model
    window : Window
    recipe : Recipe or None
        None for the exact cache.
    placement : Placement
        Says which tokens count, of the exact cache too.
    exact : callable () -> Tensor
        :func:`logits` with the exact cache; many recipes share them.
    """
    theirs = exact()
    return _scored(theirs if recipe is None else logits(model, window, recipe, placement), theirs, window)


#: A cache that a text is read with: what is rounded how (None: nothing), and where.
Cache = tuple[Recipe | None, Placement]


def readings(
    model: Model,
    text: Passages,
    caches: Sequence[Cache],
    known: Callable[[dict[str, Any], Callable[[], Reading]], Reading],
) -> list[Reading]:
    """Read a text through several caches, one window after the other.

    Costs a pass over the text for each cache, and one for the exact cache, which all share. Two sets of logits of a window are
    held.

    Parameters
    ----------
    model : Model
    text : Passages
    caches : sequence of (Recipe or None, Placement)
    known : callable (key, measure) -> Reading
        Returns what is known of a key, or measures it.
    """
    windows = {one_pass: text.windows(one_pass) for one_pass in (True, False)}
    parts: list[list[Reading]] = [[] for _ in caches]
    total = sum(len(windows[placement.one_pass]) for _, placement in caches)
    with bar("reading plain text", total, show=len(caches) > 2) as drawn:
        for one_pass in (True, False):
            chosen = [number for number, (_, placement) in enumerate(caches) if placement.one_pass == one_pass]
            for window in windows[one_pass] if chosen else ():
                exact = cache(partial(logits, model, window, None, caches[chosen[0]][1]))
                for number in chosen:
                    recipe, placement = caches[number]
                    key = {
                        "recipe": recipe.record() if recipe else None,
                        "placement": str(placement) if recipe else None,
                        "one_pass": one_pass,
                        "passages": [window.first, len(window.passages)],
                    }
                    parts[number].append(known(key, partial(read, model, window, recipe, placement, exact)))
                    drawn.update(1)
    return [_joined(each) for each in parts]


def _joined(parts: Sequence[Reading]) -> Reading:
    """Readings of several windows as one."""
    names = [field.name for field in fields(Reading)]
    return Reading(*(tuple(value for part in parts for value in getattr(part, name)) for name in names))


def logits(model: Model, window: Window, recipe: Recipe | None, placement: Placement) -> Tensor:
    """Logits [tokens that count, vocabulary] at the tokens before them."""
    ids = window.ids
    counts = _counted(len(ids), placement)
    rounded = model.new_cache(Quantizer(recipe, placement) if recipe else None)
    if placement.one_pass or not recipe:
        return model.forward(ids, rounded, all_logits=True)[-counts - 1 : -1]
    parts = [ids[:-counts], *([token] for token in ids[-counts:-1])]
    return torch.cat([model.forward(part, rounded) for part in parts])


def _scored(found: Tensor, exact: Tensor, window: Window) -> Reading:
    """Sums over the blocks of a window."""
    targets = torch.tensor(window.ids[-len(found) :], device=found.device)
    nats, kl, agreed = (torch.cat(each).numpy() for each in zip(*_compared(found, exact, targets), strict=True))
    # The first token of a window is not predicted, nor are those of a prompt.
    lengths = [len(part) for part in window.passages]
    lengths[0] -= sum(lengths) - len(found)
    return Reading.of(nats, kl, agreed, lengths, window.first)


def _compared(found: Tensor, exact: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Negative log-likelihood, divergence and agreement of tokens, on the processor."""
    for ours, theirs, target in zip(*(torch.split(each, _COMPARED) for each in (found, exact, targets)), strict=True):
        losses = torch.nn.functional.cross_entropy(ours, target, reduction="none")
        if found is exact:
            apart = losses * 0  # of a model that gives no number it is none either
        else:
            logs, true = ours.log_softmax(-1), theirs.log_softmax(-1)
            # Never negative; a sum over a vocabulary in single precision may be.
            apart = (true.exp() * (true - logs)).sum(-1).clamp_min(0.0)
        yield losses.cpu().double(), apart.cpu().double(), (ours.argmax(-1) == theirs.argmax(-1)).long().cpu()


def _counted(length: int, placement: Placement) -> int:
    """How many tokens of a window are predicted, the last ones."""
    return length - 1 if placement.one_pass else min(STEPS, length - 1)


def fidelity_columns(rows: Sequence[TextFidelity | None]) -> dict[str, list[float]]:
    """The columns :data:`FIDELITY` of a table of caches with their intervals; NaN where nothing was read."""
    each = [UNREAD if row is None else row for row in rows]
    columns = zip(*(astuple(row) for row in each), strict=True)  # of each an estimate as (value, low, high)
    return {
        f"{name}{end}": [estimate[place] for estimate in column]
        for name, column in zip(FIDELITY, columns, strict=True)
        for place, end in enumerate(ENDS)
    }


def fidelity_rows(data: xr.Dataset) -> list[TextFidelity]:
    """The inverse of :func:`fidelity_columns`, of a table of one dimension."""
    names = [name + end for name in FIDELITY for end in ENDS]
    rows = zip(*(data[name].values.astype(float).tolist() for name in names), strict=True)
    return [TextFidelity(*(Estimate(*row[begin : begin + 3]) for begin in (0, 3, 6))) for row in rows]


def fidelity_cells(row: TextFidelity) -> tuple[str, str, str]:
    """For a table with the columns :data:`HEADINGS`; the first with its interval, which the others have in the data."""
    ratio, kl, top1 = row.perplexity_ratio, row.kl, row.top1
    return times_text(ratio.value, ratio.low, ratio.high), f"{kl.value:.2g}", f"{top1.value:.1%}"


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # beyond, exp would overflow, and nobody would tell the difference
