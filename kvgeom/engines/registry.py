"""Engines by name: what each holds in its cache, as a recipe and a placement.

A preset is a recipe factory. Those in :mod:`kvgeom.engines.builtin` name engine, version and source; the page of each in the
documentation says what it does and how that was checked. Add your own with :func:`register`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvgeom.engines.builtin import BUILT_IN
from kvgeom.engines.engine import Engine, Preset
from kvgeom.errors import InputError
from kvgeom.quant.memory import bits_per_element
from kvgeom.quant.placement import Placement
from kvgeom.quant.scheme import BITS, BLOCK_FORMATS, FLOAT_FORMATS, Scheme

__all__ = ["Engine", "Preset", "engine_of", "offers", "preset", "presets", "register", "resolve", "scheme_rows"]

_PRESETS: dict[str, Preset] = {known.name: known for known in BUILT_IN}


def register(preset: Preset) -> Preset:
    """Make a preset known by its name.

    Raises
    ------
    InputError
        If the name is taken, or would be read as a scheme.
    """
    if preset.name in _PRESETS:
        raise InputError(f"preset {preset.name!r} was registered, but there is one of that name; choose another")
    if not preset.widths or any(width not in BITS for width in preset.widths):
        raise InputError(f"preset {preset.name!r} was registered with widths {preset.widths}; give some of {BITS}")
    for width in preset.widths:
        preset.at(width)
    _PRESETS[preset.name] = preset
    return preset


def presets() -> tuple[Preset, ...]:
    """All presets that are registered."""
    return tuple(_PRESETS.values())


def preset(name: str, bits: int | None = None) -> Engine:
    """An engine by the name of its preset, for instance ``preset("kivi", bits=2)``.

    Raises
    ------
    InputError
        If there is none of that name, or the engine does not offer that width.
    """
    if name not in _PRESETS:
        raise InputError(f"preset {name!r} was asked, but there are only {', '.join(_PRESETS)}")
    return _PRESETS[name].at(bits)


def engine_of(text: str) -> str:
    """Which engine, of which version, a preset's name stands for; empty if the text is a scheme of no engine."""
    return _PRESETS[text].engine if text in _PRESETS else ""


def resolve(text: str, bits: int | None = None, placement: Placement | None = None) -> Engine:
    """What a user means by a scheme: a preset, a scheme, or a scheme without its width.

    Parameters
    ----------
    text : str
        ``"kivi"``, ``"q4_0+hadamard"``, ``"int4-asym-group64"`` or, with ``bits``, ``"asym-group64"``.
    bits : int, optional
        Width. A preset has a default; a scheme that spells its own must agree with it.
    placement : Placement, optional
        Instead of the preset's, or of the decode-faithful default.

    Raises
    ------
    InputError
        If it is none of these.

    Examples
    --------
    >>> str(resolve("asym-group64", 4).k)
    'int4-asym-group64'
    >>> resolve("kivi", 2).placement.residual
    128
    """
    if text in _PRESETS:
        found = preset(text, bits)
        return found if placement is None else replace(found, placement=placement)
    if leaves_width_open(text):
        if bits is None:
            raise InputError(f"scheme {text!r} was asked without a width; give one, for instance int4-{text}")
        text = f"int{bits}-{text}"
    try:
        scheme = Scheme.parse(text)
    except InputError as error:
        raise InputError(f"{error}; or give one of the presets {', '.join(_PRESETS)}") from error
    if bits not in (None, scheme.bits):
        raise InputError(f"scheme {text!r} was asked with {bits} bits, but it has {scheme.bits}; give one of the two")
    return Engine(text, scheme, scheme, placement or Placement())


def leaves_width_open(text: str) -> bool:
    """Whether a scheme is spelled without its width, as ``"asym-group64"`` is."""
    return text.startswith(("sym-", "asym-"))


def offers(text: str) -> tuple[int, ...]:
    """The widths in which :func:`resolve` can give a scheme: for a curve over bits."""
    if text in _PRESETS:
        return tuple(sorted(_PRESETS[text].widths))
    return BITS if leaves_width_open(text) else (Scheme.parse(text).bits,)


def scheme_rows(kv_heads: int = 8, head_dim: int = 128, tokens: int = 4096) -> list[dict[str, Any]]:
    """What ``kvgeom schemes`` lists: formats and presets, with bits per element for a cache of that shape.

    Returns
    -------
    list of dict
        ``kind`` (``"format"`` or ``"preset"``), ``name``, ``bits``, ``bits_per_element`` (mean of k and v; scales and offsets
        included as the format holds them, waiting tokens at 16 bits), ``note``.
    """
    rows: list[dict[str, Any]] = []
    shape = (kv_heads, head_dim, tokens)
    for text, note in _FORMATS.items():
        scheme = Scheme.parse(text)
        rows.append(_row("format", text, scheme.bits, Engine(text, scheme, scheme, Placement()), shape, note))
    for known in presets():
        rows += [_row("preset", known.name, width, known.at(width), shape, known.engine) for width in known.widths]
    return rows


def _row(kind: str, name: str, bits: int, engine: Engine, shape: tuple[int, int, int], note: str) -> dict[str, Any]:
    size = bits_per_element(engine.recipe(1), engine.placement, *shape)
    return {"kind": kind, "name": name, "bits": bits, "bits_per_element": size, "note": note}


_INTEGER = {
    "tensor": "one scale for a sequence",
    "head": "one scale for a head",
    "channel": "one scale for a channel",
    "token": "one scale for a token",
    "token-head": "one scale for a head of a token",
    "group64": "one scale for 64 channels of a token; any size",
    "channel-group32": "one scale for 32 tokens of a channel; any size",
}
_FORMATS = {
    **{f"int4-asym-{granularity}": f"2-8 bits, sym or asym; {note}" for granularity, note in _INTEGER.items()},
    **dict.fromkeys(FLOAT_FORMATS, "cast, saturating; with -tensor, -token, -head, ...: scaled first"),
    **{name: f"blocks of {size} channels" for name, (_, size) in BLOCK_FORMATS.items()},
    "mlx4-group64": "MLX's own grid; 2, 3, 4, 5, 6 or 8 bits",
    "hqq4-group64": "HQQ's solver; 2, 3, 4 or 8 bits",
    "vllm4-token-head+rht": "vLLM's own grids: vllm4 and vllm8",
}
