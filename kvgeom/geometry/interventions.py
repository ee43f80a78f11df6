"""Interventions: directions taken out of, or put into, the residual stream, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from kvgeom.models.model import ResidEdit

Point = Literal["pre", "attn", "post"]
CacheSite = Literal["k", "v"]


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


@dataclass(frozen=True, eq=False)
class CacheDirections:
    """An edit that takes directions out of keys and values, or puts them in; see :class:`~kvgeom.models.cache.Edit`.

    Attributes
    ----------
    changes : mapping of (layer, site) to Change
        What is not named stays as it is.
    where : {"cache", "projection"}
        In which frame the directions were found: keys as stored, with the rotary embedding taken out (it is turned on for
        each token here), or as projected.
    """

    changes: Mapping[tuple[int, CacheSite], Change]
    where: str = "cache"
    prefill_reads_exact: bool = False
    _rotations: dict[int, Callable[[Tensor], Tensor]] = field(default_factory=dict, repr=False)
    _scales: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def needs_rotation(self) -> bool:
        """Whether keys are edited that have a rotary embedding in them."""
        return self.where == "cache" and any(site == "k" for _, site in self.changes)

    def set_rotation(self, layer: int, rotation: Callable[[Tensor], Tensor]) -> None:
        """What turns vectors to the positions of the next keys."""
        self._rotations[layer] = rotation

    @property
    def kind(self) -> Hashable:
        """Its own only."""
        return id(self)

    def __call__(self, layer: int, site: CacheSite, x: Tensor) -> Tensor:
        """``x`` ``[batch, kv_heads, tokens, head_dim]`` with the change of its layer and site, in ``x``'s dtype."""
        change = self.changes.get((layer, site))
        if change is None:
            return x
        heads, size = x.shape[1], x.shape[3]
        turn = self._rotations.get(layer) if site == "k" and self.where == "cache" else None

        def by_head(vector: Tensor) -> Tensor:
            return vector.to(x.device, wide.dtype).reshape(heads, size)

        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        changed = wide
        if change.shift.any():
            added = by_head(change.shift)
            changed = changed + (added[None, :, None] if turn is None else turn(added))
        for column in change.basis.T:
            u = by_head(column)
            if turn is None:
                put = reads = u[None, :, None]
            else:
                put = turn(u)
                reads = put / self._scale(layer, turn, u)
            level = (column * change.level).sum().to(x.device)
            changed = changed - ((wide * reads).sum((1, 3), keepdim=True) - level) * put
        return changed.to(x.dtype)

    def _scale(self, layer: int, turn: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
        """By how much a rotary embedding stretches each channel, squared; 1 for all that only turn, and not for YaRN's.

        What lies along a direction in keys that are turned back is read with the inverse of what puts it in.
        """
        if layer not in self._scales:
            every = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
            lengths = [turn(one.expand_as(like))[0, 0, 0].float().square().sum() for one in every]
            self._scales[layer] = torch.stack(lengths).to(like.dtype)
        return self._scales[layer]

    def rows(self, rows: Tensor) -> CacheDirections:
        """The same for some rows: all rows are edited alike."""
        return self

    @staticmethod
    def stack(parts: Sequence[Any]) -> CacheDirections:
        """The same for several sequences, which all have this edit."""
        first: CacheDirections = parts[0]
        return first
