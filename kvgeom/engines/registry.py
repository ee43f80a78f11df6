"""Engines by name: what each holds in its cache, as a recipe and a placement.

A preset is a recipe factory. Those in :mod:`kvgeom.engines.builtin` name engine, version and source; the page of each in the
documentation says what it does and how that was checked. Add your own with :func:`register`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from kvgeom.engines.builtin import BUILT_IN
from kvgeom.engines.engine import CacheConfig, Preset
from kvgeom.errors import InputError
from kvgeom.quant.memory import bits_per_element
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import BITS, BLOCK_FORMATS, ENGINE_FORMATS, FLOAT_FORMATS, Scheme

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


def resolve(
    spec: CacheConfig | Recipe | Scheme | str, *, bits: int | None = None, placement: Placement | str | None = None
) -> CacheConfig:
    """What a user means by a scheme, a preset or a recipe.

    Parameters
    ----------
    spec : CacheConfig, Recipe, Scheme or str
        A string is the name of a preset (``"kivi"``), a scheme (``"q4_0+hadamard"``, ``"int4-asym-group64"``) or, with
        ``bits``, a scheme without its width (``"asym-group64"``).
    bits : int, optional
        Width. A preset has a default; what has a width of its own must agree.
    placement : Placement or {"cache", "paper"}, optional
        Instead of the preset's, or of the decode-faithful default.

    Raises
    ------
    InputError
        If it is none of these, or not available at that width.

    Examples
    --------
    >>> str(resolve("asym-group64", bits=4).k)
    'int4-asym-group64'
    >>> resolve("kivi", bits=2).placement.residual
    128
    >>> resolve("int3-sym-tensor", placement="paper").placement.where
    'projection'
    """
    where = _placement(placement)
    if isinstance(spec, str) and spec in _PRESETS:
        found = _PRESETS[spec].at(bits)
    elif isinstance(spec, CacheConfig):
        found = spec
    elif isinstance(spec, Recipe):
        found = CacheConfig(str(spec), "", None, None, Placement(), spec)
    else:
        scheme = spec if isinstance(spec, Scheme) else _parse(spec, bits)
        found = CacheConfig(str(scheme), "", scheme, scheme, Placement())
    if bits not in (None, found.bits):
        raise InputError(f"{found.name!r} has {found.bits} bits, got bits={bits}; leave one of them out")
    return found if where is None else replace(found, placement=where)


def needs_bits(spec: object) -> bool:
    """Whether a spec is a scheme without its width, as ``"asym-group64"`` is."""
    return isinstance(spec, str) and spec not in _PRESETS and spec.startswith(("sym-", "asym-"))


def widths(spec: CacheConfig | Recipe | Scheme | str) -> tuple[int, ...]:
    """The widths, narrowest first, at which :func:`resolve` takes a spec: for a curve over bits.

    Raises
    ------
    InputError
        If :func:`resolve` does not know it.
    """
    if isinstance(spec, str) and spec in _PRESETS:
        return tuple(sorted(_PRESETS[spec].widths))
    if needs_bits(spec):
        resolve(spec, bits=BITS[0])
        return BITS
    return (resolve(spec).bits,)


#: How a scheme begins, as against a preset that is misspelt.
_SCHEME = re.compile(
    "|".join(["a?sym-", r"int\d", *(rf"{name}\d" for name in ENGINE_FORMATS), *FLOAT_FORMATS, *BLOCK_FORMATS])
)


def _parse(spec: str, bits: int | None) -> Scheme:
    if not isinstance(spec, str):
        raise InputError(
            f"a cache is given as a scheme, the name of a preset, a Recipe or a CacheConfig; got {type(spec).__name__}"
        )
    if needs_bits(spec):
        if bits is None:
            raise InputError(f"scheme {spec!r} has no width; give bits, or write it as int4-{spec}")
        return Scheme.parse(f"int{bits}-{spec}")
    if _SCHEME.match(spec):
        return Scheme.parse(spec)
    close = get_close_matches(spec.lower(), _PRESETS, 1)
    choose = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(_PRESETS)};"
    raise InputError(f"unknown preset {spec!r}; {choose} `kvgeom schemes` lists presets and formats")


def _placement(given: Placement | str | None) -> Placement | None:
    if not isinstance(given, str):
        return given
    if given not in ("cache", "paper"):
        raise InputError(f"unknown placement {given!r}; choose from cache, paper, or give a Placement")
    return Placement.paper() if given == "paper" else Placement()


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
        config = resolve(text)
        rows.append(_row("format", text, config.bits, config, shape, note))
    for known in presets():
        rows += [_row("preset", known.name, width, known.at(width), shape, known.engine) for width in known.widths]
    return rows


def _row(
    kind: str, name: str, bits: int, config: CacheConfig, shape: tuple[int, int, int], note: str
) -> dict[str, Any]:
    size = bits_per_element(config.recipe(1), config.placement, *shape)
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
