"""Tables as people read them: a row for each place, a column for each quantity; as text, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvgeom.models.zoo import zoo_model
from kvgeom.paper.published import PublishedValue, published
from kvgeom.paper.table import PaperTable, interval, published_words, shown
from kvgeom.words import text_table

#: What LaTeX reads otherwise.
_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


@dataclass(frozen=True)
class Grid:
    """Columns and rows of text."""

    columns: list[str]
    rows: list[list[str]]

    def to_text(self) -> str:
        """For a terminal."""
        return text_table(self.columns, self.rows)

    def to_markdown(self) -> str:
        """A table of GitHub's Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(_markdown(cell) for cell in line)} |" for line in lines)

    def to_latex(self, caption: str, label: str) -> str:
        """A table with booktabs."""
        body = [" & ".join(map(latex, row)) + r" \\" for row in self.rows]
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{latex(caption)}}}",
                rf"\label{{tab:{label}}}",
                rf"\begin{{tabular}}{{{'l' * len(self.columns)}}}",
                r"\toprule",
                " & ".join(map(latex, self.columns)) + r" \\",
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
            ]
        )


def grid(*tables: PaperTable) -> Grid:
    """One table, or the same table of several models below each other.

    Each cell is the number with its interval, and the published value in brackets where there is one. With several models
    the first column is the model, and what was published of other models stands below.
    """
    first, several = tables[0], len(tables) > 1
    keys: list[str] = list(first.meta["keys"])
    quantities = list(dict.fromkeys(row["quantity"] for each in tables for row in each.records()))
    counts = {row["n"] for each in tables for row in each.records() if row["n"]}
    columns = [*(["model"] if several else []), *keys, *quantities, *(["n"] if len(counts) > 1 else [])]
    rows: list[list[str]] = []
    for each in tables:
        places: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
        for row in each.records():
            places.setdefault(tuple(row[key] for key in keys), {})[row["quantity"]] = row
        for place, cells in places.items():
            texts = [cell(cells[name]) if name in cells else "" for name in quantities]
            n = max((row["n"] for row in cells.values()), default=0)
            own = [*([str(each.meta["model"])] if several else []), *map(str, place), *texts]
            rows.append([*own, *([str(n or "")] if len(counts) > 1 else [])])
    if several:
        rows += _published_rows(
            first.meta["table"], keys, quantities, {each.meta["zoo"] for each in tables}, len(columns)
        )
    return Grid(columns, rows)


def asked(table: PaperTable) -> str:
    """How many prompts stand behind the numbers, where it is one number; empty else."""
    counts = {row["n"] for row in table.records() if row["n"]}
    return f"Each number is of {counts.pop()} prompts." if len(counts) == 1 else ""


def cell(row: Mapping[str, Any]) -> str:
    """Measured, interval, published."""
    number, ends, known = (
        shown(row["measured"], row["unit"]),
        interval(row["low"], row["high"], row["unit"]),
        published_words(row),
    )
    return " ".join(filter(None, [number, ends, f"(paper: {known})" if known else ""]))


def _published_rows(
    table: str, keys: Sequence[str], quantities: Sequence[str], measured: Iterable[str | None], width: int
) -> list[list[str]]:
    """Results and settings of models that were not measured, where the table has a column for them."""
    places: dict[tuple[str, ...], dict[str, PublishedValue]] = {}
    for each in published().measured_by(table).values():
        for value in each.values:
            if value.model is not None and value.model not in measured and value.quantity in quantities:
                place = (value.model, *(str(value.at.get(key, "")) for key in keys))
                places.setdefault(place, {})[value.quantity] = value
    rows = []
    for (model, *at), values in places.items():
        texts = [
            f"(paper: {published_words({'published': values[name].value, 'unit': values[name].unit})})"
            if name in values
            else ""
            for name in quantities
        ]
        rows.append([zoo_model(model).title, *at, *texts])
    return [row + [""] * (width - len(row)) for row in rows]


def latex(text: str) -> str:
    r"""Text with what LaTeX reads otherwise escaped.

    Examples
    --------
    >>> latex("15.2 % of a_b")
    '15.2 \\% of a\\_b'
    """
    return "".join(_LATEX.get(char, char) for char in text)


def _markdown(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())
