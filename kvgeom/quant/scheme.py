"""How one tensor of keys or values is quantized."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from kvgeom.checks import flag, one_of, suggests, whole, whole_numbers
from kvgeom.errors import InputError, brief
from kvgeom.quant.formats.base import DEFAULT, formats, get_format
from kvgeom.quant.placement import MOST_TOKENS
from kvgeom.quant.transforms import get_transform

Granularity = Literal["tensor", "token", "channel", "group", "head", "token-head", "channel-group", "none"]
Precision = Literal["f32", "f16", "bf16"]
BITS = (2, 3, 4, 5, 6, 7, 8)

#: No layer has more channels: the largest published ones have some ten thousand.
MOST_CHANNELS = 1_000_000
#: Granularities with a size, each with the largest.
_SIZED = {"group": MOST_CHANNELS, "channel-group": MOST_TOKENS}
_LAST_CHANNEL = MOST_CHANNELS - 1
#: Neighbouring channels, or one.
_RUN = r"(?:0|[1-9][0-9]{0,5})(?:-(?:0|[1-9][0-9]{0,5}))?"
#: What follows the part that the format itself reads.
_SUFFIXES = re.compile(r"(?P<format>[^/+@]+)(?:/(?P<scales>\w+))?(?:\+(?P<transform>\w+))?(?:@(?P<channels>[0-9,-]+))?")


def check_bits(bits: int) -> int:
    """Return ``bits`` if a cache can be rounded to it: 2 to 8, or 16 for no rounding."""
    bits = whole("bits", bits)
    if bits not in (*BITS, 16):
        raise InputError(f"bits must be 2 to 8, or 16 for full precision, got {brief(bits)}")
    return bits


@suggests()
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
        Only for the two groups: 1 to :data:`MOST_CHANNELS` channels, or 1 to
        :data:`~kvgeom.quant.placement.MOST_TOKENS` tokens. The last group is smaller where the size does not divide, and a
        group that is larger than all there is, is one group of that. Engines are stricter: MLX, Quanto and KIVI's code refuse
        a size that does not divide, and so do formats here that follow an engine.
    channels : tuple of int or None
        Ablation: only these channels of ``kv_heads * head_dim`` (heads laid end to end) lose precision. Scales are
        those of the whole tensor, so the noise that they get is the noise they would get if all were rounded; in the format
        ``released`` they are of these channels alone.
    format : str
        Name of a registered format: ``int``; ``fp8_e4m3`` and ``fp8_e5m2`` (saturating); the blocks of GGML ``q8_0``,
        ``q6_0``, ``q5_0``, ``q5_1``, ``q4_0``, ``q4_1``, ``iq4_nl``; the block floats ``mxfp4``, ``nvfp4``, ``nvfp4_4over6`` and
        ``fp4_e2m1``; codebooks for rotated heads ``turboquant``, ``turboquant_prod`` and what engines make of them; the integer
        grids of engines ``mlx``, ``hqq``, ``vllm`` and ``exllama``, and that of the paper's code ``released``, which differ from
        ``int`` in how they choose and apply a scale; or your own
        (:func:`kvgeom.quant.formats.base.register_format`).
    transform : str
        What is done to the values before rounding, and undone after: ``none``, ``center``, ``equalize``, ``hadamard``,
        ``hadamard64``, ``hadamard32``, ``rotation``, ``rht``, or your own (:func:`kvgeom.quant.transforms.register_transform`).
    scales : {"f32", "f16", "bf16"}
        Precision in which the scales (and offsets) of an integer grid are stored.

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
    transform: str = "none"
    scales: Precision = "f32"

    def __post_init__(self) -> None:
        form = get_format(self.format)
        object.__setattr__(self, "bits", whole("bits of a scheme", self.bits, None))
        if self.bits not in BITS:
            raise InputError(
                f"bits of a scheme must be 2 to 8, got {brief(self.bits)}; full precision is no scheme (None)"
            )
        object.__setattr__(self, "symmetric", flag("symmetric", self.symmetric))
        for name, value, known in (
            ("granularity", self.granularity, get_args(Granularity)),
            ("precision of scales", self.scales, get_args(Precision)),
        ):
            one_of(name, value, known)
        if (self.granularity in _SIZED) != (self.group_size is not None):
            raise InputError(
                f"granularity {self.granularity!r} does not go with group_size={brief(self.group_size)}; "
                f"{' and '.join(_SIZED)} need a size, the others have none"
            )
        if self.group_size is not None:
            size = whole("group_size", self.group_size, 1, _SIZED[self.granularity])
            object.__setattr__(self, "group_size", size)
        if self.channels is not None:
            channels = tuple(whole_numbers("channels", self.channels, 0, _LAST_CHANNEL))
            if not channels or list(channels) != sorted({*channels}):
                raise InputError(
                    f"channels must be in ascending order, each once, and at least one, got {brief(self.channels)}; use only()"
                )
            object.__setattr__(self, "channels", channels)
        form.check(self)
        get_transform(self.transform)

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a spelling such as ``int4-asym-token``, ``q4_0+hadamard`` or ``int3-sym-group64@0-7``, the inverse of ``str``.

        Raises
        ------
        InputError
            If no registered format reads it, or it names something that cannot be used.
        """
        if not isinstance(text, str):
            raise InputError(f"a scheme is written as text, such as int4-asym-token, got {brief(text)}")
        match = _SUFFIXES.fullmatch(text)
        if match is not None:
            for form in formats():
                parsed = form.read(match["format"])
                if parsed is not None:
                    granularity: Any = parsed.granularity  # checked on construction, as the precision of scales is
                    scales: Any = match["scales"] or "f32"
                    channels = _channels(match["channels"]) if match["channels"] else None
                    bits, symmetric, _, size = parsed
                    return cls(
                        bits, symmetric, granularity, size, channels, form.name, match["transform"] or "none", scales
                    )
        usage = next((form.usage for form in formats() if form.begins(text)), get_format(DEFAULT).usage)
        raise InputError(
            f"cannot read scheme {brief(text)}; write it as {usage}, or as `kvgeom schemes` lists it (int4-asym-group64)"
        )

    def only(self, channels: Iterable[int] | int) -> Scheme:
        """The same scheme, rounding nothing but some channels."""
        return replace(self, channels=tuple(sorted({*whole_numbers("channels", channels, 0, _LAST_CHANNEL)})))

    @property
    def plain(self) -> Scheme:
        """The grid alone: no transform, all channels."""
        bare = self.channels is None and self.transform == "none"
        return self if bare else replace(self, channels=None, transform="none")

    @property
    def constants(self) -> Literal["offsets", "factors"] | None:
        """Which constants of the model the transform needs, if any."""
        found = get_transform(self.transform)
        return None if found is None else found.constants

    @property
    def spans_tokens(self) -> bool:
        """Whether tokens share a scale, so that the scale must be known before a token is stored."""
        return self.granularity in ("tensor", "channel", "head", "channel-group")

    @property
    def levels(self) -> int:
        """Number of steps between the smallest and the largest code of an integer grid."""
        return (1 << self.bits) - 2 if self.symmetric else (1 << self.bits) - 1

    def __str__(self) -> str:
        scales = "" if self.scales == "f32" else f"/{self.scales}"
        transform = "" if self.transform == "none" else f"+{self.transform}"
        where = "" if self.channels is None else f"@{','.join(runs(self.channels))}"
        return f"{get_format(self.format).spell(self)}{scales}{transform}{where}"


def runs(numbers: Sequence[int]) -> list[str]:
    """Ascending ``(0, 1, 2, 4)`` as ``["0-2", "4"]``."""
    known = {*numbers}
    starts = [n for n in numbers if n - 1 not in known]
    ends = [n for n in numbers if n + 1 not in known]
    return [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]


def _channels(runs: str) -> tuple[int, ...]:
    found: list[int] = []
    for run in runs.split(","):
        first, _, last = run.partition("-")
        # In order, so that they cannot be more than a layer has.
        if not re.fullmatch(_RUN, run) or int(first) <= (found[-1] if found else -1):
            raise InputError(f"cannot read channels {brief(runs)}; write them in ascending order, as 0-7,12")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)
