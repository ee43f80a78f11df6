"""Numbers and names in sentences."""

from __future__ import annotations

from collections.abc import Sequence


def listed(names: Sequence[str]) -> str:
    """``["a", "b", "c"]`` as ``"a, b and c"``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def span(counts: Sequence[int]) -> str:
    """From the least to the most: ``"0 to 3"``, or ``"2"`` where all are equal."""
    return str(counts[0]) if len({*counts}) == 1 else f"{min(counts)} to {max(counts)}"


def counted(count: int, noun: str) -> str:
    """``"1 layer"``, ``"2 layers"``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
