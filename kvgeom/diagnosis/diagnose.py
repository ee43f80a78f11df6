"""Curve, scan, ablations, PCR, geometry and mode of one model, in one go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvgeom.behaviour.ablation import (
    Ablation,
    ablation_of,
    channel_magnitudes,
    channel_subsets,
    is_channel_subset,
    whole_cache,
)
from kvgeom.behaviour.curve import Curve, bit_width_curve, curve_of
from kvgeom.behaviour.pcr import PCR, pcr_of
from kvgeom.behaviour.scan import Scan, scan_of, single_layers
from kvgeom.behaviour.widths import at_widths, width_recipes
from kvgeom.diagnosis.evidence import FlipTable, evidence_from, shares
from kvgeom.diagnosis.taxonomy import Evidence, Mode, classify
from kvgeom.engines.engine import CacheConfig
from kvgeom.evaluation.baseline import Baseline, baseline
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.geometry.channels import channel_view
from kvgeom.geometry.sensitivity import Sensitivity
from kvgeom.geometry.subspace import subspace
from kvgeom.judges.judge import Judge
from kvgeom.models.load import load
from kvgeom.models.model import Model
from kvgeom.prompts.sets import PromptSet, calibration, perplexity_text
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from kvgeom.judges.classifiers import ClassifierJudge
    from kvgeom.mitigation.plan import Plan

#: Name of the recipe that keeps the worst layer.
SPARED = "worst layer kept"


@dataclass(frozen=True)
class Diagnosis:
    """All that is known of one model's failure mode; made by :func:`diagnose`.

    Attributes
    ----------
    prompts : PromptSet
        That were asked (the harmful ones), with their harmless counterparts.
    baseline : Baseline
        The unquantized model on the harmful prompts.
    curve : Curve
    outcomes, parts, paper : Outcomes
        The responses behind the curve; behind scan, ablations and PCR; behind ``pcr_paper``.
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

    prompts: PromptSet = field(repr=False)
    baseline: Baseline = field(repr=False)
    curve: Curve
    outcomes: Outcomes
    parts: Outcomes
    paper: Outcomes
    scan: Scan
    ablation: Ablation
    channels: Ablation
    pcr: PCR
    pcr_paper: PCR
    sensitivity: Sensitivity | None
    evidence: Evidence
    mode: Mode

    def relabel(self, judge: ClassifierJudge) -> Diagnosis:
        """The diagnosis that follows from the same responses as a classifier labels them.

        The classifier is loaded here; the audited model may be out of memory by then (``model.release()``).

        Parameters
        ----------
        judge : ClassifierJudge
            From :func:`kvgeom.classifier`.

        Raises
        ------
        InputError
            Unless the diagnosis was made with ``whole=True``.
        """
        outcomes, parts, paper = (part.relabel(judge) for part in (self.outcomes, self.parts, self.paper))
        ratio, first = self.curve.data.perplexity_ratio.values, self.curve.meta["baseline_perplexity"]
        return _concluded(
            self.prompts,
            self.baseline,
            curve_of(outcomes, [first * float(r) for r in ratio], self.curve.meta),
            outcomes,
            parts,
            paper,
            Scheme.parse(self.scan.meta["scheme"]),
            self.scan.critical_layer,
            self.sensitivity,
            seed=0,
        )

    def prescribe(
        self,
        *,
        memory: float = 0.02,
        scheme: CacheConfig | Scheme | str | None = None,
        bits: int | None = None,
        placement: Placement | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> Plan:
        """Find a cache that keeps the refusals: what the paper's decision tree says, and what a measured search finds.

        About 40 caches answer the calibration prompts that are refused unquantized; layers are ranked by the refusal
        margin that they cost, and that is compared with other rules at equal memory. The best answer the harmless
        prompts too: a cache that keeps refusals by refusing or breaking those is not chosen.

        Parameters
        ----------
        memory : float
            Budget: the share by which the cache may exceed the unmitigated one, scales and offsets counted.
        scheme : str, Scheme or CacheConfig, optional
            The cache to mend, a scheme or an engine's preset; that of the curve by default.
        bits : int, optional
            Its width; that of the diagnosis by default.
        placement : Placement, optional
            That of the preset, or decode-faithful, by default.
        seed : int
            Of layers drawn at random.

        Returns
        -------
        Plan
            A claim, until :meth:`~kvgeom.mitigation.plan.Plan.verify` has run it on other prompts.

        Raises
        ------
        InputError
            If the model refuses nothing, or the scheme or budget cannot be used.
        """
        from kvgeom.mitigation.prescribe import prescribe

        return prescribe(
            self, memory=memory, scheme=scheme, bits=bits, placement=placement, seed=seed, progress=progress
        )

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
    scheme: CacheConfig | Scheme | str | None = None,
    curve_bits: Sequence[int] | None = None,
    bits: int = 3,
    placement: Placement | None = None,
    judge: Judge | None = None,
    text: str | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 512,
    geometry: bool = True,
    gains: bool = False,
    whole: bool = False,
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
    scheme : Scheme or str, optional
        Of the curve: asymmetric per-token by default; also an engine's preset, such as ``"kivi"``.
    curve_bits : sequence of int, optional
        Widths of the curve; see :func:`~kvgeom.behaviour.curve.bit_width_curve`.
    bits : int
        Of layer scan, ablations and PCR, which round symmetric per-tensor as the paper's released code does.
    placement : Placement, optional
        Decode-faithful by default; for the curve that of the preset, if it is one.
    judge : Judge, optional
    text : str, optional
        Plain text for perplexity; a short one is shipped.
    max_new_tokens, batch_size : int
    geometry : bool
        Whether to measure the noise-sensitivity ratio as well; it is told as evidence and decides nothing.
    gains : bool
        Whether the curve also runs the prompts that are not refused unquantized. None of them can flip, but some may be
        refused once the cache is rounded; without it ``curve`` counts labels of the refused ones, and gains are NaN.
    whole : bool
        Generate all responses of all prompts in full, so that :meth:`Diagnosis.relabel` can give them to a classifier.
        Takes much longer.
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
    engines = at_widths(scheme, curve_bits, placement)  # what is wrong with these is said before any work
    prompts = prompts or calibration()
    loaded = load(model, **load_options)
    n_layers = loaded.geometry.layers
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
        options: dict[str, Any] = {"placement": placement, "exact": whole, "progress": progress}

        def run(recipes: Mapping[str, Recipe], title: str, **changed: Any) -> Outcomes:
            return evaluate(loaded, recipes, base, refused_only=not whole, title=title, **{**options, **changed})

        # All at once: each prompt then needs one pass for all recipes. What follows finds it done.
        first = {**_flat(whole_cache(n_layers, tensor)), **single_layers(n_layers, tensor)}
        widths, where_widths = width_recipes(n_layers, engines)
        along = widths if where_widths == (placement or Placement()) else {}
        worst = scan_of(run({**first, **along}, "layers, parts and widths"), n_layers, tensor).critical_layer
        where = range(n_layers) if worst is None else [worst]
        recipes = {**first, **_flat(channel_subsets(channel_magnitudes(base, placement), tensor, where, seed=seed))}
        at_worst: dict[str, Recipe] = {}
        if worst is not None:
            recipes[SPARED] = Recipe.uniform(n_layers, tensor).keep([worst])
            at_worst = single_layers(n_layers, tensor, [worst])
        parts = run(recipes, "worst layer, channels")
        paper = run(at_worst, "PCR as the paper simulates", placement=Placement.paper())
        text = text or perplexity_text()
        curve, outcomes = bit_width_curve(
            base, text, bits=curve_bits, scheme=scheme, refused_only=not (gains or whole), **options
        )
        sensitivity = _sensitivity(loaded, prompts, tensor, placement, progress, seed) if geometry else None
    return _concluded(prompts, base, curve, outcomes, parts, paper, tensor, worst, sensitivity, seed)


def _concluded(
    prompts: PromptSet,
    base: Baseline,
    curve: Curve,
    outcomes: Outcomes,
    parts: Outcomes,
    paper: Outcomes,
    tensor: Scheme,
    measured: int | None,
    sensitivity: Sensitivity | None,
    seed: int,
) -> Diagnosis:
    """What follows from responses, whoever has labelled them.

    ``measured`` is the layer that was the worst when its parts were tried. Another judge may find another one; what was
    not tried there is not known then.
    """
    n_layers = base.model.geometry.layers
    scan = scan_of(parts, n_layers, tensor)
    worst = scan.critical_layer
    families: dict[str, list[str]] = {name: list(members) for name, members in whole_cache(n_layers, tensor).items()}
    if measured is not None:
        families["worst layer"] = [SPARED]
    of_channels = [str(name) for name in parts.data.recipe.values if is_channel_subset(str(name))]
    table = _flip_table(parts, tensor.bits, n_layers, worst, worst == measured)
    evidence = _with_geometry(evidence_from(table, seed=seed), sensitivity, worst)
    return Diagnosis(
        prompts=prompts,
        baseline=base,
        curve=curve,
        outcomes=outcomes,
        parts=parts,
        paper=paper,
        scan=scan,
        ablation=ablation_of(parts, families, reference="all layers"),
        channels=ablation_of(parts, {"channels": of_channels}, reference="every channel"),
        pcr=pcr_of(parts, worst, tensor.bits),
        pcr_paper=pcr_of(paper, worst if worst == measured else None, tensor.bits),
        sensitivity=sensitivity,
        evidence=evidence,
        mode=replace(classify(evidence), shares=shares(table, seed=seed)),
    )


def _flat(families: Mapping[str, Mapping[str, Recipe]]) -> dict[str, Recipe]:
    return {name: recipe for members in families.values() for name, recipe in members.items()}


def _flip_table(outcomes: Outcomes, bits: int, n_layers: int, worst: int | None, tried: bool) -> FlipTable:
    flipped = outcomes.flipped
    alone = [flipped(f"layer {layer} tensor") for layer in range(n_layers)]
    broken = flipped("all layers", "degenerate")
    table = FlipTable(bits, worst, flipped("all layers"), broken, flipped("group-64"), np.stack(alone, axis=1))
    table = replace(table, everywhere=flipped("per-channel"))
    if worst is None:
        return table
    table = replace(table, channel=flipped(f"layer {worst} channel"))
    if not tried:
        return table
    return replace(table, spared=flipped(SPARED), largest=flipped("largest"), others=flipped("all but the largest"))


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
