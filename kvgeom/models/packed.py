"""A cache that stores codes: small, slow, and equal to the simulated one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import Tensor

from kvgeom.errors import InputError, ModelError
from kvgeom.models.cache import Edit, EditedCache, EditedLayer
from kvgeom.models.decoder import cache_kinds, find_decoder
from kvgeom.models.rotary import RotaryEmbedding
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe, Site
from kvgeom.quant.transforms import Rotation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvgeom.models.model import Model

#: Of a layer, the position of the first new token, and new keys as stored: how their positions rotate a vector.
Rotations = Callable[[int, int, Tensor], Rotation]


class Codes(Protocol):
    """Some tokens as codes."""

    def unpack(self) -> Tensor:
        """Their values, ``[1, kv_heads, tokens, head_dim]``."""
        ...

    @property
    def nbytes(self) -> int: ...


class PackingEdit(Protocol):
    """An edit whose results can be stored as codes; see :class:`kvgeom.quant.quantizer.Quantizer`."""

    where: str
    prefill_reads_exact: bool
    has_residual: bool

    def packs(self, layer: int, site: Site) -> bool: ...

    def advance(self, layer: int, site: Site, new: int) -> tuple[int, int]: ...

    def pack(self, layer: int, site: Site, x: Tensor, start: int | None = None) -> Sequence[Codes]: ...


class _Store:
    """One site of one layer of one sequence: first tokens, codes, and last tokens that wait."""

    def __init__(self, layer: int, site: Site, edit: PackingEdit) -> None:
        self.layer, self.site, self.edit = layer, site, edit
        self.head: Tensor | None = None
        self.codes: list[Codes] = []
        self.tail: Tensor | None = None
        self.tokens = 0

    def values(self) -> Tensor:
        parts = [self.head, *(codes.unpack() for codes in self.codes), self.tail]
        return torch.cat([part for part in parts if part is not None], dim=2)

    def add(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take new tokens; returns all before and after some of them have been rounded."""
        self.tail = x if self.tail is None else torch.cat([self.tail, x], dim=2)
        self.tokens += x.shape[2]
        before = self.values()
        if not self.edit.packs(self.layer, self.site):
            return before, before
        start, stop = self.edit.advance(self.layer, self.site, x.shape[2])
        coded = self.tokens - self.tail.shape[2]
        if start < coded and start < stop:  # all anew
            self.codes, coded = [], start
        if start > coded and not self.codes:  # tokens that stay as they are
            sinks = before[:, :, :start]
            self.head, coded = sinks, start
        if start < stop:
            self.codes += self.edit.pack(self.layer, self.site, before[:, :, start:stop], start)
            coded = stop
        self.tail = before[:, :, coded:].clone()
        return before, self.values()

    @property
    def nbytes(self) -> int:
        exact = sum(x.nbytes for x in (self.head, self.tail) if x is not None)
        return exact + sum(codes.nbytes for codes in self.codes)


class PackedLayer(EditedLayer):  # type: ignore[no-untyped-call]
    """One layer of a :class:`PackedCache`; its values exist only while attention reads them."""

    is_croppable = False
    stacks = False

    def __init__(self, index: int, edit: Any, rotations: Rotations | None = None) -> None:
        super().__init__(index, edit)
        self.rotations = rotations
        self.stores = {site: _Store(index, site, edit) for site in ("k", "v")}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values as codes, and return all that attention is to read."""
        if key_states.shape[0] != 1:
            raise InputError(f"a packed cache stores one sequence, got {key_states.shape[0]}; run them one by one")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        edit: Any = self.edit
        stored = self.get_seq_length()
        if self.rotations is not None:
            edit.set_rotation(self.index, self.rotations(self.index, stored, key_states))
        (k, k_stored), (v, v_stored) = self.stores["k"].add(key_states), self.stores["v"].add(value_states)
        return (k, v) if (edit.has_residual if stored else edit.prefill_reads_exact) else (k_stored, v_stored)

    def get_seq_length(self) -> int:
        """Number of stored tokens."""
        return self.stores["k"].tokens

    def _fixed(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise InputError(
            "tokens of a packed cache cannot be dropped, copied or reordered (a reset, beams, a draft model), because the scales "
            "that a prompt has set stay; make a new cache, and generate greedily or by sampling"
        )

    reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _fixed


class PackedCache(EditedCache):
    """A cache of one sequence that holds codes and scales, and decodes them whenever attention reads.

    It returns what an :class:`~kvgeom.models.cache.EditedCache` with the same edit returns, bit for bit.

    Parameters
    ----------
    layers : int or sequence of layers
        As those of an :class:`~kvgeom.models.cache.EditedCache`.
    edit : PackingEdit
        A :class:`~kvgeom.quant.quantizer.Quantizer` that rounds in the cache.
    rotations : callable (layer, position of the first new token, new keys) -> Rotation, optional
        Rotations for an edit with ``needs_rotation``, in a model whose passes kvgeom does not run;
        :class:`kvgeom.models.rotary.RotaryEmbedding` knows them.

    Raises
    ------
    InputError
        If the edit rounds at the projection, where nothing is stored.
    ModelError
        If a layer stores something beside its keys and values that grows with the sequence, or states too.
    """

    def __init__(
        self, layers: int | Sequence[Any], edit: Edit | None = None, rotations: Rotations | None = None
    ) -> None:
        if edit is None or edit.where != "cache" or not hasattr(edit, "pack"):
            raise InputError(
                "a packed cache needs an edit that rounds in the cache; give a Quantizer with where='cache'"
            )
        super().__init__(layers)
        for index, layer in self.storing:
            if type(layer) is not EditedLayer:
                raise ModelError(
                    f"layer {index} holds more than keys and values ({type(layer).__name__}), which a packed cache does not store; "
                    "use kvgeom.evaluate, which rounds without packing"
                )
            self.layers[index] = PackedLayer(index, edit, rotations)
        self.edit = edit

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, offsets and waiting tokens; scales that tokens share are counted once."""
        packed: list[Any] = [layer for _, layer in self.storing]
        return sum(store.nbytes for layer in packed for store in layer.stores.values())


