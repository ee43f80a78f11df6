"""Is the order of the layers the same under another quantizer?"""

from __future__ import annotations

import numpy as np
from scipy.stats import spearmanr

from kvgeom.paper.protocol import Protocol
from kvgeom.paper.registry import Measured, paper_table
from kvgeom.paper.study import LAYER_BITS, Study
from kvgeom.paper.table import Row, share


@paper_table(
    "each layer alone under the quantizers of sections 4 and 5, and whether they rank layers alike",
    suites=["advbench"],
    passes=lambda layers: layers + 1,
)
def scheme_transfer(study: Study, protocol: Protocol) -> Measured:
    """Flips of each layer alone at 3 bits: symmetric with one scale for a tensor, and asymmetric with a scale for each token.

    The rank correlation of the two columns has an interval over prompts; it is undefined where a column does not vary.
    """
    schemes = {"section 4": protocol.by_tensor(LAYER_BITS), "section 5": protocol.by_token(LAYER_BITS)}
    stores = protocol.geometry.stores
    conditions = {
        f"{section}, layer {layer}": protocol.over(scheme, layers=[layer], family="layer")
        for section, scheme in schemes.items()
        for layer in stores
    }
    flips = study.flipped(conditions, "advbench", "single layers")
    n = len(study.refused("advbench"))
    rows = [
        share({"layer": str(layer)}, f"flip, {section}", int(flips[f"{section}, layer {layer}"].sum()), n)
        for layer in stores
        for section in schemes
    ]
    first, second = (
        np.array([flips[f"{section}, layer {layer}"] for layer in stores], dtype=float) for section in schemes
    )
    value, (low, high) = _rank_correlation(first, second), _interval(first, second, study.run.seed)
    rows.append(Row({"layer": "all"}, "rank correlation", value, low, high, n, "Spearman", None))
    worst = {
        section: int(stores[int(counts.sum(1).argmax())])
        for section, counts in zip(schemes, (first, second), strict=True)
    }
    same = "the same layer" if len({*worst.values()}) == 1 else "different layers"
    note = (
        f"Most flips come from {same} ({', '.join(f'{section}: {layer}' for section, layer in worst.items())})."
        if n
        else ""
    )
    return Measured(rows, (note,))


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, of flips by layer; NaN where one of the two does not vary."""
    a, b = one.sum(1), other.sum(1)
    if not (np.ptp(a) and np.ptp(b)):
        return float("nan")
    return float(spearmanr(a, b).statistic)


def _interval(one: np.ndarray, other: np.ndarray, seed: int, draws: int = 1000) -> tuple[float, float]:
    """95 % interval over prompts, drawn anew together; draws in which a column does not vary are left out."""
    rng, n = np.random.default_rng(seed), one.shape[1]
    found = []
    for _ in range(draws if n else 0):
        chosen = rng.integers(0, n, n)
        found.append(_rank_correlation(one[:, chosen], other[:, chosen]))
    kept = np.array([value for value in found if value == value])
    seen = _rank_correlation(one, other)
    if not len(kept) or seen != seen:
        return float("nan"), float("nan")
    low, high = np.quantile(kept, [0.025, 0.975])
    return min(float(low), seen), max(float(high), seen)
