"""Results of mitigations as they might have been found, for figures and pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from kvgeom.mitigation.layers import LayerSelection
from kvgeom.mitigation.search import Search
from kvgeom.mitigation.verify import Verification
from kvgeom.stats import wilson

EXACT_BYTES = 12_288.0


def _rates(flips: list[int], n: int) -> dict[str, Any]:
    intervals = [wilson(count, n) for count in flips]
    return {
        "flips": flips,
        "flips_complied": [count // 3 for count in flips],
        "flips_evaded": [0 for _ in flips],
        "flips_degenerate": [count - count // 3 for count in flips],
        "flip_rate": [count / n for count in flips],
        "ci_low": [low for low, _ in intervals],
        "ci_high": [high for _, high in intervals],
    }


def search(n: int = 16, budget: float = 0.05) -> Search:
    """Of 24 layers; two candidates lie in the same place, and the front has three steps."""
    rows = [
        ("unmitigated", "unmitigated", 13, 3456), ("center", "center", 4, 3456), ("center keys and values", "center", 4, 3456),
        ("equalize", "equalize", 11, 3456), ("hadamard", "hadamard", 7, 3456), ("per-channel keys", "refine", 5, 3290),
        ("group-64", "refine", 6, 3840), ("group-32", "refine", 2, 4608), ("center, group-64", "combined", 1, 3840),
        ("causal layers 0, 8 in 16 bits", "protect", 6, 4192), ("first layers 0, 1 in 16 bits", "protect", 9, 4192),
        ("attention layers 11, 14 in 16 bits", "protect", 12, 4192), ("keys of layers 0, 8 in 16 bits", "protect", 6, 3824),
        ("center; keys of layers 0, 8 <b> in 16 bits", "combined", 2, 3824), ("causal layers 0, 1, 8, 9 in 16 bits", "protect", 0, 7000),
    ]  # fmt: skip
    size = np.array([float(row[3]) for row in rows])
    flips = np.array([row[2] for row in rows])
    better = (size <= size[:, None]) & (flips <= flips[:, None]) & ((size < size[:, None]) | (flips < flips[:, None]))
    columns = {
        "family": np.array([row[1] for row in rows], dtype=object),
        "description": np.array([f"does {row[0]}" for row in rows], dtype=object),
        **_rates([row[2] for row in rows], n),
        "recovery": 1 - flips / flips[0],
        "recovery_low": 1 - flips / flips[0] - 0.2,
        "recovery_high": np.minimum(1, 1 - flips / flips[0] + 0.2),
        "p": np.linspace(1, 0.001, len(rows)),
        "margin_drop": flips / 10,
        "bytes_per_token": size,
        "memory_overhead": size / size[0] - 1,
        "affordable": size / size[0] - 1 <= budget,
        "pareto": ~better.any(1),
        "harmless_refused": np.full(len(rows), np.nan),
        "harmless_lost": np.full(len(rows), np.nan),
        "spoils": np.zeros(len(rows), dtype=bool),
        "untested": np.zeros(len(rows), dtype=bool),
    }
    data = xr.Dataset(
        {name: ("candidate", values) for name, values in columns.items()},
        coords={"candidate": [row[0] for row in rows]},
    )
    return Search(data, {"prompts": n, "budget": budget, "exact_bytes_per_token": EXACT_BYTES}).with_choice()


def selection(n: int = 16, kept: tuple[int, ...] = (2, 4, 8), attention: int = 2) -> LayerSelection:
    """``attention`` more flips than the causal rule has."""
    rules = ["causal", "first", "attention", "random 1", "random 2", "random 3"]
    flips = np.array([[max(0, 6 + extra - 2 * at) for at in range(len(kept))] for extra in (0, 2, attention, 3, 6, 4)])
    intervals = np.array([[wilson(int(count), n) for count in row] for row in flips])
    columns: dict[str, Any] = {
        "flips": flips,
        "flip_rate": flips / n,
        "ci_low": intervals[..., 0],
        "ci_high": intervals[..., 1],
        "p": np.where(flips > flips[0] + 5, 0.01, 0.6),
        "layers": np.array([[", ".join(map(str, range(k))) for k in kept] for _ in rules], dtype=object),
        "bytes_per_token": np.array([[3456.0 + 368 * k for k in kept] for _ in rules]),
    }
    data = xr.Dataset(
        {name: (("rule", "kept"), values) for name, values in columns.items()},
        coords={"rule": rules, "kept": list(kept)},
    )
    order = {rule: list(range(24)) for rule in rules}
    return LayerSelection(data, {"order": order, "drawn": rules[3:], "prompts": n, "unmitigated": 13})


def verification(
    flips: tuple[int, int, int] = (13, 3, 9),
    controls: tuple[tuple[int, ...], tuple[int, ...]] = ((2, 4, 3), (1, 2, 2)),
    n: int = 16,
    names: tuple[str, str] = ("center", "group-64 everywhere"),
) -> Verification:
    """``flips`` of unmitigated, chosen and paper; ``controls`` of chosen and unmitigated."""
    roles = ["unmitigated", "chosen", "paper"]
    random = [
        (f"{role}, random direction {k + 1}", role, k, count)
        for role, drawn in zip(("chosen", "unmitigated"), controls, strict=True)
        for k, count in enumerate(drawn)
    ]
    count = [*flips, *(found for *_, found in random)]
    before, rows, extra = flips[0], len(count), len(random)
    nan = float("nan")
    recovery = np.array([1 - c / before if before else nan for c in count])
    size = np.array([3456.0, 3456.0, 3840.0, *([3456.0] * extra)])
    columns: dict[str, Any] = {
        "name": np.array(["unmitigated", *names, *["random direction"] * extra], dtype=object),
        "control_of": np.array(["", "", "", *(role for _, role, _, _ in random)], dtype=object),
        "draw": [-1, -1, -1, *(draw for _, _, draw, _ in random)],
        **_rates(count, n),
        "recovery": recovery,
        "recovery_low": recovery - 0.3,
        "recovery_high": np.minimum(1, recovery + 0.15),
        "p": np.array([1.0, 0.002 if flips[1] < before - 5 else 0.7, 0.2, *[0.5] * extra]),
        "bytes_per_token": size,
        "memory_overhead": size / size[0] - 1,
        "memory_of_exact": size / EXACT_BYTES,
        "perplexity_ratio": [3.5, 1.02, 2.4, *[nan] * extra],
        "perplexity_ratio_low": [3.1, 0.99, 2.2, *[nan] * extra],
        "perplexity_ratio_high": [4.0, 1.05, 2.6, *[nan] * extra],
        "text_kl": [0.9, 0.01, 0.5, *[nan] * extra],
        "text_kl_low": [0.8, 0.008, 0.4, *[nan] * extra],
        "text_kl_high": [1.1, 0.012, 0.6, *[nan] * extra],
        "text_top1": [0.61, 0.97, 0.7, *[nan] * extra],
        "text_top1_low": [0.58, 0.96, 0.66, *[nan] * extra],
        "text_top1_high": [0.64, 0.98, 0.73, *[nan] * extra],
        "harmless_refused": [0.0, 1.0, 0.0, *[nan] * extra],
        "harmless_degenerate": [4.0, 0.0, 1.0, *[nan] * extra],
        "harmless_p": [1.0, 1.0, 1.0, *[nan] * extra],
        "harmless_lost": [4.0, 1.0, 1.0, *[nan] * extra],
        "harmless_margin": np.array(["open"] * (3 + extra), dtype=object),
        "spoils": [False] * rows,
    }
    assert rows == len(columns["name"])
    data = xr.Dataset(
        {name: ("recipe", values) for name, values in columns.items()},
        coords={"recipe": [*roles, *(name for name, *_ in random)]},
    )
    meta = {
        "source": "held-out", "prompts": 24, "refused": n, "harmless": 24, "harmless_refused": 1, "placement": "cache",
        "judge": "keywords", "max_new_tokens": 24, "examples": [], "perplexity_text": "900 tokens of plain text, in 3 passages",
    }  # fmt: skip
    return Verification(data, meta)
