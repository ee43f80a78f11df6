"""Greedy responses to prompts that have been prefilled one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvgeom.checks import whole
from kvgeom.models.cache import EditedCache
from kvgeom.models.model import EncodedPrompt, Model

if TYPE_CHECKING:
    from kvgeom.models.model import ResidEdit


@dataclass(frozen=True)
class Responses:
    """Responses to some prompts: tokens, and logits of the first position ``[prompts, vocabulary]``."""

    tokens: list[list[int]]
    first_logits: torch.Tensor


def respond(
    model: Model,
    prompts: Sequence[EncodedPrompt],
    max_new_tokens: int,
    *,
    caches: Sequence[EditedCache] | None = None,
    edit_resid: ResidEdit | None = None,
    batch_size: int = 32,
    stop: Callable[[int, list[int]], bool] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Responses:
    """Prefill every prompt into its cache, then decode in batches.

    Parameters
    ----------
    model : Model
    prompts : sequence of EncodedPrompt
    max_new_tokens : int
    caches : sequence of EditedCache, optional
        An empty cache for each prompt, filled here; exact ones by default.
    edit_resid : callable, optional
        As in :meth:`kvgeom.models.hf.HFModel.forward`, in prefill and decoding alike.
    batch_size : int
        Sequences that are decoded together.
    stop : callable (prompt, its response tokens so far) -> bool, optional
        As in :meth:`kvgeom.models.hf.HFModel.generate`.
    on_done : callable (number of prompts), optional
        Called once for every prompt prefilled and once for every prompt answered.
    """
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    done = on_done or (lambda count: None)
    caches = [model.new_cache() for _ in prompts] if caches is None else caches
    logits = []
    for prompt, cache in zip(prompts, caches, strict=True):
        logits.append(model.forward(prompt.ids, cache, edit_resid=edit_resid)[-1])
        done(1)
    if not logits:
        return Responses([], torch.empty(0, 0))
    first = torch.stack(logits)
    tokens = model.generate(
        caches,
        first.argmax(-1).tolist(),
        max_new_tokens,
        batch_size=batch_size,
        edit_resid=edit_resid,
        stop=stop,
        on_done=done,
    )
    return Responses(tokens, first)
