"""Pure tensor functions: fit scales to keys or values, quantize and dequantize them, and the control of the error.

Tensors are ``[batch, kv_heads, tokens, head_dim]``. Arithmetic is in float32 at least, whatever the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from kvgeom.errors import InputError
from kvgeom.quant import transforms
from kvgeom.quant.formats.base import Axes, Scales, get_format
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.transforms import remembered

__all__ = [
    "Encoded",
    "Scales",
    "apply",
    "decode",
    "encode",
    "fake_quantize",
    "fit",
    "in_random_directions",
    "last_scales",
    "only_channels",
    "own_channels",
    "working",
]

# The axes of [batch, kv_heads, tokens, head_dim] that share a scale (the two groups have layouts of their own).
_SHARED_AXES: dict[str, Axes] = {
    "tensor": (1, 2, 3),
    "token": (1, 3),
    "channel": (2,),
    "head": (2, 3),
    "token-head": (3,),
    "none": (1, 2, 3),
}


#: Channel orders and signs of the last draws.
_DRAWN: dict[tuple[int, int, str, int], tuple[Tensor, Tensor]] = {}


@dataclass(frozen=True)
class Encoded:
    """Codes, in the shape of their blocks, and their scales, which may be ``borrowed`` from earlier tokens."""

    codes: Tensor
    scales: Scales
    borrowed: bool = False


def fit(x: Tensor, scheme: Scheme) -> Scales:
    """Scales that ``x`` itself sets; for an integer grid the smallest that covers ``x`` without clipping."""
    blocks, axes = _blocks(working(x), scheme)
    return get_format(scheme.format).fit(scheme, blocks, axes)


def encode(x: Tensor, scheme: Scheme, scales: Scales | None = None) -> Encoded:
    """Codes of ``x`` under ``scales``, or under its own; the scheme's transform and channels are ignored."""
    form = get_format(scheme.format)
    if scales is not None:
        # The scales of one group of tokens, which broadcast over later tokens.
        lone = scheme.granularity == "channel-group" and scales.step.ndim == 4
        return Encoded(
            form.encode(scheme, working(x) if lone else _blocks(working(x), scheme)[0], scales), scales, True
        )
    return Encoded(*form.quantize(scheme, *_blocks(working(x), scheme)))


def decode(encoded: Encoded, scheme: Scheme, like: Tensor) -> Tensor:
    """Values of codes, in shape and dtype of ``like``."""
    values = get_format(scheme.format).decode(scheme, encoded.codes, encoded.scales)
    return _unblocked(values, scheme, like).to(like.dtype)


def apply(x: Tensor, scheme: Scheme, scales: Scales | None) -> Tensor:
    """Round ``x`` to the grid ``scales`` (values beyond it saturate) and return it in its own dtype."""
    return only_channels(x, decode(encode(own_channels(x, scheme), scheme, scales), scheme, x), scheme)


def fake_quantize(x: Tensor, scheme: Scheme) -> Tensor:
    """``x`` as a cache under ``scheme`` would return it, scales fitted to ``x`` itself.

    Parameters
    ----------
    x : Tensor [batch, kv_heads, tokens, head_dim]
    scheme : Scheme
        Without ``center`` or ``equalize``, which need to know the model: give a :class:`~kvgeom.quant.quantizer.Quantizer`
        a recipe with :class:`~kvgeom.quant.transforms.Statics` instead.

    Returns
    -------
    Tensor
        Same shape and dtype. On an integer grid with scales in full precision ``|x - fake_quantize(x)| <= step / 2`` for
        every entry, up to float32 arithmetic on the largest value of its block. A value that is not finite makes
        its block NaN, and no other.
    """
    if scheme.transform == "none":
        return apply(x, scheme, None)
    if scheme.constants is not None:
        raise InputError(
            f"{scheme} needs constants of the model, which a lone tensor does not have; give a Quantizer a recipe "
            "with them: recipe.with_statics(offsets=...) or (factors=...)"
        )
    frame = transforms.frame(scheme.transform, None, x)
    y = frame.enter(working(x))
    return only_channels(x, frame.leave(apply(y, scheme.plain, None)).to(x.dtype), scheme)


def last_scales(scales: Scales, scheme: Scheme) -> Scales:
    """The scales for later tokens: all of them, or those of the last group of tokens."""
    if scheme.granularity != "channel-group":
        return scales
    return Scales(scales.step[:, :, -1], scales.offset[:, :, -1])


def only_channels(x: Tensor, rounded: Tensor, scheme: Scheme) -> Tensor:
    """``rounded`` in the channels that the scheme names, ``x`` in all others."""
    if scheme.channels is None:
        return rounded
    return torch.where(_chosen(x, scheme.channels), rounded, x)


