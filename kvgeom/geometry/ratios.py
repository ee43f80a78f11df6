"""The ratios of several models side by side, however they are measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr

from kvgeom.checks import suggests
from kvgeom.errors import InputError
from kvgeom.geometry.sensitivity import Sensitivity
from kvgeom.results import Result, together

if TYPE_CHECKING:
    import pandas as pd

#: The ratio that arXiv:2606.09864 reports, without a definition.
PUBLISHED = (1e2, 1e3)


@dataclass(frozen=True, repr=False)
class Ratios(Result):
    """Ratios of several models, by layer, site and way of measuring. Made by :func:`ratios`.

    ``data`` has the dimension ``row`` and the variables ``model``, ``layer``, ``site``, ``way`` (estimator, position or
    contrast), ``kind`` (``"estimator"``, ``"position"``, ``"contrast"``), ``ratio``, ``low``, ``high`` (95 %; NaN where there is none).
    Where only a lower bound is known ``ratio`` is NaN. Undefined cells are left out.
    """

    kind: ClassVar[str] = "ratios"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {"rows": ("row",)}

    def table(self) -> pd.DataFrame:
        """By model, site and way: layers with a value, lowest, median, highest, and how many are in the published band, above it and below 1."""
        import pandas as pd

        def described(values: pd.Series) -> pd.Series:
            known = values.dropna()
            low, high = PUBLISHED
            return pd.Series(
                {
                    "layers": len(values),
                    "with a value": len(known),
                    "lowest": known.min(),
                    "median": known.median(),
                    "highest": known.max(),
                    "10^2 to 10^3": int(known.between(low, high).sum()),
                    "above": int((known > high).sum()),
                    "below 1": int((known < 1).sum()),
                }
            )

        frame = self.to_frame()
        grouped = frame.groupby(["model", "site", "kind", "way"], sort=False).ratio
        return pd.DataFrame({key: described(values) for key, values in grouped}).T.rename_axis(
            index=["model", "site", "kind", "way"]
        )

    def provenance(self) -> dict[str, Any]:
        """Where it comes from: what the sensitivities agree in; where they differ, what each says, by its name."""
        return together(self.meta["provenance"])

    def summary(self) -> str:
        models = list(dict.fromkeys(self.data.model.values.tolist()))
        return f"{self.data.sizes['row']} ratios of {', '.join(models)}"


@suggests()
def ratios(sensitivities: Mapping[str, Sensitivity]) -> Ratios:
    """Bring the ratios of several models together.

    Parameters
    ----------
    sensitivities : mapping of name to Sensitivity
        A model's name, or anything that tells them apart.

    Raises
    ------
    InputError
        Without any.

    Examples
    --------
    >>> ratios({"demo": kvgeom.subspace("demo").sensitivity()}).plot()  # doctest: +SKIP
    """
    if not sensitivities:
        raise InputError("no sensitivity was given; measure at least one with kvgeom.subspace(model).sensitivity()")
    rows = [row for name, found in sensitivities.items() for row in _rows(name, found)]
    first = next(iter(sensitivities.values()))
    meta = {
        "models": {name: found.meta.get("model", name) for name, found in sensitivities.items()},
        "scheme": sorted({str(found.meta["scheme"]) for found in sensitivities.values()}),
        "position": str(first.meta.get("position", "")),
        "published": list(PUBLISHED),
        "provenance": {name: found.provenance() for name, found in sensitivities.items()},
    }
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    data = xr.Dataset(
        {name: ("row", x.astype(object) if x.dtype.kind == "U" else x) for name, x in columns.items()},
        coords={"row": np.arange(len(rows))},
    )
    return Ratios(data, meta)


def _rows(model: str, found: Sensitivity) -> Iterator[dict[str, Any]]:
    """Rows of one model."""
    data = found.data
    nan = float("nan")

    def row(
        at: dict[str, Any], kind: str, way: str, ratio: float, low: float = nan, high: float = nan
    ) -> dict[str, Any]:
        where = {"model": model, "layer": int(at["layer"]), "site": str(at["site"])}
        return {**where, "kind": kind, "way": way, "ratio": ratio, "low": low, "high": high}

    for layer, site in product(data.layer.values, data.site.values):
        at = {"layer": layer, "site": site}
        cell = data.sel(at)
        if str(cell.status.item()) == "undefined":
            continue
        value, low, high = (float(cell[name]) for name in ("ratio", "ratio_low", "ratio_high"))
        centred = float(cell.ratio_centered)
        yield row(at, "estimator", "cross-fitted", value, low, high)
        yield row(at, "estimator", "plug-in (biased)", float(cell.ratio_plugin))
        yield row(at, "estimator", "cross-fitted, centred", centred, low * centred / value, high * centred / value)
        for name in data["at"].values:
            one = cell.sel(at=name)
            if np.isfinite(float(one.at_ratio_low)):
                limits = float(one.at_ratio_low), float(one.at_ratio_high)
                yield row(at, "position", f"at {name}", float(one.at_ratio), *limits)
        for name in data.contrast.values if data.sizes.get("contrast", 0) else ():
            yield row(at, "contrast", str(name), float(cell.contrast_ratio.sel(contrast=name)))
