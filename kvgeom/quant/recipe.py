"""Which layers of a cache are quantized, and how: every sweep, ablation and mitigation is a Recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, get_args

from kvgeom.checks import as_names, one_by_one, one_of, whole, whole_numbers
from kvgeom.errors import InputError, brief
from kvgeom.quant.scheme import Scheme, runs
from kvgeom.quant.transforms import Statics

#: No model has more layers: the deepest published ones have some hundred.
MOST_LAYERS = 10_000

Site = Literal["k", "v"]
Schemes = tuple[Scheme | None, Scheme | None]


@dataclass(frozen=True)
class Recipe:
    """For each layer the scheme of its keys and of its values; ``None`` keeps full precision.

    Attributes
    ----------
    layers : tuple of (Scheme or None, Scheme or None)
        One pair (k, v) per layer, layer 0 first, of at most :data:`MOST_LAYERS`. A scheme may be given as it is written: ``"int4-asym-token"``.
    offsets, factors : Statics or None
        What schemes with ``center`` subtract, and what schemes with ``equalize`` divide by.
    random_directions : int or None
        A control: the seed by which every rounding error is moved to other channels, with other signs. The damage is
        then that of a random perturbation which has, token by token, the size of the rounding error.

    Raises
    ------
    InputError
        For layers that are no pairs of schemes, or too many, or a seed that is no whole number, 0 or more.

    Examples
    --------
    >>> int4 = Scheme(4)
    >>> recipe = Recipe.uniform(24, int4).keep([0, 1])
    >>> recipe.touched[:3]
    (2, 3, 4)
    >>> recipe == Recipe.uniform(24, int4, layers=range(2, 24))
    True
    """

    layers: tuple[Schemes, ...]
    offsets: Statics | None = None
    factors: Statics | None = None
    random_directions: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(_pair(pair, layer) for layer, pair in enumerate(_listed(self.layers))))
        for name in ("offsets", "factors"):
            value = getattr(self, name)
            if not isinstance(value, Statics | None):
                raise InputError(
                    f"{name} of a recipe must be Statics, such as Statics.of(name, vectors), got {brief(value)}"
                )
        if self.random_directions is not None:
            seed = whole("the seed of random directions", self.random_directions, 0)
            object.__setattr__(self, "random_directions", seed)

    @classmethod
    def exact(cls, n_layers: int) -> Recipe:
        """Nothing is rounded."""
        return cls.uniform(n_layers, None)

    @classmethod
    def uniform(
        cls,
        n_layers: int,
        scheme: Scheme | str | None,
        *,
        layers: Iterable[int] | None = None,
        sites: Iterable[Site] | Site = ("k", "v"),
    ) -> Recipe:
        """The same scheme for k and v (or only one of them) in all layers, or only in ``layers``.

        Raises
        ------
        InputError
            For layers or sites that do not exist, or a scheme that cannot be read.
        """
        n_layers = whole("n_layers", n_layers, 1, MOST_LAYERS)
        chosen = range(n_layers) if layers is None else _check(layers, n_layers)
        chosen_sites = as_names("site", sites, get_args(Site))
        scheme = _scheme(scheme)
        pair = (scheme if "k" in chosen_sites else None, scheme if "v" in chosen_sites else None)
        return cls(tuple(pair if layer in chosen else (None, None) for layer in range(n_layers)))

    def keep(self, layers: Iterable[int]) -> Recipe:
        """The same recipe with ``layers`` kept in full precision."""
        kept = _check(layers, len(self))
        remaining = tuple((None, None) if layer in kept else pair for layer, pair in enumerate(self.layers))
        return replace(self, layers=remaining)

    def only(self, layers: Iterable[int]) -> Recipe:
        """The same recipe with all layers but ``layers`` kept in full precision."""
        rounded = _check(layers, len(self))
        return self.keep(layer for layer in range(len(self)) if layer not in rounded)

    def keep_ends(self, first: int = 0, last: int = 0) -> Recipe:
        """The same recipe with the first and last layers kept in full precision."""
        first, last = (whole(name, value, 0, len(self)) for name, value in (("first", first), ("last", last)))
        return self.keep([*range(first), *range(len(self) - last, len(self))])

    def with_statics(self, *, offsets: Statics | None = None, factors: Statics | None = None) -> Recipe:
        """The same recipe, with what ``center`` or ``equalize`` need to know of the model."""
        return replace(
            self,
            offsets=self.offsets if offsets is None else offsets,
            factors=self.factors if factors is None else factors,
        )

    def with_random_directions(self, seed: int) -> Recipe:
        """The control of this recipe: errors of the same size in random directions; see the class."""
        return replace(self, random_directions=seed)

    @property
    def touched(self) -> tuple[int, ...]:
        """Layers in which something is rounded."""
        return tuple(layer for layer, pair in enumerate(self.layers) if pair != (None, None))

    @property
    def first_touched(self) -> int:
        """The first layer in which something is rounded; 0 if there is none."""
        return min(self.touched, default=0)

    def scheme(self, layer: int, site: Site) -> Scheme | None:
        """The scheme of one site of one layer."""
        one_of("site", site, get_args(Site))
        layer = whole("layer", layer, 0, len(self) - 1)
        return self.layers[layer][0 if site == "k" else 1]

    def sites_with(self, constants: Literal["offsets", "factors"]) -> frozenset[Site]:
        """Sites at which some layer is rounded after a transform that needs such constants of the model."""
        one_of("kind of constants", constants, ("offsets", "factors"))
        return frozenset(
            site
            for pair in self
            for site, scheme in zip(get_args(Site), pair, strict=True)
            if scheme is not None and scheme.constants == constants
        )

    def record(self) -> dict[str, Any]:
        """All that the recipe is, as JSON: schemes layer by layer, constants by their fingerprint, the control's seed."""
        return {
            "layers": [[None if scheme is None else str(scheme) for scheme in pair] for pair in self.layers],
            "offsets": self.offsets and self.offsets.fingerprint,
            "factors": self.factors and self.factors.fingerprint,
            "random_directions": self.random_directions,
        }

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Schemes]:
        return iter(self.layers)

    def __str__(self) -> str:
        layers: dict[Schemes, list[int]] = {}
        for layer in self.touched:
            layers.setdefault(self.layers[layer], []).append(layer)
        if not layers:
            return "exact"
        parts = [
            stored_as(*pair) + ("" if len(where) == len(self) else f" in layers {','.join(runs(where))}")
            for pair, where in layers.items()
        ]
        known = [
            f"{name} {statics}" for name, statics in (("offsets", self.offsets), ("factors", self.factors)) if statics
        ]
        known += [] if self.random_directions is None else [f"errors in random directions {self.random_directions}"]
        return " + ".join(parts) + (f" ({', '.join(known)})" if known else "")


