"""How large the keys of the critical layer are."""

from __future__ import annotations

import torch

from kvgeom.models.reading import read
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import LAYER_BITS, Study
from kvgeom.paper.table import Row
from kvgeom.quant.fake_quantize import fake_quantize
from kvgeom.quant.scheme import Scheme


@paper_table("size and outliers of the keys of the critical layer", passes=lambda layers: layers / 2 + 1)
def activation_stats(study: Study, protocol: Protocol) -> Measured:
    """Largest value, outliers and rounding error of the critical layer's keys, over the tokens of all prompts together.

    Outliers are values with ``|x| > |mean| + 3 sd``. ``released``: keys as projected. ``faithful``: as a cache stores them.
    """
    critical, base = study.critical(protocol), study.base()
    where = "projection" if protocol.mode == "released" else "cache"
    parts = [
        next(one for one in read(base.model, prompt, where) if one.layer == critical.first).k[0]  # type: ignore[arg-type]
        for prompt in base.prompts
    ]
    keys = torch.cat(parts, dim=1).float()
    size, border = keys.abs(), float(keys.mean().abs() + 3 * keys.std())
    outlying = size > border
    rounded = fake_quantize(keys[None], Scheme(LAYER_BITS, True, "tensor"))[0]
    at, n = {"layer": critical.first}, len(base.prompts)
    magnitude = float(size[outlying].mean()) if bool(outlying.any()) else float("nan")
    rows = [
        Row(at, "largest value", float(size.max()), n=n, unit="activation", published_at={}),
        Row(at, "mean of the outliers", magnitude, n=n, unit="activation", published_at={}),
        Row(
            at,
            "MSE at 3 bits",
            float((rounded - keys).square().mean()),
            n=n,
            unit="squared activation",
            published_at={},
        ),
        Row(at, "outliers", float(outlying.float().mean()), n=n, unit="share of values", published_at={}),
        Row(at, "channels", keys.shape[0] * keys.shape[2], n=n, unit="channels", published_at={}),
        Row(at, "channels on one side of 0", one_sided(keys), n=n, unit="share of channels", published_at=None),
    ]
    return Measured(rows, (critical.note,))


def one_sided(keys: torch.Tensor) -> float:
    """Share of the channels of ``[heads, tokens, head_dim]`` in which no two values have different signs."""
    low, high = keys.amin(1), keys.amax(1)
    return float(((low > 0) | (high < 0)).float().mean())
