"""What rounding one layer's keys and values does to refusal: exactly, by patching, and to first order, by gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from kvgeom.checks import suggests, whole_numbers
from kvgeom.engines.engine import CacheConfig
from kvgeom.errors import InputError
from kvgeom.evaluation.condition import by_name
from kvgeom.evaluation.config import LOAD_OPTIONS
from kvgeom.evaluation.inputs import as_tokens, made_with, opened
from kvgeom.evaluation.scores import kl_divergence, margin
from kvgeom.geometry.rounding import CacheSpec, Rounding
from kvgeom.models.batching import in_batches, rows_per_batch
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.models.reading import read
from kvgeom.progress import bar, shown, track
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.results import Result


@dataclass(frozen=True, repr=False)
class Patching(Result):
    """Single-layer rounding: its exact effect on the next token, prompt by prompt. Made by :func:`patch_layers`.

    ``data`` has the dimensions ``prompt`` (number in the list), ``layer`` and ``scheme``, and the variables

    - ``margin`` (nats), and ``clean_margin`` over prompts alone: the refusal margin; NaN without refusal tokens;
    - ``kl`` (nats): Kullback-Leibler divergence of the rounded from the clean next-token distribution;
    - ``token``: the most likely next token;
    - ``resid_alignment``: how much of the perturbation of the last residual stream (last token) lies on the refusal
      direction, relative to an even spread: ``d_model * (r'd)^2 / |d|^2``; NaN where no direction was given.

    References
    ----------
    Activation patching: one layer's rounded keys and values in an otherwise clean run (docs/definitions.md).
    """

    kind: ClassVar[str] = "patching"

    @property
    def margin_drop(self) -> xr.DataArray:
        """Margin lost (nats), by prompt, layer and scheme."""
        drop: xr.DataArray = self.data.clean_margin - self.data.margin
        return drop

    def provenance(self) -> dict[str, Any]:
        return {**super().provenance(), "scheme": self.meta["schemes"]}

    def summary(self) -> str:
        sizes = self.data.sizes
        return f"{sizes['layer']} layers x {self.data.scheme.values.tolist()}, {sizes['prompt']} prompts"


@suggests(LOAD_OPTIONS)
def patch_layers(
    model: Any,
    prompts: Any,
    schemes: Mapping[str, CacheSpec] | Sequence[CacheSpec] | CacheSpec,
    refusal_tokens: Iterable[int],
    *,
    placement: Placement | str | None = None,
    direction: NDArray[np.floating] | None = None,
    layers: Sequence[int] | int | None = None,
    progress: bool = True,
    title: str = "rounding single layers",
    **load_options: Any,
) -> Patching:
    """Round each layer alone and look at the next token.

    All layers and schemes go through in one pass, each joining it at its layer, below which nothing has changed: per
    prompt 1 pass, and half a pass per layer and scheme.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts : EncodedPrompts, requests, or the name of a set
    schemes : mapping of name to scheme, sequence of schemes, or one
        A scheme is anything that :func:`kvgeom.engines.registry.resolve` takes; see
        :class:`~kvgeom.geometry.rounding.Rounding`. Of a recipe each layer is taken alone, with its own schemes for keys and
        values.
    refusal_tokens : iterable of int
        The set R of :func:`kvgeom.evaluation.scores.refusal_tokens`; without any the margins are NaN.
    placement : Placement or {"cache", "paper"}, optional
        Instead of the presets', or of the decode-faithful default.
    direction : array [d_model], optional
        Refusal direction in the residual stream after the last layer, for ``resid_alignment``.
    layers : int or sequence of int, optional
        All by default.
    **load_options
        Of :func:`kvgeom.load`.

    Raises
    ------
    InputError
        Without schemes, if one cannot be resolved, if two different ones have one name, or for layers or tokens that the model
        does not have.
    """
    model, prompts = opened(model, prompts, load_options, progress)
    named = _named(model, schemes, placement)
    n_layers = model.geometry.layers
    chosen = list(model.geometry.stores) if layers is None else whole_numbers("layers", layers, 0, n_layers - 1)
    model.geometry.check_stores(chosen, model.name)
    if not chosen:
        raise InputError(f"no layer was given; choose from 0 to {n_layers - 1}")
    branches = [
        (layer, rounding.recipe.only([layer]), rounding.placement)
        for layer in sorted(chosen)
        for rounding in named.values()
    ]
    tokens = as_tokens(model, refusal_tokens)
    unit = None if direction is None else _unit(direction, model)
    dims = ("prompt", "layer", "scheme")
    shape = (len(prompts), len(branches))
    found = {name: np.full(shape, np.nan) for name in ("margin", "kl", "resid_alignment")}
    most_likely = np.zeros(shape, dtype=np.int64)
    clean_margin = np.full(len(prompts), np.nan)

    def run(part: Sequence[tuple[int, Recipe, Placement]], prompt: EncodedPrompt) -> tuple[torch.Tensor, torch.Tensor]:
        resid: dict[int, torch.Tensor] = {}
        logits = model.forward_branches(
            prompt.ids,
            [Quantizer(recipe, at) for _, recipe, at in part],
            [layer for layer, *_ in part],
            on_resid=resid.__setitem__ if unit is not None else None,
        )[:, -1]
        return logits, resid[n_layers - 1][:, -1] if unit is not None else logits[:, :0]

    with shown(progress), bar(title, len(prompts) * len(branches)) as drawn:
        for row, prompt in enumerate(prompts):
            begin = 0
            rows = rows_per_batch(model, len(prompt), 1)
            for part, (logits, resid) in in_batches(branches, rows, partial(run, prompt=prompt)):
                cells = slice(begin, begin := begin + len(part))
                if tokens:
                    clean_margin[row], *found["margin"][row, cells] = margin(logits, tokens).double().tolist()
                found["kl"][row, cells] = kl_divergence(logits[:1], logits[1:]).double().cpu().numpy()
                most_likely[row, cells] = logits[1:].argmax(-1).cpu().numpy()
                if unit is not None:
                    change = (resid[1:] - resid[:1]).double().cpu().numpy()
                    found["resid_alignment"][row, cells] = _alignment(change, unit)
                drawn.update(len(part))
    whole = (len(prompts), len(chosen), len(named))
    data = xr.Dataset(
        {
            **{name: (dims, values.reshape(whole)) for name, values in found.items()},
            "token": (dims, most_likely.reshape(whole)),
            "clean_margin": ("prompt", clean_margin),
        },
        coords={"prompt": np.arange(len(prompts)), "layer": sorted(chosen), "scheme": list(named)},
    )
    meta = {
        **made_with(model, [prompt.text for prompt in prompts]),
        "placement": " / ".join(sorted({str(rounding.placement) for rounding in named.values()})),
        "schemes": {name: rounding.stored for name, rounding in named.items()},
    }
    return Patching(data, meta)


def _named(
    model: Model, schemes: Mapping[str, CacheSpec] | Sequence[CacheSpec] | CacheSpec, placement: Placement | str | None
) -> dict[str, Rounding]:
    """What is rounded in each branch, by name."""
    if isinstance(schemes, Mapping):
        named = by_name(zip(map(str, schemes), Rounding.each(model, schemes.values(), placement), strict=True))
    else:
        specs = (schemes,) if isinstance(schemes, CacheConfig | Recipe | Scheme | str) else schemes
        named = by_name((rounding.name, rounding) for rounding in Rounding.each(model, specs, placement))
    if not named:
        raise InputError("no scheme was given; name at least one to round the layers with")
    if len({(r.placement.where, r.placement.prefill_reads) for r in named.values()}) > 1:
        raise InputError(
            f"schemes {', '.join(named)} round at different places or times, which one pass cannot do; patch them one by "
            "one, or give a placement for all"
        )
    return named


def _unit(direction: NDArray[np.floating], model: Model) -> NDArray[np.float64]:
    r = np.asarray(direction, dtype=np.float64).ravel()
    if r.shape != (model.geometry.d_model,) or not np.linalg.norm(r) > 0:
        raise InputError(
            f"a direction must have shape [{model.geometry.d_model}] and not be 0, got shape {list(np.shape(direction))}"
        )
    return r / np.linalg.norm(r)


def _alignment(change: NDArray[np.float64], unit: NDArray[np.float64]) -> NDArray[np.float64]:
    size = (change**2).sum(-1)
    along = (change @ unit) ** 2
    alignment: NDArray[np.float64] = np.divide(len(unit) * along, size, out=np.full(len(size), np.nan), where=size > 0)
    return alignment


@dataclass(frozen=True, repr=False)
class FirstOrder(Result):
    """First-order estimate of the margin lost to rounding. Made by :func:`first_order`.

    ``data`` has the dimensions ``prompt``, ``layer``, ``site`` (``"k"``, ``"v"``) and ``channel``, and the variables

    - ``margin_drop`` (nats) over (prompt, layer, site): the derivative of the margin times the rounding error, minus;
    - ``channel_drop`` (nats) over (layer, site, channel): the same by channel of the cache, mean of the prompts.
      Channels add up to the mean of ``margin_drop``;
    - ``clean_margin`` (nats) over (prompt).
    """

    kind: ClassVar[str] = "first-order"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layers": ("prompt", "layer", "site"),
        "channels": ("layer", "site", "channel"),
    }

    @property
    def by_layer(self) -> xr.DataArray:
        """Margin lost (nats) when both keys and values of a layer are rounded, by prompt and layer."""
        drop: xr.DataArray = self.data.margin_drop.sum("site")
        return drop

    def summary(self) -> str:
        return f"{self.data.sizes['layer']} layers under {self.meta['scheme']}, {self.data.sizes['prompt']} prompts"


@suggests(LOAD_OPTIONS)
def first_order(
    model: Any,
    prompts: Any,
    scheme: CacheSpec,
    refusal_tokens: Iterable[int],
    *,
    placement: Placement | str | None = None,
    progress: bool = True,
    **load_options: Any,
) -> FirstOrder:
    """Estimate what rounding costs in every layer, site and channel from one forward and one backward pass a prompt.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts : EncodedPrompts, requests, or the name of a set
    scheme : CacheConfig, Recipe, Scheme or str
        Anything that :func:`kvgeom.engines.registry.resolve` takes; see :class:`~kvgeom.geometry.rounding.Rounding`.
        Sites that a recipe leaves exact lose nothing.
    refusal_tokens : iterable of int
        Must not be empty: the margin is what is differentiated.
    placement : Placement or {"cache", "paper"}, optional
        Instead of the preset's, or of the decode-faithful default.
    **load_options
        Of :func:`kvgeom.load`.

    Raises
    ------
    InputError
        Without refusal tokens or prompts, or if ``scheme`` cannot be resolved.

    Notes
    -----
    Attribution patching: exact for rounding errors so small that the margin is linear in them, which 3-bit errors are
    not. Compare with :func:`patch_layers` before it is believed (:func:`kvgeom.stats.rank_correlation`).
    """
    model, prompts = opened(model, prompts, load_options, progress)
    tokens = as_tokens(model, refusal_tokens)
    if not tokens or not prompts:
        raise InputError(
            f"a first-order estimate needs prompts that the model refuses and the tokens that refusals begin with, got "
            f"{len(prompts)} prompts and {len(tokens)} refusal tokens"
        )
    rounding = Rounding.of(model, scheme, placement)
    where = rounding.placement.where
    geometry = model.geometry
    sites = ("k", "v")
    geometry.check_alike(model.name)
    stores = geometry.stores
    drops = np.zeros((len(prompts), len(stores), len(sites)))
    channels = np.zeros((len(stores), len(sites), geometry.channels))
    clean = np.zeros(len(prompts))
    with shown(progress):
        for row, prompt in enumerate(track(prompts, "first-order estimate", len(prompts))):
            found = model.gradients(prompt.ids, lambda logits: margin(logits, tokens), where=where)
            clean[row] = found.score
            rotations = (
                {one.layer: one.rotation for one in read(model, prompt, where)} if rounding.needs_rotation else None
            )
            for (layer, site), x in found.x.items():
                rounded = rounding(layer, site, x, rotations[layer] if rotations and site == "k" else None)
                error = rounded.float() - x.float()
                lost = -(found.grad[layer, site] * error)[0].double().sum(1).flatten().cpu().numpy()
                at = stores.index(layer), sites.index(site)
                drops[row, *at] = lost.sum()
                channels[at] += lost / len(prompts)
    data = xr.Dataset(
        {
            "margin_drop": (("prompt", "layer", "site"), drops),
            "channel_drop": (("layer", "site", "channel"), channels),
            "clean_margin": ("prompt", clean),
        },
        coords={
            "prompt": np.arange(len(prompts)),
            "layer": list(stores),
            "site": list(sites),
            "channel": np.arange(geometry.channels),
        },
    )
    meta = {
        **made_with(model, [prompt.text for prompt in prompts]),
        **rounding.made,
        "head_dim": geometry.head_dim,
    }
    return FirstOrder(data, meta)
