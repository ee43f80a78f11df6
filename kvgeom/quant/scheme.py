"""How one tensor of keys or values is rounded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from kvgeom.errors import InputError

Granularity = Literal["tensor", "token", "channel", "group", "head"]
BITS = (2, 3, 4, 5, 6, 7, 8)

_SPELLING = re.compile(r"int(?P<bits>\d+)-(?P<sign>sym|asym)-(?P<granularity>[a-z]+)(?P<size>\d*)")


def check_bits(bits: int) -> int:
    """Return ``bits`` if a cache can be rounded to it: 2 to 8, or 16 for no rounding."""
    if bits not in (*BITS, 16):
        raise InputError(
            f"bits={bits} was asked, but a cache is rounded to 2-8 bits; give one of these, or 16 for none"
        )
    return bits


@dataclass(frozen=True)
class Scheme:
    """Uniform integer rounding of one tensor ``[batch, kv_heads, tokens, head_dim]``.

    Attributes
    ----------
    bits : int
        2 to 8.
    symmetric : bool
        Levels ``-qmax..qmax`` around zero, ``qmax = 2**(bits-1) - 1``; otherwise ``2**bits`` levels
        from the smallest to the largest value.
    granularity : {"tensor", "token", "channel", "group", "head"}
        Which entries of a sequence share one scale. ``tensor``: all. ``token``: all channels of a
        token. ``channel``: one channel over the tokens. ``group``: ``group_size`` neighbouring
        channels of a token. ``head``: one head over the tokens. Sequences never share a scale.
    group_size : int or None
        Only for ``group``; the last group is smaller where it does not divide the channels.

    Raises
    ------
    InputError
        For bits, granularity or group size that cannot be used.

    Examples
    --------
    >>> str(Scheme(4, symmetric=True, granularity="tensor"))
    'int4-sym-tensor'
    >>> Scheme.parse("int3-asym-group64").group_size
    64
    """

    bits: int
    symmetric: bool = False
    granularity: Granularity = "token"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"bits={self.bits} was asked, but a scheme rounds to 2-8 bits; for 16 bits use no scheme")
        if self.granularity not in get_args(Granularity):
            choices = ", ".join(get_args(Granularity))
            raise InputError(f"granularity {self.granularity!r} was asked, but there are only {choices}")
        if (self.granularity == "group") != (self.group_size is not None):
            raise InputError(
                f"granularity {self.granularity!r} with group_size={self.group_size}: group_size belongs to 'group' alone"
            )
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"group_size={self.group_size} was asked; give a positive number of channels")

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a spelling such as ``int4-asym-token`` or ``int3-sym-group64``, the inverse of ``str``."""
        match = _SPELLING.fullmatch(text)
        if match is None:
            raise InputError(
                f"scheme {text!r} was asked; spell it int<bits>-<sym|asym>-<granularity>, for instance int4-asym-group64"
            )
        size = match["size"]
        return cls(
            bits=int(match["bits"]),
            symmetric=match["sign"] == "sym",
            granularity=match["granularity"],  # type: ignore[arg-type]  # checked on construction
            group_size=int(size) if size else None,
        )

    @property
    def spans_tokens(self) -> bool:
        """Whether tokens share a scale, so that the scale must be known before a token is stored."""
        return self.granularity in ("tensor", "channel", "head")

    @property
    def levels(self) -> int:
        """Number of steps between the smallest and the largest code."""
        return (1 << self.bits) - 2 if self.symmetric else (1 << self.bits) - 1

    def __str__(self) -> str:
        sign = "sym" if self.symmetric else "asym"
        return f"int{self.bits}-{sign}-{self.granularity}{self.group_size or ''}"
