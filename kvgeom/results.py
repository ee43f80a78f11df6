"""The shape that all results share: labelled tables, what made them, and ways to look at them and keep them."""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from kvgeom.checks import as_path, one_of, suggests
from kvgeom.errors import InputError, brief, reason, unknown
from kvgeom.sealed import check_seal, write_sealed
from kvgeom.words import text_table

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    import xarray as xr

T = TypeVar("T", bound="Result | Composite")

#: Rows of a frame that a notebook shows of a result.
SHOWN_ROWS = 12
#: What :meth:`Result.provenance` says, each with its name in ``meta``.
PROVENANCE = {
    **{name: name for name in ("model", "fingerprint", "weights", "template_options", "conversation", "notes")},
    "prompts": "prompt_set",  # ``meta["prompts"]`` is how many of them a table is about
    **{
        name: name
        for name in ("scheme", "placement", "judge", "max_new_tokens", "max_reasoning_tokens", "seed", "versions")
    },
}
#: Classes of results by kind.
_KINDS: dict[str, type[Result | Composite]] = {}


def _register(cls: type[Result | Composite]) -> None:
    kind = cls.__dict__.get("kind")
    if kind is None:
        return
    known = _KINDS.get(kind)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise InputError(f"result kind {kind!r} belongs to {known.__module__}.{known.__qualname__}; choose another")
    _KINDS[kind] = cls


