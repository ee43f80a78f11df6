"""Numbers and names in sentences and in tables of text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvgeom.errors import brief


def listed(names: Sequence[str]) -> str:
    """``["a", "b", "c"]`` as ``"a, b and c"``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def span(counts: Sequence[int]) -> str:
    """From the least to the most: ``"0 to 3"``, or ``"2"`` where all are equal."""
    return str(counts[0]) if len({*counts}) == 1 else f"{min(counts)} to {max(counts)}"


def counted(count: int, noun: str) -> str:
    """``"1 layer"``, ``"2 layers"``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def conversation_text(messages: Sequence[Mapping[str, str]]) -> str:
    """The messages before each request in a line, long ones shortened and many counted; empty if there are none.

    Examples
    --------
    >>> conversation_text([{"role": "system", "content": "Be brief."}])
    "after system 'Be brief.'"
    """
    said = [f"{message['role']} {brief(message['content'])}" for message in messages[:2]]
    more = [f"{counted(len(messages) - 2, 'message')} more"] if len(messages) > 2 else []
    return f"after {listed([*said, *more])}" if said else ""


def text_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], last: int | None = None) -> str:
    """Columns set flush: words to the left, numbers to the right; NaN is a dash. The last has at most so many characters a line."""
    from tabulate import tabulate

    cells = [[cell_text(value) for value in row] for row in rows]
    if not cells:
        return "  ".join(columns)
    right = ["right" if all(_is_number(row[n]) for row in cells) else "left" for n in range(len(columns))]
    widths = None if last is None else [*[None] * (len(columns) - 1), last]
    return tabulate(
        cells, headers=list(columns), tablefmt="simple", disable_numparse=True, colalign=right, maxcolwidths=widths
    )


def cell_text(value: Any) -> str:
    """A cell of a table: four digits of a fraction, a dash for NaN."""
    if isinstance(value, float):
        return "-" if value != value else f"{value:.4g}"
    return str(value)


def _is_number(cell: str) -> bool:
    return bool(cell) and (cell[0].isdigit() or cell[0] in "+-[")


def interval_text(low: float, high: float) -> str:
    """An interval of a rate as text: ``[7, 43] %``; a dash where there is none, or nothing to estimate."""
    return "-" if not low < high else f"[{100 * low:.0f}, {100 * high:.0f}] %"


def times_text(value: float, low: float, high: float) -> str:
    """A ratio with its interval as text: ``1.08x [1.04, 1.13]``; alone where it is known, or its interval is not."""
    number, *ends = (f"{end:.2f}" if end < 100 else f"{end:,.0f}" for end in (value, low, high))
    return f"{number}x [{', '.join(ends)}]" if low < high else f"{number}x"
