"""Curve, scan, ablations, PCR, geometry and mode of one model, in one go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvgeom.diagnosis.ablation import Ablation, ablate, channel_magnitudes, channel_subsets, whole_cache
from kvgeom.diagnosis.curve import Curve, bit_width_curve
from kvgeom.diagnosis.evaluate import Baseline, Outcomes, baseline, evaluate
from kvgeom.diagnosis.pcr import PCR, per_channel_reduction
from kvgeom.diagnosis.scan import Scan, single_layer_scan, single_layers
from kvgeom.diagnosis.taxonomy import Evidence, Mode, classify
from kvgeom.diagnosis.verdicts import FlipTable, evidence_from, shares
from kvgeom.geometry.channels import channel_view
from kvgeom.geometry.sensitivity import Sensitivity
from kvgeom.geometry.subspace import subspace
from kvgeom.models.load import load
from kvgeom.models.model import Model
from kvgeom.prompts.sets import PromptSet, calibration, perplexity_text
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.refusal.judge import Judge

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: Name of the recipe that keeps the worst layer.
SPARED = "worst layer kept"
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
    ablation : Ablation
        Parts of the whole cache: granularity, keys or values, first and last layers, the worst layer kept.
    channels : Ablation
        Channels of the worst layer (of all layers, where none alone flips a refusal).
    pcr, pcr_paper : PCR
        At the critical layer, with the decode-faithful placement and as in the paper's released code.
    sensitivity : Sensitivity or None
        None where the geometry was left out.
    evidence : Evidence
    mode : Mode
    """

    baseline: Baseline = field(repr=False)
    curve: Curve
    outcomes: Outcomes
    scan: Scan
    ablation: Ablation
    channels: Ablation
    pcr: PCR
    pcr_paper: PCR
    sensitivity: Sensitivity | None
    evidence: Evidence
    mode: Mode

    def summary(self) -> str:
        """One line: the mode and why."""
        return f"{self.mode.name}: {self.mode.reason}"

    def plot(self) -> go.Figure:
        """What each piece of evidence speaks for, and how sure the mode is."""
        from kvgeom.plots.mode import mode_card

        return mode_card(self.mode)

    def __repr__(self) -> str:
        return f"<Diagnosis {self.summary()}>"

    def _repr_html_(self) -> str:
        from html import escape

        rows = "".join(f"<li>{escape(sentence)}</li>" for sentence in self.mode.evidence)
        return f"<p><b>{escape(self.mode.name)}</b></p><ul>{rows}</ul>"


def diagnose(
    model: Any,
    prompts: PromptSet | None = None,
    *,
    scheme: Scheme | None = None,
    curve_bits: Sequence[int] = BITS,
    bits: int = 3,
    placement: Placement | None = None,
    judge: Judge | None = None,
    text: str | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 32,
    geometry: bool = True,
    journal: str | Path | None = None,
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
        Of layer scan, ablations and PCR, which round symmetric per-tensor as the paper's released code does.
    placement : Placement, optional
        Decode-faithful by default.
    judge : Judge, optional
    text : str, optional
        Plain text for perplexity; a short one is shipped.
    max_new_tokens, batch_size : int
    geometry : bool
        Whether to measure the noise-sensitivity ratio as well; it is told as evidence and decides nothing.
    journal : str or Path, optional
        As in :func:`kvgeom.baseline`: interrupted at any moment and run again, no response is made twice.
    progress : bool
    seed : int
        Of random subspaces, random channels and bootstraps.

    Raises
    ------
    InputError
        If the model, the prompts, the bits or the journal cannot be used.
    """
    tensor = Scheme(bits, symmetric=True, granularity="tensor")
    prompts = prompts or calibration()
    loaded = load(model, **load_options)
    base = baseline(
        loaded,
        prompts.harmful,
        judge=judge,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        journal=journal,
        progress=progress,
    )
    with closing(base.journal):
        n_layers = loaded.geometry.layers
        families = whole_cache(n_layers, tensor)
        # All at once: each prompt then needs one pass for all recipes. What follows finds it done.
        layers = single_layers(n_layers, tensor)
        options: dict[str, Any] = {"placement": placement, "progress": progress}
        evaluate(loaded, {**_flat(families), **layers}, base, refused_only=True, title="layers and parts", **options)
        scan, _ = single_layer_scan(base, scheme=tensor, placement=placement, progress=False)
        worst = scan.critical_layer
        parts = channel_subsets(
            channel_magnitudes(base, placement), tensor, range(n_layers) if worst is None else [worst], seed=seed
        )
        if worst is not None:
            families = {**families, "worst layer": {SPARED: Recipe.uniform(n_layers, tensor).keep([worst])}}
        ablation = ablate(base, families, reference="all layers", title="worst layer kept", **options)
        channels = ablate(base, parts, reference="every channel", title="channels", **options)
        pcr, pcr_paper = (
            per_channel_reduction(base, worst, scheme=tensor, placement=where, progress=progress)
            for where in (placement, Placement.paper())
        )
        curve, outcomes = bit_width_curve(base, text or perplexity_text(), bits=curve_bits, scheme=scheme, **options)
        sensitivity = _sensitivity(loaded, prompts, tensor, placement, progress, seed) if geometry else None
        everything = {**_flat(families), **_flat(parts), **layers}
        known = evaluate(loaded, everything, base, refused_only=True, placement=placement, progress=False)
        table = _flip_table(known, tensor.bits, n_layers, worst)
        evidence = _with_geometry(evidence_from(table, seed=seed), sensitivity, worst)
        mode = replace(classify(evidence), shares=shares(table, seed=seed))
    return Diagnosis(base, curve, outcomes, scan, ablation, channels, pcr, pcr_paper, sensitivity, evidence, mode)


def _flat(families: Mapping[str, Mapping[str, Recipe]]) -> dict[str, Recipe]:
    return {name: recipe for members in families.values() for name, recipe in members.items()}


def _flip_table(outcomes: Outcomes, bits: int, n_layers: int, worst: int | None) -> FlipTable:
    flipped = outcomes.flipped
    alone = [flipped(f"layer {layer} tensor") for layer in range(n_layers)]
    broken = flipped("all layers", "degenerate")
    table = FlipTable(bits, worst, flipped("all layers"), broken, flipped("group-64"), np.stack(alone, axis=1))
    if worst is None:
        return table
    return replace(
        table,
        channel=flipped(f"layer {worst} channel"),
        spared=flipped(SPARED),
        outliers=flipped("outliers"),
        others=flipped("non-outliers"),
    )


def _sensitivity(
    model: Model, prompts: PromptSet, scheme: Scheme, placement: Placement | None, progress: bool, seed: int
) -> Sensitivity:
    contrast = prompts if prompts.harmless else calibration()
    space = subspace(model, contrast, placement=placement, progress=progress)
    half = max(2, min(len(contrast.harmful), len(contrast.harmless)) // 2)
    return space.sensitivity(scheme, noise_pairs=half, progress=progress, seed=seed)


def _with_geometry(evidence: Evidence, sensitivity: Sensitivity | None, worst: int | None) -> Evidence:
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
