"""What is done to keys and values before rounding and undone after: ``center``, ``equalize``, and rotations of heads.

None of them changes what attention computes in full precision, and none costs memory per token: offsets and factors are
constants of the model, rotations are fixed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from scipy.linalg import hadamard as sylvester
from torch import Tensor

from kvgeom.errors import InputError
from kvgeom.quant.scheme import Scheme

Key = tuple[int, Literal["k", "v"]]
K = TypeVar("K")
V = TypeVar("V")
#: Rotates vectors ``[kv_heads, head_dim]`` into ``[batch or 1, kv_heads, tokens, head_dim]``, each at its token's position.
Rotation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Statics:
    """Constant vectors of a model that ``center`` subtracts or ``equalize`` divides by, free of position.

    Two of them are equal if their name and content are; the vectors themselves stay out of ``==`` and ``hash``.

    Attributes
    ----------
    name : str
        Where they come from, for instance ``"key bias"``.
    fingerprint : str
        Hash of all the rest; made by :meth:`of`.
    vectors : mapping of (layer, "k" or "v") to Tensor [kv_heads, head_dim]
        A site without one is rounded as it is.
    rotary : bool
        Whether offsets of keys must be rotated to a token's position before they fit the keys that a cache stores.
    """

    name: str
    fingerprint: str
    vectors: Mapping[Key, Tensor] = field(compare=False, repr=False)
    rotary: bool = False

    @classmethod
    def of(cls, name: str, vectors: Mapping[Key, Tensor], *, rotary: bool = False) -> Statics:
        """Name some vectors.

        Raises
        ------
        InputError
            If there are none, or one is not a finite matrix ``[kv_heads, head_dim]``.
        """
        if not vectors:
            raise InputError(f"{name} was asked, but there are no vectors of it; this model has none")
        digest = hashlib.sha256(f"{name}\n{rotary}".encode())
        for key in sorted(vectors):
            vector = vectors[key].detach().float().cpu().contiguous()
            if vector.ndim != 2 or not torch.isfinite(vector).all():
                raise InputError(
                    f"{name} of {key} has shape {tuple(vector.shape)} or is not finite; give [kv_heads, head_dim]"
                )
            digest.update(f"{key}{tuple(vector.shape)}".encode() + vector.numpy().tobytes())
        return cls(name, digest.hexdigest()[:16], dict(vectors), rotary)

    def __str__(self) -> str:
        return f"{self.name} {self.fingerprint[:8]}"


@dataclass(frozen=True)
class Frame:
    """The way into the coordinates in which values are rounded, and back."""

    enter: Callable[[Tensor], Tensor]
    leave: Callable[[Tensor], Tensor]


def frame(scheme: Scheme, vector: Tensor | None, like: Tensor) -> Frame:
    """The coordinates in which ``scheme`` rounds.

    Parameters
    ----------
    scheme : Scheme
    vector : Tensor, optional
        What ``center`` subtracts (broadcastable to the values) or ``equalize`` divides by (``[kv_heads, head_dim]``);
        without it, these change nothing.
    like : Tensor [batch, kv_heads, tokens, head_dim]
        What is to be rounded, for its device and head_dim.
    """
    if scheme.transform in ("hadamard", "hadamard64", "rht"):
        return _rotation(scheme.transform, like.shape[-1])
    if vector is None:
        return Frame(lambda x: x, lambda x: x)
    vector = vector.to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)
    if scheme.transform == "center":
        return Frame(lambda x: x - vector, lambda x: x + vector)
    factors = vector[:, None]
    return Frame(lambda x: x / factors, lambda x: x * factors)


def pair_factors(largest: Tensor, rotary_dim: int) -> Tensor:
    """Factors for ``equalize`` that rotary embedding does not see: both channels of a rotated pair share one.

    Parameters
    ----------
    largest : Tensor [kv_heads, head_dim]
        Size of each channel, for instance its largest magnitude over a calibration set.
    rotary_dim : int
        How many channels of a head are rotated, in halves (channel i with i + rotary_dim / 2); 0 for values.

    Returns
    -------
    Tensor [kv_heads, head_dim]
        Positive, with geometric mean one in each head.
    """
    sizes = largest.clone().float()
    half = rotary_dim // 2
    if half:
        pair = torch.maximum(sizes[:, :half], sizes[:, half:rotary_dim])
        sizes[:, :rotary_dim] = torch.cat([pair, pair], dim=1)
    logs = sizes.clamp_min(1e-6).log()
    return (logs - logs.mean(1, keepdim=True)).exp()


def hadamard_matrix(size: int, largest: int | None = None) -> Tensor:
    """Orthonormal and symmetric: Sylvester's matrix of the largest power of two that divides ``size``, along the diagonal.

    With ``largest``, a power of two, blocks are no larger than that.
    """
    block = min(size & -size, largest or size)
    return torch.kron(torch.eye(size // block).double(), torch.from_numpy(sylvester(block)).double() / block**0.5)


#: How many matrices, and how many draws, are kept.
_KEPT = 512
_MATRICES: dict[tuple[str, int, torch.device, torch.dtype], Tensor] = {}


def remembered(cache: dict[K, V], key: K, make: Callable[[K], V]) -> V:
    """``cache[key]``, made when it is missing; the oldest entry goes when there are too many.

    A plain dict and a plain function: an edit, with all it refers to, must travel to where a remote model runs.
    """
    if key not in cache:
        if len(cache) >= _KEPT:
            cache.pop(next(iter(cache)), None)
        cache[key] = make(key)
    return cache[key]


def _matrix(kind: str, like: Tensor) -> Tensor:
    """Orthonormal; for ``rht`` of ones and minus ones."""
    return remembered(_MATRICES, (kind, like.shape[-1], like.device, like.dtype), _made)


def _made(key: tuple[str, int, torch.device, torch.dtype]) -> Tensor:
    kind, size, device, dtype = key
    matrix = hadamard_matrix(size, 64 if kind == "hadamard64" else None)
    return (matrix.sign() if kind == "rht" else matrix).to(device, dtype)


def _rotation(kind: str, size: int) -> Frame:
    if kind != "rht":
        return Frame(lambda x: x @ _matrix(kind, x), lambda x: x @ _matrix(kind, x))
    # vLLM's randomized one: signs of a fixed seed, then the matrix of plus and minus ones, not normalized.
    seeded = torch.Generator().manual_seed(0x9E3779B9)
    signs = 2 * torch.bernoulli(torch.full((size,), 0.5), generator=seeded) - 1
    return Frame(
        lambda x: (x * signs.to(x)) @ _matrix(kind, x),
        lambda x: (x @ _matrix(kind, x)) * signs.to(x) / (size & -size),
    )