def quantized_cache(model: PreTrainedModel | Model, recipe: Recipe, placement: Placement | None = None) -> PackedCache:
    """An empty cache of one sequence: ``hf_model.generate(**inputs, past_key_values=quantized_cache(hf_model, recipe))``.

    It stores packed codes and decodes them whenever attention reads, which makes it small and slow. Where the recipe
    subtracts offsets from rotated keys (``center``), it asks the model's own rotary embedding for positions 0, 1, 2, ...;
    inputs must not be padded, not even a single sequence. Layers with a sliding window store the whole sequence.

    Parameters
    ----------
    model : PreTrainedModel or Model
        A plain transformers model, or what :func:`kvgeom.load` made of one. It is not changed.
    recipe : Recipe
    placement : Placement, optional
        The decode-faithful default if not given.

    Returns
    -------
    PackedCache
        For one prompt and what follows it; make a new one for the next.

    Raises
    ------
    InputError
        If the recipe has another number of layers than the model, or rounds single channels, which cannot be packed; or
        if the placement rounds at the projection, or feeds the last prompt token separately, which ``generate`` does not.
    ModelError
        If offsets of keys must be rotated and the model's rotary embedding cannot be followed.
    """
    hf_model: Any = getattr(model, "hf_model", model)
    name = type(model).__name__ if hf_model is model else getattr(model, "name", "")
    if not hasattr(hf_model, "config"):
        raise InputError(f"quantized_cache takes a transformers model, got {type(model).__name__}")
    count = int(hf_model.config.get_text_config().num_hidden_layers)
    if len(recipe) != count:
        raise InputError(f"{name} has {count} layers, got a recipe for {len(recipe)}")
    placement = placement or Placement()
    check_packable(recipe, placement)
    quantizer, kinds = Quantizer(recipe, placement), cache_kinds(hf_model.config, count, name)
    if not (quantizer.needs_rotation and "k" in recipe.sites_with("offsets")):
        return PackedCache(kinds, quantizer)
    rotary = RotaryEmbedding(hf_model, find_decoder(hf_model, name))
    rotary.check()
    return PackedCache(kinds, quantizer, lambda *new: rotary.rotation(*new).of_vectors)


def check_packable(recipe: Recipe, placement: Placement) -> None:
    """Whether a cache of codes can store what a recipe rounds, under a placement.

    Raises
    ------
    InputError
        As :func:`quantized_cache`.
    """
    if placement.where != "cache":
        raise InputError(f"placement '{placement}' stores nothing rounded; give a placement with where='cache'")
    if placement.prefill_reads == "last":
        raise InputError(
            "generate does not feed the last prompt token separately; give a placement with prefill_reads 'rounded' or 'exact', "
            "not 'last'"
        )
    partial = [
        n for n, pair in enumerate(recipe) for scheme in pair if scheme is not None and scheme.channels is not None
    ]
    if partial:
        raise InputError(
            f"the recipe rounds only some channels of layer {partial[0]}, which cannot be packed; give schemes without channels"
        )
