"""Judges for random models, which say nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvgeom.evaluation.baseline import Baseline
from kvgeom.judges.judge import Judgement, Label


@dataclass(frozen=True)
class ArbitraryJudge:
    """For random models, which say nothing: the sum of its characters decides."""

    name: str = "arbitrary"

    def label(self, request: str, response: str, likelihood: Callable[[], float]) -> Judgement:
        labels: Sequence[Label] = ("refused", "complied", "degenerate")
        return Judgement(labels[sum(map(ord, request + response)) % 3], f"log-likelihood {likelihood():.6f}")


@dataclass(frozen=True)
class CountingJudge:
    """Reads up to a number of characters; the sum of what it has read decides."""

    reads: int = 5
    name: str = "counting"

    def label(self, request: str, response: str, likelihood: Callable[[], float]) -> Judgement:
        labels: Sequence[Label] = ("refused", "complied", "degenerate")
        return Judgement(labels[sum(map(ord, request + response)) % 3], f"log-likelihood {likelihood():.4f}")

    def settled(self, response: str) -> bool:
        return len(response) >= self.reads


def with_refusal_tokens(base: Baseline) -> Baseline:
    """The same, its margins those of what the refused responses begin with; of a random model none predicts a refusal."""
    assert base.refused
    begun = frozenset(base.tokens[index][0] for index in base.refused if base.tokens[index])
    base.__dict__["refusal_tokens"] = begun
    return base
