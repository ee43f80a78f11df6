"""Rotary position embedding: applying it, taking it out again, and a model's own at any position."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvgeom.errors import ModelError
from kvgeom.models.modules import attention_of
from kvgeom.quant.transforms import Rotation

#: Positions that tell the embeddings of layers apart; at position 0 all are the same.
_PROBE = 3


def rotate(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys as stored, from keys as projected: ``k * cos + rotate_half(k) * sin``.

    Parameters
    ----------
    k : Tensor [..., tokens, head_dim]
    cos, sin : Tensor [tokens, rotary_dim]
        What the model's own rotary module returned; with a partial rotary embedding ``rotary_dim < head_dim``
        and the other channels pass through.
    """
    size = cos.shape[-1]
    rotated = k[..., :size]
    return torch.cat([rotated * cos + _rotate_half(rotated) * sin, k[..., size:]], dim=-1)


def unrotate(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Inverse of :func:`rotate`, also where the model scales ``cos`` and ``sin`` (as YaRN does)."""
    scale = (cos * cos + sin * sin).clamp_min(torch.finfo(cos.dtype).tiny)
    return rotate(k, cos / scale, -sin / scale)


def rotation_at(cos: Tensor, sin: Tensor) -> Rotation:
    """The rotation of vectors to the positions of some tokens.

    Parameters
    ----------
    cos, sin : Tensor [batch or 1, tokens, rotary_dim]
        What the model's own rotary module returned.
    """
    cos, sin = cos[:, None], sin[:, None]
    rows, _, tokens, _ = cos.shape
    return lambda vectors: rotate(vectors[None, :, None].to(cos).expand(rows, -1, tokens, -1), cos, sin)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


@dataclass(frozen=True)
class _Call:
    """How the model calls its rotary module: with positions, and with what else (a layer type, for instance)."""

    module: Any
    shape: tuple[int, ...]
    others: tuple[Any, ...]
    named: dict[str, Any]
    output: tuple[Tensor, Tensor]

    def at(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[1, tokens, rotary_dim]`` at ``positions [tokens]``, in the dtype of ``like``."""
        positions = positions.expand(*self.shape[:-1], -1)
        cos, sin = self.module(like, positions, *self.others, **self.named)
        return cos, sin


class RotaryEmbedding:
    """Which rotary module a model uses in each layer, and how it calls it.

    The model is run once, on three tokens, to see that; nothing stays in it. A module whose frequencies depend on the
    length of the sequence so far ("dynamic", "longrope") answers as in the model's own pass over the same tokens.

    Parameters
    ----------
    model : PreTrainedModel
    layers : sequence of nn.Module
        Its decoder layers.
    name : str
        For messages.

    Raises
    ------
    ModelError
        If some layer's attention gets no rotary embedding, or one that does not come from a rotary module as it is.
    """

    def __init__(self, model: Any, layers: Sequence[nn.Module], name: str) -> None:
        calls: list[_Call] = []
        read: dict[int, tuple[Tensor, Tensor]] = {}

        def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            named = {key: value for key, value in kwargs.items() if key not in ("x", "position_ids")}
            positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
            calls.append(_Call(module, tuple(positions.shape), args[2:], named, output))

        def reading(layer: int, kwargs: dict[str, Any]) -> None:
            if kwargs.get("position_embeddings") is not None:
                read[layer] = kwargs["position_embeddings"]

        with ExitStack() as stack, torch.inference_mode():
            for module in model.modules():
                if "rotary" in type(module).__name__.lower():
                    stack.callback(module.register_forward_hook(called, with_kwargs=True).remove)
            for index, layer in enumerate(layers):
                handle = attention_of(layer).register_forward_pre_hook(
                    lambda _module, _args, kwargs, index=index: reading(index, kwargs), with_kwargs=True
                )
                stack.callback(handle.remove)
            model(input_ids=torch.zeros(1, _PROBE, dtype=torch.long, device=model.device), use_cache=False)
        self._calls = [_match(calls, read.get(index), index, name) for index in range(len(layers))]

    def rotation(self, layer: int, first: int, keys: Tensor) -> Rotation:
        """The rotation of vectors to the positions of new tokens.

        Parameters
        ----------
        layer : int
        first : int
            Position of the first new token.
        keys : Tensor [batch, kv_heads, new tokens, head_dim]
            For their number, dtype and device.
        """
        positions = torch.arange(first, first + keys.shape[2], device=keys.device)
        return rotation_at(*self._calls[layer].at(positions, keys))


def _match(calls: list[_Call], read: tuple[Tensor, Tensor] | None, layer: int, name: str) -> _Call:
    """The call whose answer a layer's attention has read."""
    if read is not None:
        for call in calls:
            if all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(call.output, read, strict=True)):
                return call
    raise ModelError(
        f"the attention in layer {layer} of {name} gets no rotary embedding that kvgeom can follow; use a recipe without "
        "center for keys, or kvgeom's own passes"
    )
