"""Safety directions side by side: methods, layers, sites and positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from kvgeom.checks import MOST_DRAWS, as_names, as_seed, at_coordinates, one_by_one, suggests, whole
from kvgeom.errors import InputError, brief
from kvgeom.geometry.activations import SITES, site_width
from kvgeom.geometry.bases import along, oriented
from kvgeom.geometry.estimators import bootstrap, defined_at, held_out
from kvgeom.geometry.fitted import FittedSpace
from kvgeom.geometry.methods.mean import difference_of_means
from kvgeom.geometry.methods.registry import METHODS, Floats, Method, as_method, from_features
from kvgeom.geometry.separation import separation
from kvgeom.progress import bar, shown
from kvgeom.results import Result


@dataclass(frozen=True, repr=False)
class Directions(Result):
    """Directions of one subspace's prompts, by every method and at several positions. Made by :func:`compare`.

    ``data`` has the dimensions ``estimator`` (the method), ``position``, ``layer``, ``site`` and the variables

    - ``stability``, ``stability_low``, ``stability_high``: median and 95 % interval of the cosine with the directions
      of bootstrap samples; NaN where the direction is undefined, and for methods that run the model, whose samples would each
      be another optimisation;
    - ``separation``: cross-validated AUROC along the difference of means (the same for all methods);
    - ``auroc``: cross-validated AUROC along the method's own direction; NaN for methods that run the model;
    - ``cosine_with_mean``: cosine with the difference of means;
    - ``direction_kv`` over (estimator, position, layer, kv, channel) and ``direction_resid`` over (estimator, position,
      layer, resid_channel): unit vectors, zero where undefined;
    - ``score`` over (estimator, position, layer, site, prompt): projection of every prompt, in units of the vectors;
      ``harmful`` over (prompt).

    Of a method with several dimensions the direction is the one within its subspace that lies nearest to the difference of
    means, and stability is that of the whole subspace (:func:`kvgeom.geometry.bases.agreement`).

    With ``heads=True`` the directions of every KV head alone, found in its channels, are there too, over (estimator,
    position, layer, kv, head): ``head_stability`` with its interval, ``head_separation``, ``head_auroc``,
    ``head_cosine_with_mean``, and ``direction_head`` over ``head_channel`` besides.

    ``to_frame()`` has a row for each method, position, layer and site; ``to_frame("scores")``, ``to_frame("channels")``,
    ``to_frame("resid_channels")``, and ``to_frame("heads")`` and ``to_frame("head_channels")`` have the others;
    :meth:`overview` a row for each method.
    """

    kind: ClassVar[str] = "directions"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layers": ("estimator", "position", "layer", "site"),
        "scores": ("estimator", "position", "layer", "site", "prompt"),
        "channels": ("estimator", "position", "layer", "kv", "channel"),
        "resid_channels": ("estimator", "position", "layer", "resid_channel"),
        "heads": ("estimator", "position", "layer", "kv", "head"),
        "head_channels": ("estimator", "position", "layer", "kv", "head", "head_channel"),
    }

    def overview(self, effects: Any = None, *, position: str | None = None) -> pd.DataFrame:
        """The methods at a glance: a row for each method and site.

        Parameters
        ----------
        effects : Effects, optional
            What the directions do when they are ablated and added (:meth:`kvgeom.geometry.subspace.Subspace.effects`);
            adds its columns (:meth:`kvgeom.geometry.effects.Effects.overview`) for the methods that are in both.
        position : str, optional
            The first one by default.

        Returns
        -------
        pandas.DataFrame
            Medians over the layers where the direction is defined, and ``layers``, their number.
        """
        at = self._at(position=position)
        part = self.data.sel(at)
        rows = []
        for method in part.estimator.values:
            for site in part.site.values:
                cell = part.sel(estimator=method, site=site)
                defined = np.isfinite(cell.separation.values)
                row: dict[str, Any] = {"method": str(method), "site": str(site), "layers": int(defined.sum())}
                for name in ("separation", "auroc", "stability", "cosine_with_mean"):
                    values = cell[name].values[defined]
                    seen = values[np.isfinite(values)]
                    row[name] = float(np.median(seen)) if len(seen) else float("nan")
                rows.append(row)
        frame = pd.DataFrame(rows)
        if effects is not None and getattr(effects, "kind", None) != "effects":
            raise InputError(f"effects must be what effects() of the subspace returns, got {brief(effects)}")
        return frame if effects is None else frame.merge(effects.overview(), on=["method", "site"], how="left")

    def cosines_of_positions(self, site: str, layer: int, method: str = "mean") -> xr.DataArray:
        """Cosine between the directions at the positions of one layer: harmfulness (``"instruction"``) and refusal, say."""
        names = list(self.data.position.values)
        at = list(self.data.layer.values)
        at_coordinates(self.data, layer=layer)
        rows = np.stack([self.vectors(site, method, name)[at.index(layer)] for name in names])
        return _square(_nan_rows(rows @ rows.T, rows), "position", names)

    def vectors(self, site: str, method: str = "mean", position: str | None = None) -> NDArray[np.float64]:
        """Unit directions of all layers, ``[layers, channels]`` in the order of ``data.layer``; the first position by default."""
        at = self._at(site=site, estimator=method, position=position)
        del at["site"]
        picked = self.data.direction_resid if site == "resid" else self.data.direction_kv.sel(kv=site)
        found: NDArray[np.float64] = picked.sel(at).values.astype(np.float64)
        return found

    def cosines_of_methods(self, site: str, layer: int, position: str | None = None) -> xr.DataArray:
        """Cosine between methods at one layer and site."""
        at_coordinates(self.data, layer=layer)
        names, at = list(self.data.estimator.values), list(self.data.layer.values).index(layer)
        rows = np.stack([self.vectors(site, name, position)[at] for name in names])
        return _square(_nan_rows(rows @ rows.T, rows), "estimator", names)

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
    methods: Sequence[str | Method] | str | Method | None = None,
    positions: Sequence[str] | str | None = None,
    *,
    k: int = 1,
    heads: bool = False,
    samples: int = 50,
    progress: bool = True,
    seed: int = 0,
) -> Directions:
    """Estimate directions by several methods at every layer and site, and resample the prompts to see how firm they are.

    Runs no prompt again, unless a method needs the model (``"cone"``).

    Parameters
    ----------
    space : Subspace
    methods : str, Method or sequence of these, optional
        All of :data:`kvgeom.geometry.methods.registry.METHODS` by default that need no more of the model than was read.
    positions : str or sequence of str, optional
        The last template token and the instruction by default: one of each position class.
    k : int
        Dimensions of those methods that have several; as many as each has at one position, if that is less.
    heads : bool
        Find the directions of every KV head alone, too.
    samples : int
        Bootstrap samples; 0 for none.
    seed : int

    Raises
    ------
    InputError
        For methods or positions that do not exist, or numbers that are no whole ones.
    """
    chosen_methods = as_methods(methods)
    chosen = (
        [space.positions[-1], space.positions[0]]
        if positions is None
        else as_names("position", positions, space.positions)
    )
    samples, seed, k = whole("samples", samples, 0, MOST_DRAWS), as_seed(seed), whole("k", k, 1)
    geometry, harmful = space.model.geometry, space.is_harmful
    pairs = int(min(harmful.sum(), (~harmful).sum()))
    with shown(progress):
        bases = {
            method.name: method.bases(space.source, chosen, min(k, method.most(len(chosen), pairs)))[0]
            for method in chosen_methods
            if method.needs_model and space.source is not None
        }
    shape = (len(chosen_methods), len(chosen), len(geometry.stores))
    numbers = {name: np.full((*shape, len(SITES)), np.nan) for name in _NUMBERS}
    within = {name: np.full((*shape, 2, geometry.kv_heads), np.nan) for name in _NUMBERS}
    vectors = {site: np.zeros((*shape, site_width(space.model, site)), dtype=np.float32) for site in SITES}
    head_vectors = np.zeros((*shape, 2, geometry.kv_heads, geometry.head_dim), dtype=np.float32)
    scores = np.zeros((*shape, len(SITES), len(harmful)), dtype=np.float32)
    total = len(geometry.stores) * len(SITES) * len(chosen) * len(chosen_methods)
    with shown(progress), bar("directions by every method", total) as drawn:
        for row, layer in enumerate(geometry.stores):
            for column, site in enumerate(SITES):
                features = space.features(layer, site)
                defined = defined_at(features, harmful, space.resolution(layer, site))
                for p, position in enumerate(chosen):
                    index = space.positions.index(position)
                    x = features[:, index]
                    if not defined[index]:
                        drawn.update(len(chosen_methods))
                        continue
                    parts = np.split(x, geometry.kv_heads, axis=1) if heads and site != "resid" else []
                    auroc = separation(x, harmful, draws=0).auroc
                    part_aurocs = [separation(part, harmful, draws=0).auroc for part in parts]
                    for m, method in enumerate(chosen_methods):
                        known = bases[method.name][layer, site][index] if method.needs_model else None
                        unit, found = _cell(x, harmful, method, k, samples, seed, known)
                        vectors[site][m, p, row], scores[m, p, row, column] = unit, x @ unit
                        for name, value in {**found, "separation": auroc}.items():
                            numbers[name][m, p, row, column] = value
                        for head, part in enumerate(parts):
                            inside = None if known is None else np.split(known, geometry.kv_heads)[head]
                            unit, found = _cell(part, harmful, method, k, samples, seed, inside)
                            head_vectors[m, p, row, column, head] = unit
                            for name, value in {**found, "separation": part_aurocs[head]}.items():
                                within[name][m, p, row, column, head] = value
                        drawn.update(1)
    dims = ("estimator", "position", "layer")
    variables: dict[str, Any] = {
        **{name: ((*dims, "site"), values) for name, values in numbers.items()},
        "direction_kv": ((*dims, "kv", "channel"), np.stack([vectors["k"], vectors["v"]], axis=3)),
        "direction_resid": ((*dims, "resid_channel"), vectors["resid"]),
        "score": ((*dims, "site", "prompt"), scores),
        "harmful": ("prompt", harmful),
    }
    if heads:
        variables |= {f"head_{name}": ((*dims, "kv", "head"), values) for name, values in within.items()}
        variables["direction_head"] = ((*dims, "kv", "head", "head_channel"), head_vectors)
    data = xr.Dataset(
        variables,
        coords={
            "estimator": [method.name for method in chosen_methods],
            "position": chosen,
            "layer": list(geometry.stores),
            "site": list(SITES),
            "kv": ["k", "v"],
        },
    )
    return Directions(data, {**space.meta, "samples": samples, "seed": seed, "k": k})


#: Of every method, position, layer and site, and of every head.
_NUMBERS = ("stability", "stability_low", "stability_high", "separation", "auroc", "cosine_with_mean")


def as_methods(given: Any) -> list[Method]:
    """Some methods, each with another name; all that need no more of the model than was read by default."""
    if given is None:
        return [METHODS[name] for name in from_features()]
    if isinstance(given, Method):
        return [given]
    found = [as_method(each) for each in one_by_one(given)]
    names = [method.name for method in found]
    if not found or len(set(names)) < len(names):
        raise InputError(
            f"methods must be at least one, each with another name, got {brief(names)}; see {', '.join(METHODS)}"
        )
    return found


def _cell(
    x: Floats, harmful: NDArray[np.bool_], method: Method, k: int, samples: int, seed: int, known: Floats | None
) -> tuple[Floats, dict[str, float]]:
    """The direction of a method, and its numbers; of one that was found before (``known``), those that can be had."""
    gap = difference_of_means(x, harmful)
    size = float(np.linalg.norm(gap))
    if known is not None:
        unit = along(gap, oriented(known, None))
        return unit, {"cosine_with_mean": float(unit @ gap) / size if size > 0 else float("nan")}
    k = min(k, method.most(1, int(min(harmful.sum(), (~harmful).sum()))))
    method = method.resampled(x, harmful)  # what it chooses by the data, once for all that follows
    basis, drawn = bootstrap(x, harmful, method, k=k, samples=samples, seed=seed)
    unit = along(gap, basis)
    found = {
        "auroc": held_out(x, harmful, method, k=k),
        "cosine_with_mean": float(unit @ gap) / size if size > 0 else float("nan"),
    }
    if samples:
        low, median, high = np.quantile(drawn, [0.025, 0.5, 0.975])
        found |= {"stability": float(median), "stability_low": float(low), "stability_high": float(high)}
    return unit, found
