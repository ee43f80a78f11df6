"""Codes as bits: what a cache under a scheme takes in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from kvgeom.quant.fake_quantize import Encoded, decode
from kvgeom.quant.formats.base import Scales, get_format
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.transforms import Frame


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes ``0 .. 2**bits - 1`` along the last axis, eight of them in ``bits`` bytes.

    Parameters
    ----------
    codes : Tensor [..., n], uint8
    bits : int
        1 to 8.

    Returns
    -------
    Tensor [..., ceil(n / 8) * bits], uint8
    """
    if bits == 8:
        return codes
    rows = rearrange(torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8)), "... (n c) -> ... n c", c=8).long()
    places = torch.arange(8, device=codes.device)
    words = (rows << (bits * places)).sum(-1, keepdim=True)
    return rearrange(((words >> (8 * places[:bits])) & 255).to(torch.uint8), "... n c -> ... (n c)")


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack_bits`: the first ``count`` codes of every row."""
    if bits == 8:
        return packed
    rows = rearrange(packed, "... (n c) -> ... n c", c=bits).long()
    places = torch.arange(8, device=packed.device)
    words = (rows << (8 * places[:bits])).sum(-1, keepdim=True)
    codes = ((words >> (bits * places)) & ((1 << bits) - 1)).to(torch.uint8)
    return rearrange(codes, "... n c -> ... (n c)")[..., :count]


@dataclass(frozen=True)
class Packed:
    """Some tokens of one site as bytes of codes and scales.

    Attributes
    ----------
    codes : Tensor, uint8
        Rows of packed codes.
    step, offset : Tensor or None
        In the precision in which the format stores them; None where it has none.
    scheme : Scheme
    frame : Frame
        The way back from the coordinates in which they were rounded.
    row : int
        Codes in a row.
    like : Tensor
        Shape and dtype of the values before the way back, on the "meta" device, where it takes no memory.
    dtype : torch.dtype
        Of the cache.
    borrowed : bool
        Whether the scales are stored with earlier tokens.
    """

    codes: Tensor
    step: Tensor | None
    offset: Tensor | None
    scheme: Scheme
    frame: Frame
    row: int
    like: Tensor
    dtype: torch.dtype
    borrowed: bool

    @classmethod
    def of(cls, encoded: Encoded, scheme: Scheme, frame: Frame, y: Tensor, dtype: torch.dtype) -> Packed:
        """Make bytes of the codes of ``y``, which are values in the coordinates of ``frame``."""
        form, scales = get_format(scheme.format), encoded.scales
        step_dtype, offset_dtype = form.scale_dtypes(scheme)
        return cls(
            codes=pack_bits(form.to_bytes(scheme, encoded.codes), scheme.bits),
            step=None if step_dtype is None else scales.step.to(step_dtype),
            offset=None if offset_dtype is None else scales.offset.to(offset_dtype),
            scheme=scheme,
            frame=frame,
            row=encoded.codes.shape[-1],
            like=torch.empty_like(y, device="meta"),
            dtype=dtype,
            borrowed=encoded.borrowed,
        )

    def unpack(self) -> Tensor:
        """The values, ``[batch, kv_heads, tokens, head_dim]``."""
        form, working = get_format(self.scheme.format), self.like.dtype
        codes = form.from_bytes(self.scheme, unpack_bits(self.codes, self.scheme.bits, self.row), working)
        one = torch.ones(1, dtype=working, device=self.codes.device)
        step = one if self.step is None else self.step.to(working)
        offset = torch.zeros_like(step) if self.offset is None else self.offset.to(working)
        return self.frame.leave(decode(Encoded(codes, Scales(step, offset)), self.scheme, self.like)).to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets; borrowed scales are not counted again."""
        parts = (self.codes,) if self.borrowed else (self.codes, self.step, self.offset)
        return sum(x.nbytes for x in parts if x is not None)
