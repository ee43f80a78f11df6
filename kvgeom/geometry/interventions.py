"""Interventions: directions taken out of, or put into, the residual stream, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from kvgeom.models.model import ResidEdit

Point = Literal["pre", "attn", "post"]
CacheSite = Literal["k", "v"]
Changes = Mapping[tuple[int, CacheSite], "Change"]


def ablate(directions: Tensor) -> ResidEdit:
    """Take a direction out of everything that the residual stream receives, at every layer and token.

    Parameters
    ----------
    directions : Tensor [rows, d_model] or [d_model]
        One for each row of the batch, or one for all; scaled to unit length here.

    References
    ----------
    Directional ablation, Arditi et al., arXiv:2406.11717, section 2.4.
    """
    unit = directions / directions.norm(dim=-1, keepdim=True)
    return ablate_subspaces(unit.reshape(-1, unit.shape[-1], 1))


def ablate_subspaces(bases: Tensor) -> ResidEdit:
    """The same with all directions of a subspace.

    Parameters
    ----------
    bases : Tensor [rows, d_model, k]
        Orthonormal columns, or columns of 0; one basis for each row of the batch, or one for all.
    """

    def edit(layer: int, point: Point, x: Tensor) -> Tensor:
        u = bases.to(x.device, x.dtype)
        ablated: Tensor = x - (x @ u) @ u.mT
        return ablated

    return edit


def add(directions: Tensor, layers: int | Sequence[int]) -> ResidEdit:
    """Add a direction, as long as it is, to the residual stream after a layer, at every token.

    Parameters
    ----------
    directions : Tensor [rows, d_model] or [d_model]
    layers : int or sequence of int
        After which layer; one for each row, or one for all.

    References
    ----------
    Activation addition, Arditi et al., arXiv:2406.11717, section 2.4.
    """
    rows = directions.reshape(-1, 1, directions.shape[-1])
    after = torch.as_tensor([layers] if isinstance(layers, int) else list(layers))

    def edit(layer: int, point: Point, x: Tensor) -> Tensor:
        here = after == layer
        if point != "post" or not here.any():
            return x
        changed: Tensor = x + (rows * here[:, None, None]).to(x.device, x.dtype)
        return changed

    return edit


@dataclass(frozen=True)
class Change:
    """What is done to the keys or the values of one layer, at every token.

    ``x`` becomes ``x - U (U'x - U'level) + shift``, in the channels as they are without their rotary embedding.

    Several rows have their dimension in front.

    Attributes
    ----------
    basis : Tensor [channels, k]
        U, orthonormal; without columns nothing is taken out.
    level : Tensor [channels]
        What is left along the basis: the harmless mean, so that a direction loses what it says and not the offset that all
        tokens have along it.
    shift : Tensor [channels]
        What is added.
    """

    basis: Tensor
    level: Tensor
    shift: Tensor

    @classmethod
    def ablation(cls, basis: NDArray[np.floating], level: NDArray[np.floating]) -> Change:
        """Replace what lies along a basis ``[channels, k]`` by what a vector ``[channels]`` has there."""
        u, kept = (torch.from_numpy(np.array(x, dtype=np.float32)) for x in (basis, level))
        return cls(u, kept, torch.zeros_like(kept))

    @classmethod
    def addition(cls, shift: NDArray[np.floating]) -> Change:
        """Add a vector ``[channels]``."""
        added = torch.from_numpy(np.array(shift, dtype=np.float32))
        return cls(added.new_zeros(len(added), 0), torch.zeros_like(added), added)


@dataclass(eq=False)
class CacheDirections:
    """An edit that takes directions out of keys and values, or puts them in; see :class:`~kvgeom.models.cache.Edit`.

    Attributes
    ----------
    changes : mapping of (layer, site) to Change, or sequence of these
        What is not named stays as it is. One mapping for all rows of a batch, or one for each.
    where : {"cache", "projection"}
        In which frame the directions were found: keys as stored, with the rotary embedding taken out (it is turned on for
        each token here), or as projected.
    """

    changes: Changes | Sequence[Changes]
    where: str = "cache"
    prefill_reads_exact: bool = False

    def __post_init__(self) -> None:
        self._rotations: dict[int, Callable[[Tensor], Tensor]] = {}
        self._scales: dict[int, Tensor] = {}
        #: By layer and site: rows that change (None: all), and what is done to them.
        self._stacked: dict[tuple[int, CacheSite], tuple[list[int] | None, Change]] = {}
        if isinstance(self.changes, Mapping):
            self._stacked = {key: (None, _stack([change])) for key, change in self.changes.items()}
            return
        for key in dict.fromkeys(key for each in self.changes for key in each):
            rows = [row for row, each in enumerate(self.changes) if key in each]
            self._stacked[key] = rows, _stack([self.changes[row][key] for row in rows])

    @property
    def needs_rotation(self) -> bool:
        """Whether keys are edited that have a rotary embedding in them."""
        return self.where == "cache" and any(site == "k" for _, site in self._stacked)

    def set_rotation(self, layer: int, rotation: Callable[[Tensor], Tensor]) -> None:
        """What turns vectors to the positions of the next keys."""
        self._rotations[layer] = rotation

    @property
    def kind(self) -> Hashable:
        """Its own only."""
        return id(self)

    def __call__(self, layer: int, site: CacheSite, x: Tensor) -> Tensor:
        """``x`` ``[batch, kv_heads, tokens, head_dim]`` with the changes of its layer and site, in ``x``'s dtype."""
        if (layer, site) not in self._stacked:
            return x
        rows, change = self._stacked[layer, site]
        wide = (x if rows is None else x[rows]).to(torch.promote_types(x.dtype, torch.float32))
        shape = (x.shape[1], x.shape[3])
        turn = self._rotations.get(layer) if site == "k" and self.where == "cache" else None
        changed = wide
        if change.shift.any():
            changed = changed + _at_tokens(change.shift.to(wide), shape, turn, rows)
        for column in range(change.basis.shape[2]):
            u = change.basis[:, :, column].to(wide)
            put = _at_tokens(u, shape, turn, rows)
            # What lies along a direction is read with the inverse of what puts it in.
            reads = put if turn is None else put / self._scale(layer, turn, shape[1], wide)
            level = (u * change.level.to(wide)).sum(1)[:, None, None, None]
            changed = changed - ((wide * reads).sum((1, 3), keepdim=True) - level) * put
        if rows is None:
            return changed.to(x.dtype)
        out = x.clone()
        out[rows] = changed.to(x.dtype)
        return out

    def _scale(self, layer: int, turn: Callable[[Tensor], Tensor], size: int, like: Tensor) -> Tensor:
        """By how much a rotary embedding stretches each channel, squared: 1, but for YaRN's and its like."""
        if layer not in self._scales:
            every = torch.eye(size, dtype=like.dtype, device=like.device)
            self._scales[layer] = turn(every)[0, :, 0].to(like).square().sum(-1)
        return self._scales[layer]

    def rows(self, rows: Tensor) -> CacheDirections:
        """The same for some rows of the batch."""
        if isinstance(self.changes, Mapping):
            return self
        chosen = CacheDirections([self.changes[int(row)] for row in rows], self.where)
        chosen._rotations, chosen._scales = self._rotations, self._scales
        return chosen

    @staticmethod
    def stack(parts: Sequence[Any]) -> CacheDirections:
        """The same for several sequences, which all have this edit."""
        first: CacheDirections = parts[0]
        return first


def _stack(changes: Sequence[Change]) -> Change:
    """Changes of several rows as one, with a dimension of rows in front; bases are filled up with columns of 0."""
    most = max(change.basis.shape[1] for change in changes)
    bases = [torch.nn.functional.pad(change.basis, (0, most - change.basis.shape[1])) for change in changes]
    levels, shifts = ([getattr(change, name) for change in changes] for name in ("level", "shift"))
    return Change(torch.stack(bases), torch.stack(levels), torch.stack(shifts))


def _at_tokens(
    vectors: Tensor, shape: tuple[int, int], turn: Callable[[Tensor], Tensor] | None, rows: list[int] | None
) -> Tensor:
    """Vectors ``[rows, channels]`` as they are at every token, ``[rows, kv_heads, tokens or 1, head_dim]``.

    ``rows`` are those of the batch that they are for; None: one vector for all of them.
    """
    if turn is None:
        return vectors.reshape(len(vectors), shape[0], 1, shape[1])
    turned = turn(vectors.reshape(-1, shape[1])).to(vectors)
    turned = turned.reshape(len(turned), len(vectors), shape[0], *turned.shape[2:])
    if rows is None:
        return turned[:, 0]
    return turned[0] if len(turned) == 1 else turned[rows, range(len(rows))]
