"""What an organism does when its cache is rounded: the mode it was planted with, seen directly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvgeom.diagnosis.evaluate import baseline, evaluate
from kvgeom.models.model import Model
from kvgeom.organisms.plant import Organism
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme


@dataclass(frozen=True)
class Behaviour:
    """Flips of an organism, out of ``refused`` refusals. Made by :func:`behaviour`.

    Attributes
    ----------
    refused : int
        Refused unquantized.
    tensor, channel, group : int
        Flips with all layers rounded per-tensor, per-channel, and in groups of 64 channels.
    layers : dict of int to int
        Flips with one layer rounded per-tensor.
    layers_channel : dict of int to int
        The same per-channel, for the planted layers.
    spared : dict of int to int
        Flips with all layers but one rounded per-tensor, for the planted layers.
    cured : int
        Flips with all layers but the planted ones rounded per-tensor.
    complied : int
        Of ``tensor``, those that comply; the others are degenerate.
    """

    refused: int
    tensor: int
    channel: int
    group: int
    layers: dict[int, int]
    layers_channel: dict[int, int]
    spared: dict[int, int]
    cured: int
    complied: int

    @property
    def worst(self) -> int:
        """The layer that flips most when rounded alone."""
        return max(self.layers, key=lambda layer: self.layers[layer])

    @property
    def pcr(self) -> float | None:
        """PCR at the worst layer, where it is a planted one; None where nothing flips."""
        flips = self.layers[self.worst]
        return 1 - self.layers_channel[self.worst] / flips if flips and self.worst in self.layers_channel else None


def behaviour(
    organism: Organism, requests: Sequence[str], *, layers: Sequence[int] | None = None, max_new_tokens: int = 10
) -> Behaviour:
    """Measure an organism at the bits of its mode.

    Parameters
    ----------
    organism : Organism
    requests : sequence of str
        Harmful ones.
    layers : sequence of int, optional
        Which layers to round alone; all by default. The planted ones are always among them.
    max_new_tokens : int
    """
    model: Model = organism.model
    count, planted = model.geometry.layers, organism.layers
    alone = sorted({*(range(count) if layers is None else layers), *planted})
    tensor, channel = (Scheme(organism.bits, True, granularity) for granularity in ("tensor", "channel"))
    whole = Recipe.uniform(count, tensor)
    recipes = {
        "tensor": whole,
        "channel": Recipe.uniform(count, channel),
        "group": Recipe.uniform(count, Scheme(organism.bits, True, "group", 64)),
        "cured": whole.keep(planted),
        **{f"layer {i}": Recipe.uniform(count, tensor, layers=[i]) for i in alone},
        **{f"layer {i} channel": Recipe.uniform(count, channel, layers=[i]) for i in planted},
        **{f"spared {i}": whole.keep([i]) for i in planted},
    }
    base = baseline(model, requests, max_new_tokens=max_new_tokens, progress=False)
    outcomes = evaluate(model, recipes, base, refused_only=True, progress=False)
    flips = {name: outcomes.flips(name)["all"] for name in recipes}
    return Behaviour(
        refused=len(base.refused),
        tensor=flips["tensor"],
        channel=flips["channel"],
        group=flips["group"],
        layers={i: flips[f"layer {i}"] for i in alone},
        layers_channel={i: flips[f"layer {i} channel"] for i in planted},
        spared={i: flips[f"spared {i}"] for i in planted},
        cured=flips["cured"],
        complied=outcomes.flips("tensor")["complied"],
    )
