"""Curve, scan, PCR, geometry and mode of one model, in one go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvgeom.diagnosis.curve import Curve, bit_width_curve
from kvgeom.diagnosis.evaluate import Baseline, Outcomes, baseline, evaluate
from kvgeom.diagnosis.pcr import PCR, per_channel_reduction
from kvgeom.diagnosis.scan import Scan, single_layer_scan
from kvgeom.diagnosis.taxonomy import Evidence, Mode, classify
from kvgeom.geometry.sensitivity import Sensitivity
from kvgeom.geometry.subspace import subspace
from kvgeom.models.load import load
from kvgeom.prompts.sets import PromptSet, calibration, perplexity_text
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.refusal.judge import Judge

#: Bit-widths of the curve.
BITS = (8, 6, 5, 4, 3, 2)


@dataclass(frozen=True)
class Diagnosis:
    """All that is known of one model's failure mode; made by :func:`diagnose`.

    Attributes
    ----------
    baseline : Baseline
        The unquantized model on the harmful prompts.
    curve : Curve
    outcomes : Outcomes
        The responses behind the curve.
    scan : Scan
    pcr, pcr_paper : PCR
        At the critical layer, with the decode-faithful placement and as in the paper's released code.
    sensitivity : Sensitivity
    evidence : Evidence
    mode : Mode
    """

    baseline: Baseline = field(repr=False)
    curve: Curve
    outcomes: Outcomes
    scan: Scan
    pcr: PCR
    pcr_paper: PCR
    sensitivity: Sensitivity
    evidence: Evidence
    mode: Mode


def diagnose(
    model: Any,
    prompts: PromptSet | None = None,
    *,
    scheme: Scheme | None = None,
    curve_bits: Sequence[int] = BITS,
    bits: int = 3,
    placement: Placement | None = None,
    judge: Judge | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 32,
    progress: bool = True,
    seed: int = 0,
    **load_options: Any,
) -> Diagnosis:
    """Find out whether, where and why a model loses its refusals when its KV cache is rounded.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts : PromptSet, optional
        Its harmful requests are asked; the calibration set by default. The subspace is found on the same set
        if it has harmless requests too, else on the calibration set.
    scheme : Scheme, optional
        Of the curve (its bits are ignored); asymmetric per-token by default.
    curve_bits : sequence of int
    bits : int
        Of the layer scan and PCR, which round symmetric per-tensor as the paper's released code does.
    placement : Placement, optional
        Decode-faithful by default.
    judge : Judge, optional
    max_new_tokens, batch_size : int
    progress : bool
    seed : int
        Of random subspaces.

    Raises
    ------
    InputError
        If the model, the prompts or the bits cannot be used.
    """
    tensor = Scheme(bits, symmetric=True, granularity="tensor")
    prompts = prompts or calibration()
    loaded = load(model, **load_options)
    base = baseline(
        loaded, prompts.harmful, judge=judge, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )
    curve, outcomes = bit_width_curve(
        base, perplexity_text(), bits=curve_bits, scheme=scheme, placement=placement, progress=progress
    )
    scan, _ = single_layer_scan(base, scheme=tensor, placement=placement, progress=progress)
    critical = scan.critical_layer
    pcr = per_channel_reduction(base, critical, scheme=tensor, placement=placement, progress=progress)
    pcr_paper = per_channel_reduction(base, critical, scheme=tensor, placement=Placement.paper(), progress=progress)
    contrast = prompts if prompts.harmless else calibration()
    space = subspace(loaded, contrast, placement=placement, progress=progress)
    half = max(2, min(len(contrast.harmful), len(contrast.harmless)) // 2)
    sensitivity = space.sensitivity(tensor, noise_pairs=half, progress=progress, seed=seed)
    evidence = _evidence(base, scan, pcr, sensitivity, tensor, placement, progress)
    return Diagnosis(base, curve, outcomes, scan, pcr, pcr_paper, sensitivity, evidence, classify(evidence))


def _evidence(
    base: Baseline,
    scan: Scan,
    pcr: PCR,
    sensitivity: Sensitivity,
    tensor: Scheme,
    placement: Placement | None,
    progress: bool,
) -> Evidence:
    """What the mode is decided from: the scan, and all layers rounded in up to three ways."""
    layers, critical = base.model.geometry.layers, scan.critical_layer
    whole = Recipe.uniform(layers, tensor)
    recipes = {"all": whole, "group-64": Recipe.uniform(layers, Scheme(tensor.bits, True, "group", 64))}
    if critical is not None:
        recipes["spared"] = whole.keep([critical])
    flips = dict.fromkeys(recipes, 0)
    if base.refused:
        outcomes = evaluate(
            base.model,
            recipes,
            base,
            placement=placement,
            refused_only=True,
            progress=progress,
            title="all layers: tensor, group, spared",
        )
        flips = {name: outcomes.flips(name)["all"] for name in recipes}
    gap = alignment = None
    if critical is not None:
        keys = sensitivity.data.sel(layer=critical, site="k")
        if keys.status != "undefined":
            gap, alignment = float(keys.signal_gap), float(keys.noise_alignment)
    return Evidence(
        refused=len(base.refused),
        bits=tensor.bits,
        flips_all=flips["all"],
        flips_group64=flips["group-64"],
        flips_spared=flips.get("spared"),
        layer_flips={int(layer): int(f) for layer, f in enumerate(scan.data.flips.values) if np.isfinite(f)},
        layers=layers,
        pcr=pcr,
        signal_gap=gap,
        noise_alignment=alignment,
    )
