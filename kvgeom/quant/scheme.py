"""How one tensor of keys or values is rounded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from kvgeom.errors import InputError

Granularity = Literal["tensor", "token", "channel", "group", "head", "token-head", "channel-group", "none"]
Transform = Literal["none", "center", "equalize", "hadamard", "hadamard64", "rht"]
Precision = Literal["f32", "f16", "bf16"]
BITS = (2, 3, 4, 5, 6, 7, 8)

#: Formats that are one thing only, with bits of a code and entries of a block.
BLOCK_FORMATS = {
    "q8_0": (8, 32),
    "q5_0": (5, 32),
    "q5_1": (5, 32),
    "q4_0": (4, 32),
    "q4_1": (4, 32),
    "iq4_nl": (4, 32),
    "mxfp4": (4, 32),
    "nvfp4": (4, 16),
}
#: 8-bit floating point; with granularity "none" values are cast as they are, else scaled to its range first.
FLOAT_FORMATS = ("fp8_e4m3", "fp8_e5m2")
#: Integer grids whose arithmetic is an engine's own: where its scales may be shared, and its widths.
ENGINE_FORMATS: dict[str, tuple[Granularity, tuple[int, ...]]] = {
    "mlx": ("group", (2, 3, 4, 5, 6, 8)),
    "hqq": ("group", (2, 3, 4, 8)),
    "vllm": ("token-head", (4, 8)),
}

_SIZED = ("group", "channel-group")
_SPELLING = re.compile(
    r"(?P<format>fp8_e4m3|fp8_e5m2|i?q\d_\w+|mxfp4|nvfp4|[a-z]+)(?P<bits>\d*)(?:-(?P<sign>sym|asym))?"
    r"(?:-(?P<granularity>[a-z]+(?:-[a-z]+)?)(?P<size>\d*))?(?:/(?P<scales>f16|bf16))?"
    r"(?:\+(?P<transform>[a-z]+\d*))?(?:@(?P<channels>[\d,-]+))?"
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
    """Rounding of one tensor ``[batch, kv_heads, tokens, head_dim]``; an integer grid unless ``format`` says otherwise.

    Attributes
    ----------
    bits : int
        Of a code, 2 to 8.
    symmetric : bool
        Levels ``-qmax..qmax`` around zero, ``qmax = 2**(bits-1) - 1``; otherwise ``2**bits`` levels
        from the smallest to the largest value.
    granularity : str
        Which entries of a sequence share one scale. ``tensor``: all. ``token``: all channels of a
        token. ``channel``: one channel over the tokens. ``group``: ``group_size`` neighbouring
        channels of a token. ``head``: one head over the tokens. ``token-head``: one head of a token.
        ``channel-group``: ``group_size`` neighbouring tokens of one channel. ``none``: there is no scale (8-bit floats
        alone). Sequences never share a scale.
    group_size : int or None
        Only for the two groups; the last group is smaller where it does not divide.
    channels : tuple of int or None
        Ablation: only these channels of ``kv_heads * head_dim`` (heads laid end to end) lose precision. Scales are
        those of the whole tensor, so the noise that they get is the noise they would get if all were rounded.
    format : str
        ``int``; ``fp8_e4m3`` and ``fp8_e5m2`` (saturating); the blocks of GGML ``q8_0``, ``q5_0``, ``q5_1``, ``q4_0``,
        ``q4_1``, ``iq4_nl``; the block floats ``mxfp4`` and ``nvfp4``; the integer grids of engines ``mlx``, ``hqq`` and
        ``vllm``, which differ from ``int`` in how they choose and apply a scale.
    transform : {"none", "center", "equalize", "hadamard", "hadamard64", "rht"}
        What is done to the values before rounding, and undone after; see :mod:`kvgeom.quant.transforms`.
    scales : {"f32", "f16", "bf16"}
        Precision in which the scales (and offsets) of an integer grid are held.

    Raises
    ------
    InputError
        For bits, granularity, group size or combinations that cannot be used.

    Examples
    --------
    >>> str(Scheme(4, symmetric=True, granularity="tensor"))
    'int4-sym-tensor'
    >>> Scheme.parse("int3-asym-group64").group_size
    64
    >>> str(Scheme(3, True, "tensor").only([4, 0, 1, 2]))
    'int3-sym-tensor@0-2,4'
    >>> Scheme.parse("q4_0+hadamard").bits
    4
    >>> str(Scheme.parse("fp8_e4m3")), str(Scheme.parse("int8-asym-token-head/f16"))
    ('fp8_e4m3', 'int8-asym-token-head/f16')
    """

    bits: int
    symmetric: bool = False
    granularity: Granularity = "token"
    group_size: int | None = None
    channels: tuple[int, ...] | None = None
    format: str = "int"
    transform: Transform = "none"
    scales: Precision = "f32"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"bits={self.bits} was asked, but a scheme rounds to 2-8 bits; for 16 bits use no scheme")
        for name, value, known in (
            ("granularity", self.granularity, get_args(Granularity)),
            ("transform", self.transform, get_args(Transform)),
            ("scales", self.scales, get_args(Precision)),
            ("format", self.format, ("int", *FLOAT_FORMATS, *BLOCK_FORMATS, *ENGINE_FORMATS)),
        ):
            if value not in known:
                raise InputError(f"{name} {value!r} was asked, but there are only {', '.join(known)}")
        if (self.granularity in _SIZED) != (self.group_size is not None):
            raise InputError(
                f"granularity {self.granularity!r} with group_size={self.group_size}: group_size belongs to "
                f"{' and '.join(_SIZED)} alone"
            )
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"group_size={self.group_size} was asked; give a positive number of entries")
        if self.channels is not None and (not self.channels or list(self.channels) != sorted({*self.channels})):
            raise InputError(
                f"channels {self.channels} were asked; give them in ascending order, each once, at least one"
            )
        self._check_format()

    def _check_format(self) -> None:
        if self.format == "int":
            fits = self.granularity != "none"
        elif self.format in FLOAT_FORMATS:
            fits = self.bits == 8 and self.symmetric
        elif self.format in BLOCK_FORMATS:
            fits = (self.bits, self.group_size) == BLOCK_FORMATS[self.format] and self.granularity == "group"
        else:
            granularity, widths = ENGINE_FORMATS[self.format]
            fits = self.granularity == granularity and self.bits in widths
        if not fits or (self.format != "int" and self.scales != "f32"):
            raise InputError(
                f"format {self.format!r} was asked with {self.bits} bits, {self.granularity}{self.group_size or ''} and "
                f"{self.scales} scales, which do not go together; spell it as `kvgeom schemes` lists it"
            )

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a spelling such as ``int4-asym-token``, ``q4_0+hadamard`` or ``int3-sym-group64@0-7``, the inverse of ``str``."""
        match = _SPELLING.fullmatch(text)
        made = None if match is None else cls._parsed(match)
        if made is None:
            raise InputError(
                f"scheme {text!r} was asked; spell it int<bits>-<sym|asym>-<granularity>, for instance int4-asym-group64, "
                "or as `kvgeom schemes` lists it"
            )
        return made

    @classmethod
    def _parsed(cls, match: re.Match[str]) -> Scheme | None:
        kind, size = match["format"], match["size"]
        granularity: Any = match["granularity"]  # checked on construction
        sign = match["sign"]
        common: dict[str, Any] = {
            "channels": _channels(match["channels"]) if match["channels"] else None,
            "transform": match["transform"] or "none",
            "scales": match["scales"] or "f32",
            "format": kind,
        }
        if kind in BLOCK_FORMATS and not (match["bits"] or sign or granularity):
            bits, block = BLOCK_FORMATS[kind]
            return cls(bits, kind in SYMMETRIC_BLOCKS, "group", block, **common)
        if kind in FLOAT_FORMATS and not (match["bits"] or sign):
            return cls(8, True, granularity or "none", int(size) if size else None, **common)
        if kind in BLOCK_FORMATS or kind in FLOAT_FORMATS or not (match["bits"] and granularity):
            return None
        if (kind == "int") != (sign is not None) or kind not in ("int", *ENGINE_FORMATS):
            return None
        symmetric = sign == "sym" if kind == "int" else (kind, match["bits"]) == ("vllm", "8")
        return cls(int(match["bits"]), symmetric, granularity, int(size) if size else None, **common)

    def only(self, channels: Iterable[int]) -> Scheme:
        """The same scheme, rounding nothing but some channels."""
        return replace(self, channels=tuple(sorted({int(channel) for channel in channels})))

    @property
    def plain(self) -> Scheme:
        """The grid alone: no transform, all channels."""
        bare = self.channels is None and self.transform == "none"
        return self if bare else replace(self, channels=None, transform="none")

    @property
    def spans_tokens(self) -> bool:
        """Whether tokens share a scale, so that the scale must be known before a token is stored."""
        return self.granularity in ("tensor", "channel", "head", "channel-group")

    @property
    def levels(self) -> int:
        """Number of steps between the smallest and the largest code of an integer grid."""
        return (1 << self.bits) - 2 if self.symmetric else (1 << self.bits) - 1

    def __str__(self) -> str:
        shared = f"-{self.granularity}{self.group_size or ''}"
        if self.format in BLOCK_FORMATS:
            kind = self.format
        elif self.format in FLOAT_FORMATS:
            kind = self.format + ("" if self.granularity == "none" else shared)
        elif self.format == "int":
            kind = f"int{self.bits}-{'sym' if self.symmetric else 'asym'}{shared}"
        else:
            kind = f"{self.format}{self.bits}{shared}"
        held = "" if self.scales == "f32" else f"/{self.scales}"
        transform = "" if self.transform == "none" else f"+{self.transform}"
        where = "" if self.channels is None else f"@{','.join(runs(self.channels))}"
        return f"{kind}{held}{transform}{where}"


#: Blocks without an offset.
SYMMETRIC_BLOCKS = ("q8_0", "q5_0", "q4_0", "iq4_nl", "mxfp4", "nvfp4")


def runs(numbers: Sequence[int]) -> list[str]:
    """Ascending ``(0, 1, 2, 4)`` as ``["0-2", "4"]``."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]


def _channels(runs: str) -> tuple[int, ...]:
    found: list[int] = []
    for run in runs.split(","):
        first, _, last = run.partition("-")
        if not first or (not last and "-" in run):
            raise InputError(f"channels {runs!r} were asked; spell them as 0-7,12")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)
