"""Constants of a model that transforms need (``center``, ``equalize``), measured over some prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvgeom.errors import InputError
from kvgeom.models.model import Model
from kvgeom.models.reading import read
from kvgeom.quant.recipe import Recipe, Site
from kvgeom.quant.transforms import Key, Statics, pair_factors


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and largest magnitude of every channel, keys without their rotary embedding.

    Attributes
    ----------
    mean, largest : dict of (layer, "k" or "v") to Tensor [kv_heads, head_dim]
    planes : dict of (layer, "k") to Tensor [planes, 2]
        The pairs of channels of a head that the layer rotates.
    tokens : int
    """

    mean: dict[Key, Tensor] = field(repr=False)
    largest: dict[Key, Tensor] = field(repr=False)
    planes: dict[Key, Tensor] = field(repr=False)
    tokens: int


def channel_statistics(model: Model, prompts: Sequence[str]) -> ChannelStatistics:
    """Run some prompts (one pass each) and summarize what the cache stores of them.

    Only sums are kept.

    Raises
    ------
    InputError
        Without prompts.
    """
    if not prompts:
        raise InputError("statistics of keys and values need prompts, got none; give at least one")
    sums: dict[Key, Tensor] = {}
    largest: dict[Key, Tensor] = {}
    planes: dict[Key, Tensor] = {}
    tokens = 0
    for prompt in model.encode(prompts):
        tokens += len(prompt)
        for layer in read(model, prompt):
            if layer.rotation is not None:
                planes[layer.layer, "k"] = layer.rotation.planes
            sites: tuple[tuple[Site, Tensor], ...] = (("k", layer.unrotated()), ("v", layer.v))
            for site, x in sites:
                key, own = (layer.layer, site), x[0].float()
                sums[key] = sums.get(key, torch.zeros(())) + own.sum(1)
                largest[key] = torch.maximum(largest.get(key, torch.zeros_like(own[:, 0])), own.abs().amax(1))
    return ChannelStatistics({key: total / tokens for key, total in sums.items()}, largest, planes, tokens)


@dataclass(frozen=True)
class Constants:
    """What ``center`` and ``equalize`` need to know of a model; made by :func:`constants`.

    Attributes
    ----------
    keys, both : Statics
        Offsets of keys alone, and of keys and values. Those of keys are the bias of their projection or, where a model
        has none, the calibration mean without the rotary embedding; those of values are the calibration mean.
    mean_keys : Statics or None
        The calibration mean of keys where ``keys`` is not that already. It contains what prompts have in common beside
        the bias, so it depends on the prompts.
    factors : Statics
        Channel sizes over the calibration prompts; the two channels of a rotated pair share one.
    """

    keys: Statics
    both: Statics
    mean_keys: Statics | None
    factors: Statics


def constants(model: Model, prompts: Sequence[str]) -> Constants:
    """Measure offsets and sizes of channels. Costs one pass a prompt.

    Raises
    ------
    InputError
        Without prompts.
    """
    seen = channel_statistics(model, prompts)
    biases = model.key_biases()
    source = "key bias" if biases else "mean key"
    means = {key: mean for key, mean in seen.mean.items() if key[1] == "k"}
    keys, rotary = biases or means, any(map(len, seen.planes.values()))
    values = {key: mean for key, mean in seen.mean.items() if key[1] == "v"}
    sizes = {key: pair_factors(top, seen.planes.get(key)) for key, top in seen.largest.items()}
    return Constants(
        Statics.of(source, keys, rotary=rotary),
        Statics.of(f"{source} and mean value", {**keys, **values}, rotary=rotary),
        Statics.of("mean key", means, rotary=rotary) if biases else None,
        Statics.of("channel sizes", sizes),
    )


def with_constants(model: Model, recipe: Recipe, prompts: Sequence[str]) -> Recipe:
    """The same recipe with the offsets and factors that its schemes need and it does not have.

    Parameters
    ----------
    model : Model
    recipe : Recipe
    prompts : sequence of str
        Calibration prompts. They are run (one pass each) only if something must be measured; key biases are read off the
        model.

    Returns
    -------
    Recipe
        ``recipe`` itself if it needs nothing, or has all that it needs. Offsets are those of :class:`Constants`: of keys
        alone where no values are centred.
    """
    offsets, factors = missing_constants(recipe)
    if not offsets and not factors:
        return recipe
    if not factors and offsets == {"k"} and (biases := model.key_biases()):
        rotary = model.geometry.rope != "none"
        return recipe.with_statics(offsets=Statics.of("key bias", biases, rotary=rotary))
    known = constants(model, prompts)
    centred = (known.both if "v" in offsets else known.keys) if offsets else None
    return recipe.with_statics(offsets=centred, factors=known.factors if factors else None)


def missing_constants(recipe: Recipe) -> tuple[frozenset[Site], frozenset[Site]]:
    """Sites whose schemes need offsets, and sites whose schemes need factors, that the recipe does not have."""
    return (
        recipe.sites_with("offsets") if recipe.offsets is None else frozenset(),
        recipe.sites_with("factors") if recipe.factors is None else frozenset(),
    )
