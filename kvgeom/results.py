"""The shape that all results share: a labelled table, what made it, and ways to look at it."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from kvgeom.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    import xarray as xr


#: Rows of a frame that a notebook shows of a result.
SHOWN_ROWS = 12


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
        dims = self.tables[table or next(iter(self.tables))] if self.tables else tuple(map(str, part.dims))
        return part.to_dataframe(dim_order=list(dims)).reset_index()

    def _part(self, table: str | None = None) -> xr.Dataset:
        """The variables of one table."""
        if not self.tables:
            if table is not None:
                raise InputError(f"unknown table {table!r}; {type(self).__name__} has only one: to_frame()")
            return self.data
        if table is None:
            table = next(iter(self.tables))
        if table not in self.tables:
            raise InputError(f"unknown table {table!r}; choose from {', '.join(self.tables)}")
        dims = self.tables[table]
        others = [{*own} for own in self.tables.values()]
        names = [
            name
            for name, variable in self.data.data_vars.items()
            if {*variable.dims} == {*dims} or ({*variable.dims} <= {*dims} and {*variable.dims} not in others)
        ]
        return self.data[names]

    def records(self) -> list[dict[str, Any]]:
        """The numbers as one dict for each combination of coordinates."""
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

    def save(self, path: str | Path) -> Path:
        """Write the result to one NetCDF file (no pickle); read it back with :meth:`load`."""
        path = Path(path)
        stamped = self.data.assign_attrs(kvgeom_kind=self.kind, kvgeom_meta=json.dumps(self.meta))
        try:
            stamped.to_netcdf(path, engine="h5netcdf")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error}; choose a folder that exists and is writable") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a result that :meth:`save` wrote.

        Raises
        ------
        InputError
            If the file is missing, is not a kvgeom result, or is a result of another kind.
        """
        import xarray as xr

        path = Path(path)
        if not path.is_file():
            raise InputError(f"cannot load {path}: no such file; give a path that .save() wrote")
        try:
            with xr.open_dataset(path, engine="h5netcdf") as opened:
                data = opened.load()
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load {path}: not a kvgeom result; give a path that .save() wrote") from error
        found = data.attrs.pop("kvgeom_kind", None)
        meta = json.loads(data.attrs.pop("kvgeom_meta", "{}"))
        if found != cls.kind:
            raise InputError(f"cannot load {path} as {cls.kind}: it holds {found or 'no kvgeom result'}")
        return cls(data=data, meta=meta)

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
        shown = head.to_dataframe().reset_index().head(SHOWN_ROWS).to_html()
        more = f"<p>to_frame(...) has the tables {html.escape(', '.join(self.tables))}</p>" if self.tables else ""
        return f"<p><b>{type(self).__name__}</b> {html.escape(self.summary())}</p>{shown}{more}"


def plain(value: Any) -> Any:
    """The same as JSON types: numpy scalars unpacked, tuples as lists, NaN and infinities null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
