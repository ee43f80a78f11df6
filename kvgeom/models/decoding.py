"""Decoding in batches, by any function that runs a model one step: greedy, or as a sampler chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvgeom.models.cache import EditedCache


class Step(Protocol):
    """Runs a model on one new token of every sequence of a batch.

    Parameters
    ----------
    tokens, positions : Tensor [sequences, 1], int64
    cache : EditedCache
    mask : Tensor [sequences, longest], int64
        1 for a token of the sequence, 0 for padding on the left.

    Returns
    -------
    Tensor [sequences, 1, vocabulary]
        Logits.
    """

    def __call__(self, tokens: Tensor, cache: EditedCache, positions: Tensor, mask: Tensor, /) -> Tensor: ...


#: Which token comes next: from the row of a prompt, how many tokens its response has, and logits ``[vocabulary]``.
Choose = Callable[[int, int, Tensor], int]


def decode(
    step: Step,
    caches: Sequence[EditedCache],
    first_tokens: Sequence[int],
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    *,
    batch_size: int,
    device: torch.device,
    stop: Callable[[int, list[int]], bool] | None = None,
    choose: Choose | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Decode prefilled prompts; see :meth:`kvgeom.models.model.Model.generate`.

    Parameters
    ----------
    step : Step
    stop_tokens : frozenset of int
        Tokens that end a response, and are left out of it.
    device : torch.device
        Where the model takes tokens.
    caches, first_tokens, max_new_tokens, batch_size, stop, choose, on_done
        As there.
    """
    responses: list[list[int]] = []
    for begin in range(0, len(caches), batch_size):
        chunk = slice(begin, begin + batch_size)
        ends = None if stop is None else lambda row, tokens, begin=begin: stop(begin + row, tokens)
        own = None if choose is None else lambda row, made, logits, begin=begin: choose(begin + row, made, logits)
        first = torch.tensor(list(first_tokens[chunk]), device=device)
        responses += _decode_batch(step, list(caches[chunk]), first, max_new_tokens, stop_tokens, ends, own)
        if on_done is not None:
            on_done(len(caches[chunk]))
    return responses


def _decode_batch(
    step: Step,
    caches: list[EditedCache],
    token: Tensor,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    stop: Callable[[int, list[int]], bool] | None,
    choose: Choose | None,
) -> list[list[int]]:
    """Responses to the prompts of one batch, whose first tokens are ``token [sequences]``."""
    device = token.device
    lengths = torch.tensor([cache.get_seq_length() for cache in caches], device=device)
    cache = EditedCache.stack(caches)
    longest = int(lengths.max())
    mask = (torch.arange(longest, device=device)[None] >= (longest - lengths)[:, None]).long()
    responses: list[list[int]] = [[] for _ in caches]
    rows = list(range(len(caches)))
    for made in range(max_new_tokens):
        alive = [i for i, t in enumerate(token.tolist()) if t not in stop_tokens]
        for i in alive:
            responses[rows[i]].append(int(token[i]))
        if stop is not None:
            alive = [i for i in alive if not stop(rows[i], responses[rows[i]])]
        if not alive or made == max_new_tokens - 1:
            break
        if len(alive) < len(rows):
            keep = torch.tensor(alive, device=device)
            cache.keep(keep)
            rows, token, lengths, mask = [rows[i] for i in alive], token[keep], lengths[keep], mask[keep]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        logits = step(token[:, None], cache, lengths[:, None] + made, mask)[:, -1]
        if choose is None:
            token = logits.argmax(-1)
        else:
            chosen = [choose(row, made + 1, own) for row, own in zip(rows, logits, strict=True)]
            token = torch.tensor(chosen, device=device)
    return responses
