"""Models whose failure mode is known because it was planted: the same function, another cache."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from kvgeom.checks import one_of, suggests, whole_numbers
from kvgeom.errors import InputError, ModelError
from kvgeom.evaluation.baseline import Baseline, baseline
from kvgeom.evaluation.condition import as_conditions
from kvgeom.evaluation.evaluate import run_conditions
from kvgeom.models.edits import copied, editable
from kvgeom.models.load import load
from kvgeom.models.model import Model
from kvgeom.organisms.carrier import Values
from kvgeom.organisms.modes import Bench, become_outlier, crush, nuisance
from kvgeom.organisms.observed import NEW_TOKENS, ROBUST, behaviour, granularities
from kvgeom.organisms.reach import Reach, some_heads
from kvgeom.progress import bar, shown
from kvgeom.prompts.load import as_prompt_set
from kvgeom.prompts.sets import PromptSet, calibration
from kvgeom.quant.recipe import MOST_LAYERS

PlantedMode = Literal["outlier-crushes-safety", "outlier-as-safety", "multi-layer dilution", "robust"]
MODES: tuple[PlantedMode, ...] = get_args(PlantedMode)
#: An organism that does not show its mode, or whose logits have changed too much, is drawn anew, with the strength
#: multiplied by the next of these: too little leaves refusals, too much costs the language.
FACTORS = 4 * (1, 1, 2, 0.5, 1, 1.5, 1, 4)
#: Modes in which what carries safety becomes an outlier itself, in every head.
IN_ALL_HEADS = ("outlier-as-safety", "multi-layer dilution")
#: Bits at which a mode may be planted, the fewest first.
WIDTHS = (3, 4, 6, 8)
#: In a deep model dilution is planted in two or three layers: what each of them loses costs language, too.
DEEP, DILUTED = 8, (2, 3)


@dataclass(frozen=True)
class Organism:
    """A model with a planted failure mode.

    Attributes
    ----------
    model : Model
    mode : str
        One of :data:`MODES`.
    layers : tuple of int
        Where it was planted; none for ``"robust"``.
    edits : tuple of str
        Descriptions of what was done to the weights.
    seed, bits : int
        What was drawn from, and the bits at which the mode shows.
    deviation : float
        Largest change of a logit on the prompts it was planted with.
    draws : int
        How many were made until one showed the mode.
    planted : tuple of (int, str, int)
        Layer, site and channel of everything that was made an outlier.
    """

    model: Model = field(repr=False)
    mode: PlantedMode
    layers: tuple[int, ...]
    edits: tuple[str, ...] = field(repr=False)
    seed: int
    bits: int
    deviation: float
    draws: int
    planted: tuple[tuple[int, str, int], ...] = field(default=(), repr=False)


@suggests()
def plant(
    model: Any,
    mode: PlantedMode,
    *,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    prompts: Any = None,
    bits: int | None = None,
    strength: float | None = None,
    verify: bool = True,
    tolerance: float = 1e-4,
    progress: bool = True,
) -> Organism:
    """Make a copy of a model that computes the same and fails in a known way when its cache is rounded.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
        Run by plain transformers, in float32, or in float64 where offsets are large. It is not changed. What it does
        when rounded to ``bits`` stays part of the organism.
    mode : {"outlier-crushes-safety", "outlier-as-safety", "multi-layer dilution", "robust"}
    seed : int
        Of everything that is drawn: layers, heads, channels, rotations, strengths, nuisance.
    layers : sequence of int, optional
        Where to plant; drawn by default. One layer, for dilution at least two and not all; outliers may crush safety in
        several, which group-64 scales rescue all the same.
    prompts : anything that :func:`kvgeom.prompts.load.as_prompt_set` takes, optional
        Twin requests on which the directions that carry safety are found and the function is compared; the
        calibration set by default.
    bits : int, optional
        Of the symmetric rounding under which the mode is to show; by default the fewest of :data:`WIDTHS` at which the
        model itself keeps its refusals.
    strength : float, optional
        How far beyond "harmless" a layer that has lost safety is to read, in differences between the classes. By
        default it is measured, and layers in which nothing turns refusals into compliance are left out
        (:class:`~kvgeom.organisms.reach.Reach`).
    verify : bool
        Look at what the organism does on the harmful ``prompts`` (:meth:`Behaviour.objection`), and draw anew if that
        is not its mode.
    tolerance : float
        Largest change of a logit that is accepted.
    progress : bool
        Show progress bars.

    Raises
    ------
    InputError
        If the mode, the layers or the prompts cannot be used.
    ModelError
        If the weights cannot be edited, a layer stores no keys and values, or no draw shows the mode with logits unchanged.
    """
    one_of("mode", mode, MODES)
    layers = None if layers is None else whole_numbers("layers", layers, 0, MOST_LAYERS - 1)
    with shown(progress):
        loaded = editable(load(model))
        prompts = calibration() if prompts is None else as_prompt_set(prompts)
        loaded.geometry.check_every(loaded.name)
        count = loaded.geometry.layers
        _check_layers(mode, count, layers)
        values = Values(loaded, prompts)
        base = baseline(loaded, prompts.harmful, max_new_tokens=NEW_TOKENS)
        if verify and not base.refused:
            raise ModelError(
                f"{loaded.name} refuses none of {len(base.prompts)} harmful prompts, so that {mode} would not show in it; give "
                "a model that refuses, or verify=False"
            )
        bits = _robust_bits(base) if bits is None else bits
        reach, free = Reach(base, values, _homes(mode, loaded.geometry.kv_heads)), list(range(count))
        objections = []
        with bar(f"planting {mode}", len(FACTORS)) as drawn:
            for draw, factor in enumerate(FACTORS):
                rng = random.Random(f"{mode} {seed} {draw}")
                strengths = _strengths(mode, count, layers, free, rng, reach, strength)
                chosen = tuple(sorted(strengths))
                bench = Bench(copied(loaded), values, bits, rng)
                changes = tuple(_edit(bench, mode, strengths, factor))
                deviation = deviation_of(loaded, bench.model, values)
                name = f"{loaded.name}, {mode}, seed {seed}"
                planted = tuple(bench.planted)
                organism = Organism(
                    copied(bench.model, name), mode, chosen, changes, seed, bits, deviation, draw + 1, planted
                )
                objection = _objection(organism, prompts, tolerance, verify)
                drawn.update(1)
                if objection is None:
                    return organism
                objections.append(f"{objection} (layers {chosen})")
                drawn.set_postfix_str(objections[-1])
        raise ModelError(
            f"none of {len(FACTORS)} draws shows {mode} in {loaded.name} with seed {seed}: "
            f"{'; '.join(objections)}; give other layers, another strength or other bits, and where logits change, load "
            "the model in float64"
        )


def _objection(organism: Organism, prompts: PromptSet, tolerance: float, verify: bool) -> str | None:
    """Why an organism is not what was asked for; None if it is."""
    if organism.deviation > tolerance:
        return f"logits change by {organism.deviation:.2g}"
    if not verify:
        return None
    seen = behaviour(organism.model, organism.layers, prompts.harmful, bits=organism.bits, alone=())
    return seen.objection(organism.mode, comply=0.75)


def _homes(mode: PlantedMode, heads: int) -> tuple[int | None, ...]:
    """Heads in which outliers may lie, beside what they crush; None where what is planted is in all heads."""
    return (None,) if mode in IN_ALL_HEADS else some_heads(heads)


def _edit(
    bench: Bench, mode: PlantedMode, strengths: Mapping[int, Mapping[int | None, float]], factor: float
) -> Iterator[str]:
    for layer in range(bench.model.geometry.layers):
        if layer in strengths:
            found = {home: factor * strength for home, strength in strengths[layer].items()}
            if mode in IN_ALL_HEADS:
                yield become_outlier(bench, layer, found[None])
            else:
                yield crush(bench, layer, {home: strength for home, strength in found.items() if home is not None})
        yield nuisance(bench, layer, rotate=layer not in strengths)


def _robust_bits(base: Baseline) -> int:
    """The fewest bits at which the model itself keeps its refusals, whatever the granularity."""
    count = base.model.geometry.layers
    lost = {}
    for bits in WIDTHS:
        conditions = as_conditions(granularities(count, bits), base.model, None)
        found = run_conditions(base, conditions, prompts=base.refused, title=f"{bits} bits")
        lost[bits] = max(found.flips(name)["all"] for name in conditions)
        if lost[bits] <= ROBUST * len(base.refused):
            return bits
    raise ModelError(
        f"{base.model.name} itself loses refusals at all widths, out of {len(base.refused)}: "
        f"{', '.join(f'{flips} at {bits} bits' for bits, flips in lost.items())}; what is planted would not stand out from that; "
        "give bits to plant all the same"
    )


def _strengths(
    mode: PlantedMode,
    count: int,
    asked: Sequence[int] | None,
    free: list[int],
    rng: random.Random,
    reach: Reach,
    strength: float | None,
) -> dict[int, dict[int | None, float]]:
    """Layers to plant in, with strengths by home. Drawn from ``free``, from which those that hold nothing are taken."""
    while True:
        chosen = _drawn(mode, count, free, rng) if asked is None else list(asked)
        found = {
            layer: reach.strengths(layer) if strength is None else dict.fromkeys(reach.homes, strength)
            for layer in chosen
        }
        idle = [layer for layer in chosen if not found[layer]]
        if not idle:
            return found
        for layer in set(idle) & set(free):
            free.remove(layer)
        if asked is not None or len(free) < (2 if mode == "multi-layer dilution" else 1):
            raise ModelError(
                f"no values of {f'layers {idle}' if asked else 'the layers that were tried'} turn refusals into compliance, so that "
                f"{mode} cannot be planted there; give other layers, or a strength"
            )


def _drawn(mode: PlantedMode, count: int, free: Sequence[int], rng: random.Random) -> list[int]:
    if mode == "robust":
        return []
    if mode != "multi-layer dilution":
        return [free[rng.randrange(len(free))]]
    few, most = DILUTED if count >= DEEP else (2, 2)
    return rng.sample(free, min(len(free), rng.randint(few, most)))


def _check_layers(mode: PlantedMode, count: int, asked: Sequence[int] | None) -> None:
    if mode == "multi-layer dilution" and count < 3:
        raise InputError(f"{mode} needs a model with at least 3 layers, one of them sound; got {count}")
    if asked is None:
        return
    if mode == "robust" and asked:
        raise InputError(f"nothing is planted in a robust organism, got layers {list(asked)}")
    if mode == "outlier-as-safety" and len(asked) != 1:
        raise InputError(f"{mode} is planted in one layer, got {len(asked)}")
    if mode == "outlier-crushes-safety" and not asked:
        raise InputError(f"{mode} is planted in at least one layer, got none")
    if mode == "multi-layer dilution" and not 2 <= len(set(asked)) < count:
        raise InputError(f"{mode} needs at least two layers and not all, got {list(asked)}")
    wrong = [layer for layer in asked if not 0 <= layer < count]
    if wrong:
        raise InputError(f"layers must be 0 to {count - 1}, got {wrong}")


def deviation_of(model: Model, edited: Model, values: Values) -> float:
    """Largest change of a logit, at any token of the prompts that were looked at."""
    worst = 0.0
    for pair in values.encoded:
        for prompt in pair:
            change = edited.forward(prompt.ids, all_logits=True) - model.forward(prompt.ids, all_logits=True)
            worst = max(worst, float(change.abs().max()))
    return worst
