"""The responses that a diagnosis follows from, and the geometry beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvgeom.behaviour.ablation import channel_magnitudes, channel_subsets, whole_cache
from kvgeom.behaviour.matched import ScanWidth
from kvgeom.behaviour.scan import GRANULARITIES, SCAN_SCHEME, scan_of, single_layers
from kvgeom.diagnosis.evidence import Evidence
from kvgeom.diagnosis.posterior import Draws, pcr_at_one_layer
from kvgeom.diagnosis.trials import Codes, Trials, codes
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

#: Families of conditions beside those of scan and ablations: fixes of the whole cache, random errors, and the whole cache
#: as the paper's layer scan rounds a layer.
FIXES, RANDOM, PAPER_SETTING = "fixes", "random directions", "paper's setting"
#: Draws of random errors, for the whole cache and for the worst layer. Of three, which may lose all or nothing, the mean says little.
RANDOM_DRAWS = 8


@dataclass(frozen=True)
class Measured:
    """Responses that a diagnosis follows from, whoever has labelled them."""

    outcomes: Outcomes
    parts: Outcomes
    paper: Outcomes
    width: ScanWidth
    worst: int | None  # when its parts were tried; another judge may find another one


def measure(
    base: Baseline,
    widths: Mapping[str, Condition],
    width: ScanWidth,
    placement: Placement,
    gains: bool,
    full_responses: bool,
) -> Measured:
    """All responses; each prompt needs one pass for all conditions that are known at a time."""
    geometry, seed, tensor = base.model.geometry, base.run.seed, width.scheme
    n_layers, stores = geometry.layers, geometry.stores
    chosen = tuple(range(len(base.prompts))) if full_responses else base.refused

    def run(conditions: Mapping[str, Condition], title: str, prompts: Sequence[int] = chosen) -> Outcomes:
        return run_conditions(base, conditions, prompts=prompts, full_responses=full_responses, title=title)

    first = {
        **whole_cache(n_layers, tensor, placement, stores, geometry.site_names),
        **single_layers(n_layers, tensor, placement, stores),
    }
    first |= paper_setting(n_layers, placement, stores)
    along = widths if all(each.placement == placement for each in widths.values()) else {}
    together = run({**first, **along}, "layers, parts and widths")
    scan = scan_of(together, tensor)
    worst, ranked = scan.worst_layer, scan.worst()
    where = stores if worst is None else [worst]
    more = channel_subsets(channel_magnitudes(base, placement), tensor, where, placement, seed=seed)
    more |= fixes(n_layers, tensor, ranked, placement, stores)
    more |= random_errors(n_layers, tensor, ranked[:1], placement, seed, stores)
    parts = together.joined(run(more, "fixes, channels, random errors"))
    at_worst = {} if worst is None else single_layers(n_layers, SCAN_SCHEME, Placement.paper(), [worst])
    paper = run(at_worst, "PCR as the paper simulates")
    curve = together.at_recipes(widths) if along else run(widths, "responses by bit-width")
    if gains and not full_responses:
        others = [index for index in range(len(base.prompts)) if index not in base.refused]
        curve = curve.joined(run(widths, "responses by bit-width", others))
    return Measured(curve, parts, paper, width, worst)


def paper_setting(n_layers: int, placement: Placement, stores: Sequence[int] | None = None) -> dict[str, Condition]:
    """The whole cache at the width and granularity of the paper's layer scan, as a cache stores it."""
    recipe = Recipe.uniform(n_layers, SCAN_SCHEME, layers=stores)
    bits = SCAN_SCHEME.bits
    return {
        f"all layers, {bits}-bit per-tensor": Condition(
            recipe, placement, family=PAPER_SETTING, granularity="tensor", bits=bits
        )
    }


def fixes(
    n_layers: int,
    tensor: Scheme,
    ranked: Sequence[int],
    placement: Placement,
    stores: Sequence[int] | None = None,
) -> dict[str, Condition]:
    """What the modes say would help, of the whole cache: each of the worst layers kept, all of them, and finer scales.

    Group-64 and per-channel scales everywhere are among the conditions of
    :func:`~kvgeom.behaviour.ablation.whole_cache`.

    Parameters
    ----------
    n_layers : int
    tensor : Scheme
        Per-tensor.
    ranked : sequence of int
        The layers that alone lose most, the worst first.
    placement : Placement
    stores : sequence of int, optional
        The layers that store keys and values; all by default.
    """
    channel, group = replace(tensor, granularity="channel"), replace(tensor, granularity="group", group_size=64)
    whole, bits = Recipe.uniform(n_layers, tensor, layers=stores), tensor.bits

    def fix(recipe: Recipe, layer: int | None, granularity: str) -> Condition:
        return Condition(recipe, placement, family=FIXES, layer=layer, granularity=granularity, bits=bits)

    found = {f"layer {layer} in 16 bits": fix(whole.keep([layer]), layer, "tensor") for layer in ranked}
    found["most critical layers in 16 bits"] = fix(whole.keep(ranked), None, "tensor")
    if ranked:
        pairs = tuple((channel, channel) if layer == ranked[0] else (group, group) for layer in range(n_layers))
        mixed = Recipe(pairs) if stores is None else Recipe(pairs).only(stores)
        found["per-channel at the worst layer, group-64 elsewhere"] = fix(mixed, ranked[0], "mixed")
    return found


