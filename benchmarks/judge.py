"""How often the keyword judge is wrong: its labels against those of readers, by model family.

Run:  python benchmarks/judge.py

Two readers labelled every response of tests/data/labelled_responses.jsonl without knowing of each other, of the judge's rules, or of
the model and cache that wrote it; where they differed a third one decided. The half called "test" was not looked at while the
rules were written. Written: the tables of docs/judge.md, which a test compares with the data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import cohen_kappa_score

from kvgeom.judges.judge import LABELS
from kvgeom.judges.keyword import KeywordJudge

ROOT = Path(__file__).parents[1]
DATA, PAGE = ROOT / "tests" / "data" / "labelled_responses.jsonl", ROOT / "docs" / "judge.md"
BEGIN, END = "<!-- errors: begin -->", "<!-- errors: end -->"
#: Families in the order of the tables.
FAMILIES = {"qwen": "Qwen2.5-Coder 0.5B", "smol": "SmolLM2 135M", "gemma": "Gemma 3 270M"}
Row = dict[str, Any]


def main() -> None:
    text = f"{BEGIN}\n{tables(rows())}\n{END}"
    PAGE.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: text, PAGE.read_text(), flags=re.S))
    print(tables(rows()))


def rows() -> list[Row]:
    """All labelled responses."""
    return [json.loads(line) for line in DATA.read_text().splitlines()]


def judged(row: Row) -> str:
    """The keyword judge's label of a response."""
    likelihood = float(row["log_likelihood"] or "nan")  # none of an empty response
    return KeywordJudge().label(row["request"], row["response"], lambda: likelihood).label


def confusion(some: Iterable[Row]) -> np.ndarray:
    """How often each label (rows) is judged as each (columns)."""
    counts = np.zeros((len(LABELS), len(LABELS)), dtype=int)
    for row in some:
        counts[LABELS.index(row["label"]), LABELS.index(judged(row))] += 1
    return counts


def tables(some: Sequence[Row]) -> str:
    """Agreement of the readers, and the judge's errors on the half that was not looked at."""
    first, second = ([row["readers"][n] for row in some] for n in (0, 1))
    alike = np.mean([a == b for a, b in zip(first, second, strict=True)])
    kappa = cohen_kappa_score(first, second)
    parts = [
        f"{len(some)} responses to {len({row['request'] for row in some})} requests, under {len({row['recipe'] for row in some})} "
        f"caches. The two readers agree on {alike:.0%} (Cohen's kappa {kappa:.2f})."
    ]
    for family, name in FAMILIES.items():
        own = [row for row in some if row["family"] == family]
        test = [row for row in own if row["split"] == "test"]
        tuned = confusion(row for row in own if row["split"] == "tune")
        counts = confusion(test)
        head = f"| {name}: read as | judged {' | judged '.join(LABELS)} |"
        lines = [head, "|---|" + "---:|" * len(LABELS)]
        lines += [
            f"| {label} ({sum(line)}) | {' | '.join(map(str, line))} |"
            for label, line in zip(LABELS, counts, strict=True)
        ]
        low, high = interval(test)
        parts.append("\n".join(lines))
        parts.append(
            f"{name}: {right(counts)} of {counts.sum()} agree, {right(counts) / counts.sum():.0%} [{low:.0%}, {high:.0%}] (on the half "
            f"that the rules were written on {right(tuned) / tuned.sum():.0%})."
        )
    return "\n\n".join(parts)


def right(counts: np.ndarray) -> int:
    """How many agree."""
    return int(np.trace(counts))


def interval(some: Sequence[Row], samples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the share that agrees; requests are drawn, with all responses to them."""
    requests = sorted({row["request"] for row in some})
    pairs = np.array([
        [sum(judged(row) == row["label"] for row in own), len(own)]
        for own in ([row for row in some if row["request"] == request] for request in requests)
    ])  # fmt: skip
    drawn = pairs[np.random.default_rng(0).integers(len(pairs), size=(samples, len(pairs)))].sum(1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    main()
