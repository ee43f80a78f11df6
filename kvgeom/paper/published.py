"""What arXiv:2606.09864 and the code released with it made public, as facts to compare with.

The full text of the paper was not at hand: values come from abstracts, from the released code, and from third parties that
quote it. ``published.json`` says of each value where it is from. What is not public is not there, and is never filled in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal, cast

from pydantic import Field

from kvgeom.diagnosis.mode import ModeName, Pattern
from kvgeom.diagnosis.taxonomy import published_mode
from kvgeom.errors import unknown
from kvgeom.models.zoo import zoo_model
from kvgeom.quant.serialization import StrictRecord
from kvgeom.sealed import checked_json

#: What stands for a value that is in no public source.
NOT_PUBLIC = "not public"


class Source(StrictRecord):
    """Where values come from.

    ``grade``: ``primary`` is of the authors; ``secondary`` quotes them; of ``weak`` ones the attribution is inferred.
    """

    what: str
    grade: Literal["primary", "secondary", "weak"]
    address: str | None


class PublishedValue(StrictRecord):
    """One cell of a table, or one number of a text.

    ``model`` is a name of :mod:`kvgeom.models.zoo`, and ``at`` says which cell it is. ``kind``: a ``result`` was measured by
    the authors; a ``setting`` is what their code sets, and shows what they found only by way of it; an ``example`` is from
    their documentation; a ``claim`` has no number.
    """

    quantity: str
    value: float | int | str | tuple[float | int, float | int]
    unit: str
    source: str
    model: str | None = None
    at: dict[str, int | str] = Field(default_factory=dict)
    kind: Literal["result", "setting", "example", "claim"] = "result"
    note: str = ""


class PublishedTable(StrictRecord):
    """A table of the paper, or an experiment of the released code that has none: a title in our words, and what is public.

    ``name`` is the function of :mod:`kvgeom.paper.tables` that measures it, whether it is there or not. ``columns`` are
    theirs. ``released_code`` says what one must know of how the table is made.
    """

    name: str
    title: str
    section: str | None
    columns: list[str]
    settings: list[str]
    values: list[PublishedValue]
    released_code: list[str]


class _Paper(StrictRecord):
    title: str
    arxiv: str
    authors: list[str]


class Published(StrictRecord):
    """All that is public, as ``published.json`` has it: tables by label, experiments by name."""

    paper: _Paper
    sources: dict[str, Source]
    claims: list[PublishedValue]
    tables: dict[str, PublishedTable]
    experiments: dict[str, PublishedTable]
    released_code: list[str]

    def measured_by(self, name: str) -> dict[str, PublishedTable]:
        """Tables and experiments that one function measures, by label."""
        return {label: each for label, each in {**self.tables, **self.experiments}.items() if each.name == name}

    def find(
        self, name: str, quantity: str, model: str | None, at: dict[str, int | str] | None = None
    ) -> PublishedValue | None:
        """What was published of one cell; None if nothing is public. Examples of the documentation are no results.

        Parameters
        ----------
        name : str
            Of the function that measures the table.
        quantity : str
        model : str or None
            A name of :mod:`kvgeom.models.zoo`.
        at : dict
            Coordinates of the cell.
        """
        return next(
            (
                value
                for table in self.measured_by(name).values()
                for value in table.values
                if (value.quantity, value.model, value.at) == (quantity, model, at or {}) and value.kind != "example"
            ),
            None,
        )

    def every_value(self) -> Iterator[PublishedValue]:
        """All values, claims first."""
        yield from self.claims
        for table in (*self.tables.values(), *self.experiments.values()):
            yield from table.values


@cache
def published() -> Published:
    """The facts, read once."""
    text = files("kvgeom.paper").joinpath("published.json").read_bytes()
    return checked_json(text, Published)


def published_table(label: str) -> PublishedTable:
    """One table or experiment by the paper's label, or the released code's name.

    Raises
    ------
    InputError
        If there is none.
    """
    known = {**published().tables, **published().experiments}
    if label not in known:
        raise unknown("table of the paper", label, known)
    return known[label]


@dataclass(frozen=True)
class PublishedModel:
    """One row of the paper's taxonomy.

    Attributes
    ----------
    name : str
    layers, critical_layer : int
    pcr : float
    pattern : str
        Its layer pattern, in the paper's words; empty where none is given.
    group64 : (float, float)
        Range of the flips that group-64 scales take away, as published for the models of this mode.
    mode : str
    """

    name: str
    layers: int
    critical_layer: int
    pcr: float
    pattern: str
    group64: tuple[float, float]
    mode: ModeName

    def named(self) -> ModeName:
        """The mode that the paper's rules name from these numbers."""
        return published_mode(self.pcr, _PATTERNS[self.pattern], self.group64)


#: "Front-heavy" says where damage lies, not how many layers are critical.
_PATTERNS: dict[str, Pattern | None] = {
    "": None,
    "front-heavy": None,
    "concentrated": "concentrated",
    "distributed-early": "distributed-early",
    "hyper-vulnerable": "hyper-vulnerable",
    "uniformly diffuse": "ultra-distributed",
}


def _taxonomy_row(short: str, mode: ModeName) -> PublishedModel:
    known, tables = zoo_model(short), published().tables
    of_layers = {
        value.quantity: value.value for value in tables["individual_layer_sensitivity"].values if value.model == short
    }
    of_pcr = {value.quantity: value.value for value in tables["pcr_framework"].values if value.model == short}
    low, high = cast("tuple[float, float]", of_pcr["group-64 reduction"])
    return PublishedModel(
        known.title,
        known.layers,
        int(of_layers["critical layer"]),  # type: ignore[arg-type]
        float(of_pcr["PCR"]),  # type: ignore[arg-type]
        str(of_layers.get("pattern", "")),
        (float(low), float(high)),
        mode,
    )


MODELS: tuple[PublishedModel, ...] = tuple(
    _taxonomy_row(value.model, value.value)  # type: ignore[arg-type]
    for value in published().tables["taxonomy"].values
    if value.quantity == "mode" and value.model is not None
)
