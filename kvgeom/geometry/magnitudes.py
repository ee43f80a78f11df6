"""How large keys and values are, and how far rounding moves them: what predicts damage without any geometry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr
from einops import rearrange

from kvgeom.checks import one_by_one, one_of, suggests, whole_numbers
from kvgeom.errors import InputError
from kvgeom.evaluation.config import LOAD_OPTIONS
from kvgeom.evaluation.inputs import made_with, opened
from kvgeom.geometry.rounding import DEFAULT_SCHEME, CacheSpec, Rounding
from kvgeom.models.reading import read
from kvgeom.progress import shown, track
from kvgeom.quant.placement import Placement
from kvgeom.results import Result

SITES = ("k", "v")


@dataclass(frozen=True, repr=False)
class Magnitudes(Result):
    """Sizes and rounding errors of all channels. Made by :func:`magnitudes`.

    ``data`` has the variables, over (prompt, layer, site, channel), of what the cache stores of a prompt:

    - ``max_abs``: largest absolute value over the tokens;
    - ``energy``: mean square over the tokens;
    - ``mse``: mean squared rounding error over the tokens;

    over (layer, channel) ``key_bias``, the bias of the key projection, 0 where there is none; and over (layer, site), of all
    prompts and channels, ``largest`` and ``relative_error``, the root of the squared error over the energy.
    """

    kind: ClassVar[str] = "magnitudes"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layers": ("layer", "site"),
        "channels": ("prompt", "layer", "site", "channel"),
        "key_biases": ("layer", "channel"),
    }

    def controls(self, sites: str = "kv", channels: Sequence[Sequence[int]] | None = None) -> xr.Dataset:
        """What a predictor of damage must beat, for one unit of every layer.

        Parameters
        ----------
        sites : {"k", "v", "kv"}
            Which sites the unit has. What has one value is that of its first site.
        channels : sequence of sequence of int, optional
            Channels of the unit in each layer; all by default.

        Returns
        -------
        xarray.Dataset
            Over (layer, prompt) ``max_abs``, ``mse`` (summed over channels and sites) and ``relative_mse`` (of the first site);
            over (layer) ``key_bias`` (norm; 0 for values) and ``depth`` (the layer's number).

        Raises
        ------
        InputError
            For unknown sites, or channels that the model does not have.
        """
        one_of("sites", sites, ("k", "v", "kv"))
        layers, width = self.data.sizes["layer"], self.data.sizes["channel"]
        chosen = (
            [range(width)] * layers
            if channels is None
            else [whole_numbers("channels", some, 0, width - 1) for some in one_by_one(channels)]
        )
        if len(chosen) != layers or not all(chosen):
            raise InputError(f"channels must name some of {width} channels for each of {layers} layers")
        rows = []
        for layer, some in zip(self.data.layer.values, chosen, strict=True):
            unit = self.data.sel(layer=layer).isel(channel=list(some)).sel(site=list(sites))
            first = unit.isel(site=0)
            bias = np.sqrt((unit.key_bias**2).sum()) if sites[0] == "k" else xr.zeros_like(unit.key_bias.sum())
            rows.append(
                xr.Dataset(
                    {
                        "max_abs": first.max_abs.max("channel"),
                        "mse": unit.mse.sum(("site", "channel")),
                        "relative_mse": first.mse.sum("channel") / first.energy.sum("channel"),
                        "key_bias": bias,
                        "depth": float(layer),
                    }
                ).drop_vars("site")
            )
        return xr.concat(rows, "layer")

    def summary(self) -> str:
        largest = self.data.largest.sel(site="k")
        layer = int(largest.layer.values[int(largest.argmax("layer"))])
        return f"largest key {float(largest.max()):.3g}, in layer {layer}; errors under {self.meta['scheme']}"


@suggests(LOAD_OPTIONS)
def magnitudes(
    model: Any,
    prompts: Any,
    scheme: CacheSpec = DEFAULT_SCHEME,
    *,
    placement: Placement | str | None = None,
    progress: bool = True,
    **load_options: Any,
) -> Magnitudes:
    """Measure how large keys and values are, and how far rounding moves them.

    Costs one forward pass a prompt.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts : EncodedPrompts, requests, or the name of a set
    scheme : CacheConfig, Recipe, Scheme or str
        Anything that :func:`kvgeom.engines.registry.resolve` takes; see :class:`~kvgeom.geometry.rounding.Rounding`.
        3-bit symmetric per-tensor by default.
    placement : Placement or {"cache"}, optional
        Instead of the preset's, or of the decode-faithful default.
    **load_options
        Of :func:`kvgeom.load`.

    Raises
    ------
    InputError
        Without prompts, if ``scheme`` cannot be resolved, or for a placement at the projection.
    ModelError
        If layers of the model have caches of different shapes.
    """
    model, prompts = opened(model, prompts, load_options, progress)
    rounding, geometry = Rounding.in_cache(model, scheme, placement), model.geometry
    geometry.check_alike(model.name)
    rows = {layer: row for row, layer in enumerate(geometry.stores)}
    shape = (len(prompts), len(rows), len(SITES), geometry.channels)
    found = {name: np.zeros(shape) for name in ("max_abs", "energy", "mse")}
    biases = np.zeros((len(rows), geometry.channels))
    for (layer, _), bias in model.key_biases().items():
        biases[rows[layer]] = bias.flatten().float().cpu().numpy()
    with shown(progress):
        for number, prompt in enumerate(track(prompts, "sizes of keys and values", len(prompts))):
            for one in read(model, prompt):
                for column, (x, error) in enumerate(zip((one.k, one.v), rounding.errors(one), strict=True)):
                    exact, off = (
                        rearrange(t, "h t d -> t (h d)").double().cpu().numpy() for t in (x[0].float(), error)
                    )
                    at = number, rows[one.layer], column
                    found["max_abs"][at] = np.abs(exact).max(0)
                    found["energy"][at] = (exact**2).mean(0)
                    found["mse"][at] = (off**2).mean(0)
    dims = ("prompt", "layer", "site", "channel")
    with np.errstate(invalid="ignore"):  # a site that is 0 throughout
        relative = np.sqrt(found["mse"].sum((0, 3)) / found["energy"].sum((0, 3)))
    data = xr.Dataset(
        {
            "largest": (dims[1:3], found["max_abs"].max((0, 3))),
            "relative_error": (dims[1:3], relative),
            **{name: (dims, values) for name, values in found.items()},
            "key_bias": (("layer", "channel"), biases),
        },
        coords={
            "prompt": np.arange(len(prompts)),
            "layer": list(rows),
            "site": list(SITES),
            "channel": np.arange(geometry.channels),
        },
    )
    return Magnitudes(data, {**made_with(model, [prompt.text for prompt in prompts]), **rounding.made})
