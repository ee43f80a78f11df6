"""A table of the paper, measured: each row one cell, with its interval and what was published of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from kvgeom.paper.published import NOT_PUBLIC, PublishedValue, published
from kvgeom.results import Result
from kvgeom.stats import reduction_estimate, wilson

if TYPE_CHECKING:
    import pandas as pd

#: The columns that every frame ends in.
ENDING = ("measured", "low", "high", "n", "published", "source")
#: What a table about a model that is not the paper's says instead of a source.
NOT_IN_PAPER = "not a model of the paper"
_NAN = float("nan")
_At = Mapping[str, int | str]
#: Where the paper has a cell: where the row stands, elsewhere, or nowhere.
_PublishedAt = Mapping[str, int | str] | Literal["same"] | None


@dataclass(frozen=True)
class Row:
    """One cell.

    Attributes
    ----------
    at : mapping of str to int or str
        Where it stands: the columns before the number, such as ``{"bits": 4}``. All rows of a table have the same keys.
    quantity : str
    measured : float or str
        A word where it is no number; NaN where it is undefined.
    low, high : float
        95 % interval; NaN without one.
    n : int
        Prompts that it is measured on.
    unit : str
    published_at : mapping, "same" or None
        Coordinates under which the paper has the cell; ``at`` by default. None: the paper has no such cell.
    """

    at: _At
    quantity: str
    measured: float | str
    low: float = _NAN
    high: float = _NAN
    n: int = 0
    unit: str = "share"
    published_at: _PublishedAt = "same"

    @property
    def coordinates(self) -> dict[str, int | str] | None:
        """Where the paper has the cell; None if nowhere."""
        if self.published_at is None:
            return None
        return dict(self.at if self.published_at == "same" else self.published_at)


def share(at: _At, quantity: str, count: int, n: int, published_at: _PublishedAt = "same") -> Row:
    """A share of prompts with its Wilson interval; undefined of none."""
    low, high = wilson(count, n)
    return Row(at, quantity, count / n if n else _NAN, low, high, n, published_at=published_at)


def repeated(at: _At, quantity: str, cell: Mapping[str, Any], published_at: _PublishedAt = None) -> Row:
    """A cell of another table, as :meth:`PaperTable.cell` has it, in this one."""
    measured, low, high, n, unit = (cell[name] for name in ("measured", "low", "high", "n", "unit"))
    return Row(at, quantity, measured, low, high, n, unit, published_at)


def recovered(at: _At, quantity: str, before: ArrayLike, after: ArrayLike, **more: Any) -> Row:
    """The share of what is lost ``before`` that is not lost ``after``, less what only ``after`` loses; paired by prompt.

    Undefined where nothing is lost before, which the released code calls 0.
    """
    n = len(np.asarray(before))
    found = reduction_estimate(before, after)
    if found is None:
        return Row(at, quantity, _NAN, n=n, unit="share of lost refusals", **more)
    return Row(at, quantity, found.value, found.low, found.high, n, "share of lost refusals", **more)


@dataclass(frozen=True, repr=False)
class PaperTable(Result):
    """One table of arXiv:2606.09864 for one model, by one protocol.

    ``to_frame()`` has a row for each cell: what says where it stands, ``quantity`` and ``unit``, and then ``measured`` with its
    95 % interval ``low``, ``high``, the prompts ``n``, the ``published`` value of the same model and its ``source``. A cell
    without a number has a word. What is in no public source has NaN, and ``source`` says so.

    ``meta`` holds ``table`` (its name), ``title``, ``mode``, ``keys`` (the columns that say where a cell stands), ``labels`` (of
    the paper's tables that it stands for), ``zoo`` (the model's name in :mod:`kvgeom.models.zoo`, or None) and ``remarks``.
    """

    kind: ClassVar[str] = "paper-table"

    @classmethod
    def of(cls, rows: Sequence[Row], meta: dict[str, Any]) -> PaperTable:
        """The table of some rows; looks up what was published of each."""
        found = [_published(row, meta) for row in rows]
        keys = list(rows[0].at) if rows else []
        columns: dict[str, Any] = {key: _column([row.at[key] for row in rows]) for key in keys}
        columns |= {
            "quantity": np.array([row.quantity for row in rows], dtype=object),
            "unit": np.array([row.unit for row in rows], dtype=object),
            "measured": np.array([_number(row.measured) for row in rows], dtype=float),
            "measured_words": np.array([_words(row.measured) for row in rows], dtype=object),
            "low": np.array([row.low for row in rows], dtype=float),
            "high": np.array([row.high for row in rows], dtype=float),
            "n": np.array([row.n for row in rows], dtype=int),
            "published": np.array([_number(value.value) if value else _NAN for value, _ in found], dtype=float),
            "published_words": np.array([_words(value.value) if value else "" for value, _ in found], dtype=object),
            "source": np.array([source for _, source in found], dtype=object),
        }
        return cls(xr.Dataset({name: ("row", values) for name, values in columns.items()}), {**meta, "keys": keys})

    def to_frame(self, table: str | None = None) -> pd.DataFrame:
        """One row for each cell; see the class."""
        frame = super().to_frame(table).drop(columns="row", errors="ignore")
        for name in ("measured", "published"):
            words = frame.pop(f"{name}_words")
            if (words != "").any():
                frame[name] = words.where(words != "", frame[name].astype(object))
        return frame[[*self.meta["keys"], "quantity", "unit", *ENDING]]

    def cell(self, quantity: str, **at: int | str) -> dict[str, Any]:
        """The row of one cell.

        Raises
        ------
        KeyError
            If there is none, or several.
        """
        rows = [
            row
            for row in self.records()
            if row["quantity"] == quantity and all(row[key] == value for key, value in at.items())
        ]
        if len(rows) != 1:
            raise KeyError(f"{len(rows)} cells of {self.meta['table']} are {quantity!r} at {at}")
        return rows[0]

    def figures(self) -> list[str]:
        """Names of the figures that the table has, the default first: none of a table of words."""
        quantities = {*map(str, self.data.quantity.values)}
        numbers = bool((self.data.measured_words == "").any())
        of_memory = {"recovery", "more bytes"} <= quantities
        return [name for name in super().figures() if numbers and (name != "recovery_by_memory" or of_memory)]

    def summary(self) -> str:
        return f"{self.meta['table']} ({self.meta['mode']}) of {self.meta['model']}: {self.data.sizes['row']} cells"

    def to_text(self) -> str:
        """A row for each place and a column for each quantity, published beside measured, and what must be said below."""
        from kvgeom.paper.layout import asked, grid

        heading = f"{self.meta['table']} ({self.meta['mode']}): {self.meta['title']}"
        return "\n\n".join(filter(None, [heading, grid(self).to_text(), asked(self), *self.meta["remarks"]]))


def _column(values: Sequence[int | str]) -> NDArray[Any]:
    """Whole numbers as such; text where any is."""
    if all(isinstance(value, int) for value in values):
        return np.array(values, dtype=int)
    return np.array([str(value) for value in values], dtype=object)


def _published(row: Row, meta: Mapping[str, Any]) -> tuple[PublishedValue | None, str]:
    """What was published of a cell, and where: of the model, or of all models."""
    at = row.coordinates
    if at is None:
        return None, "not in the paper"
    of_model = meta["zoo"] and published().find(meta["table"], row.quantity, meta["zoo"], at)
    value = of_model or published().find(meta["table"], row.quantity, None, at)
    if value is None:
        return None, NOT_PUBLIC if meta["zoo"] else NOT_IN_PAPER
    return value, f"{value.source} ({value.kind})" + (f": {value.note}" if value.note else "")


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else _NAN


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return " to ".join(f"{end:g}" for end in value)
    return value if isinstance(value, str) else ""


def shown(value: Any, unit: str) -> str:
    """A number with its unit; a word as it is; a dash for what is undefined."""
    if isinstance(value, str):
        return value
    if value != value:
        return "-"
    if unit.startswith("share"):
        return f"{100 * value:.1f} %"
    if unit.startswith("x "):
        return f"{value:.4g}x"
    return f"{value:.4g}"


def interval(low: float, high: float, unit: str) -> str:
    """An interval in the unit of its number; nothing where there is none."""
    if not low <= high:
        return ""
    ends = (shown(end, unit).removesuffix(" %").removesuffix("x") for end in (low, high))
    return f"[{', '.join(ends)}]"


def published_words(row: Mapping[str, Any]) -> str:
    """The published value as text; empty where there is none."""
    value = row["published"]
    if isinstance(value, tuple):
        return " to ".join(shown(end, row["unit"]) for end in value)
    return shown(value, row["unit"]) if isinstance(value, str) or value == value else ""
