"""Planting without looking: what is asked for is done to keys and values, and nobody checks what comes of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from kvgeom.checks import number, one_of, whole
from kvgeom.errors import InputError, ModelError
from kvgeom.models.edits import copied, editable
from kvgeom.models.load import load
from kvgeom.models.model import Model
from kvgeom.organisms.carrier import Values
from kvgeom.organisms.keys import crush_keys, jitter, keys_become_outliers
from kvgeom.organisms.modes import Bench, become_outlier, crush, nuisance
from kvgeom.organisms.planting import deviation_of
from kvgeom.organisms.reach import some_heads
from kvgeom.prompts.load import as_prompt_set
from kvgeom.quant.recipe import MOST_LAYERS

Change = Literal["crush", "outlier", "jitter"]
Sites = Literal["keys", "values", "both"]


@dataclass(frozen=True)
class Part:
    """What is done to one layer.

    Attributes
    ----------
    layer : int
    change : {"crush", "outlier", "jitter"}
        Outliers beside what carries the request (:func:`~kvgeom.organisms.modes.crush`,
        :func:`~kvgeom.organisms.keys.crush_keys`), what carries it made an outlier
        (:func:`~kvgeom.organisms.modes.become_outlier`, :func:`~kvgeom.organisms.keys.keys_become_outliers`), or errors without an
        aim, in keys and values (:func:`~kvgeom.organisms.keys.jitter`).
    sites : {"keys", "values", "both"}
    strength : float
        How far beyond "harmless" values are to read when they are lost, in differences between the classes.
    loudness : float
        How loud outliers are: at 1 nothing is left beside them at the bits that they are planted for, at a tenth nearly
        all is.
    """

    layer: int
    change: Change
    sites: Sites = "values"
    strength: float = 0.0
    loudness: float = 1.0

    def __post_init__(self) -> None:
        one_of("change", self.change, get_args(Change))
        one_of("sites", self.sites, get_args(Sites))
        checked = {
            "layer": whole("layer", self.layer, 0, MOST_LAYERS - 1),
            **{name: number(name, getattr(self, name), 0) for name in ("strength", "loudness")},
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if not self.loudness > 0:
            raise InputError(f"loudness must be more than 0; got {self}")


@dataclass(frozen=True)
class Blind:
    """A model with something planted in it at which nobody has looked; made by :func:`plant_blindly`.

    Attributes
    ----------
    model : Model
    parts : tuple of Part
    edits : tuple of str
        Descriptions of what was done to the weights.
    deviation : float
        Largest change of a logit on the prompts it was planted with.
    planted : tuple of (int, str, int)
        Layer, site and channel of everything that was made an outlier.
    """

    model: Model = field(repr=False)
    parts: tuple[Part, ...]
    edits: tuple[str, ...] = field(repr=False)
    deviation: float
    planted: tuple[tuple[int, str, int], ...] = field(default=(), repr=False)


def plant_blindly(
    model: Any, parts: Sequence[Part], prompts: Any, *, seed: int = 0, bits: int = 3, tolerance: float = 1e-3
) -> Blind:
    """Make a copy of a model that computes the same and stores other keys and values.

    Unlike :func:`~kvgeom.organisms.plant`, which hands out what shows its mode, it looks at nothing but logits: what
    rounding then does may be what was asked for, less, or something else.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
        Run by plain transformers, in float64 where outliers are loud. It is not changed.
    parts : sequence of Part
        What to do; layers without a part get nuisance only.
    prompts : anything that :func:`kvgeom.prompts.load.as_prompt_set` takes
        Twin requests on which the directions that carry safety are found and the function is compared.
    seed : int
        Of heads, channels, rotations and nuisance.
    bits : int
        Of the symmetric rounding that outliers are planted for.
    tolerance : float
        Largest change of a logit that is accepted.

    Raises
    ------
    InputError
        If there is no such layer, or its keys cannot be made outliers.
    ModelError
        If the weights cannot be edited, a layer stores no keys and values, or logits change.
    """
    loaded = editable(load(model))
    loaded.geometry.check_every(loaded.name)
    count = loaded.geometry.layers
    wrong = [part.layer for part in parts if not 0 <= part.layer < count]
    if wrong:
        raise InputError(f"layers must be 0 to {count - 1}, got {wrong}")
    values = Values(loaded, as_prompt_set(prompts))
    bench = Bench(copied(loaded), values, bits, random.Random(f"blind {seed}"))
    changes: list[str] = []
    for layer in range(count):
        own = [part for part in parts if part.layer == layer]
        for part in own:
            changes += _planted(bench, part)
        if not any(part.change == "jitter" for part in own):
            changes.append(nuisance(bench, layer, rotate=all(part.sites == "keys" for part in own)))
    deviation = deviation_of(loaded, bench.model, values)
    if deviation > tolerance:
        raise ModelError(
            f"what was to be planted changes logits of {loaded.name} by {deviation:.2g}, more than {tolerance:.2g}; load it in float64"
        )
    return Blind(
        copied(bench.model, f"{loaded.name}, planted blindly, seed {seed}"),
        tuple(parts),
        tuple(changes),
        deviation,
        tuple(bench.planted),
    )


def _planted(bench: Bench, part: Part) -> list[str]:
    layer, loud = part.layer, part.loudness
    if part.change == "jitter":
        return [jitter(bench, layer, 1 + loud * 2 * bench.top)]
    done = []
    if part.sites != "keys":
        if part.change == "crush":
            homes = some_heads(bench.model.geometry.kv_heads)
            done.append(crush(bench, layer, dict.fromkeys(homes, part.strength), loud))
        else:
            done.append(become_outlier(bench, layer, part.strength, loud))
    if part.sites != "values":
        done.append(
            crush_keys(bench, layer, loud) if part.change == "crush" else keys_become_outliers(bench, layer, loud)
        )
    return done
