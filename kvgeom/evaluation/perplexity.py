"""Perplexity of plain text read through a rounded cache."""

from __future__ import annotations

import math

import torch

from kvgeom.errors import InputError
from kvgeom.models.model import Model
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe

#: Tokens that are read one by one where one pass would round nothing.
STEPS = 64


def perplexity(
    model: Model,
    text: str,
    recipe: Recipe | None = None,
    *,
    placement: Placement | None = None,
    max_tokens: int = 384,
) -> float:
    """``exp`` of the mean negative log-likelihood of a text, read through the cache.

    Every token attends to rounded keys and values, as a prompt does. Where a placement rounds only after tokens were read
    exactly, one pass would round nothing: then all but the last :data:`STEPS` tokens are the prompt, the others come one by
    one, and it is they that count (for the exact cache of that placement too).

    Parameters
    ----------
    model : Model
    text : str
    recipe : Recipe, optional
        None for the exact cache.
    placement : Placement, optional
    max_tokens : int
        Only this many first tokens of the text are read.

    Raises
    ------
    InputError
        If the text has fewer than two tokens.
    """
    placement = placement or Placement()
    tokens = model.tokens(text)[: min(max_tokens, model.max_context)]
    if len(tokens) < 2:
        raise InputError(f"perplexity needs a text of at least two tokens, got {len(tokens)}; give a longer text")
    cache = model.new_cache(Quantizer(recipe, placement) if recipe else None)
    if placement.one_pass:
        logits = model.forward(tokens, cache, all_logits=True)[:-1]
    else:
        prompt = max(1, len(tokens) - STEPS)
        parts = [tokens[:prompt], *([token] for token in tokens[prompt:-1])]
        logits = torch.cat([model.forward(part, cache) for part in parts])
    targets = torch.tensor(tokens[-len(logits) :], device=logits.device)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    return math.exp(min(float(loss), 700.0))  # beyond 700 nats exp would overflow, and nobody would tell the difference