def random_errors(
    n_layers: int,
    tensor: Scheme,
    worst: Sequence[int],
    placement: Placement,
    seed: int,
    stores: Sequence[int] | None = None,
) -> dict[str, Condition]:
    """Errors as large as those of all layers, and of the worst alone, in random directions."""
    recipes: dict[int | None, Recipe] = {None: Recipe.uniform(n_layers, tensor, layers=stores)}
    recipes |= {layer: Recipe.uniform(n_layers, tensor, layers=[layer]) for layer in worst}
    return {
        f"random errors in {'all layers' if layer is None else f'layer {layer}'}, draw {draw + 1}": Condition(
            recipe.with_random_directions(seed + draw),
            placement,
            family=RANDOM,
            layer=layer,
            granularity="tensor",
            bits=tensor.bits,
            draw=draw,
        )
        for layer, recipe in recipes.items()
        for draw in range(RANDOM_DRAWS)
    }


def trials_of(outcomes: Outcomes, bits: int, worst: int | None) -> Trials:
    """What became of each refused prompt under the conditions of :func:`measure`; what was not tried is None.

    Parameters
    ----------
    outcomes : Outcomes
        Those of :func:`measure`.
    bits : int
    worst : int or None
        The worst layer. Another judge may find another one than that whose parts were tried.
    """
    outcomes = outcomes.of_refused()

    def under(name: str) -> Codes:
        return codes(outcomes.data.label.sel(recipe=name).values)

    def each(**coordinates: object) -> list[Codes]:
        return [under(name) for name in outcomes.names(**coordinates)]

    def one(**coordinates: object) -> Codes | None:
        return next(iter(each(**coordinates)), None)

    def draws(layer: int | None) -> Codes | None:
        found = each(family=RANDOM, layer=layer)
        return np.stack(found, axis=1) if found else None

    def alone(granularity: str) -> Codes:
        return np.stack(each(family="layer", granularity=granularity, bits=bits), axis=1)

    scanned = outcomes.names(family="layer", granularity="tensor", bits=bits)

    kept = outcomes.names(family=FIXES, granularity="tensor")
    layers = {name: int(outcomes.data.layer.sel(recipe=name)) for name in kept}
    tried = [layer for layer in layers.values() if layer >= 0]
    table = Trials(
        bits,
        under(outcomes.name(family="granularity", granularity="tensor")),
        alone("tensor"),
        alone("channel"),
        numbers=tuple(int(layer) for layer in outcomes.data.layer.sel(recipe=scanned).values),
        group64=one(family="granularity", granularity="group"),
        channel=one(family="granularity", granularity="channel"),
        kept={layer: under(name) for name, layer in layers.items() if layer >= 0},
        top=one(family=FIXES, granularity="tensor", layer=None),
        top_layers=tuple(sorted(tried)),
        random=draws(None),
        paper=one(family=PAPER_SETTING),
    )
    if not tried or worst not in (None, tried[0]):
        return table
    table = replace(
        table,
        mixed=one(family=FIXES, granularity="mixed"),
        random_layer=draws(tried[0]),
    )
    if worst is None:
        return table
    return replace(table, largest=under("largest"), others=under("all but the largest"))


def paper_draws(trials: Trials, paper: Outcomes, layer: int | None, seed: int) -> Draws | None:
    """Draws of PCR as the paper simulates it, at a layer that the scan chose; None where it was not tried there."""
    if layer is None or not trials.prompts:
        return None
    paper = paper.of_refused()
    names = [paper.name(family="layer", layer=layer, granularity=g, bits=SCAN_SCHEME.bits) for g in GRANULARITIES]
    tensor, channel = (codes(paper.data.label.sel(recipe=name).values) for name in names)
    return pcr_at_one_layer(trials.layers, trials.column(layer), tensor, channel, seed=seed)


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
        # Neither is known where the class difference cannot be told from chance.
        signal_gap=float(keys.signal_gap) if np.isfinite(keys.signal_gap) else None,
        noise_alignment=float(keys.noise_alignment) if np.isfinite(keys.noise_alignment) else None,
        overlap=float(view.overlap),
        overlap_p=float(view.overlap_p),
    )
