"""What is done to keys and values before rounding and undone after: ``center``, ``equalize``, and rotations of heads.

None of them changes what attention computes in full precision, and none costs memory per token: offsets and factors are
constants of the model, rotations are fixed. Yours is one more with :func:`register_transform`. Importing this module must
not import torch, which takes seconds: functions import it where they compute.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from kvgeom.checks import as_text, flag, one_of, whole
from kvgeom.errors import InputError, brief
from kvgeom.registry import check_free

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Key = tuple[int, Literal["k", "v"]]
K = TypeVar("K")
V = TypeVar("V")
#: Rotates vectors ``[kv_heads, head_dim]`` into ``[batch or 1, kv_heads, tokens, head_dim]``, each at its token's position.
Rotation = Callable[["Tensor"], "Tensor"]


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
        import torch

        if not isinstance(name, str) or name.strip():  # a blank one is odd, and harmless
            as_text("the name of constants", name)
        rotary = flag("rotary", rotary)
        if not isinstance(vectors, Mapping):
            raise InputError(
                f"vectors of {name!r} must be a mapping of (layer, site) to a tensor, got {brief(vectors)}"
            )
        for key, vector in vectors.items():
            pair = key if isinstance(key, tuple) and len(key) == 2 else (None, None)
            whole("layer of a vector", pair[0])
            one_of("site of a vector", pair[1], ("k", "v"))
            if not isinstance(vector, torch.Tensor):
                raise InputError(f"vectors of {name!r} must be tensors, got {brief(vector)} at {key}")
        if not vectors:
            raise InputError(f"{name!r} needs at least one vector; this model has none")
        digest = hashlib.sha256(f"{name}\n{rotary}".encode())
        for key in sorted(vectors):
            vector = vectors[key].detach().float().cpu().contiguous()
            if vector.ndim != 2 or not torch.isfinite(vector).all():
                raise InputError(
                    f"vectors of {name!r} must be finite and [kv_heads, head_dim], got {tuple(vector.shape)} at {key}"
                )
            digest.update(f"{key}{tuple(vector.shape)}".encode() + vector.numpy().tobytes())
        return cls(name, digest.hexdigest()[:16], dict(vectors), rotary)

    def __str__(self) -> str:
        return f"{self.name} {self.fingerprint[:8]}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Transform:
    """A change of coordinates before rounding, undone after it. Subclasses define ``enter`` and ``leave``.

    Attributes
    ----------
    name : str
        What follows ``+`` in the spelling of a scheme; lower-case letters, then digits.
    constants : {"offsets", "factors"} or None
        Which :class:`Statics` of the recipe it needs. ``offsets`` of keys are rotated to the position of their tokens where
        these are stored rotated; ``factors`` are not.
    """

    name: str
    constants: Literal["offsets", "factors"] | None = None

    def enter(self, x: Tensor, constant: Any) -> Tensor:
        """The values to round.

        Parameters
        ----------
        x : Tensor [batch, kv_heads, tokens, head_dim]
        constant : Tensor or None
            Broadcastable to ``x``; None for a transform without constants.
        """
        raise NotImplementedError

    def leave(self, y: Tensor, constant: Any) -> Tensor:
        """The inverse of :meth:`enter`."""
        raise NotImplementedError


_TRANSFORMS: dict[str, Transform] = {}


def register_transform(new: Transform) -> Transform:
    """Make a transform known to :meth:`Scheme.parse` and the quantizer; returns it.

    Raises
    ------
    InputError
        If its name is taken or cannot be part of a scheme's string.
    """
    check_free("a transform named", new.name, {"none", *_TRANSFORMS})
    if not re.fullmatch(r"[a-z]+[0-9]*", new.name):
        raise InputError(f"invalid transform name {new.name!r}; use lower-case letters, then digits")
    _TRANSFORMS[new.name] = new
    return new


def get_transform(name: str) -> Transform | None:
    """The transform of that name; None for ``"none"``.

    Raises
    ------
    InputError
        If there is none.
    """
    one_of("transform", name, ["none", *_TRANSFORMS])
    return _TRANSFORMS.get(name)


@dataclass(frozen=True)
class Frame:
    """The coordinates in which values are rounded: a transform, with its constant for these values.

    Without a transform, or where it needs a constant and there is none, values are rounded as they are.
    """

    transform: Transform | None
    constant: Tensor | None

    def enter(self, x: Tensor) -> Tensor:
        """The values to round."""
        return x if self.transform is None else self.transform.enter(x, self.constant)

    def leave(self, y: Tensor) -> Tensor:
        """The inverse of :meth:`enter`."""
        return y if self.transform is None else self.transform.leave(y, self.constant)


def frame(transform: str, constant: Tensor | None, like: Tensor) -> Frame:
    """The coordinates in which a scheme with this transform rounds.

    Parameters
    ----------
    transform : str
        Its name.
    constant : Tensor, optional
        An offset, or factors, broadcastable to the values; without it, a transform that needs one changes nothing.
    like : Tensor [batch, kv_heads, tokens, head_dim]
        What is to be rounded, for its device and precision.
    """
    import torch

    found = get_transform(transform)
    if found is None or found.constants is None:
        return Frame(found, None)
    if constant is None:
        return Frame(None, None)
    return Frame(found, constant.to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32))


class Center(Transform):
    """Subtract an offset, for instance the bias of the key projection."""

    def enter(self, x: Tensor, constant: Any) -> Tensor:
        """What is left without the offset."""
        found: Tensor = x - constant
        return found

    def leave(self, y: Tensor, constant: Any) -> Tensor:
        """Add it again."""
        found: Tensor = y + constant
        return found


class Equalize(Transform):
    """Divide each channel by its factor, so that all have about one size."""

    def enter(self, x: Tensor, constant: Any) -> Tensor:
        """Channels of one size."""
        found: Tensor = x / constant
        return found

    def leave(self, y: Tensor, constant: Any) -> Tensor:
        """Channels of their own sizes."""
        found: Tensor = y * constant
        return found


class Hadamard(Transform):
    """Rotate each head by a Hadamard matrix, of blocks no larger than the number in its name (64 for ``hadamard64``)."""

    def enter(self, x: Tensor, constant: Any) -> Tensor:
        """Rotated heads."""
        rotated: Tensor = _walsh(x, self._block(x)) * self._block(x) ** -0.5
        return rotated

    def leave(self, y: Tensor, constant: Any) -> Tensor:
        """The matrix is its own inverse."""
        return self.enter(y, constant)

    def _block(self, x: Tensor) -> int:
        size = x.shape[-1]
        limit = self.name.removeprefix("hadamard")
        return min(size & -size, int(limit)) if limit else size & -size


class RandomRotation(Transform):
    """Rotate each head by one orthogonal matrix, drawn uniformly from a fixed seed (Haar measure)."""

    def enter(self, x: Tensor, constant: Any) -> Tensor:
        """Rotated heads."""
        return self._product(x, _rotation(x))

    def leave(self, y: Tensor, constant: Any) -> Tensor:
        """Rotated back."""
        return self._product(y, _rotation(y).T)

    def _product(self, x: Tensor, matrix: Tensor) -> Tensor:
        # In double precision, rounded once: a token must come out the same alone as among others (see _walsh).
        return (x.to(matrix.dtype) @ matrix).to(x.dtype)


class RandomizedHadamard(Transform):
    """vLLM's: signs of a fixed seed, then the matrix of plus and minus ones, not normalized."""

    def enter(self, x: Tensor, constant: Any) -> Tensor:
        """Rotated heads, larger by the root of the matrix's size."""
        return _walsh(x * _signs(x), x.shape[-1] & -x.shape[-1])

    def leave(self, y: Tensor, constant: Any) -> Tensor:
        """Rotated back."""
        block = y.shape[-1] & -y.shape[-1]
        return _walsh(y, block) * _signs(y) / block


