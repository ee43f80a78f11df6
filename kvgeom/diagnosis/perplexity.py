"""Perplexity of plain text read through a rounded cache."""

from __future__ import annotations

import math

import torch

from kvgeom.errors import InputError
from kvgeom.models.model import Model
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.rounder import Rounder


def perplexity(
    model: Model,
    text: str,
    recipe: Recipe | None = None,
    *,
    placement: Placement | None = None,
    max_tokens: int = 384,
) -> float:
    """``exp`` of the mean negative log-likelihood of a text, read in one pass through the cache.

    Every token attends to rounded keys and values, as a prompt does.

    Parameters
    ----------
    model : Model
    text : str
    recipe : Recipe, optional
        None for the unquantized cache.
    placement : Placement, optional
    max_tokens : int
        Only this many first tokens of the text are read.

    Raises
    ------
    InputError
        If the text has fewer than two tokens.
    """
    tokens = model.tokens(text)[: min(max_tokens, model.max_context)]
    if len(tokens) < 2:
        raise InputError(f"a text of {len(tokens)} tokens was given; perplexity needs at least two")
    cache = model.new_cache(Rounder(recipe, placement) if recipe else None)
    logits = model.forward(tokens, cache, all_logits=True)
    targets = torch.tensor(tokens[1:], device=logits.device)
    loss = torch.nn.functional.cross_entropy(logits[:-1], targets)
    return math.exp(min(float(loss), 700.0))  # beyond 700 nats exp would overflow, and nobody would tell the difference