def own_channels(x: Tensor, scheme: Scheme) -> Tensor:
    """``x`` so that only the channels that the scheme names set its scales, where its format has it so.

    The other channels, which are not rounded, are copies of the first of these.
    """
    if scheme.channels is None or not get_format(scheme.format).own_channels:
        return x
    chosen = _chosen(x, scheme.channels)
    head, channel = divmod(scheme.channels[0], x.shape[3])
    return torch.where(chosen, x, x[:, head : head + 1, :, channel : channel + 1])


def _chosen(x: Tensor, channels: Sequence[int]) -> Tensor:
    """Which channels of ``x`` are among some, ``[kv_heads, 1, head_dim]``."""
    heads, head_dim = x.shape[1], x.shape[3]
    if channels[-1] >= heads * head_dim:
        raise InputError(f"channels must be 0 to {heads * head_dim - 1}, got {channels[-1]}")
    chosen = torch.zeros(heads * head_dim, dtype=torch.bool, device=x.device)
    chosen[list(channels)] = True
    return rearrange(chosen, "(h d) -> h 1 d", h=heads)


def in_random_directions(error: Tensor, seed: int, layer: int, site: str) -> Tensor:
    """The same error with its channels in a random order and with random signs.

    It tells what such an error would do if its direction did not matter. Order and signs are one draw for each layer and
    site and the same for all tokens, so that a later token is perturbed alike whether it comes alone or in a pass with
    others.

    Parameters
    ----------
    error : Tensor [batch, kv_heads, tokens, head_dim]
    seed : int
    layer, site
        Each has a draw of its own.

    Returns
    -------
    Tensor [batch, kv_heads, tokens, head_dim]
        Of the same norm at every token.
    """
    heads = error.shape[1]
    order, signs = remembered(_DRAWN, (seed, layer, site, heads * error.shape[3]), _draw)
    flat = rearrange(error, "b h t d -> b t (h d)")[..., order.to(error.device)] * signs.to(error)
    return rearrange(flat, "b t (h d) -> b h t d", h=heads)


def _draw(key: tuple[int, int, str, int]) -> tuple[Tensor, Tensor]:
    seed, layer, site, channels = key
    rng = np.random.default_rng((seed, layer, "kv".index(site)))
    return torch.from_numpy(rng.permutation(channels)), torch.from_numpy(rng.choice([-1.0, 1.0], channels))


def working(x: Tensor) -> Tensor:
    """``x`` in the precision in which it is rounded: float64 as it is, all else in float32."""
    return x if x.dtype == torch.float64 else x.float()


def _blocks(x: Tensor, scheme: Scheme) -> tuple[Tensor, Axes]:
    """Blocks, and their axes that share a scale; a short last group is filled with copies of its last entry, or zeros."""
    size, form = scheme.group_size, get_format(scheme.format)
    if size is None:
        return x, _SHARED_AXES[scheme.granularity]
    _, heads, tokens, head_dim = x.shape
    if scheme.granularity == "channel-group":
        size = min(size, tokens)
        return rearrange(_filled(x, size, 2), "b h (g s) d -> b h g s d", s=size), (3,)
    if head_dim % size and not form.groups_cross_heads:
        raise InputError(
            f"{scheme} needs heads that divide into blocks of {size}, got head_dim={head_dim}; choose another format"
        )
    size = min(size, heads * head_dim)
    if head_dim % size == 0:  # groups lie within heads: a view will do
        return rearrange(x, "b h t (g s) -> b h t g s", s=size), (4,)
    flat = _filled(rearrange(x, "b h t d -> b t (h d)"), size, 2, zeros=form.fills_with_zeros)
    return rearrange(flat, "b t (g s) -> b t g s", s=size), (3,)


def _unblocked(blocks: Tensor, scheme: Scheme, like: Tensor) -> Tensor:
    _, heads, tokens, head_dim = like.shape
    if scheme.granularity == "channel-group":
        return blocks if blocks.ndim == 4 else rearrange(blocks, "b h g s d -> b h (g s) d")[:, :, :tokens]
    if scheme.group_size is None or blocks.ndim == 5:
        return blocks.reshape(like.shape)
    flat = rearrange(blocks, "b t g s -> b t (g s)")[..., : heads * head_dim]
    return rearrange(flat, "b t (h d) -> b h t d", h=heads)


def _filled(x: Tensor, size: int, dim: int, *, zeros: bool = False) -> Tensor:
    missing = -x.shape[dim] % size
    if not missing:
        return x
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape) if zeros else last.expand(shape)], dim=dim)
