"""What an engine is: how it stores a cache (presets), how it is configured (export) and how it is run (runner)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvgeom.checks import check_texts, whole, whole_numbers
from kvgeom.engines.runner import Runner
from kvgeom.errors import InputError, brief
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Schemes, stored_as
from kvgeom.quant.scheme import Scheme

if TYPE_CHECKING:
    from kvgeom.models.model import KVGeometry


@dataclass(frozen=True)
class CacheConfig:
    """How the cache of a model is stored; made by :func:`kvgeom.engines.registry.resolve`.

    Attributes
    ----------
    name : str
        Name of the preset, or the scheme as a string.
    version : str
        Engine and version that this describes; empty for a bare scheme or recipe.
    k, v : Scheme or None
        Schemes of keys and of values, the same in all layers; ``None`` stands for full precision. Both are ``None`` where
        ``per_layer`` is set.
    placement : Placement
    per_layer : Recipe or None
        Schemes that belong to one model, layer by layer.
    exact_ends : int
        How many of the first layers, and of the last ones, stay in full precision; no more than half of all layers each. 0
        where ``per_layer`` is set.
    """

    name: str
    version: str
    k: Scheme | None
    v: Scheme | None
    placement: Placement
    per_layer: Recipe | None = None
    exact_ends: int = 0

    def __post_init__(self) -> None:
        check_texts("a cache", self, "name", "version")
        for name, kind in (("k", Scheme), ("v", Scheme), ("per_layer", Recipe)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise InputError(f"{name} of a cache must be a {kind.__name__} or None, got {brief(value)}")
        object.__setattr__(self, "placement", Placement.parse(self.placement))
        object.__setattr__(self, "exact_ends", whole("exact_ends of a cache", self.exact_ends, 0))
        if self.exact_ends and self.per_layer is not None:
            raise InputError(
                f"a cache with schemes layer by layer says itself which layers are exact, got exact_ends={self.exact_ends}; leave it out"
            )

    def recipe(self, n_layers: int) -> Recipe:
        """The recipe for a model with ``n_layers``.

        Raises
        ------
        InputError
            If the schemes are given layer by layer, for another number of layers.
        """
        if self.per_layer is None:
            ends = min(self.exact_ends, n_layers // 2)
            return Recipe(((self.k, self.v),) * n_layers).keep_ends(ends, ends)
        if len(self.per_layer) != n_layers:
            raise InputError(f"the model has {n_layers} layers, got a recipe for {len(self.per_layer)}")
        return self.per_layer

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """All schemes in use, each once: of keys and values, in all layers."""
        pairs = ((self.k, self.v),) if self.per_layer is None else self.per_layer.layers
        return tuple(dict.fromkeys(scheme for pair in pairs for scheme in pair if scheme is not None))

    @property
    def bits(self) -> int:
        """Width of the widest scheme in use; 16 if nothing is rounded."""
        return max((scheme.bits for scheme in self.schemes), default=16)

    @property
    def stored(self) -> str:
        """What keys and values are stored as."""
        if self.per_layer is not None:
            return str(self.per_layer)
        ends = f", but the first and last {self.exact_ends} layers exact" if self.exact_ends else ""
        return stored_as(self.k, self.v) + ends

    def __str__(self) -> str:
        return f"{self.name}: {self.stored}; {self.placement}"


@dataclass(frozen=True)
class Export:
    """How an engine is configured for a recipe, and what of the recipe it leaves out.

    An engine that lacks a format gets the *nearest* one: for each site, its format of the same width, or else the next wider
    one, or else 16 bits; never a narrower one. Where one setting serves several layers or both sites, the widest width
    decides, and a layer of which any part stays in 16 bits stays there as a whole.

    Attributes
    ----------
    engine : str
    text : str
        Flags, or lines of Python to paste.
    versions : str
        Versions of the engine that have what the text uses, and the one that was looked at.
    cannot : tuple of str
        What the engine does otherwise than the recipe says; empty if nothing.
    notes : tuple of str
        What must hold for the text to work.
    recipe, placement : Recipe, Placement
        What the engine stores, as nearly as kvgeom emulates it. Evaluate this before you rely on an export.
    """

    engine: str
    text: str
    versions: str
    cannot: tuple[str, ...]
    notes: tuple[str, ...] = ()
    recipe: Recipe = field(default=Recipe(()), repr=False)
    placement: Placement = field(default=Placement(), repr=False)

    def __str__(self) -> str:
        lines = [f"# {self.engine} ({self.versions})", self.text]
        lines += [f"# cannot: {line}" for line in self.cannot] + [f"# note: {line}" for line in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True)
class Preset:
    """A quantized cache of an engine, under a name.

    Attributes
    ----------
    name : str
        What users write, for instance ``"kivi"``.
    setting : str
        How the engine is set up for it.
    widths : tuple of int
        Bits that the engine offers; the first is the default.
    schemes : callable (bits) -> (Scheme or None, Scheme or None)
        Schemes of keys and of values at a width.
    placement : Placement
    """

    name: str
    setting: str
    widths: tuple[int, ...]
    schemes: Callable[[int], Schemes]
    placement: Placement = field(default=Placement())
    exact_ends: int = 0

    def __post_init__(self) -> None:
        check_texts("a preset", self, "name", "setting")
        object.__setattr__(self, "widths", tuple(whole_numbers("widths of a preset", self.widths)))
        if not callable(self.schemes):
            raise InputError(
                f"schemes of preset {self.name!r} must be a function of the width, got {brief(self.schemes)}"
            )
        object.__setattr__(self, "placement", Placement.parse(self.placement))
        object.__setattr__(self, "exact_ends", whole("exact_ends of a preset", self.exact_ends, 0))


@dataclass(frozen=True)
class Engine:
    """Software that stores a quantized cache; made known by :func:`kvgeom.engines.registry.register_engine`.

    Attributes
    ----------
    name : str
        Key in the registry, for instance ``"llamacpp"``.
    title : str
        As its makers write it, for instance ``"llama.cpp"``.
    version : str
        Version that the presets describe.
    source : str
        Where the behaviour is defined.
    checked : str
        What the presets were compared with, in a few words; the page has the numbers.
    page : str
        File in ``docs/``, or a URL.
    presets : tuple of Preset
    export : callable (recipe, placement, geometry) -> Export, optional
        The configuration that is nearest to a recipe, for an engine that can be configured.
    export_plan : callable (file, recipe, placement) -> Export or None, optional
        For an engine that reads a saved plan and so loses nothing of it; ``None`` where it cannot run this one.
    runner : Runner, optional
        How it is run as a server, for an engine that kvgeom can start.
    """

    name: str
    title: str
    version: str
    source: str
    checked: str
    page: str
    presets: tuple[Preset, ...] = ()
    export: Callable[[Recipe, Placement, KVGeometry], Export] | None = None
    export_plan: Callable[[str | Path, Recipe, Placement], Export | None] | None = None
    runner: Runner | None = None

    def config(self, preset: Preset, bits: int | None = None) -> CacheConfig:
        """The cache of one of the presets at a width, the default one if none is given.

        Raises
        ------
        InputError
            If the engine does not offer that width.
        """
        width = preset.widths[0] if bits is None else bits
        if width not in preset.widths:
            offered = ", ".join(map(str, preset.widths))
            raise InputError(f"preset {preset.name!r} offers bits {offered}; got {brief(width)}")
        k, v = preset.schemes(width)
        version = f"{self.title} {self.version}, {preset.setting}"
        return CacheConfig(preset.name, version, k, v, preset.placement, exact_ends=preset.exact_ends)


def both(scheme: str) -> Callable[[int], Schemes]:
    """The same scheme for keys and values, for :attr:`Preset.schemes`; ``{bits}`` in it stands for the width."""
    return lambda bits: (Scheme.parse(scheme.format(bits=bits)),) * 2
