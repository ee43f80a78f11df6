"""Safety directions side by side: methods, layers, sites and positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from kvgeom.checks import as_names, as_seed, at_coordinates, suggests, whole
from kvgeom.geometry.activations import SITES, site_width
from kvgeom.geometry.estimators import METHODS, bootstrap, defined_at
from kvgeom.geometry.fitted import FittedSpace
from kvgeom.geometry.separation import separation
from kvgeom.progress import bar, shown
from kvgeom.results import Result


@dataclass(frozen=True, repr=False)
class Directions(Result):
    """Directions of one subspace's prompts, by every method and at several positions. Made by :func:`compare`.

    ``data`` has the dimensions ``estimator`` (the method), ``position``, ``layer``, ``site`` and the variables

    - ``stability``, ``stability_low``, ``stability_high``: median and 95 % interval of the cosine with the directions
      of bootstrap samples; NaN where the direction is undefined;
    - ``separation``: cross-validated AUROC along the difference of means (the same for all methods);
    - ``direction_kv`` over (estimator, position, layer, kv, channel) and ``direction_resid`` over (estimator, position,
      layer, resid_channel): unit vectors, zero where undefined;
    - ``score`` over (estimator, position, layer, site, prompt): projection of every prompt, in units of the vectors;
      ``harmful`` over (prompt).

    ``to_frame()`` has a row for each method, position, layer and site; ``to_frame("scores")``, ``to_frame("channels")`` and
    ``to_frame("resid_channels")`` have the others.
    """

    kind: ClassVar[str] = "directions"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layers": ("estimator", "position", "layer", "site"),
        "scores": ("estimator", "position", "layer", "site", "prompt"),
        "channels": ("estimator", "position", "layer", "kv", "channel"),
        "resid_channels": ("estimator", "position", "layer", "resid_channel"),
    }

    def vectors(self, site: str, method: str = "mean", position: str | None = None) -> NDArray[np.float64]:
        """Unit directions of all layers, ``[layers, channels]``; the first position by default."""
        at = self._at(site=site, estimator=method, position=position)
        del at["site"]
        picked = self.data.direction_resid if site == "resid" else self.data.direction_kv.sel(kv=site)
        found: NDArray[np.float64] = picked.sel(at).values.astype(np.float64)
        return found

    def cosines_of_methods(self, site: str, layer: int, position: str | None = None) -> xr.DataArray:
        """Cosine between methods at one layer and site."""
        at_coordinates(self.data, layer=layer)
        names = list(self.data.estimator.values)
        rows = np.stack([self.vectors(site, name, position)[layer] for name in names])
        return _square(rows @ rows.T, "estimator", names)

    def cosines_of_layers(self, method: str = "mean", position: str | None = None) -> xr.DataArray:
        """Cosine between the directions of the residual stream after each layer.

        Only the residual stream has the same channels in all layers: for keys and values see
        :meth:`agreement_of_layers`.
        """
        rows = self.vectors("resid", method, position)
        return _square(_nan_rows(rows @ rows.T, rows), "layer", self.data.layer.values)

    def agreement_of_layers(self, site: str, method: str = "mean", position: str | None = None) -> xr.DataArray:
        """Cosine between the prompts' scores along the directions of each layer, class means taken out.

        Scores can be compared where vectors cannot, in other channels. With the class means in, all good directions
        would agree merely because they all separate the classes.
        """
        at = self._at(estimator=method, position=position, site=site)
        rows = self._within(self.data.score.sel(at).values.astype(np.float64))
        return _square(_nan_rows(rows @ rows.T, rows), "layer", self.data.layer.values)

    def agreement_of_sites(self, layer: int, method: str = "mean", position: str | None = None) -> xr.DataArray:
        """The same between keys, values and residual stream of one layer."""
        at = self._at(estimator=method, position=position, layer=layer)
        rows = self._within(self.data.score.sel(at).transpose("site", "prompt").values.astype(np.float64))
        return _square(_nan_rows(rows @ rows.T, rows), "site", self.data.site.values)

    def _at(self, position: str | None, **coordinates: Any) -> dict[str, Any]:
        """Coordinates that there are; the first position where none is given."""
        at = {**coordinates, "position": str(self.data.position.values[0]) if position is None else position}
        at_coordinates(self.data, **at)
        return at

    def _within(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        harmful = self.data.harmful.values
        centred = scores.copy()
        for rows in (harmful, ~harmful):
            centred[..., rows] -= centred[..., rows].mean(-1, keepdims=True)
        norms = np.linalg.norm(centred, axis=-1, keepdims=True)
        found: NDArray[np.float64] = np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0)
        return found

    def summary(self) -> str:
        sizes = self.data.sizes
        return f"{self.data.estimator.values.tolist()} at {self.data.position.values.tolist()}, {sizes['layer']} layers"


def _square(values: NDArray[np.float64], dim: str, names: Iterable[object]) -> xr.DataArray:
    labels = list(names)
    return xr.DataArray(values, dims=(dim, f"other_{dim}"), coords={dim: labels, f"other_{dim}": labels})


def _nan_rows(values: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    missing = ~(np.linalg.norm(rows, axis=1) > 0)
    values = values.copy()
    values[missing] = values[:, missing] = np.nan
    return values


@suggests()
def compare(
    space: FittedSpace,
    methods: Sequence[str] | str | None = None,
    positions: Sequence[str] | str | None = None,
    *,
    samples: int = 50,
    progress: bool = True,
    seed: int = 0,
) -> Directions:
    """Estimate directions by several methods at every layer and site, and resample the prompts to see how firm they are.

    Runs no prompt again.

    Parameters
    ----------
    space : Subspace
    methods : str or sequence of str, optional
        All of :data:`kvgeom.geometry.estimators.METHODS` by default.
    positions : str or sequence of str, optional
        The last template token and the instruction by default: one of each position class.
    samples : int
        Bootstrap samples; 0 for none.
    seed : int

    Raises
    ------
    InputError
        For methods or positions that do not exist, or numbers that are no whole ones.
    """
    methods = list(METHODS) if methods is None else as_names("method", methods, METHODS)
    chosen = (
        [space.positions[-1], space.positions[0]]
        if positions is None
        else as_names("position", positions, space.positions)
    )
    samples, seed = whole("samples", samples), as_seed(seed)
    geometry, harmful = space.model.geometry, space.is_harmful
    shape = (len(methods), len(chosen), len(geometry.stores))
    numbers = {
        name: np.full((*shape, 3), np.nan) for name in ("stability", "stability_low", "stability_high", "separation")
    }
    vectors = {site: np.zeros((*shape, site_width(space.model, site)), dtype=np.float32) for site in SITES}
    scores = np.zeros((*shape, 3, len(harmful)), dtype=np.float32)
    total = len(geometry.stores) * len(SITES) * len(chosen) * len(methods)
    with shown(progress), bar("directions by every method", total) as drawn_bar:
        for row, layer in enumerate(geometry.stores):
            for column, site in enumerate(SITES):
                features = space.features(layer, site)
                defined = defined_at(features, harmful, space.resolution(layer, site))
                for p, position in enumerate(chosen):
                    index = space.positions.index(position)
                    x = features[:, index]
                    if not defined[index]:
                        drawn_bar.update(len(methods))
                        continue
                    auroc = separation(x, harmful, draws=0).auroc
                    for m, method in enumerate(methods):
                        unit, drawn = bootstrap(x, harmful, method, samples=samples, seed=seed)
                        vectors[site][m, p, row], scores[m, p, row, column] = unit, x @ unit
                        numbers["separation"][m, p, row, column] = auroc
                        if samples:
                            low, median, high = np.quantile(drawn, [0.025, 0.5, 0.975])
                            numbers["stability"][m, p, row, column] = median
                            numbers["stability_low"][m, p, row, column] = low
                            numbers["stability_high"][m, p, row, column] = high
                        drawn_bar.update(1)
    dims = ("estimator", "position", "layer")
    data = xr.Dataset(
        {
            **{name: ((*dims, "site"), values) for name, values in numbers.items()},
            "direction_kv": ((*dims, "kv", "channel"), np.stack([vectors["k"], vectors["v"]], axis=3)),
            "direction_resid": ((*dims, "resid_channel"), vectors["resid"]),
            "score": ((*dims, "site", "prompt"), scores),
            "harmful": ("prompt", harmful),
        },
        coords={
            "estimator": methods,
            "position": chosen,
            "layer": list(geometry.stores),
            "site": list(SITES),
            "kv": ["k", "v"],
        },
    )
    return Directions(data, {**space.meta, "samples": samples, "seed": seed})
