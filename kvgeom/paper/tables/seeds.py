"""Is a flip the same under every seed?"""

from __future__ import annotations

from dataclasses import replace

from kvgeom.evaluation.baseline import run_baseline
from kvgeom.evaluation.evaluate import run_conditions
from kvgeom.paper.cells import widths
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, share

SEEDS = (42, 123, 456)
BITS = (4, 3)


@paper_table("whether runs under three seeds give the same responses", passes=lambda layers: 2 * len(SEEDS))
def seeds(study: Study, protocol: Protocol) -> Measured:
    """Responses at 4 and 3 bits, generated anew under three seeds, and how many of them agree word for word.

    The runs are not taken from a journal: each is made again, so that what differs between them is seen.
    """
    base, conditions = study.base(), widths(protocol, BITS)
    texts: dict[int, dict[str, list[str]]] = {}
    rows: list[Row] = []
    for seed in SEEDS:
        run = replace(study.run, seed=seed, journal=None)
        again = run_baseline(study.model, study.suites["custom"].requests, run)
        found = run_conditions(again, conditions, prompts=again.refused, title=f"seed {seed}")
        texts[seed] = {name: [str(text) for text in found.data.text.sel(recipe=name).values] for name in conditions}
        for name in conditions:
            flipped = found.flipped(name)
            rows.append(share({"bits": int(name), "seed": str(seed)}, "flip", int(flipped.sum()), len(flipped)))
    n = len(base.refused)
    for name in conditions:
        first, *others = (texts[seed][name] for seed in SEEDS)
        alike = sum(all(other[i] == first[i] for other in others) for i in range(len(first)))
        rows.append(share({"bits": int(name), "seed": "all"}, "responses that all seeds share", alike, n, None))
    return Measured(
        rows, ("Decoding is greedy, so that no seed is read: agreement shows that the run is deterministic, no more.",)
    )
