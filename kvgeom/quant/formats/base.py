"""What a number format is, and the registry of all formats.

A format module registers its formats where it defines them, as yours does with :func:`register_format`. Importing a
format must not import torch, which takes seconds: its methods import what they need.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvgeom.checks import one_of
from kvgeom.errors import InputError
from kvgeom.registry import check_free, import_modules

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Axes = tuple[int, ...]


@dataclass(frozen=True)
class Scales:
    """Step and offset of a quantization grid, broadcastable to the values: ``x ~ offset + step * code``."""

    step: Tensor
    offset: Tensor

    def rows(self, rows: Tensor) -> Scales:
        """The scales of some sequences of the batch."""
        return Scales(self.step[rows], self.offset[rows])

    @staticmethod
    def stack(parts: Sequence[Scales]) -> Scales:
        """The scales of several batches as one batch."""
        import torch

        return Scales(torch.cat([p.step for p in parts]), torch.cat([p.offset for p in parts]))


class Grid(Protocol):
    """What a format needs to know of a :class:`~kvgeom.quant.scheme.Scheme`."""

    @property
    def bits(self) -> int: ...

    @property
    def symmetric(self) -> bool: ...

    @property
    def granularity(self) -> str: ...

    @property
    def group_size(self) -> int | None: ...

    @property
    def channels(self) -> tuple[int, ...] | None: ...

    @property
    def scales(self) -> str: ...

    @property
    def levels(self) -> int: ...


class Parsed(NamedTuple):
    """The fields of a scheme that its format spells."""

    bits: int
    symmetric: bool
    granularity: str
    group_size: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Format:
    """A number format: how blocks of values become codes and scales, and back, operation by operation as in an engine.

    A block lies along the axes that share a scale. Codes are whole numbers stored as floats (or 8-bit floats), ready to
    be multiplied; :mod:`kvgeom.quant.packing` makes bits of them. A subclass defines ``quantize``, or ``fit`` and
    ``encode``; only with the latter can tokens use the scales of earlier tokens.

    Attributes
    ----------
    name : str
        How its schemes begin; lower-case letters, digits and underscores.
    widths : tuple of int
        Bits of a code. The strings of a format of one width leave it out.
    granularities : tuple of str
        Where its scales may be shared; see :class:`~kvgeom.quant.scheme.Scheme`.
    block_size : int or None
        The only group size that there is. The strings of such a format name neither granularity nor size.
    default_granularity : str or None
        The granularity that a string leaves out.
    symmetric_widths : tuple of int or None
        Widths at which levels lie symmetric around zero; None lets the scheme choose, and its string says ``sym`` or ``asym``.
    scale_precisions : tuple of str
        Precisions that the scheme may choose for its scales.
    groups_cross_heads : bool
        Whether a group of channels may reach into the next head, and the last may be short. Otherwise the size of a
        group must divide ``head_dim``.
    fills_with_zeros : bool
        Whether a short last group is filled with zeros, which take part in its scale, and not with copies of its last entry.
    own_channels : bool
        Whether a scheme that rounds some channels alone (:meth:`~kvgeom.quant.scheme.Scheme.only`) scales them by their own
        values, and not by those of the whole tensor. Not with groups, which channels that are left out would break up.
    couples_tokens : bool
        Whether tokens that are quantized in one call influence each other even where they share no scale.
    examples : mapping of str to str
        What ``kvgeom schemes`` lists: spellings, each with a note.
    """

    name: str
    widths: tuple[int, ...]
    granularities: tuple[str, ...]
    block_size: int | None = None
    default_granularity: str | None = None
    symmetric_widths: tuple[int, ...] | None = ()
    scale_precisions: tuple[str, ...] = ("f32",)
    groups_cross_heads: bool = False
    fills_with_zeros: bool = False
    own_channels: bool = False
    couples_tokens: bool = False
    examples: Mapping[str, str] = field(default_factory=dict)

    # --- spelling ---

    @property
    def usage(self) -> str:
        """How its schemes are written."""
        head = self.name + ("<bits>" if len(self.widths) > 1 else "")
        sign = "-<sym|asym>" if self.symmetric_widths is None else ""
        if self.block_size is not None:
            return head + sign
        return head + sign + ("-<granularity>" if self.default_granularity is None else "[-<granularity>]")

    def begins(self, text: str) -> bool:
        """Whether ``text`` begins as a scheme of this format does."""
        return re.match(re.escape(self.name) + (r"[0-9]" if len(self.widths) > 1 else r"(?!\w)"), text) is not None

    def read(self, text: str) -> Parsed | None:
        """The fields of a scheme without its suffixes, such as ``int4-asym-group64``; None if it is of another format."""
        bits = r"(?P<bits>0|[1-9][0-9]{0,98})" if len(self.widths) > 1 else ""
        sign = r"-(?P<sign>sym|asym)" if self.symmetric_widths is None else ""
        shared = (
            r"-(?P<granularity>(?!a?sym)[a-z]+(?:-[a-z]+)?)(?P<size>(?:0|[1-9][0-9]{0,98})?)"
            if self.block_size is None
            else ""
        )
        optional = "?" if self.default_granularity is not None else ""
        match = re.fullmatch(f"{re.escape(self.name)}{bits}{sign}(?:{shared}){optional}", text)
        if match is None:
            return None
        found = match.groupdict()
        width = int(found["bits"]) if bits else self.widths[0]
        symmetric = found["sign"] == "sym" if self.symmetric_widths is None else width in self.symmetric_widths
        if self.block_size is not None:
            return Parsed(width, symmetric, self.granularities[0], self.block_size)
        granularity = found["granularity"] or self.default_granularity or self.granularities[0]
        return Parsed(width, symmetric, granularity, int(found["size"]) if found["size"] else None)

    def spell(self, scheme: Grid) -> str:
        """The inverse of :meth:`read`."""
        parts = [self.name + (str(scheme.bits) if len(self.widths) > 1 else "")]
        if self.symmetric_widths is None:
            parts.append("sym" if scheme.symmetric else "asym")
        if self.block_size is None and scheme.granularity != self.default_granularity:
            parts.append(f"{scheme.granularity}{scheme.group_size or ''}")
        return "-".join(parts)

    def check(self, scheme: Grid) -> None:
        """Refuse a scheme that this format cannot be.

        Raises
        ------
        InputError
            If its bits, symmetry, granularity, group size or precision of scales is not one of this format.
        """
        if scheme.bits not in self.widths:
            raise InputError(f"format {self.name!r} has {_either(self.widths)} bits, got {scheme.bits}")
        if scheme.granularity not in self.granularities:
            raise InputError(
                f"format {self.name!r} has granularity {_either(self.granularities)}, got {scheme.granularity!r}"
            )
        if self.block_size not in (None, scheme.group_size):
            raise InputError(
                f"format {self.name!r} has blocks of {self.block_size}, got group_size={scheme.group_size}"
            )
        if self.symmetric_widths is not None and scheme.symmetric != (scheme.bits in self.symmetric_widths):
            raise InputError(
                f"format {self.name!r} with {scheme.bits} bits has symmetric={not scheme.symmetric}, got "
                f"{scheme.symmetric}; use Scheme.parse({self.usage!r})"
            )
        if self.own_channels and scheme.channels is not None and scheme.group_size is not None:
            raise InputError(
                f"format {self.name!r} rounds some channels alone with scales of their own, got groups of "
                f"{scheme.group_size}; use another granularity"
            )
        if scheme.scales not in self.scale_precisions:
            raise InputError(f"format {self.name!r} has scales {_either(self.scale_precisions)}, got {scheme.scales!r}")

    # --- arithmetic ---

    def quantize(self, scheme: Grid, blocks: Tensor, axes: Axes) -> tuple[Tensor, Scales]:
        """Codes and scales of some blocks."""
        scales = self.fit(scheme, blocks, axes)
        return self.encode(scheme, blocks, scales), scales

    def fit(self, scheme: Grid, blocks: Tensor, axes: Axes) -> Scales:
        """Scales alone."""
        return self.quantize(scheme, blocks, axes)[1]

    def encode(self, scheme: Grid, blocks: Tensor, scales: Scales) -> Tensor:
        """Codes under scales that other values have set; beyond their range values saturate."""
        raise NotImplementedError(f"format {self.name!r} cannot quantize values with the scales of others")

    def decode(self, scheme: Grid, codes: Tensor, scales: Scales) -> Tensor:
        """Values of codes."""
        return codes * scales.step + scales.offset

    # --- storage ---

    def scale_dtypes(self, scheme: Grid) -> tuple[torch.dtype | None, torch.dtype | None]:
        """How a scale and its offset are stored; None where there is none to store. float16 and none by default."""
        import torch

        return torch.float16, None

    def lowest(self, scheme: Grid) -> int:
        """The smallest code, from which stored codes are counted."""
        return 0

    def to_bytes(self, scheme: Grid, codes: Tensor) -> Tensor:
        """Codes as ``0 .. 2**bits - 1``, uint8."""
        import torch

        return (codes - self.lowest(scheme)).to(torch.uint8)

    def from_bytes(self, scheme: Grid, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """Inverse of :meth:`to_bytes`."""
        return numbers.to(dtype) + self.lowest(scheme)


#: The format of a scheme that names none.
DEFAULT = "int"
_FORMATS: dict[str, Format] = {}
_PACKAGE = __name__.rpartition(".")[0]


def register_format(new: Format) -> Format:
    """Make a format known to :meth:`Scheme.parse`, the quantizer, packed caches and ``kvgeom schemes``; returns it.

    Raises
    ------
    InputError
        If its name is taken or cannot be part of a scheme's string, or one of its examples is not read by this format alone.
    """
    import_modules(_PACKAGE)
    check_free("a format named", new.name, _FORMATS)
    if not re.fullmatch(r"[a-z]\w*", new.name) or new.name in ("sym", "asym"):
        raise InputError(f"invalid format name {new.name!r}; use lower-case letters, digits and underscores")
    if not new.widths or not new.granularities or not new.examples:
        raise InputError(f"format {new.name!r} needs at least one width, one granularity and one example")
    for text in new.examples:
        readers = [known.name for known in (*_FORMATS.values(), new) if known.read(re.split("[/+@]", text)[0])]
        if readers != [new.name]:
            raise InputError(
                f"example {text!r} of format {new.name!r} is read by {', '.join(readers) or 'no format'}; "
                f"write it as {new.usage}, or choose another name"
            )
    _FORMATS[new.name] = new
    return new


def formats() -> tuple[Format, ...]:
    """All registered formats: the default one first, the others by name."""
    import_modules(_PACKAGE)
    return tuple(_FORMATS[name] for name in sorted(_FORMATS, key=lambda name: (name != DEFAULT, name)))


def get_format(name: str) -> Format:
    """The format of that name.

    Raises
    ------
    InputError
        If there is none.
    """
    import_modules(_PACKAGE)
    one_of("format", name, _FORMATS)
    return _FORMATS[name]


def is_scheme(text: str) -> bool:
    """Whether ``text`` begins as a scheme does, as against the name of a preset."""
    return any(known.begins(text) for known in formats())


def _either(values: Sequence[object]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, values[:-1])), str(values[-1])]))
