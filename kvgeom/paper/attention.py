"""Layers by their attention: the two rules of the released code."""

from __future__ import annotations

from typing import Literal

import numpy as np

from kvgeom.models.attention import scores, weights
from kvgeom.models.reading import read
from kvgeom.paper.study import Study

AttentionRuleName = Literal["peak", "entropy"]
#: So many prompts set the order.
CALIBRATION = 20


def by_attention(study: Study, rule: AttentionRuleName, suite: str = "custom") -> list[int]:
    """Layers, first the one that the rule calls most important.

    ``peak``: the largest attention weight of each query. ``entropy``: the entropy (nats) of its attention. Each is a mean over
    heads, queries and 20 prompts, and the layer with the most of it comes first; where heads attend sharply, the two are
    nearly the reverse of each other. Costs one pass a prompt.
    """
    base = study.base(suite)
    key = {"measure": "attention by layer", "prompts": CALIBRATION}
    found: dict[str, list[float]] = base.known(key, lambda: _measured(study, suite))
    order = np.argsort(-np.array(found[rule]), kind="stable")
    return [study.model.geometry.stores[int(n)] for n in order]


def _measured(study: Study, suite: str) -> dict[str, list[float]]:
    model, prompts = study.model, study.base(suite).prompts[:CALIBRATION]
    sums = np.zeros((2, len(model.geometry.stores)))
    for prompt in prompts:
        for row, found in enumerate(read(model, prompt, queries=True)):
            q, k, rule = found.queries.float(), found.k[0].float(), model.attention(found.layer)
            paid = weights(scores(q, k.repeat_interleave(q.shape[0] // k.shape[0], 0), rule), rule)
            entropy = -(paid * paid.clamp_min(1e-10).log()).sum(-1)
            sums[:, row] += float(paid.amax(-1).mean()), float(entropy.mean())
    peak, entropies = (sums / len(prompts)).tolist()
    return {"peak": peak, "entropy": entropies}
