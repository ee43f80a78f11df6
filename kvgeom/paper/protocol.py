"""The two protocols of a table: what the released code does, and what a cache would hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from kvgeom.checks import one_of
from kvgeom.evaluation.condition import Condition
from kvgeom.models.shapes import KVGeometry
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Granularity, Scheme

Mode = Literal["released", "faithful"]
MODES: tuple[Mode, ...] = get_args(Mode)
#: The grids under which per-channel reduction is reported side by side; see :meth:`Protocol.grid`.
GRIDS = ("symmetric", "clamped asymmetric", "asymmetric")


@dataclass(frozen=True)
class Protocol:
    """How a table is measured.

    ``released``: the grids of the released code, at the projection, in padded batches of 4 that share scales. ``faithful``:
    rounded as a cache stores it, with the scales that a streaming cache has, each prompt by itself.

    Attributes
    ----------
    mode : {"released", "faithful"}
    geometry : KVGeometry
        Of the model.
    """

    mode: Mode
    geometry: KVGeometry

    def __post_init__(self) -> None:
        one_of("mode of a table", self.mode, MODES)

    @property
    def placement(self) -> Placement:
        """Where and over what rounding happens."""
        return Placement.released() if self.mode == "released" else Placement.cache()

    @property
    def kivi_placement(self) -> Placement:
        """That of KIVI: in the released code a decoded token is rounded with one scale, not by channel."""
        if self.mode == "released":
            return Placement(where="projection", scales="call", batch=4, alone="token")
        return Placement(prefill_reads="exact", residual=128)

    def scheme(
        self, bits: int, granularity: Granularity = "token", *, symmetric: bool = False, size: int | None = None
    ) -> Scheme:
        """A scheme on the mode's own integer grid."""
        form = "released" if self.mode == "released" else "int"
        return Scheme(bits, symmetric, granularity, size, format=form)

    def by_token(self, bits: int) -> Scheme:
        """That of sweeps and mitigations: asymmetric, a scale for each token."""
        return self.scheme(bits)

    def by_tensor(self, bits: int) -> Scheme:
        """That of layers and channels: symmetric, one scale for all tokens."""
        return self.scheme(bits, "tensor", symmetric=True)

    def grid(self, name: str, bits: int, granularity: Granularity) -> Scheme:
        """A scheme on one of :data:`GRIDS`, whatever the mode: what they differ in is the zero point alone."""
        one_of("grid", name, GRIDS)
        own = name == "symmetric" and self.mode == "released"  # the same grid by both names
        form = "released" if own or name == "clamped asymmetric" else "int"
        return Scheme(bits, name == "symmetric", granularity, format=form)

    def over(
        self,
        scheme: Scheme | None,
        *,
        layers: Iterable[int] | None = None,
        values: Scheme | Literal["same"] | None = "same",
        family: str = "paper",
        placement: Placement | None = None,
    ) -> Condition:
        """A scheme in all layers, or in some, as a condition.

        Parameters
        ----------
        scheme : Scheme or None
            Of the keys, and of the values too unless ``values`` has another.
        layers : iterable of int, optional
        values : Scheme or None, optional
        family : str
        placement : Placement, optional
            The protocol's own by default.
        """
        chosen = {*self.geometry.stores} if layers is None else {*layers}
        pair = (scheme, scheme if values == "same" else values)
        return self.each(lambda layer: pair if layer in chosen else (None, None), family=family, placement=placement)

    def each(
        self,
        choose: Callable[[int], tuple[Scheme | None, Scheme | None]],
        *,
        family: str = "paper",
        placement: Placement | None = None,
    ) -> Condition:
        """Schemes of keys and values by layer, as a condition; layers that store nothing keep nothing."""
        stores: Sequence[int] = self.geometry.stores
        layers = tuple(choose(n) if n in stores else (None, None) for n in range(self.geometry.layers))
        return Condition(Recipe(layers), placement or self.placement, family=family)
