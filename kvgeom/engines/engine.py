"""What a cache holds: :class:`CacheConfig`, and the presets that name one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvgeom.errors import InputError
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Schemes
from kvgeom.quant.scheme import Scheme


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
    """

    name: str
    version: str
    k: Scheme | None
    v: Scheme | None
    placement: Placement
    per_layer: Recipe | None = None

    def recipe(self, n_layers: int) -> Recipe:
        """The recipe for a model with ``n_layers``.

        Raises
        ------
        InputError
            If the schemes are given layer by layer, for another number of layers.
        """
        if self.per_layer is None:
            return Recipe(((self.k, self.v),) * n_layers)
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
        k, v = (str(scheme or "exact") for scheme in (self.k, self.v))
        return k if k == v else f"k {k}, v {v}"

    def __str__(self) -> str:
        return f"{self.name}: {self.stored}; {self.placement}"


@dataclass(frozen=True)
class Preset:
    """A named engine.

    Attributes
    ----------
    name : str
    engine : str
        Which engine, and of which version this is true.
    source : str
        Where the behaviour is defined.
    checked : str
        What it was compared with, in a few words; the page in the documentation has the numbers.
    widths : tuple of int
        Bits that the engine offers; the first is the default.
    schemes : callable (bits) -> (Scheme or None, Scheme or None)
        Rounding of keys and values at a width.
    placement : Placement
    page : str
        Of the documentation.
    """

    name: str
    engine: str
    source: str
    checked: str
    widths: tuple[int, ...]
    schemes: Callable[[int], Schemes]
    placement: Placement
    page: str

    def at(self, bits: int | None = None) -> CacheConfig:
        """The cache at a width, the default one if none is given.

        Raises
        ------
        InputError
            If the engine does not offer that width.
        """
        width = self.widths[0] if bits is None else bits
        if width not in self.widths:
            offered = ", ".join(map(str, self.widths))
            raise InputError(f"preset {self.name!r} offers bits {offered}; got {width}")
        k, v = self.schemes(width)
        return CacheConfig(self.name, self.engine, k, v, self.placement)
