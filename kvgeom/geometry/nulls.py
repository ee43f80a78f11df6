"""What the ratio would be for subspaces that have nothing to do with safety."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvgeom.geometry.activations import ActivationStore
from kvgeom.geometry.subspace import Subspace, fit
from kvgeom.prompts.sets import PromptSet


def random_bases(channels: int, k: int, count: int, seed: int = 0) -> NDArray[np.float64]:
    """Orthonormal bases of uniformly random subspaces (null a).

    Parameters
    ----------
    channels, k, count : int
    seed : int

    Returns
    -------
    array [count, channels, k]
    """
    rng = np.random.default_rng(seed)
    return np.linalg.qr(rng.standard_normal((count, channels, k)))[0]


def contrast_spaces(space: Subspace, contrasts: Sequence[PromptSet]) -> dict[str, Subspace]:
    """Subspaces of contrasts between harmless requests (null b), found as the safety subspace was.

    Their prompts are run once, whatever number of contrasts they are part of, and once for all schemes.

    Parameters
    ----------
    space : Subspace
    contrasts : sequence of PromptSet
        The two classes stand in the places of harmful and harmless. No more of each are used than the safety subspace
        has: a direction from fewer prompts has more noise in it, and more noise looks like more signal.
    """
    size = min(len(space.prompts.harmful), len(space.prompts.harmless))
    small = [contrast.take(size) for contrast in contrasts]
    requests = tuple(dict.fromkeys(text for contrast in small for text in (*contrast.harmful, *contrast.harmless)))
    if not requests:
        return {}
    key = PromptSet("", requests, (), "").fingerprint
    store = space.contrast_activations.get(key)
    if store is None:
        store = space.contrast_activations[key] = ActivationStore(space.model, requests, space.placement)
        store.features("k")
    return {contrast.name: fit(store, contrast, space) for contrast in small}
