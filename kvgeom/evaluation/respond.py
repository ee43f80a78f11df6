"""Responses to prompts that have been prefilled one by one: greedy, or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvgeom.checks import whole
from kvgeom.models.cache import EditedCache
from kvgeom.models.decoding import Choose
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
    choose: Choose | None = None,
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
    choose : callable (prompt, tokens of its response, logits [vocabulary]) -> int, optional
        The next token, such as a :class:`Sampler`; the likeliest by default.
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
    begin = first.argmax(-1).tolist() if choose is None else [choose(row, 0, own) for row, own in enumerate(first)]
    tokens = model.generate(
        caches,
        begin,
        max_new_tokens,
        batch_size=batch_size,
        edit_resid=edit_resid,
        stop=stop,
        choose=choose,
        on_done=done,
    )
    return Responses(tokens, first)


@dataclass(frozen=True)
class Sampler:
    """Draws tokens at a temperature from the likeliest ones (nucleus sampling).

    A draw hangs on seed, prompt and place alone, so that batches change nothing.

    Attributes
    ----------
    temperature : float
        Above 0.
    top_p : float
        Probability that the tokens have together from which is drawn.
    seed : int

    References
    ----------
    Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020.
    """

    temperature: float
    top_p: float = 1.0
    seed: int = 0

    def __call__(self, prompt: int, made: int, logits: torch.Tensor) -> int:
        likely = torch.softmax(logits.double().cpu() / self.temperature, -1).sort(descending=True, stable=True)
        before = likely.values.cumsum(-1) - likely.values
        kept = likely.values * (before < self.top_p)
        rng = np.random.default_rng([self.seed, prompt, made])
        place = int(torch.searchsorted(kept.cumsum(-1), rng.random() * float(kept.sum()), right=True))
        return int(likely.indices[min(place, int((kept > 0).sum()) - 1)])
