"""The responses that a diagnosis follows from, and the geometry beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvgeom.behaviour.ablation import (
    channel_magnitudes,
    channel_subsets,
    whole_cache,
)
from kvgeom.behaviour.scan import scan_of, single_layers
from kvgeom.diagnosis.evidence import FlipTable
from kvgeom.diagnosis.taxonomy import Evidence
from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.condition import Condition
from kvgeom.evaluation.config import RunConfig
from kvgeom.evaluation.evaluate import run_conditions
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.geometry.channels import channel_view
from kvgeom.geometry.sensitivity import Sensitivity
from kvgeom.geometry.subspace import subspace
from kvgeom.models.model import Model
from kvgeom.prompts.sets import PromptSet, calibration
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme

#: Family and name of the condition that keeps the worst layer exact.
WORST_LAYER, WORST_KEPT = "worst layer", "worst layer kept"


@dataclass(frozen=True)
class Measured:
    """Responses that a diagnosis follows from, whoever has labelled them."""

    outcomes: Outcomes
    parts: Outcomes
    paper: Outcomes
    scheme: Scheme
    worst: int | None  # when its parts were tried; another judge may find another one


def measure(
    base: Baseline,
    widths: Mapping[str, Condition],
    tensor: Scheme,
    placement: Placement,
    gains: bool,
    full_responses: bool,
) -> Measured:
    """All responses; each prompt needs one pass for all conditions that are known at a time."""
    n_layers, seed = base.model.geometry.layers, base.run.seed
    chosen = tuple(range(len(base.prompts))) if full_responses else base.refused

    def run(conditions: Mapping[str, Condition], title: str, prompts: Sequence[int] = chosen) -> Outcomes:
        return run_conditions(base, conditions, prompts=prompts, full_responses=full_responses, title=title)

    first = {**whole_cache(n_layers, tensor, placement), **single_layers(n_layers, tensor, placement)}
    along = widths if all(each.placement == placement for each in widths.values()) else {}
    together = run({**first, **along}, "layers, parts and widths")
    worst = scan_of(together, tensor).critical_layer
    where = range(n_layers) if worst is None else [worst]
    more = channel_subsets(channel_magnitudes(base, placement), tensor, where, placement, seed=seed)
    at_worst: dict[str, Condition] = {}
    if worst is not None:
        kept = Recipe.uniform(n_layers, tensor).keep([worst])
        more[WORST_KEPT] = Condition(kept, placement, family=WORST_LAYER, layer=worst, bits=tensor.bits)
        at_worst = single_layers(n_layers, tensor, Placement.paper(), [worst])
    parts = together.joined(run(more, "worst layer, channels"))
    paper = run(at_worst, "PCR as the paper simulates")
    curve = together.at_recipes(widths) if along else run(widths, "responses by bit-width")
    if gains and not full_responses:
        others = [index for index in range(len(base.prompts)) if index not in base.refused]
        curve = curve.joined(run(widths, "responses by bit-width", others))
    return Measured(curve, parts, paper, tensor, worst)


def flip_table(outcomes: Outcomes, bits: int, worst: int | None, tried: bool) -> FlipTable:
    """Which refusals flip under which conditions.

    Parameters
    ----------
    outcomes : Outcomes
        Those of :func:`measure`.
    bits : int
    worst : int or None
        The worst layer.
    tried : bool
        Whether its channels were rounded apart, and all layers but it.
    """
    flipped = outcomes.flipped
    alone = [flipped(name) for name in outcomes.names(family="layer", granularity="tensor", bits=bits)]
    whole = outcomes.name(family="granularity", granularity="tensor")
    table = FlipTable(
        bits,
        worst,
        flipped(whole),
        flipped(whole, "degenerate"),
        flipped(outcomes.name(family="granularity", granularity="group")),
        np.stack(alone, axis=1),
        everywhere=flipped(outcomes.name(family="granularity", granularity="channel")),
    )
    if worst is None:
        return table
    table = replace(
        table, channel=flipped(outcomes.name(family="layer", layer=worst, granularity="channel", bits=bits))
    )
    if not tried:
        return table
    return replace(
        table,
        worst_kept=flipped(outcomes.name(family=WORST_LAYER, layer=worst)),
        largest=flipped("largest"),
        others=flipped("all but the largest"),
    )


def sensitivity_of(
    model: Model, prompts: PromptSet, scheme: Scheme, placement: Placement | None, run: RunConfig
) -> Sensitivity:
    """The noise-sensitivity ratio of a set of prompts, or of the calibration set where it has no harmless ones."""
    contrast = prompts if prompts.harmless else calibration()
    space = subspace(model, contrast, placement=placement, progress=run.progress)
    half = max(2, min(len(contrast.harmful), len(contrast.harmless)) // 2)
    return space.sensitivity(scheme, noise_pairs=half, progress=run.progress, seed=run.seed)


def with_geometry(evidence: Evidence, sensitivity: Sensitivity | None, worst: int | None) -> Evidence:
    """What the keys of the worst layer look like, where that is defined."""
    if sensitivity is None or worst is None or evidence.refused == 0:
        return evidence
    keys = sensitivity.data.sel(layer=worst, site="k")
    if keys.status == "undefined":
        return evidence
    view = channel_view(sensitivity, "k").sel(layer=worst)
    return replace(
        evidence,
        signal_gap=float(keys.signal_gap),
        noise_alignment=float(keys.noise_alignment),
        overlap=float(view.overlap),
        overlap_p=float(view.overlap_p),
    )
