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
    """An edit that changes nothing and remembers what passes the projections."""

    where = "projection"
    prefill_reads_exact = False

    def __init__(self, seen: dict[tuple[int, Site], Tensor]) -> None:
        self._seen = seen

    def __call__(self, layer: int, site: Literal["k", "v"], x: Tensor) -> Tensor:
        self._seen[layer, site] = x
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
    resid: dict[int, Tensor] = {}
    projected: dict[tuple[int, Site], Tensor] = {}
    at_projection = placement.where == "projection"
    cache = model.new_cache(_Tap(projected) if at_projection else None)
    model.forward(
        prompt.ids,
        cache,
        on_resid=resid.__setitem__,
        on_rotation=lambda layer, cos, sin: rotations.__setitem__(layer, (cos, sin)),
    )
    for layer, stored in enumerate(cache.layers):
        turned = rotations.get(layer) if not at_projection else None
        k = projected[layer, "k"] if at_projection else stored.keys
        v = projected[layer, "v"] if at_projection else stored.values
        see(layer, "k", k, lambda y, by=turned: _vectors(y if by is None else unrotate(y, *by)))  # type: ignore[misc]
        see(layer, "v", v, _vectors)
        see(layer, "resid", resid[layer][None], _vectors)


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
