"""Random perturbations of the size of a rounding error: what such an error would do if its direction did not matter."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

#: Channel orders and signs that were drawn before. A plain dict: an edit must travel to where a remote model runs.
_DRAWN: dict[tuple[int, int, str, int], tuple[Tensor, Tensor]] = {}


def scattered(error: Tensor, seed: int, layer: int, site: str) -> Tensor:
    """The same error with its channels in a random order and with random signs.

    Order and signs are one draw for each layer and site and the same for all tokens, so that a later token is perturbed
    alike whether it comes alone or in a pass with others.

    Parameters
    ----------
    error : Tensor [batch, kv_heads, tokens, head_dim]
    seed : int
    layer, site
        Each has a draw of its own.

    Returns
    -------
    Tensor [batch, kv_heads, tokens, head_dim]
        Of the same norm at every token.
    """
    heads = error.shape[1]
    order, signs = _drawn(seed, layer, site, heads * error.shape[3])
    flat = rearrange(error, "b h t d -> b t (h d)")[..., order.to(error.device)] * signs.to(error)
    return rearrange(flat, "b t (h d) -> b h t d", h=heads)


def _drawn(seed: int, layer: int, site: str, channels: int) -> tuple[Tensor, Tensor]:
    key = (seed, layer, site, channels)
    if key not in _DRAWN:
        rng = np.random.default_rng((seed, layer, "kv".index(site)))
        _DRAWN[key] = torch.from_numpy(rng.permutation(channels)), torch.from_numpy(rng.choice([-1.0, 1.0], channels))
    return _DRAWN[key]
