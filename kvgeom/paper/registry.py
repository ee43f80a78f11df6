"""The tables that can be measured: each registers itself where it is defined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvgeom.checks import suggests
from kvgeom.errors import InputError, unknown
from kvgeom.evaluation.baseline import versions
from kvgeom.evaluation.config import RUN_OPTIONS
from kvgeom.evaluation.inputs import made_with
from kvgeom.models.zoo import in_zoo
from kvgeom.paper.protocol import Mode, Protocol
from kvgeom.paper.published import PublishedTable, published
from kvgeom.paper.study import Study, described, open_study
from kvgeom.paper.table import PaperTable, Row
from kvgeom.registry import check_free, import_modules

_PACKAGE = "kvgeom.paper.tables"
_TABLES: dict[str, TableSpec] = {}

#: What a table's file defines: rows, and notes that go below it.
Measure = Callable[[Study, Protocol], "Measured | Sequence[Row]"]
#: Passes over a prompt that a table costs, from the number of layers; what other tables share is counted in each.
Passes = Callable[[int], float]


@dataclass(frozen=True)
class Measured:
    """Rows, and what must be said below them."""

    rows: Sequence[Row]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TableSpec:
    """A table that can be measured.

    Attributes
    ----------
    name : str
        Of its function, and of the command.
    measures : str
        What, in a line.
    suites : tuple of str
        Which prompts it asks.
    passes : callable
        Passes over each prompt, from the number of layers.
    function : callable
        The public one.
    """

    name: str
    measures: str
    suites: tuple[str, ...]
    passes: Passes
    function: Callable[..., PaperTable]

    @property
    def published(self) -> dict[str, PublishedTable]:
        """The paper's tables and experiments that it stands for, by label."""
        return published().measured_by(self.name)

    @property
    def values(self) -> int:
        """How many results of it are public."""
        return sum(value.kind == "result" for table in self.published.values() for value in table.values)


def paper_table(
    measures: str, *, suites: Iterable[str] = ("custom",), passes: Passes = lambda layers: 0.0
) -> Callable[[Measure], Callable[..., PaperTable]]:
    """Register a function that measures rows as a table of its name, and make the public function of it.

    Parameters
    ----------
    measures : str
        What it measures, in a line.
    suites : iterable of str
        ``"custom"``, ``"advbench"`` or both; none for a table that asks nothing.
    passes : callable
        Passes over a prompt that it costs, from the number of layers.

    Raises
    ------
    InputError
        If the name is taken.
    """

    def decorate(measure: Measure) -> Callable[..., PaperTable]:
        import_modules(_PACKAGE)
        check_free("a table named", measure.__name__, _TABLES)

        def table(
            model: Any, *, mode: Mode = "faithful", prompts: Any = "calibration", advbench: Any = None, **options: Any
        ) -> PaperTable:
            if isinstance(model, Study):
                return _made(spec, measure, model, mode)
            with open_study(model, prompts=prompts, advbench=advbench, **options) as study:
                return _made(spec, measure, study, mode)

        for name in ("__module__", "__name__", "__qualname__"):
            setattr(table, name, getattr(measure, name))
        table.__doc__ = f"{(measure.__doc__ or measures).rstrip()}\n{_PARAMETERS}"
        checked = suggests(RUN_OPTIONS)(table)
        spec = TableSpec(measure.__name__, measures, tuple(suites), passes, checked)
        _TABLES[spec.name] = spec
        return checked

    return decorate


_PARAMETERS = f"""
    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes, or a Study
        A :class:`~kvgeom.paper.study.Study` brings its own prompts and options, and shares what it has measured.
    mode : {{"faithful", "released"}}
        See :class:`~kvgeom.paper.protocol.Protocol`.
    prompts : folder, PromptSet, file, name of a set, or sequence of str
        In the place of the paper's own set: a folder with ``refusal.txt``, ``privacy.txt`` and ``jailbreak.txt``, or what
        :func:`kvgeom.load_prompts` takes.
    advbench : the same, optional
        In the place of AdvBench, for instance ``"advbench=FILE"``; ``prompts`` by default.
    **options
        {", ".join(RUN_OPTIONS[:7])}; and options of :func:`kvgeom.load`.

    Returns
    -------
    PaperTable
    """


def _made(spec: TableSpec, measure: Measure, study: Study, mode: Mode) -> PaperTable:
    protocol = study.protocol(mode)
    found = measure(study, protocol)
    rows, notes = (found.rows, found.notes) if isinstance(found, Measured) else (found, ())
    requests = tuple(request for suite in spec.suites for request in study.suites[suite].requests)
    known = in_zoo(study.model.name)
    asked = described(study.suites, spec.suites) if spec.suites else ""
    meta = {
        **made_with(study.model, requests),
        "table": spec.name,
        "title": spec.measures,
        "mode": mode,
        "labels": [*spec.published],
        "zoo": None if known is None else known.name,
        "remarks": [note for note in (*notes, asked) if note],
        "placement": str(protocol.placement),
        "judge": study.run.judge.name,
        "max_new_tokens": study.run.max_new_tokens,
        "max_reasoning_tokens": study.run.max_reasoning_tokens,
        "seed": study.run.seed,
        "versions": versions(),
    }
    return PaperTable.of(rows, meta)


def tables() -> dict[str, TableSpec]:
    """All tables by name, in the order of the alphabet."""
    import_modules(_PACKAGE)
    return dict(sorted(_TABLES.items()))


def get_table(name: str) -> TableSpec:
    """A table by its name, or by the label that the paper has for it.

    Raises
    ------
    InputError
        If there is none; of a label of the paper that is not measured yet, that it is not.
    """
    known = tables()
    if name in known:
        return known[name]
    facts = {**published().tables, **published().experiments}
    if name in facts:
        if facts[name].name in known:
            return known[facts[name].name]
        raise InputError(
            f"{name} is a table of the paper that kvgeom does not measure; kvgeom paper list has those that it does"
        )
    raise unknown("table", name, [*known, *facts])
