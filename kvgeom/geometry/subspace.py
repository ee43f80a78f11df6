"""The subspace in which harmful and harmless requests differ, at every layer and site."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvgeom.errors import InputError
from kvgeom.geometry.capture import SITES, positions, site_width, stack_positions, watch
from kvgeom.models.load import load
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.progress import track
from kvgeom.prompts.sets import PromptSet, calibration
from kvgeom.quant.placement import Placement
from kvgeom.refusal.direction import Separation, difference_of_means, separation

if TYPE_CHECKING:
    from kvgeom.geometry.sensitivity import Sensitivity
    from kvgeom.quant.scheme import Scheme

#: A class difference smaller than this share of the mean square is rounding error of the arithmetic, not signal.
COINCIDENT = 1e-10


@dataclass(frozen=True)
class Direction:
    """The safety subspace of one layer and site.

    Attributes
    ----------
    position : str
        Tokens at which the classes are best separated.
    gap : array [channels]
        Mean harmful minus mean harmless vector there.
    basis : array [channels, k]
        Orthonormal.
    separation : Separation
        Cross-validated, along ``gap``.
    defined : bool
        False where the classes coincide at every position.
    """

    position: str
    gap: NDArray[np.float64]
    basis: NDArray[np.float64]
    separation: Separation
    defined: bool


@dataclass(frozen=True)
class Subspace:
    """Safety subspaces of all layers and sites of a model; made by :func:`subspace`.

    Attributes
    ----------
    model : Model
    harmful, harmless : tuple of EncodedPrompt
    placement : Placement
    k : int
        Dimensions of each subspace.
    directions : dict of (layer, site) to Direction
    positions : tuple of str
        Positions that were looked at.
    prompts : PromptSet
    """

    model: Model
    harmful: tuple[EncodedPrompt, ...]
    harmless: tuple[EncodedPrompt, ...]
    placement: Placement
    k: int
    directions: dict[tuple[int, str], Direction] = field(repr=False)
    positions: tuple[str, ...]
    prompts: PromptSet

    def sensitivity(
        self, scheme: Scheme | None = None, *, noise_pairs: int | None = None, progress: bool = True, seed: int = 0
    ) -> Sensitivity:
        """How exposed the subspace is to the rounding error of ``scheme``.

        Costs one forward pass over the prompts, or over ``noise_pairs`` harmful and as many harmless ones.
        See :func:`kvgeom.geometry.sensitivity.measure`.
        """
        from kvgeom.geometry.sensitivity import measure

        return measure(self, scheme, noise_pairs=noise_pairs, progress=progress, seed=seed)

    def meta(self) -> dict[str, Any]:
        """What made it, in JSON types."""
        return {
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "placement": str(self.placement),
            "prompts": self.prompts.fingerprint,
            "k": self.k,
            "kv_heads": self.model.geometry.kv_heads,
            "head_dim": self.model.geometry.head_dim,
        }


def subspace(
    model: Any,
    prompts: PromptSet | None = None,
    *,
    k: int = 1,
    placement: Placement | None = None,
    progress: bool = True,
    **load_options: Any,
) -> Subspace:
    """Find where harmful and harmless requests differ in keys, values and residual stream.

    At each layer and site the difference of class means is taken at the instruction's tokens (their mean) and at
    every template token after it. ``k=1`` keeps the best separated position; ``k > 1`` the leading right singular
    vectors of all these differences. Costs one forward pass over the prompts.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts : PromptSet, optional
        Needs harmful and harmless requests; the calibration set by default.
    k : int
    placement : Placement, optional
        Which keys and values are meant; as stored in the cache by default (rotary embedding taken out again).

    Raises
    ------
    InputError
        If a class has fewer than two prompts, or ``k`` exceeds the number of positions.

    Examples
    --------
    >>> kvgeom.subspace("demo").sensitivity().plot()  # doctest: +SKIP
    """
    loaded = load(model, **load_options)
    prompts = prompts or calibration()
    if min(len(prompts.harmful), len(prompts.harmless)) < 2:
        raise InputError(
            f"prompt set {prompts.name!r} has {len(prompts.harmful)} harmful and {len(prompts.harmless)} harmless requests; "
            "a subspace needs at least two of each"
        )
    harmful, harmless = tuple(loaded.encode(prompts.harmful)), tuple(loaded.encode(prompts.harmless))
    encoded = [*harmful, *harmless]
    names = positions(encoded)
    if not 1 <= k <= len(names):
        raise InputError(f"k={k} was asked, but {len(names)} positions give at most as many dimensions")
    placement = placement or Placement()
    features = _features(loaded, encoded, names, placement, progress)
    is_harmful = np.arange(len(encoded)) < len(harmful)
    directions = {key: _direction(x.numpy(), is_harmful, names, k) for key, x in features.items()}
    return Subspace(loaded, harmful, harmless, placement, k, directions, tuple(names), prompts)


def _features(
    model: Model, prompts: list[EncodedPrompt], names: list[str], placement: Placement, progress: bool
) -> dict[tuple[int, str], torch.Tensor]:
    """Mean vector of every prompt at every position, ``[prompts, positions, channels]`` for each layer and site."""
    shape = (len(prompts), len(names))
    features = {
        (layer, site): torch.empty(*shape, site_width(model, site))
        for layer in range(model.geometry.layers)
        for site in SITES
    }
    for row, prompt in enumerate(track(prompts, "safety subspace", len(prompts), progress)):

        def see(layer: int, site: str, x: torch.Tensor, flat: Any, row: int = row, prompt: Any = prompt) -> None:
            features[layer, site][row] = stack_positions(flat(x), prompt, names).cpu()

        watch(model, prompt, placement, see)
    return features


def _direction(features: NDArray[np.float32], harmful: NDArray[np.bool_], names: Iterable[str], k: int) -> Direction:
    x = features.astype(np.float64)
    gaps = difference_of_means(x, harmful)
    defined = (gaps**2).sum(-1) > COINCIDENT * (x**2).sum(-1).mean(0)
    found = {index: separation(x[:, index], harmful) for index in map(int, np.flatnonzero(defined))} or {
        0: Separation(0.5, 1.0, 0.0)
    }
    best = int(max(found, key=lambda index: (found[index].auroc, found[index].effect)))
    gap = gaps[best]
    if k == 1 or not defined.any():
        norm = np.linalg.norm(gap)
        basis = (gap / norm if norm > 0 else gap)[:, None]
    else:
        basis = np.linalg.svd(gaps[defined], full_matrices=False)[2][:k].T
    return Direction(list(names)[best], gap, basis, found[best], bool(defined[best]))
