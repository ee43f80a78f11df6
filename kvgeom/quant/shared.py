"""Quantization of prompts in one padded batch that share scales, as the code released with arXiv:2606.09864 runs them."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe, Site
from kvgeom.quant.transforms import Key


class BatchQuantizer(Quantizer):
    """Rounds a batch as if it were one sequence, so that scales that span tokens span its rows and their padding too.

    Attributes
    ----------
    errors : dict of (layer, site) to list of float
        Mean squared error of every call, over all rows, padding included.
    """

    def __init__(self, recipe: Recipe, placement: Placement) -> None:
        super().__init__(recipe, placement)
        self.errors: dict[Key, list[float]] = {}

    def __call__(self, layer: int, site: Site, x: Tensor) -> Tensor:
        """What the cache holds of ``x``, ``[rows, kv_heads, new tokens, head_dim]``."""
        scheme = self.recipe.scheme(layer, site)
        if scheme is None:
            return x
        rows, _, tokens, _ = x.shape
        alone = tokens == 1 and self.placement.alone == "token"
        if alone or not scheme.spans_tokens:
            rounded = super().__call__(layer, site, x)
        else:
            together = super().__call__(layer, site, rearrange(x, "b h t d -> 1 h (b t) d"))
            rounded = rearrange(together, "1 h (b t) d -> b h t d", b=rows)
        self.errors.setdefault((layer, site), []).append(float((rounded - x).float().square().mean()))
        return rounded