@dataclass(frozen=True, repr=False)
class Result:
    """A frozen result: an :class:`xarray.Dataset` with named dimensions, and its provenance.

    Attributes
    ----------
    data : xarray.Dataset
        The numbers; each subclass documents its variables.
    meta : dict
        What made it: model, fingerprints, recipe, prompts, versions, seed. JSON types only.
    """

    data: xr.Dataset
    meta: dict[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "result"
    #: Frames by name, each with the dimensions of its rows, the main one first; empty: one frame over all dimensions.
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _register(cls)

    @suggests()
    def to_frame(self, table: str | None = None) -> pd.DataFrame:
        """The numbers as a tidy pandas frame.

        Parameters
        ----------
        table : str, optional
            One of :attr:`tables`; the main one by default. It has a row for each combination of its dimensions and a
            column for each variable over just these, or over some of them and no table of their own.

        Raises
        ------
        InputError
            If there is no table of that name.
        """
        part = self._part(table)
        if not part.dims:
            return part.expand_dims("row").to_dataframe().reset_index(drop=True)
        dims = self.tables[table or next(iter(self.tables))] if self.tables else tuple(map(str, part.dims))
        return part.to_dataframe(dim_order=list(dims)).reset_index()

    def _part(self, table: str | None = None) -> xr.Dataset:
        """The variables of one table."""
        if not self.tables:
            if table is not None:
                raise InputError(f"unknown table {brief(table)}; {type(self).__name__} has only one: to_frame()")
            return self.data
        if table is None:
            table = next(iter(self.tables))
        one_of("table", table, self.tables)
        dims = self.tables[table]
        others = [{*own} for own in self.tables.values()]
        names = [
            name
            for name, variable in self.data.data_vars.items()
            if {*variable.dims} == {*dims} or ({*variable.dims} <= {*dims} and {*variable.dims} not in others)
        ]
        return self.data[names]

    def to_text(self) -> str:
        """The main table as text for a terminal."""
        frame = self.to_frame()
        return text_table([str(name) for name in frame.columns], frame.itertuples(index=False))

    def records(self) -> list[dict[str, Any]]:
        """The main table as one dict for each row."""
        return [{str(name): value for name, value in row.items()} for row in self.to_frame().to_dict("records")]

    @classmethod
    def of_records(cls, rows: Sequence[Mapping[str, Any]], meta: dict[str, Any], dims: Sequence[str]) -> Self:
        """The inverse of :meth:`records`, with null for NaN; ``dims`` are the coordinates."""
        import pandas as pd
        import xarray as xr

        frame = pd.DataFrame([{k: float("nan") if v is None else v for k, v in row.items()} for row in rows])
        order = {dim: list(dict.fromkeys(frame[dim])) for dim in dims}
        return cls(xr.Dataset.from_dataframe(frame.set_index(list(dims))).reindex(order), meta)

    def plot(self, kind: str | None = None, **options: Any) -> go.Figure:
        """Draw the result.

        Parameters
        ----------
        kind : str, optional
            One of :meth:`figures`; the first one by default.
        **options
            Of the figure; see its function in :mod:`kvgeom.plots`.

        Raises
        ------
        InputError
            If there is no figure of that name, or an option is unknown or missing.
        """
        from kvgeom.plots.registry import draw

        return draw(self, kind, **options)

    def figures(self) -> list[str]:
        """Names of the figures that :meth:`plot` draws, the default first."""
        from kvgeom.plots.registry import figures

        return figures(self.kind)

    def provenance(self) -> dict[str, Any]:
        """Where the result comes from.

        Returns
        -------
        dict
            The same keys for every result, with JSON types; None for what does not apply.

            - ``model`` and ``fingerprint``: name of the model, and hash of its weights and chat template;
            - ``weights``: how its weights are stored, whatever is done to the cache;
            - ``template_options``: what its chat template was told; None if nothing;
            - ``conversation``: the messages before each request; None if none;
            - ``notes``: what of its files changes answers and is not done, or done otherwise; None if nothing;
            - ``prompts``: hash of all requests that were asked, as :attr:`kvgeom.PromptSet.fingerprint` has it;
            - ``scheme``: what the cache is rounded to, as text: a scheme, a preset or a recipe; by name where there are several.
              None also for a choice among caches, whose rows name them;
            - ``placement``: where and when it is rounded, as text;
            - ``judge``, ``max_new_tokens`` and ``max_reasoning_tokens``: what labelled the responses, and the longest answer
              and reasoning that there could be;
            - ``seed``: of random draws;
            - ``versions``: of the packages that decide what a model answers, by name.
        """
        return {name: self.meta.get(key) for name, key in PROVENANCE.items()}

    def save(self, path: str | Path) -> Path:
        """Write the result to one NetCDF file (no pickle); read it back with :meth:`load`."""
        return _written(path, {"/": _stamped(self)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a result that :meth:`save` wrote.

        Raises
        ------
        InputError
            If the file is missing, is no kvgeom result, is damaged or was changed, or is a result of another kind.
        """
        return _loaded(path, cls)

    def summary(self) -> str:
        """One line that says what this is and what it shows."""
        return f"{self.kind}: " + ", ".join(f"{dim} {size}" for dim, size in self.data.sizes.items())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.summary()}>"

    def _repr_html_(self) -> str:
        """Summary and first rows: a notebook shows a result for nothing, however large it is."""
        head = self._part()
        room = SHOWN_ROWS
        for dim in reversed(next(iter(self.tables.values())) if self.tables else [str(dim) for dim in head.dims]):
            head = head.isel({dim: slice(0, max(room, 1))})
            room //= max(head.sizes[dim], 1)
        frame = head.to_dataframe().reset_index() if head.dims else self.to_frame()
        more = f"<p>to_frame(...) has the tables {html.escape(', '.join(self.tables))}</p>" if self.tables else ""
        return (
            f"<p><b>{type(self).__name__}</b> {html.escape(self.summary())}</p>{frame.head(SHOWN_ROWS).to_html()}{more}"
        )


class Composite:
    """A result made of results, such as a diagnosis; subclasses are frozen dataclasses.

    Fields that hold a :class:`Result` (or None) are its parts. What else it holds goes into :meth:`record`.
    """

    kind: ClassVar[str]
    #: The part that stands for the whole in ``to_frame()`` and ``plot()``.
    main: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _register(cls)

    def parts(self) -> dict[str, Result]:
        """The results that it is made of, by name."""
        held = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in held.items() if isinstance(value, Result)}

    @suggests()
    def to_frame(self, part: str | None = None, table: str | None = None) -> pd.DataFrame:
        """A table of one part; the main one by default."""
        return self._part(part).to_frame(table)

    def plot(self, kind: str | None = None, **options: Any) -> go.Figure:
        """Draw the main part, another part, or one figure.

        Parameters
        ----------
        kind : str, optional
            A part by its name, or one of :meth:`figures`. Where several parts have the figure, the first of them draws it;
            the others draw theirs with ``result.part.plot(kind)``.
        **options
            Of the figure; see its function in :mod:`kvgeom.plots`.

        Raises
        ------
        InputError
            If no part and no figure has that name, or an option is unknown or missing.
        """
        parts = self.parts()
        if kind is not None and not isinstance(kind, str):
            raise InputError(f"a part or figure is asked for by its name, got {brief(kind)}")
        if kind is None or kind in parts:
            return self._part(kind).plot(**options)
        drawn = next((part for part in self._main_first() if kind in part.figures()), None)
        if drawn is None:
            raise unknown(f"part or figure of {type(self).__name__}", kind, [*parts, *self.figures()])
        return drawn.plot(kind, **options)

    def figures(self) -> list[str]:
        """Names of the figures of all parts, those of the main part first."""
        return list(dict.fromkeys(name for part in self._main_first() for name in part.figures()))

    def _main_first(self) -> list[Result]:
        parts = self.parts()
        return [parts.pop(self.main), *parts.values()]

    def _part(self, name: str | None) -> Result:
        parts = self.parts()
        name = self.main if name is None else name
        one_of(f"part of {type(self).__name__}", name, parts)
        return parts[name]

    def record(self) -> dict[str, Any]:
        """What it holds apart from its parts, in JSON types."""
        raise NotImplementedError

    @classmethod
    def of_parts(cls, parts: Mapping[str, Any], record: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`parts` and :meth:`record`."""
        raise NotImplementedError

    def provenance(self) -> dict[str, Any]:
        """Where it comes from: what the parts agree in; where they differ, what each of them says, by its name.

        See :meth:`Result.provenance`. Parts to which something does not apply have no say in it.
        """
        return together({name: part.provenance() for name, part in self.parts().items()})

    def save(self, path: str | Path) -> Path:
        """Write all parts to one NetCDF file with a group for each; read it back with :meth:`load`."""
        import xarray as xr

        head = {"kvgeom_kind": self.kind, "kvgeom_meta": json.dumps(plain(self.record())), "parts": list(self.parts())}
        parts = {name: _stamped(part) for name, part in self.parts().items()}
        return _written(path, {"/": xr.Dataset(attrs=head), **parts})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote; raises as :meth:`Result.load` does."""
        return _loaded(path, cls)

    def summary(self) -> str:
        """One line that says what this is and what it shows."""
        return self._part(None).summary()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.summary()}>"


def together(provenances: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Several provenances as one: what they agree in; where they differ, what each says, by its name."""
    found: dict[str, Any] = {}
    for key in PROVENANCE:
        said = {name: own[key] for name, own in provenances.items() if own[key] is not None}
        first = next(iter(said.values()), None)
        found[key] = first if all(value == first for value in said.values()) else said
    return found


def _stamped(result: Result) -> xr.Dataset:
    text = [str(name) for name, variable in result.data.variables.items() if variable.dtype == object]
    return result.data.assign_attrs(
        kvgeom_kind=result.kind, kvgeom_meta=json.dumps(plain(result.meta)), kvgeom_text=json.dumps(text)
    )


def _written(path: str | Path, groups: Mapping[str, xr.Dataset]) -> Path:
    """Write one NetCDF file, whole or not at all; made in memory, because HDF5 crashes where a disk is full.

    It is sealed: a damaged file would crash HDF5, or give other numbers.
    """
    made = io.BytesIO()
    for name, data in groups.items():
        data.to_netcdf(made, engine="h5netcdf", group=name, mode="w" if name == "/" else "a")
    return write_sealed(as_path("the file of a result", path), made.getvalue())


def _loaded(path: str | Path, cls: type[T]) -> T:
    """What a file holds, if it is of some kind; raises as :meth:`Result.load`."""
    path = as_path("the file of a result", path)
    check_seal(path)
    try:
        found = _read(path, None)
    except InputError:
        raise
    except Exception as error:  # whatever can be wrong in a file that somebody else has sealed
        raise InputError(
            f"cannot load {path}: not a kvgeom result ({reason(error)}); give a path that .save() wrote"
        ) from error
    if not isinstance(found, cls):
        raise InputError(f"cannot load {path} as {cls.kind}: it holds {found.kind}")
    return found


def _read(path: Path, group: str | None) -> Result | Composite:
    import xarray as xr

    with xr.open_dataset(path, engine="h5netcdf", group=group) as opened:
        data = opened.load()
    kind = data.attrs.pop("kvgeom_kind", None)
    meta = json.loads(data.attrs.pop("kvgeom_meta", "{}"))
    # A file has no type for text that is not there: an empty column would come back as numbers.
    text = json.loads(data.attrs.pop("kvgeom_text", "[]"))
    data = data.assign({name: data[name].astype(object) for name in text})
    made = _KINDS.get(kind)
    if made is None:
        raise InputError(
            f"cannot load {path}: it holds {kind or 'no kvgeom result'}; import what defines that kind first"
        )
    if issubclass(made, Result):
        return made(data=data, meta=meta)
    names = data.attrs["parts"]
    return made.of_parts(
        {str(name): _read(path, str(name)) for name in ([names] if isinstance(names, str) else names)}, meta
    )


def plain(value: Any) -> Any:
    """The same as JSON types: numpy scalars unpacked, tuples as lists, NaN and infinities null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # of an array a list, of a numpy scalar the number
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
