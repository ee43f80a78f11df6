"""How one tensor of keys or values is rounded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from kvgeom.errors import InputError

Granularity = Literal["tensor", "token", "channel", "group", "head"]
BITS = (2, 3, 4, 5, 6, 7, 8)

_SPELLING = re.compile(
    r"int(?P<bits>\d+)-(?P<sign>sym|asym)-(?P<granularity>[a-z]+)(?P<size>\d*)(?:@(?P<channels>[\d,-]+))?"
)


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
    channels : tuple of int or None
        Ablation: only these channels of ``kv_heads * head_dim`` (heads laid end to end) lose precision. Scales are
        those of the whole tensor, so the noise that they get is the noise they would get if all were rounded.

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
    >>> str(Scheme(3, True, "tensor").only([4, 0, 1, 2]))
    'int3-sym-tensor@0-2,4'
    """

    bits: int
    symmetric: bool = False
    granularity: Granularity = "token"
    group_size: int | None = None
    channels: tuple[int, ...] | None = None

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
        if self.channels is not None and (not self.channels or list(self.channels) != sorted({*self.channels})):
            raise InputError(
                f"channels {self.channels} were asked; give them in ascending order, each once, at least one"
            )

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a spelling such as ``int4-asym-token`` or ``int3-sym-group64@0-7``, the inverse of ``str``."""
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
            channels=_channels(match["channels"]) if match["channels"] else None,
        )

    def only(self, channels: Iterable[int]) -> Scheme:
        """The same scheme, rounding nothing but some channels."""
        return replace(self, channels=tuple(sorted({int(channel) for channel in channels})))

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
        where = "" if self.channels is None else f"@{_runs(self.channels)}"
        return f"int{self.bits}-{sign}-{self.granularity}{self.group_size or ''}{where}"


def _runs(channels: tuple[int, ...]) -> str:
    """``(0, 1, 2, 4)`` as ``"0-2,4"``."""
    starts = [c for c in channels if c - 1 not in channels]
    ends = [c for c in channels if c + 1 not in channels]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _channels(runs: str) -> tuple[int, ...]:
    found: list[int] = []
    for run in runs.split(","):
        first, _, last = run.partition("-")
        if not first or (not last and "-" in run):
            raise InputError(f"channels {runs!r} were asked; spell them as 0-7,12")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)