def stored_as(k: Scheme | None, v: Scheme | None) -> str:
    """What keys and values are stored as, once where they are stored alike."""
    return str(k or "exact") if k == v else f"k {k or 'exact'}, v {v or 'exact'}"


def _listed(layers: Any) -> list[Any]:
    if not isinstance(layers, Iterable) or isinstance(layers, str):
        raise InputError(f"layers of a recipe are one pair (k, v) of schemes each, got {brief(layers)}")
    found = list(islice(one_by_one(layers), MOST_LAYERS + 1))
    if len(found) > MOST_LAYERS:
        raise InputError(
            f"a recipe has at most {MOST_LAYERS:,} layers, got more; give one pair for each layer of the model"
        )
    return found


def _pair(given: Any, layer: int) -> Schemes:
    pair = () if isinstance(given, str) or not isinstance(given, Iterable) else tuple(islice(one_by_one(given), 3))
    if len(pair) != 2:
        raise InputError(f"layer {layer} of a recipe must be a pair (k, v) of schemes, got {brief(given)}")
    return _scheme(pair[0]), _scheme(pair[1])


def _scheme(given: Any) -> Scheme | None:
    """A scheme that may be given as it is written."""
    if given is None or isinstance(given, Scheme):
        return given
    if isinstance(given, str):
        return Scheme.parse(given)
    raise InputError(f"a scheme of a recipe must be a Scheme, its name, or None for full precision; got {brief(given)}")


def _check(layers: Iterable[int], n_layers: int) -> frozenset[int]:
    if not isinstance(layers, Iterable):
        raise InputError(f"layers must be a list of numbers, got {brief(layers)}")
    return frozenset(whole_numbers("layers", layers, 0, n_layers - 1))
