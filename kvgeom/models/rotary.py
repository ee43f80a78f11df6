"""Rotary position embedding: how a model's own turns the keys of each layer, found and proven on the loaded model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from kvgeom.errors import ModelError
from kvgeom.models.cache import EditedCache
from kvgeom.models.decoder import Decoder

#: Where the proof looks: near positions turn fast planes, far ones the slow planes too. Those beyond the context are left out.
_POSITIONS = (0, 1, 2, 3, 5, 9, 17, 40, 97, 251, 499, 1009, 2039, 4093)
#: How far keys may move with their position when the embedding is taken out, of their norm: at least, and in roundings.
_MOVES, _ROUNDINGS = 1e-4, 8


@dataclass(frozen=True, eq=False)
class TokenRotation:
    """The rotary embedding of some tokens.

    Attributes
    ----------
    cos, sin : Tensor [..., tokens, planes]
        Of each plane's angle at each token; both may be scaled, as YaRN does.
    planes : Tensor [planes, 2], int64
        The two channels of a head that each plane turns, the first towards the second; other channels pass.
    """

    cos: Tensor
    sin: Tensor
    planes: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Keys as stored, from keys as projected.

        Parameters
        ----------
        x : Tensor [..., tokens, head_dim]
        """
        return self._turned(x, self.cos, self.sin)

    def unrotate(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`rotate`, in float32 at least: half precision would blur what positions have in common."""
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = self.cos.to(wide), self.sin.to(wide)
        scale = (cos * cos + sin * sin).clamp_min(torch.finfo(wide).tiny)
        return self._turned(x.to(wide), cos / scale, -sin / scale)

    def of_vectors(self, vectors: Tensor) -> Tensor:
        """Vectors ``[kv_heads, head_dim]`` at every token: ``[batch or 1, kv_heads, tokens, head_dim]``."""
        cos, sin = (x if x.ndim == 3 else x[None] for x in (self.cos, self.sin))
        rows, tokens, _ = cos.shape
        return TokenRotation(cos[:, None], sin[:, None], self.planes).rotate(
            vectors[None, :, None].to(cos).expand(rows, -1, tokens, -1)
        )

    def row(self, row: int) -> TokenRotation:
        """That of one sequence of a batch, without the batch's dimension."""
        return TokenRotation(self.cos[row], self.sin[row], self.planes)

    def tokens(self, tokens: slice) -> TokenRotation:
        """That of some of the tokens."""
        return TokenRotation(self.cos[..., tokens, :], self.sin[..., tokens, :], self.planes)

    def followed_by(self, other: TokenRotation) -> TokenRotation:
        """That of these tokens and others after them."""
        cos, sin = (torch.cat(pair, dim=-2) for pair in ((self.cos, other.cos), (self.sin, other.sin)))
        return TokenRotation(cos, sin, self.planes)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not len(self.planes):
            return x
        first, second = self.planes.to(x.device).unbind(1)
        a, b = x[..., first], x[..., second]
        turned = x.to(torch.promote_types(x.dtype, cos.dtype), copy=True)
        turned[..., first] = a * cos - b * sin
        turned[..., second] = b * cos + a * sin
        return turned


@dataclass(frozen=True, eq=False)
class Rotary:
    """How the rotary embedding of a layer turns a head of keys.

    Attributes
    ----------
    planes : Tensor [planes, 2], int64
        As in :class:`TokenRotation`; none where a layer turns nothing, whatever its attention is handed.
    columns : slice
        Of the cosines and sines that the model makes, those of the planes.
    unproven : str or None
        Why it is not known; :meth:`at` then raises ModelError.
    """

    planes: Tensor
    columns: slice
    unproven: str | None = None

    def read(self, attention: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenRotation:
        """The rotation of the tokens that an attention module is called with; raises as :meth:`at`."""
        hidden = args[0] if args else kwargs["hidden_states"]
        return self.at(embedding_of(attention, args, kwargs), hidden.shape[-2], hidden)

    def at(self, embedding: Any, tokens: int, like: Tensor) -> TokenRotation:
        """The rotation of tokens, from what the attention is handed for them.

        Parameters
        ----------
        embedding : (cos, sin), complex Tensor or None
        tokens : int
        like : Tensor
            For the dtype and device of a rotation that turns nothing.

        Raises
        ------
        ModelError
            If the embedding is not known.
        """
        if self.unproven is not None:
            raise ModelError(self.unproven)
        if not len(self.planes):
            nothing = like.new_zeros(1, tokens, 0)
            return TokenRotation(nothing, nothing, self.planes)
        cos, sin = _angles(embedding)
        return TokenRotation(cos[..., self.columns], sin[..., self.columns], self.planes)


def embedding_of(attention: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What an attention module is handed to rotate by: ``(cos, sin)``, a complex tensor, or None."""
    given = kwargs.get("position_embeddings")
    if given is None:
        given = next((arg for arg in args[1:] if _is_embedding(arg)), None)
    table, positions = getattr(attention, "embed_positions", None), kwargs.get("position_ids")
    if given is None and isinstance(table, Tensor) and positions is not None:  # GPT-J and CodeGen look it up themselves
        sin, cos = table.to(positions.device)[positions].chunk(2, dim=-1)
        given = cos, sin
    return given if _is_embedding(given) else None


def _is_embedding(given: Any) -> bool:
    if isinstance(given, Tensor):
        return given.is_complex()
    return isinstance(given, tuple) and len(given) == 2 and all(isinstance(x, Tensor) for x in given)


def _angles(embedding: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[batch or 1, tokens, columns]``."""
    cos, sin = (embedding.real, embedding.imag) if isinstance(embedding, Tensor) else embedding
    if cos.ndim == 4:  # an axis of heads, or of the coordinates of images, which are equal in text
        at = next((axis for axis in (2, 1) if cos.shape[axis] == 1), 0)
        cos, sin = cos.select(at, 0), sin.select(at, 0)
    return (cos[None], sin[None]) if cos.ndim == 2 else (cos, sin)


def _layouts(columns: int, head_dim: int) -> Iterator[Rotary]:
    """Every way in which so many cosines can turn a head; the most common first, none at all last.

    Pairs are the two halves or neighbours; of the first or the last channels; turned in either sense. Cosines come
    twice, half by half or each beside its copy, or once.
    """
    doubled = ((columns // 2, slice(0, columns // 2)), (columns // 2, slice(0, None, 2))) if columns % 2 == 0 else ()
    for (count, own), neighbours, last, reverse in product((*doubled, (columns, slice(None))), *[(False, True)] * 3):
        if not 0 < 2 * count <= head_dim or (last and 2 * count == head_dim):
            continue
        channels = torch.arange(2 * count) + (head_dim - 2 * count if last else 0)
        planes = channels.reshape(count, 2) if neighbours else channels.reshape(2, count).T
        yield Rotary(planes.flip(1) if reverse else planes, own)


_NOTHING = Rotary(torch.empty(0, 2, dtype=torch.long), slice(0))


class RotaryEmbedding:
    """The rotary embedding of every layer of a model.

    The model is run once. Every layer is shown one vector at all tokens, far apart in position, so that its keys differ
    by their rotation alone: the layout that takes this difference away is the layer's own. Nothing is assumed of layers
    that are handed an embedding and do not use it, of pairs of channels, or of senses of rotation.

    Parameters
    ----------
    model : PreTrainedModel
    decoder : Decoder

    Attributes
    ----------
    layers : dict of layer number to Rotary
        Of the layers that store keys and values.
    """

    def __init__(self, model: Any, decoder: Decoder) -> None:
        self._name = decoder.name
        self._calls: list[_Call] = []
        self._handed: dict[int, Any] = {}
        cache = self._run(model, decoder)
        self.layers = {
            index: _proven(cache.layers[index].keys[0], self._handed.get(index), index, decoder.name)
            for index in decoder.shapes
        }

    def _run(self, model: Any, decoder: Decoder) -> EditedCache:
        """One pass in which all tokens of a layer are one vector."""
        config = model.config.get_text_config()
        context = int(getattr(config, "max_position_embeddings", None) or _POSITIONS[-1] + 1)
        positions = torch.tensor([[p for p in _POSITIONS if p < context]], device=model.device)
        vector = torch.randn(int(config.hidden_size), generator=torch.Generator().manual_seed(0))

        def same(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            everywhere = vector.to(hidden).expand_as(hidden)
            return ((everywhere, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": everywhere})

        def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            named = {key: value for key, value in kwargs.items() if key not in ("x", "position_ids")}
            at = kwargs["position_ids"] if "position_ids" in kwargs else next(iter(args[1:]), None)
            if isinstance(at, Tensor):
                self._calls.append(_Call(module, tuple(at.shape), args[2:], named, output))

        def handed(index: int) -> Any:
            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._handed[index] = embedding_of(module, args, kwargs)

            return before

        cache = decoder.new_cache()
        with ExitStack() as stack, torch.inference_mode():
            for module in model.modules():
                if "rotary" in type(module).__name__.lower():
                    stack.callback(module.register_forward_hook(called, with_kwargs=True).remove)
            for layer in decoder.layers:
                stack.callback(layer.register_forward_pre_hook(same, with_kwargs=True).remove)
            for index, attention in decoder.attentions.items():
                stack.callback(attention.register_forward_pre_hook(handed(index), with_kwargs=True).remove)
            model(input_ids=torch.zeros_like(positions), position_ids=positions, past_key_values=cache, use_cache=True)
        return cache

    def rotation(self, layer: int, first: int, keys: Tensor) -> TokenRotation:
        """The rotation of new tokens.

        A module whose frequencies depend on the length of the sequence so far ("dynamic", "longrope") answers as in the
        model's own pass over the same tokens.

        Parameters
        ----------
        layer : int
        first : int
            Position of the first new token.
        keys : Tensor [batch, kv_heads, new tokens, head_dim]
            For their number, dtype and device.

        Raises
        ------
        ModelError
            If the embedding of the layer is not known, or does not come from a rotary module as it is.
        """
        rotary, tokens = self.layers[layer], keys.shape[2]
        if rotary.unproven is not None or not len(rotary.planes):
            return rotary.at(None, tokens, keys)
        positions = torch.arange(first, first + tokens, device=keys.device)
        return rotary.at(self._call(layer).at(positions, keys), tokens, keys)

    def check(self) -> None:
        """Whether :meth:`rotation` can answer in every layer; raises as it does."""
        for layer, rotary in self.layers.items():
            if rotary.unproven is not None:
                raise ModelError(rotary.unproven)
            if len(rotary.planes):
                self._call(layer)

    def _call(self, layer: int) -> _Call:
        """The call whose answer a layer's attention is handed."""
        for call in self._calls:
            if _is_embedding(call.output) and _equal(call.output, self._handed[layer]):
                return call
        raise ModelError(
            f"the rotary embedding of layer {layer} of {self._name} comes from no rotary module that kvgeom can ask for other "
            "positions; use a recipe without center for keys, or kvgeom's own passes"
        )


@dataclass(frozen=True)
class _Call:
    """How the model calls its rotary module: with positions, and with what else (a layer type, for instance)."""

    module: Any
    shape: tuple[int, ...]
    others: tuple[Any, ...]
    named: dict[str, Any]
    output: Any

    def at(self, positions: Tensor, like: Tensor) -> Any:
        """The embedding at ``positions [tokens]``, in the dtype of ``like``."""
        return self.module(like, positions.expand(*self.shape[:-1], -1), *self.others, **self.named)


def _equal(one: Any, other: Any) -> bool:
    pairs = zip(_angles(one), _angles(other), strict=True)
    return all(a.shape == b.shape and torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


def _proven(keys: Tensor, embedding: Any, layer: int, name: str) -> Rotary:
    """The layout under which keys ``[kv_heads, tokens, head_dim]`` of one vector depend least on their position, if they hardly do.

    What is left is measured against the channels that a layout turns: large ones beside them, as a bias makes them, would hide it.
    """
    tokens, head_dim = keys.shape[1:]
    moving = (keys != keys[:, :1]).any(1, keepdim=True)
    if keys.any() and not moving.any():  # of keys that are all 0, as some untrained models have them, nothing is known
        return _NOTHING
    allowed = max(_MOVES, _ROUNDINGS * torch.finfo(keys.dtype).eps)
    columns = _angles(embedding)[0].shape[-1] if embedding is not None else 0
    first = keys[:, :1].float()
    moves = {
        rotary: _moves(rotary.at(embedding, tokens, keys).row(0).unrotate(keys), first[..., rotary.planes.flatten()])
        for rotary in _layouts(columns, head_dim)
    }
    moves[_NOTHING] = _moves(keys, first * moving)
    best = min(moves, key=lambda rotary: moves[rotary])
    if (least := moves[best]) <= allowed:
        return best
    return Rotary(
        _NOTHING.planes,
        slice(0),
        unproven=f"keys in layer {layer} of {name} depend on their position (by {least:.2g} of their norm) in a way that kvgeom "
        "cannot take out, so that keys of different tokens cannot be compared; responses, perplexity and what rounds or "
        "reads values alone work, and so does the geometry before the rotary embedding (placement='paper')",
    )


def _moves(keys: Tensor, turned: Tensor) -> float:
    """How far keys ``[kv_heads, tokens, head_dim]`` lie from those of the first token, of what of it is turned ``[kv_heads, 1, channels]``."""
    away = (keys.float() - keys[:, :1].float()).norm(dim=-1)
    return float((away / turned.norm(dim=-1).clamp_min(1e-30)).amax())
