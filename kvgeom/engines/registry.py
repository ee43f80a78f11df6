"""Engines and their presets by name, and what a user means by one.

Built-in engines are the modules of this package; each registers its own :class:`~kvgeom.engines.engine.Engine`, as yours does
with :func:`register_engine`. The page of each in the documentation says what it does and how that was checked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvgeom.checks import suggests, whole
from kvgeom.engines.engine import CacheConfig, Engine, Preset
from kvgeom.errors import InputError, unknown
from kvgeom.quant.formats.base import formats, is_scheme
from kvgeom.quant.memory import bits_per_element
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import BITS, Scheme
from kvgeom.registry import check_free, import_modules

_ENGINES: dict[str, Engine] = {}
_PACKAGE = __name__.rpartition(".")[0]


def register_engine(engine: Engine) -> Engine:
    """Make an engine and its presets known; returns the engine.

    Raises
    ------
    InputError
        If a name is taken or reads as a scheme, or a preset has no width or one that cannot be made.
    """
    import_modules(_PACKAGE)
    check_free("an engine named", engine.name, _ENGINES)
    taken = _presets()
    for preset in engine.presets:
        if preset.name in taken:
            raise InputError(f"engine {taken[preset.name][0].name!r} has a preset {preset.name!r}; choose another name")
        if needs_bits(preset.name) or is_scheme(preset.name):
            raise InputError(f"preset name {preset.name!r} reads as a scheme; choose another name")
        if not preset.widths or not {*preset.widths} <= {*BITS}:
            raise InputError(f"widths of preset {preset.name!r} must be some of {BITS}, got {preset.widths}")
        for width in preset.widths:
            engine.config(preset, width)
        taken[preset.name] = engine, preset
    _ENGINES[engine.name] = engine
    return engine


def engines() -> tuple[Engine, ...]:
    """All registered engines, by name."""
    import_modules(_PACKAGE)
    return tuple(_ENGINES[name] for name in sorted(_ENGINES))


def presets() -> tuple[Preset, ...]:
    """The presets of all registered engines."""
    return tuple(preset for engine in engines() for preset in engine.presets)


def _presets() -> dict[str, tuple[Engine, Preset]]:
    return {preset.name: (engine, preset) for engine in engines() for preset in engine.presets}


@suggests()
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
        Instead of the preset's, or of the decode-faithful default. The version then says so.

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
    where = None if placement is None else Placement.parse(placement)
    bits = None if bits is None else whole("bits", bits, None)
    if isinstance(spec, str) and spec in (known := _presets()):
        engine, preset = known[spec]
        found = engine.config(preset, bits)
    elif isinstance(spec, CacheConfig):
        found = spec
    elif isinstance(spec, Recipe):
        found = CacheConfig(str(spec), "", None, None, Placement(), spec)
    else:
        scheme = spec if isinstance(spec, Scheme) else _parse(spec, bits)
        found = CacheConfig(str(scheme), "", scheme, scheme, Placement())
    if bits not in (None, found.bits):
        raise InputError(f"{found.name!r} has {found.bits} bits, got bits={bits}; leave one of them out")
    if where in (None, found.placement):
        return found
    version = f"{found.version}; with another placement: {where}" if found.version else ""
    return replace(found, placement=where, version=version)


def needs_bits(spec: object) -> bool:
    """Whether a spec is a scheme without its width, as ``"asym-group64"`` is."""
    return isinstance(spec, str) and spec.startswith(("sym-", "asym-"))


def widths(spec: CacheConfig | Recipe | Scheme | str) -> tuple[int, ...]:
    """The widths, narrowest first, at which :func:`resolve` takes a spec: for a curve over bits.

    Raises
    ------
    InputError
        If :func:`resolve` does not know it.
    """
    if isinstance(spec, str) and spec in (known := _presets()):
        return tuple(sorted(known[spec][1].widths))
    if needs_bits(spec):
        resolve(spec, bits=BITS[0])
        return BITS
    return (resolve(spec).bits,)


def _parse(spec: str, bits: int | None) -> Scheme:
    if not isinstance(spec, str):
        raise InputError(
            f"a cache is given as a scheme, the name of a preset, a Recipe or a CacheConfig; got {type(spec).__name__}"
        )
    if needs_bits(spec):
        if bits is None:
            raise InputError(f"scheme {spec!r} has no width; give bits, or write it as int4-{spec}")
        return Scheme.parse(f"int{bits}-{spec}")
    if is_scheme(spec):
        return Scheme.parse(spec)
    raise InputError(f"{unknown('preset', spec, _presets())} (`kvgeom schemes` lists presets and formats)")


def scheme_rows(kv_heads: int = 8, head_dim: int = 128, tokens: int = 4096) -> list[dict[str, Any]]:
    """What ``kvgeom schemes`` lists: formats and presets, with bits per element for a cache of that shape.

    Returns
    -------
    list of dict
        ``kind`` (``"format"`` or ``"preset"``), ``name``, ``bits``, ``bits_per_element`` (mean of k and v; scales and offsets
        included at their own precision, tokens of a residual window at 16 bits), ``note``.
    """
    rows: list[dict[str, Any]] = []
    shape = (kv_heads, head_dim, tokens)
    for text, note in (example for known in formats() for example in known.examples.items()):
        config = resolve(text)
        rows.append(_row("format", text, config.bits, config, shape, note))
    for engine in engines():
        for preset in engine.presets:
            configs = ((width, engine.config(preset, width)) for width in preset.widths)
            rows += [_row("preset", preset.name, width, config, shape, config.version) for width, config in configs]
    return rows


def _row(
    kind: str, name: str, bits: int, config: CacheConfig, shape: tuple[int, int, int], note: str
) -> dict[str, Any]:
    size = bits_per_element(config.recipe(1), config.placement, *shape)
    return {"kind": kind, "name": name, "bits": bits, "bits_per_element": size, "note": note}
