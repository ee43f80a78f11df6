"""Seeing keys, values and residual stream of a prompt as vectors of channels, keys freed of their position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.models.rope import unrotate
from kvgeom.quant.placement import Placement

SITES = ("k", "v", "resid")
Site = Literal["k", "v", "resid"]
Seen = Callable[[int, Site, Tensor, Callable[[Tensor], Tensor]], None]


class _Tap:
    """An edit that changes nothing and hands on what passes."""

    prefill_reads_exact = False

    def __init__(self, where: str, see: Callable[[int, Site, Tensor], None]) -> None:
        self.where = where
        self._see = see

    def __call__(self, layer: int, site: Literal["k", "v"], x: Tensor) -> Tensor:
        self._see(layer, site, x)
        return x

    def rows(self, rows: Tensor) -> _Tap:
        return self

    @staticmethod
    def stack(parts: Sequence[Any]) -> _Tap:
        first: _Tap = parts[0]
        return first


def watch(model: Model, prompt: EncodedPrompt, placement: Placement, see: Seen) -> None:
    """Run one prompt and hand on every layer's stored vectors. Costs one forward pass.

    Parameters
    ----------
    model : Model
    prompt : EncodedPrompt
    placement : Placement
        Whether keys and values are seen as stored in the cache or as projected.
    see : callable (layer, site, x, flat) -> None
        ``x`` is what rounding would be applied to, ``[1, heads, tokens, head_dim]`` (one head of ``d_model`` for
        the residual stream after the layer). ``flat(y)`` turns ``x``, or anything in its shape and frame such as
        a rounding error, into vectors ``[tokens, channels]``, and takes the rotary embedding out of stored keys:
        position turns a key without changing its content, and would blur the class means.
    """
    rotations: dict[int, tuple[Tensor, Tensor]] = {}

    def see_kv(layer: int, site: Site, x: Tensor) -> None:
        turned = rotations.get(layer) if site == "k" and placement.where == "cache" else None
        see(layer, site, x, lambda y: _vectors(unrotate(y, *turned) if turned is not None else y))

    def remember(layer: int, cos: Tensor, sin: Tensor) -> None:
        rotations[layer] = (cos, sin)

    model.forward(
        prompt.ids,
        model.new_cache(_Tap(placement.where, see_kv)),
        on_resid=lambda layer, x: see(layer, "resid", x[None, None], _vectors),
        on_rotation=remember,
    )


def _vectors(x: Tensor) -> Tensor:
    return rearrange(x[0], "h t d -> t (h d)").float()


def positions(prompts: Sequence[EncodedPrompt]) -> list[str]:
    """Names of the token positions that all prompts share: the instruction, and the template tokens after it.

    ``"template-1"`` is the last prompt token, ``"template-2"`` the one before, ...
    """
    after = min(len(prompt) - prompt.instruction.stop for prompt in prompts)
    return ["instruction", *(f"template-{back}" for back in range(after, 0, -1))]


def tokens_at(prompt: EncodedPrompt, position: str) -> slice:
    """The tokens of a prompt at a position named by :func:`positions`."""
    if position == "instruction":
        return prompt.instruction
    token = len(prompt) - int(position.removeprefix("template-"))
    return slice(token, token + 1)


def site_width(model: Model, site: str) -> int:
    """Channels of a site."""
    return model.geometry.d_model if site == "resid" else model.geometry.channels


def stack_positions(x: Tensor, prompt: EncodedPrompt, names: Sequence[str]) -> Tensor:
    """Mean vector at each position: ``[tokens, channels]`` to ``[positions, channels]``."""
    return torch.stack([x[tokens_at(prompt, name)].mean(0) for name in names])
