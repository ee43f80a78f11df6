"""What a model's KV cache holds: which layers store keys and values, and of which shape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from kvgeom.errors import InputError, ModelError
from kvgeom.quant.memory import TOKENS, bytes_of_sites
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Site
from kvgeom.quant.scheme import runs

SITES: tuple[Site, ...] = get_args(Site)


@dataclass(frozen=True)
class KVGeometry:
    """Shape of a model's KV cache, read from the model itself.

    Layers have the model's own numbers everywhere, whether or not they store anything.

    Attributes
    ----------
    layers : int
        Number of decoder layers.
    query_heads, kv_heads : int
        Attention heads of the queries and of the cache.
    head_dim : int
        Channels of one head; K and V have ``kv_heads * head_dim`` channels each.
    d_model : int
        Width of the residual stream.
    key_bias : bool
        Whether keys are projected with a bias.
    rope : str
        Kind of rotary embedding (``"default"``, ``"llama3"``, ``"yarn"``, ...), ``"none"`` without one.
    sliding_window : int or None
        Window of the layers that attend locally, if any.
    stores : tuple of int
        The layers that store keys and values; all by default.
    shapes : tuple of (int, int, int, int)
        KV heads and channels of a head of the keys, and those of the values, for each of :attr:`stores`. Empty where all
        are ``kv_heads, head_dim``; else these two are of the keys in the first.
    states : tuple of int
        Layers with recurrent or convolution states, which stay exact; they may store keys and values beside them.
    shares : tuple of int
        Layers whose attention reads the keys and values that another layer has stored, and stores none.
    indexed : tuple of int
        Layers that hold the keys of an index beside their own, which say what is attended to; they stay exact.
    alone : bool
        Whether sequences are decoded one at a time, because padding would change what a model says.
    latent : bool
        Whether the cache holds, in place of keys, the latent of keys and values, and in place of values the rotated part
        of the keys (multi-head latent attention).
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    d_model: int
    key_bias: bool
    rope: str
    sliding_window: int | None = None
    stores: tuple[int, ...] = ()
    shapes: tuple[tuple[int, int, int, int], ...] = ()
    states: tuple[int, ...] = ()
    shares: tuple[int, ...] = ()
    indexed: tuple[int, ...] = ()
    alone: bool = False
    latent: bool = False

    def __post_init__(self) -> None:
        # From JSON these come as lists.
        object.__setattr__(self, "stores", tuple(self.stores) or tuple(range(self.layers)))
        object.__setattr__(self, "shapes", tuple((a, b, c, d) for a, b, c, d in self.shapes))
        for name in ("states", "shares", "indexed"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def __str__(self) -> str:
        some = "" if len(self.stores) == self.layers else f", {len(self.stores)} with keys and values"
        shapes = " or ".join(f"{heads} KV heads x {size}" for heads, size, *_ in dict.fromkeys(self.every_shape))
        return f"{self.layers} layers{some}, {shapes}"

    @property
    def every_shape(self) -> tuple[tuple[int, int, int, int], ...]:
        """:attr:`shapes`, for each of :attr:`stores` also where they are all alike."""
        return self.shapes or ((self.kv_heads, self.head_dim, self.kv_heads, self.head_dim),) * len(self.stores)

    @property
    def channels(self) -> int:
        """Channels of K (or V) in one layer: ``kv_heads * head_dim``."""
        return self.kv_heads * self.head_dim

    def shape(self, layer: int, site: Site) -> tuple[int, int]:
        """KV heads and channels of a head of one site of a layer that stores keys and values."""
        found = self.every_shape[self.stores.index(layer)]
        return found[:2] if site == "k" else found[2:]

    @property
    def site_names(self) -> tuple[str, str]:
        """What the cache holds at sites ``k`` and ``v``."""
        return ("latent", "rotated keys") if self.latent else ("keys", "values")

    @property
    def elements(self) -> int:
        """Numbers that the cache holds of one token."""
        return sum(a * b + c * d for a, b, c, d in self.every_shape)

    def bytes_per_token(self, recipe: Recipe, placement: Placement | None = None) -> float:
        """Bytes per token of the keys and values of all layers, as :func:`kvgeom.quant.memory.bytes_per_token` counts them."""
        sites = ((recipe.scheme(layer, site), *self.shape(layer, site)) for layer in self.stores for site in SITES)
        return bytes_of_sites(sites, placement or Placement(), TOKENS) / TOKENS

    @property
    def stepwise(self) -> bool:
        """Whether tokens after a prompt must come one by one: a state cannot be cut back, and an index sees all that comes."""
        return bool(self.states or self.indexed)

    @property
    def note(self) -> str:
        """Which layers store no keys and values, and what kvgeom does with them; empty where all do."""
        some = len(self.stores) < self.layers
        said = (
            [f"keys and values are stored, and rounded, in layers {_spans(self.stores)} of {self.layers}"]
            if some
            else []
        )
        if self.states:
            said.append(f"the recurrent states of layers {_spans(self.states)} stay exact")
        if self.indexed:
            said.append(f"the keys of the index in layers {_spans(self.indexed)} stay exact")
        if self.alone:
            said.append("sequences are decoded one at a time, for padding would change them")
        if self.shares:
            said.append(f"layers {_spans(self.shares)} read what other layers have stored")
        if self.latent:
            said.append(
                "'keys' are the latent of keys and values, 'values' the rotated part of the keys, for that is what the cache holds"
            )
        return "; ".join(said)

    def stored(self, recipe: Recipe, model: str) -> Recipe:
        """The same recipe without the layers that store nothing, in which there is nothing to round.

        Raises
        ------
        InputError
            If the recipe rounds only such layers.
        """
        kept = recipe.only(self.stores)
        if recipe.touched and not kept.touched:
            raise InputError(
                f"{model} stores no keys and values in layer {_spans(recipe.touched)}, so that nothing would be rounded; choose from "
                f"layers {_spans(self.stores)}"
            )
        return kept

    def check_stores(self, layers: Iterable[int], model: str) -> None:
        """Raise InputError for a layer that is none, or that stores no keys and values."""
        wrong = sorted({*layers} - {*self.stores})
        if wrong:
            among = f"0 to {self.layers - 1}" if len(self.stores) == self.layers else f"layers {_spans(self.stores)}"
            raise InputError(f"layers with keys and values in {model} are {among}, got {_spans(wrong)}")

    def check_every(self, model: str) -> None:
        """Raise ModelError where a layer stores no keys and values, or they differ in shape."""
        if self.note or self.shapes:
            raise ModelError(
                f"organisms are planted in models all of whose layers store keys and values of one shape, unlike {model}; "
                "give such a model"
            )

    def check_alike(self, model: str) -> None:
        """Raise ModelError where keys and values, or layers, differ in shape, so that one frame cannot hold all of them."""
        if self.latent:
            why = "caches a latent of keys and values, not keys and values"
        elif self.shapes:
            why = "stores keys and values of shapes that differ"
        else:
            return
        raise ModelError(
            f"{model} {why}, so that their geometry is not measured; responses, perplexity, scans, diagnosis and fixes work "
            "(geometry=False, or --no-geometry)"
        )


def _spans(layers: Sequence[int]) -> str:
    return ", ".join(runs(layers))
