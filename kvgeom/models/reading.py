"""Reading what a model computes of one prompt: keys, values, residual stream, queries and rotary embedding of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from kvgeom.models.cache import EditedCache
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.models.rotary import TokenRotation

if TYPE_CHECKING:
    from kvgeom.models.model import ResidEdit

Where = Literal["cache", "projection"]


@dataclass(frozen=True)
class LayerActivations:
    """What one layer computes of one prompt.

    Attributes
    ----------
    layer : int
    k, v : Tensor [1, kv_heads, tokens, head_dim]
        As stored in the cache (keys after their rotary embedding), or as projected.
    rotation : TokenRotation or None
        Rotary embedding that is in ``k``; None of keys as projected.
    resid : Tensor [1, 1, tokens, d_model] or None
        Residual stream after the layer, if it was asked for.
    q : Tensor [1, query_heads, tokens, head_dim] or None
        Queries before their rotary embedding, if they were asked for.
    """

    layer: int
    k: Tensor
    v: Tensor
    rotation: TokenRotation | None = None
    resid: Tensor | None = None
    q: Tensor | None = None

    @property
    def queries(self) -> Tensor:
        """Queries in the frame of ``k``, ``[query_heads, tokens, head_dim]`` in float32."""
        if self.q is None:
            raise ValueError("the queries were not read; read with queries=True")
        q = self.q[0].float()
        return q if self.rotation is None else self.rotation.rotate(q).float()

    def unrotated(self, keys: Tensor | None = None) -> Tensor:
        """Keys, or anything in their shape and frame, without the rotary embedding; those of the layer by default.

        In float32, whatever the model computes in.
        """
        keys = self.k if keys is None else keys
        return keys.float() if self.rotation is None else self.rotation.unrotate(keys)


@dataclass
class Prefix:
    """The tokens that some prompts begin with, read once for all of them. Made by :func:`read_prefix`.

    Attributes
    ----------
    ids : tuple of int
    where : {"cache", "projection"}
    cache : EditedCache
        What the model has stored of these tokens.
    """

    ids: tuple[int, ...]
    where: Where
    cache: EditedCache
    taken: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    rotations: dict[int, TokenRotation] = field(default_factory=dict)
    streams: dict[int, Tensor] = field(default_factory=dict)


def read_prefix(model: Model, prompts: Sequence[EncodedPrompt], where: Where = "cache") -> Prefix | None:
    """Run what all prompts begin with before their instructions, mostly a system prompt, once.

    None where they begin with nothing worth it (fewer than 4 tokens), where the model goes on from a cache token by token, and
    where what it computes of the beginning hangs on how long the whole is.
    """
    decoder = getattr(model, "decoder", None)  # of a backend that runs a transformers model
    if decoder is not None and max(map(len, prompts)) > decoder.batches_up_to:
        return None
    ids = list(prompts[0].ids[: min(prompt.instruction.start for prompt in prompts)])
    for prompt in prompts:
        same = next((n for n, (a, b) in enumerate(zip(ids, prompt.ids, strict=False)) if a != b), len(ids))
        ids = ids[:same]
    if len(ids) < 4 or model.geometry.stepwise:
        return None
    taken: dict[tuple[int, str], Tensor] = {}
    prefix = Prefix(tuple(ids), where, model.new_cache(_Tap(taken) if where == "projection" else None), taken)
    model.forward(
        ids,
        prefix.cache,
        on_resid=prefix.streams.__setitem__,
        on_rotation=prefix.rotations.__setitem__ if where == "cache" else None,
    )
    return prefix


def read(
    model: Model,
    prompt: EncodedPrompt,
    where: Where = "cache",
    *,
    resid: bool = False,
    queries: bool = False,
    edit_resid: ResidEdit | None = None,
    after: Prefix | None = None,
) -> Iterator[LayerActivations]:
    """Run one prompt and read every layer that stores keys and values, first to last. Costs one forward pass.

    Parameters
    ----------
    model : Model
    prompt : EncodedPrompt
    where : {"cache", "projection"}
        Keys and values as stored, or as they leave their projections.
    resid, queries : bool
        Whether to read the residual stream and the queries too.
    edit_resid : callable, optional
        As in :meth:`kvgeom.models.model.Model.forward`.
    after : Prefix, optional
        What the prompt begins with, if it has been read; only the rest is run. Queries are not kept of it.
    """
    taken: dict[tuple[int, str], Tensor] = {}
    rotations: dict[int, TokenRotation] = {}
    q: dict[int, Tensor] = {}
    streams: dict[int, Tensor] = {}

    tap = _Tap(taken) if where == "projection" else None
    cache = model.new_cache(tap) if after is None else after.cache.copy(tap)
    model.forward(
        prompt.ids if after is None else prompt.ids[len(after.ids) :],
        cache,
        on_resid=streams.__setitem__ if resid else None,
        on_rotation=rotations.__setitem__ if where == "cache" else None,
        on_query=q.__setitem__ if queries else None,
        edit_resid=edit_resid,
    )
    if after is not None:
        taken = {key: torch.cat([after.taken[key], x], dim=2) for key, x in taken.items()}
        streams = {layer: torch.cat([after.streams[layer], x], dim=1) for layer, x in streams.items()}
        rotations = {layer: after.rotations[layer].followed_by(x) for layer, x in rotations.items()}
    for layer, stored in cache.storing:
        k, v = (stored.keys, stored.values) if where == "cache" else (taken[layer, "k"], taken[layer, "v"])
        stream = streams[layer][None] if resid else None
        yield LayerActivations(layer, k, v, rotations.get(layer), stream, q.get(layer))


class _Tap:
    """An edit that changes nothing and keeps what passes the projections."""

    where = "projection"
    prefill_reads_exact = False

    def __init__(self, taken: dict[tuple[int, str], Tensor]) -> None:
        self._taken = taken

    def __call__(self, layer: int, site: Literal["k", "v"], x: Tensor) -> Tensor:
        self._taken[layer, site] = x
        return x

    @property
    def kind(self) -> int:
        return id(self)

    def rows(self, rows: Tensor) -> _Tap:
        return self

    @staticmethod
    def stack(parts: Sequence[Any]) -> _Tap:
        first: _Tap = parts[0]
        return first
