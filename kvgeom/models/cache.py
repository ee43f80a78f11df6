"""A cache through which keys and values can be read and edited: where kvgeom and a model meet."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

from kvgeom.errors import InputError


class Edit(Protocol):
    """What is done to keys and values on their way into a cache.

    ``where`` says whether it sees them as stored (``"cache"``, keys after RoPE) or as projected
    (``"projection"``, keys before RoPE). An edit may also have what :class:`WindowedEdit` and :class:`RotaryEdit` have.
    """

    @property
    def where(self) -> str: ...

    @property
    def prefill_reads_exact(self) -> bool: ...

    @property
    def kind(self) -> Hashable:
        """Edits of equal kind do the same, each to its own sequences, and can be stacked."""
        ...

    def __call__(self, layer: int, site: Literal["k", "v"], x: Tensor) -> Tensor:
        """Return what to keep of ``x``, ``[batch, kv_heads, new tokens, head_dim]``."""
        ...

    def rows(self, rows: Tensor) -> Edit: ...

    @staticmethod
    def stack(parts: Sequence[Any]) -> Edit: ...


@runtime_checkable
class WindowedEdit(Protocol):
    """An edit that (if ``windowed``) keeps tokens as they come and changes them later, or never."""

    windowed: bool
    has_residual: bool

    def flush(self, layer: int, site: Literal["k", "v"], stored: Tensor, new: int) -> Tensor:
        """Return what to keep of ``stored``, one sequence's tokens so far, the last ``new`` of which have just come.

        With ``has_residual``, attention of this call still reads ``stored`` itself.
        """
        ...


@runtime_checkable
class RotaryEdit(Protocol):
    """An edit that (if ``needs_rotation``) must know the rotary embedding of the next keys."""

    needs_rotation: bool

    def set_rotation(self, layer: int, rotation: Callable[[Tensor], Tensor]) -> None:
        """``rotation`` makes ``[batch or 1, kv_heads, tokens, head_dim]`` of vectors ``[kv_heads, head_dim]``."""
        ...


def is_windowed(edit: Edit | None) -> bool:
    """Whether an edit keeps some tokens as they come."""
    return isinstance(edit, WindowedEdit) and edit.windowed


@dataclass(frozen=True)
class BatchedEdit:
    """Several edits in one batch, each on its own rows.

    A batch that grows from layer to layer (:meth:`kvgeom.models.model.Model.forward_branches`) has, in a layer, the
    rows of the first parts.

    Attributes
    ----------
    parts : tuple of Edit or None
        None leaves its rows as they are; all others have the same ``where`` and ``prefill_reads_exact``.
    sizes : tuple of int
        How many rows each part edits; one each by default.
    """

    parts: tuple[Edit | None, ...]
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.sizes:
            object.__setattr__(self, "sizes", (1,) * len(self.parts))

    @property
    def where(self) -> str:
        """That of the parts."""
        return next((part.where for part in self.parts if part is not None), "cache")

    @property
    def prefill_reads_exact(self) -> bool:
        """That of the parts."""
        return any(part is not None and part.prefill_reads_exact for part in self.parts)

    @property
    def kind(self) -> Hashable:
        """Its own only."""
        return id(self)

    def __call__(self, layer: int, site: Literal["k", "v"], x: Tensor) -> Tensor:
        """Every row through its own edit."""
        return torch.cat([x[at] if part is None else part(layer, site, x[at]) for part, at in self._places(len(x))])

    @property
    def windowed(self) -> bool:
        """Whether one of the parts is."""
        return any(is_windowed(part) for part in self.parts)

    @property
    def has_residual(self) -> bool:
        """That of the parts."""
        return any(getattr(part, "has_residual", False) for part in self.parts)

    def flush(self, layer: int, site: Literal["k", "v"], stored: Tensor, new: int) -> Tensor:
        """Every row through its own edit."""
        return torch.cat(
            [
                part.flush(layer, site, stored[at], new) if isinstance(part, WindowedEdit) else stored[at]
                for part, at in self._places(len(stored))
            ]
        )

    @property
    def needs_rotation(self) -> bool:
        """Whether one of the parts does."""
        return any(isinstance(part, RotaryEdit) and part.needs_rotation for part in self.parts)

    def set_rotation(self, layer: int, rotation: Callable[[Tensor], Tensor]) -> None:
        """Give every part the rotation of its own rows."""

        def own(vectors: Tensor, at: slice) -> Tensor:
            rotated = rotation(vectors)
            return rotated if len(rotated) == 1 else rotated[at]  # one for all: every row is at the same positions

        for part, at in self._places(sum(self.sizes)):
            if isinstance(part, RotaryEdit):
                part.set_rotation(layer, partial(own, at=at))

    def _places(self, rows: int) -> Iterator[tuple[Edit | None, slice]]:
        """Every part that has rows among the first ``rows``, and which."""
        first = 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            if first < rows:
                yield part, slice(first, first + size)
            first += size

    def rows(self, rows: Tensor) -> BatchedEdit:
        """The edits of some rows, in the order of the batch."""
        first, chosen = 0, []
        for part, size in zip(self.parts, self.sizes, strict=True):
            own = rows[(rows >= first) & (rows < first + size)] - first
            if len(own):
                chosen.append((part if part is None or len(own) == size else part.rows(own), len(own)))
            first += size
        return BatchedEdit(tuple(part for part, _ in chosen), tuple(size for _, size in chosen))

    @staticmethod
    def stack(parts: Sequence[BatchedEdit]) -> BatchedEdit:
        """The edits of several batches as one; neighbours that do the same to their rows become one edit."""
        flat = [(edit, size) for part in parts for edit, size in zip(part.parts, part.sizes, strict=True)]
        merged: list[tuple[Edit | None, int]] = []
        for _, run in itertools.groupby(flat, key=lambda item: item[0] and item[0].kind):
            edits, sizes = zip(*run, strict=True)
            merged.append((edits[0].stack(edits) if edits[0] and len(edits) > 1 else edits[0], sum(sizes)))
        return BatchedEdit(tuple(edit for edit, _ in merged), tuple(size for _, size in merged))


class EditedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer of an :class:`EditedCache` that stores keys and values.

    What a kind of layer holds beside them (states, keys of an index) stays exact: see :func:`kvgeom.models.decoder.edited`.
    """

    keys: Tensor  # None before the first token, which nothing here reads
    values: Tensor
    #: Whether caches of single sequences can be put together into a batch.
    stacks = True

    def __init__(self, index: int, edit: Edit | None, **own: Any) -> None:
        super().__init__(**own)  # type: ignore[no-untyped-call]
        self.index = index
        self.edit = edit

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values as edited, and return all that attention is to read."""
        edit = self.edit
        if edit is None or edit.where != "cache":
            return super().update(key_states, value_states, *args, **kwargs)
        first_call = self.get_seq_length() == 0
        if is_windowed(edit):
            stored = super().update(key_states, value_states, *args, **kwargs)
            new = key_states.shape[-2]
            self.keys = edit.flush(self.index, "k", self.keys, new)  # type: ignore[attr-defined]
            self.values = edit.flush(self.index, "v", self.values, new)  # type: ignore[attr-defined]
            reads_stored = edit.prefill_reads_exact if first_call else edit.has_residual  # type: ignore[attr-defined]
            return stored if reads_stored else (self.keys, self.values)
        stored = super().update(edit(self.index, "k", key_states), edit(self.index, "v", value_states), *args, **kwargs)
        return (key_states, value_states) if first_call and edit.prefill_reads_exact else stored


class EditedCache(Cache):
    """A transformers cache that passes all keys and values through an edit.

    Every layer keeps the whole sequence, sliding-window layers too: their mask hides what is out of the window. Layers that
    hold states instead, or nothing, are transformers' own.

    Parameters
    ----------
    layers : int or sequence of layers
        How many layers there are, all with keys and values; or one empty layer of its kind for each.
    edit : Edit, optional
        None stores everything as it is.
    """

    layers: list[EditedLayer]  # type: ignore[assignment]

    def __init__(self, layers: int | Sequence[Any], edit: Edit | None = None) -> None:
        kinds = [EditedLayer(index, None) for index in range(layers)] if isinstance(layers, int) else layers
        super().__init__(layers=[_rebuilt([kind], edit) for kind in kinds])
        self.edit = edit

    @classmethod
    def stack(cls, caches: Sequence[Self]) -> Self:
        """One batch out of caches of single sequences, padded on the left to the longest."""
        if not all(getattr(layer, "stacks", True) for cache in caches for layer in cache.layers):
            raise InputError(
                "packed caches store one sequence each and cannot be batched; feed their tokens with forward"
            )
        edits = [cache.edit for cache in caches if cache.edit is not None]
        edit = edits[0].stack(edits) if edits and not is_windowed(edits[0]) else None
        if edits and edit is None:  # tokens wait in each sequence for itself
            edit = BatchedEdit(tuple(edit.rows(torch.tensor([0])) for edit in edits))
        longest = max(cache.get_seq_length() for cache in caches)

        def padded(parts: Sequence[Tensor], grows: bool) -> Tensor:
            return torch.cat([_padded(part, longest) if grows else part for part in parts])

        return cls._of([_rebuilt(parts, edit, padded) for parts in zip(*(c.layers for c in caches), strict=True)], edit)

    @classmethod
    def _of(cls, layers: Sequence[Any], edit: Edit | None) -> Self:
        new = cls(0, edit)
        new.layers = list(layers)
        return new

    @property
    def storing(self) -> list[tuple[int, EditedLayer]]:
        """The layers that store keys and values, with their numbers."""
        return [(index, layer) for index, layer in enumerate(self.layers) if isinstance(layer, EditedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds."""
        return sum(holder[name].nbytes for layer in self.layers for holder, name, _ in _tensors(layer))

    def tokens_at(self, layer: int) -> int:
        """How many tokens the first layer that stores any, from ``layer`` on, has stored."""
        return next((one.get_seq_length() for index, one in self.storing if index >= layer), 0)

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences of the batch but ``rows``, in ascending order; each layer has those that have reached it."""
        for layer in self.layers:
            for holder, name, _ in _tensors(layer):
                x = holder[name]
                holder[name] = x[rows[rows < len(x)].to(x.device)]
        if self.edit is not None:
            self.edit = self.edit.rows(rows)
            for layer in self.layers:
                layer.edit = self.edit

    def row(self, row: int, length: int) -> EditedCache:
        """One sequence of a batch that ran under :class:`BatchedEdit`, cut to its first ``length`` tokens.

        In layers that a branch has not reached yet, its keys and values are those of row 0, which it branched off. States
        cannot be cut, so that ``length`` must be all tokens where a layer has some.
        """
        edit = self.edit.rows(torch.tensor([row])) if isinstance(self.edit, BatchedEdit) else self.edit

        def own(parts: Sequence[Tensor], grows: bool) -> Tensor:
            at = row if row < len(parts[0]) else 0
            one = parts[0][at : at + 1]
            # Copied, or the one sequence would hold on to the memory of the whole batch.
            return (one[..., :length, :] if grows else one).clone()

        return EditedCache._of([_rebuilt([layer], edit, own) for layer in self.layers], edit)

    def copy(self, edit: Edit | None = None) -> EditedCache:
        """A new cache with the same contents and another edit.

        Keys and values are shared, for they are never written in place; states are.
        """

        def same(parts: Sequence[Tensor], grows: bool) -> Tensor:
            return parts[0] if grows else parts[0].clone()

        return EditedCache._of([_rebuilt([layer], edit, same) for layer in self.layers], edit)


def _tensors(layer: Any) -> Iterator[tuple[dict[Any, Any], Any, bool]]:
    """Where a layer holds its tensors, each with whether it grows token by token (``[batch, ..., tokens, channels]``).

    What grows are attributes (keys, values, keys of an index); states, which stay as large as they are, lie in dictionaries.
    """
    own = vars(layer)
    for name, value in own.items():
        if isinstance(value, Tensor):
            yield own, name, True
        elif isinstance(value, dict):
            yield from ((value, key, False) for key, x in value.items() if isinstance(x, Tensor))


def _rebuilt(
    layers: Sequence[Any], edit: Edit | None, join: Callable[[Sequence[Tensor], bool], Tensor] | None = None
) -> Any:
    """A layer of the same kind, each of whose tensors ``join`` makes of those of some layers."""
    new = copy.copy(layers[0])
    for name, value in vars(new).items():
        if isinstance(value, dict):
            setattr(new, name, dict(value))
    new.edit = edit
    if join is not None:
        places = zip(*(list(_tensors(each)) for each in layers), strict=True)
        for (holder, name, grows), theirs in zip(list(_tensors(new)), places, strict=True):
            holder[name] = join([own[key] for own, key, _ in theirs], grows)
    return new


def _padded(x: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, length - x.shape[-2], 0))
