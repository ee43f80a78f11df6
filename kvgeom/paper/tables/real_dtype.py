"""Is the simulation what a cache of real codes gives?"""

from __future__ import annotations

import torch

from kvgeom.models.packed import PackedCache, check_packable
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, share
from kvgeom.progress import track
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.scheme import Scheme

SCHEMES = ("int8-asym-token", "fp8_e4m3", "int4-asym-token")


@paper_table("responses of a cache that stores codes, against the simulation", passes=lambda layers: 3 * len(SCHEMES))
def real_dtype(study: Study, protocol: Protocol) -> Measured:
    """Flips with keys and values stored as packed codes, and with the simulation that all other tables use.

    ``stored`` holds nothing but codes and scales, reads them back for every token, and is decoded token by token; its bytes are
    counted. The authors' own table is not released. Both protocols store as a cache does.
    """
    base, placement = study.base(), Placement.cache()
    conditions = {text: protocol.over(Scheme.parse(text), placement=placement) for text in SCHEMES}
    simulated = study.outcomes(conditions, title="simulated")
    rows: list[Row] = []
    n, exact = len(base.refused), study.model.geometry
    for text in SCHEMES:
        recipe = conditions[text].recipe
        check_packable(recipe, placement)
        labels, stored = [], 0
        for index in track(base.refused, f"stored as {text}", n):
            cache = PackedCache(exact.layers, Quantizer(recipe, placement))
            labels.append(_label(study, index, cache))
            stored = max(stored, cache.nbytes // max(1, cache.get_seq_length()))
        at: dict[str, int | str] = {"cache": text}
        ours = simulated.data.label.sel(recipe=text).values
        rows += [
            share(at, "flip, simulated", int((ours != "refused").sum()), n),
            share(at, "flip, stored", sum(label != "refused" for label in labels), n),
            share(at, "labels that agree", sum(a == b for a, b in zip(ours, labels, strict=True)), n, None),
            Row(at, "bytes of a token", stored, n=n, unit="bytes", published_at=None),
        ]
    return Measured(rows)


def _label(study: Study, index: int, cache: PackedCache) -> str:
    """What becomes of one prompt, decoded token by token as far as the judge reads."""
    base, model = study.base(), study.model
    new, tokens = list(base.prompts[index].ids), list[int]()
    with torch.inference_mode():
        while len(tokens) < base.longest(index):
            token = int(model.forward(new, cache)[-1].argmax())
            if token in model.stop_tokens:
                break
            tokens.append(token)
            new = [token]
    return base.judged(index, tokens)[1]
