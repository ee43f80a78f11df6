"""An engine as a value: schemes of keys and values, and a placement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvgeom.errors import InputError
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Schemes
from kvgeom.quant.scheme import Scheme


@dataclass(frozen=True)
class Engine:
    """What an engine does to a cache, at some width.

    Attributes
    ----------
    name : str
        That of the preset, or the spelling of the scheme.
    k, v : Scheme or None
    placement : Placement
    """

    name: str
    k: Scheme | None
    v: Scheme | None
    placement: Placement

    def recipe(self, n_layers: int) -> Recipe:
        """All layers of a model with ``n_layers``."""
        return Recipe(((self.k, self.v),) * n_layers)

    @property
    def held(self) -> str:
        """What keys and values are held as."""
        k, v = (str(scheme or "exact") for scheme in (self.k, self.v))
        return k if k == v else f"k {k}, v {v}"

    def __str__(self) -> str:
        return f"{self.name}: {self.held}; {self.placement}"


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

    def at(self, bits: int | None = None) -> Engine:
        """The engine at a width, its default one if none is given.

        Raises
        ------
        InputError
            If the engine does not offer that width.
        """
        width = self.widths[0] if bits is None else bits
        if width not in self.widths:
            offered = ", ".join(map(str, self.widths))
            raise InputError(f"{self.name} was asked with {width} bits, but {self.engine} offers {offered}")
        k, v = self.schemes(width)
        return Engine(self.name, k, v, self.placement)
