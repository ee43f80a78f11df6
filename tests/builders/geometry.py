"""Classes of vectors and their rounding errors: drawn, and read off a transformers model by hand."""

from __future__ import annotations

import numpy as np
import torch

import kvgeom
from kvgeom.geometry.activations import tokens_at
from kvgeom.geometry.ratio import random_bases
from kvgeom.models.hf import HFModel
from kvgeom.models.rotary import TokenRotation
from kvgeom.prompts.sets import PromptSet
from kvgeom.quant.fake_quantize import fake_quantize
from kvgeom.quant.scheme import Scheme
from tests.builders.requests import PAIRS
from tests.builders.rotary import rotate
from tests.builders.tiny import tiny_model


def synthetic(seed: int, channels: int = 12, k: int = 1, tokens: int = 4000) -> dict[str, np.ndarray]:
    """Classes at +-gap/2 around a mean, isotropic spread, correlated noise; the first half of the tokens is harmful."""
    rng = np.random.default_rng(seed)
    gap, mean = rng.standard_normal(channels), 3 * rng.standard_normal(channels)
    sign = np.where(np.arange(tokens) < tokens // 2, 0.5, -0.5)
    x = mean + sign[:, None] * gap + 0.3 * rng.standard_normal((tokens, channels))
    e = rng.standard_normal((tokens, channels)) @ np.diag(rng.uniform(0.1, 1.0, channels))
    basis = (gap / np.linalg.norm(gap))[:, None]
    if k > 1:
        basis = np.linalg.qr(np.column_stack([gap, rng.standard_normal((channels, k - 1))]))[0]
    return {"x": x, "e": e, "gap": gap, "mean": mean, "basis": basis, "null": random_bases(channels, k, 50, seed + 1)}


def by_hand(
    model: HFModel, layer: int, site: str, position: str, scheme: Scheme, prompts: PromptSet = PAIRS
) -> dict[str, np.ndarray]:
    """Vectors and rounding errors of one layer and site, from a run of the transformers model itself."""
    rows: dict[str, list[np.ndarray]] = {"harmful": [], "harmless": []}
    errors = []
    for label in rows:
        for prompt in model.encode(getattr(prompts, label)):
            cache = model.new_cache()
            angles: dict[int, TokenRotation] = {}
            resid: dict[int, torch.Tensor] = {}
            model.forward(
                prompt.ids,
                cache,
                on_rotation=angles.__setitem__,
                on_resid=resid.__setitem__,
            )
            stored = {"k": cache.layers[layer].keys, "v": cache.layers[layer].values, "resid": resid[layer][None]}
            x = stored[site]
            e = fake_quantize(x, scheme) - x
            if site == "k":  # turn back by the opposite angle
                cos, sin = (torch.cat([t, t], dim=-1) for t in (angles[layer].cos, angles[layer].sin))
                x, e = (rotate(t, cos, -sin) for t in (x, e))
            at = tokens_at(prompt, position)
            flat = [t[0].permute(1, 0, 2).flatten(1)[at].double().numpy() for t in (x, e)]
            rows[label].append(flat[0])
            errors.append(flat[1])
    gap = np.mean([r.mean(0) for r in rows["harmful"]], 0) - np.mean([r.mean(0) for r in rows["harmless"]], 0)
    pairs = [bad.mean(0) - good.mean(0) for bad, good in zip(rows["harmful"], rows["harmless"], strict=True)]
    x = np.concatenate([*rows["harmful"], *rows["harmless"]])
    return {"x": x, "e": np.concatenate(errors), "gap": gap, "pairs": np.array(pairs)}


def refusing(space_seed: int = 1):  # type: ignore[no-untyped-def]
    """A space and tokens R such that of 7 harmful prompts the 5th, of 7 harmless ones the 3rd is on the wrong side."""
    model = tiny_model(seed=space_seed)
    letters = "abcdefghijklmnopqrstuvwx"
    words = [f"{a}{b} {c}" for a, b, c in zip(letters, letters[3:], letters[7:], strict=False)]
    first = {
        word: int(model.forward(prompt.ids)[-1].argmax())
        for word, prompt in zip(words, model.encode(words), strict=True)
    }
    tokens = set(sorted(set(first.values()), key=list(first.values()).count)[-2:])
    yes, no = ([word for word in words if (first[word] in tokens) == inside] for inside in (True, False))
    harmful, harmless = [*yes[:4], no[0], *yes[4:6]], [*no[1:3], yes[6], *no[3:7]]
    assert len(harmful) == len(harmless) == 7
    return kvgeom.subspace(
        model, PromptSet("split", tuple(harmful), tuple(harmless), "letters"), progress=False
    ), tokens