#: Transforms of kvgeom that turn a head, and change no norm in it but by one factor.
ROTATIONS = ("hadamard", "hadamard64", "hadamard32", "rotation", "rht")

register_transform(Center(name="center", constants="offsets"))
register_transform(Equalize(name="equalize", constants="factors"))
for _name in ROTATIONS[:3]:
    register_transform(Hadamard(name=_name))
register_transform(RandomRotation(name="rotation"))
register_transform(RandomizedHadamard(name="rht"))


def pair_factors(largest: Tensor, planes: Tensor | None = None) -> Tensor:
    """Factors for ``equalize`` that rotary embedding does not see: both channels of a rotated pair share one.

    Parameters
    ----------
    largest : Tensor [kv_heads, head_dim]
        Size of each channel, for instance its largest magnitude over a calibration set.
    planes : Tensor [planes, 2], optional
        The pairs of channels of a head that are rotated, as in :class:`kvgeom.models.rotary.TokenRotation`; none of values.

    Returns
    -------
    Tensor [kv_heads, head_dim]
        Positive, with geometric mean one in each head.
    """
    sizes = largest.clone().float()
    if planes is not None and len(planes):
        sizes[:, planes] = sizes[:, planes].amax(-1, keepdim=True)
    logs = sizes.clamp_min(1e-6).log()
    return (logs - logs.mean(1, keepdim=True)).exp()


def _walsh(x: Tensor, block: int) -> Tensor:
    """Products with Sylvester's matrix of ones and minus ones, block by block along the last dimension.

    By sums and differences of pairs: a matrix product may give one token other last digits than the same token among others,
    and a cache that is rounded as it grows must hold what one holds that is rounded at once.
    """
    import torch

    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    half = 1
    while half < block:
        pairs = wide.reshape(*wide.shape[:-1], -1, 2, half)
        first, second = pairs.unbind(-2)
        wide = torch.stack((first + second, first - second), -2).flatten(-3)
        half *= 2
    return wide.to(x.dtype)


#: How many draws are kept.
_KEPT = 512
_SIGNS: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
_ROTATIONS: dict[tuple[int, torch.device], Tensor] = {}


def remembered(cache: dict[K, V], key: K, make: Callable[[K], V]) -> V:
    """``cache[key]``, made when it is missing; the oldest entry goes when there are too many.

    A plain dict and a plain function: an edit, with all it refers to, must travel to where a remote model runs.
    """
    if key not in cache:
        if len(cache) >= _KEPT:
            cache.pop(next(iter(cache)), None)
        cache[key] = make(key)
    return cache[key]


def _signs(like: Tensor) -> Tensor:
    return remembered(_SIGNS, (like.shape[-1], like.device, like.dtype), _drawn)


def _drawn(key: tuple[int, torch.device, torch.dtype]) -> Tensor:
    import torch

    size, device, dtype = key
    seeded = torch.Generator().manual_seed(0x9E3779B9)
    return (2 * torch.bernoulli(torch.full((size,), 0.5), generator=seeded) - 1).to(device, dtype)


def _rotation(like: Tensor) -> Tensor:
    return remembered(_ROTATIONS, (like.shape[-1], like.device), _turned)


def _turned(key: tuple[int, torch.device]) -> Tensor:
    import numpy as np
    import torch

    size, device = key
    q, r = np.linalg.qr(np.random.default_rng((0x9E3779B9, size)).standard_normal((size, size)))
    # With these signs the matrix is uniformly distributed (Mezzadri 2007).
    turned = torch.from_numpy(q * np.sign(np.diag(r)))
    return turned.to(device, torch.float32 if device.type == "mps" else torch.float64)
