"""Do refusals flip when responses are sampled?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.condition import Condition
from kvgeom.evaluation.respond import Sampler, respond
from kvgeom.paper.cells import widths
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, share
from kvgeom.progress import track
from kvgeom.quant.quantizer import Quantizer
from kvgeom.stats import bootstrap_means

BITS = (6, 4)
TEMPERATURE, TOP_P, SEEDS = 0.6, 0.9, (0, 1, 2)
_Bools = NDArray[np.bool_]


@paper_table(
    "refusals and flips of sampled responses", suites=["advbench"], passes=lambda layers: len(SEEDS) * (len(BITS) + 1)
)
def temperature(study: Study, protocol: Protocol) -> Measured:
    """Refusals at temperature 0.6 (top-p 0.9) under three seeds, with an exact cache and at 6 and 4 bits, and what flips.

    A flip is a request that one seed lets the exact cache refuse and the rounded one not. Every prompt is read by itself.
    """
    base = study.base("advbench")
    caches: dict[str, Condition | None] = {"16": None, **widths(protocol, BITS)}
    work = [(name, seed) for name in caches for seed in SEEDS]
    refused: dict[tuple[str, int], _Bools] = {}
    for name, seed in track(work, "sampled responses", len(work)):
        condition = caches[name]
        key = {
            "measure": "sampled",
            "seed": seed,
            "temperature": TEMPERATURE,
            "top_p": TOP_P,
            "bits": name,
            "mode": protocol.mode,
        }
        labels = base.known(key, partial(_labels, base, condition, seed))
        refused[name, seed] = np.array(labels) == "refused"
    rows: list[Row] = []
    for name in caches:
        rows += _rows(
            int(name), {seed: refused["16", seed] for seed in SEEDS}, {seed: refused[name, seed] for seed in SEEDS}
        )
    return Measured(rows, ("The intervals over all seeds resample requests, each with what it says under every seed.",))


def _labels(base: Baseline, condition: Condition | None, seed: int) -> list[str]:
    """What the judge says of one sampled response to each prompt."""
    edit = None
    if condition is not None:
        edit = Quantizer(condition.recipe, replace(condition.placement, batch=1))
    found = respond(
        base.model,
        base.prompts,
        max(base.longest(index) for index in range(len(base.prompts))),
        caches=[base.model.new_cache(edit) for _ in base.prompts],
        batch_size=base.batch_rows,
        stop=base.reader.watch(base.prompts),
        choose=Sampler(TEMPERATURE, TOP_P, seed),
    )
    return [base.judged(index, tokens)[1] for index, tokens in enumerate(found.tokens)]


def _rows(bits: int, exact: Mapping[int, _Bools], now: Mapping[int, _Bools]) -> list[Row]:
    rows: list[Row] = []
    for seed in exact:
        at: dict[str, int | str] = {"bits": bits, "seed": str(seed)}
        rows.append(share(at, "refusal", int(now[seed].sum()), len(now[seed])))
        if bits < 16:
            rows.append(share(at, "flip", int((exact[seed] & ~now[seed]).sum()), int(exact[seed].sum())))
    at = {"bits": bits, "seed": "all"}
    means = np.mean([*now.values()], 0)
    low, high = bootstrap_means(means)
    rows.append(Row(at, "refusal", float(means.mean()), float(low), float(high), len(means)))
    if bits < 16:
        rows.append(_flips(at, np.array([*exact.values()]), np.array([*now.values()])))
    return rows


def _flips(at: dict[str, int | str], exact: _Bools, now: _Bools) -> Row:
    """The share of refusals of all seeds that flip ``[seeds, prompts]``, with requests resampled."""
    lost, there = (exact & ~now).sum(0), exact.sum(0)
    if not there.any():
        return Row(at, "flip", float("nan"), n=0)
    drawn = np.random.default_rng(0).integers(0, len(there), (2000, len(there)))
    shares = lost[drawn].sum(1) / np.maximum(there[drawn].sum(1), 1)
    low, high = np.quantile(shares[there[drawn].any(1)], [0.025, 0.975])
    return Row(at, "flip", float(lost.sum() / there.sum()), float(low), float(high), int(there.sum()))
