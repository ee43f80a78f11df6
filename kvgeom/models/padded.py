"""Greedy decoding of prompts as one batch padded on the left, as ``generate`` of transformers runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvgeom.models.cache import Edit, EditedCache
from kvgeom.models.decoding import Step


@dataclass(frozen=True)
class PaddedResponses:
    """Greedy responses of a padded batch: tokens without the one that ended each, and first logits ``[rows, vocabulary]``."""

    tokens: list[list[int]]
    first_logits: Tensor


def decode_padded(
    step: Step,
    prompts: Sequence[Sequence[int]],
    cache: EditedCache,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    *,
    pad: int,
    filler: int,
    device: torch.device,
    stop: Callable[[int, list[int]], bool] | None = None,
) -> PaddedResponses:
    """Run prompts as one batch from the first token on, as ``generate`` of transformers does.

    No row leaves the batch: one that has ended is fed ``filler`` until all have, so that what is computed of it can be part
    of a scale that all share.

    Parameters
    ----------
    step : Step
        Here with all tokens of the prompts in its first call.
    prompts : sequence of sequence of int
    cache : EditedCache
        An empty one, which sees the whole batch.
    max_new_tokens : int
    stop_tokens : frozenset of int
    pad, filler : int
        Tokens on the left of shorter prompts, and after the end of a response.
    device : torch.device
    stop : callable (row, its response tokens so far) -> bool, optional
        Whether no more is needed of a row; when all rows have ended or need no more, the batch ends.
    """
    longest = max(map(len, prompts))
    rows = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = step(torch.tensor(rows, device=device), cache, positions, mask)[:, -1]
    first, next_position = logits, positions[:, -1:] + 1
    tokens: list[list[int]] = [[] for _ in prompts]
    ended, enough = [False] * len(prompts), [False] * len(prompts)
    for made in range(max_new_tokens):
        chosen = [filler if over else token for over, token in zip(ended, logits.argmax(-1).tolist(), strict=True)]
        for row, token in enumerate(chosen):
            ended[row] = ended[row] or token in stop_tokens
            if not ended[row]:
                tokens[row].append(token)
                enough[row] = enough[row] or (stop is not None and stop(row, tokens[row]))
        if all(map(max, ended, enough)) or made == max_new_tokens - 1:
            break
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        logits = step(torch.tensor(chosen, device=device)[:, None], cache, next_position + made, mask)[:, -1]
    return PaddedResponses(tokens, first)


class Padding:
    """Part of a backend that has a tokenizer and runs batches under a mask: what placements that share scales need."""

    @torch.inference_mode()
    def generate_padded(
        self,
        prompts: Sequence[Sequence[int]],
        edit: Edit,
        max_new_tokens: int,
        *,
        stop: Callable[[int, list[int]], bool] | None = None,
    ) -> PaddedResponses:
        """Responses of prompts in one batch that ``edit`` sees whole; see :func:`decode_padded`."""
        own: Any = self
        ends, pad = own.tokenizer.eos_token_id, own.tokenizer.pad_token_id
        filler = int(min(own.stop_tokens, default=0) if ends is None else ends)
        return decode_padded(
            partial(own._run, logits_to_keep=1),
            prompts,
            own.new_cache(edit),
            max_new_tokens,
            own.stop_tokens,
            pad=filler if pad is None else int(pad),
            filler=filler,
            device=own.device,
            stop=stop,
        )
