"""Curve, scan, ablations, PCR, geometry and mode of one model, in one go."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar, Self

from kvgeom.behaviour.ablation import (
    ALL_LAYERS,
    EVERY_CHANNEL,
    WHOLE_CACHE,
    Ablation,
    ablation_of,
    ablation_text,
)
from kvgeom.behaviour.curve import Curve, curve_of, text_curve
from kvgeom.behaviour.matched import ScanWidth, check_scan_bits, scan_width
from kvgeom.behaviour.pcr import PCR, pcr_of
from kvgeom.behaviour.scan import SCAN_SCHEME, Scan, scan_of
from kvgeom.behaviour.widths import at_widths
from kvgeom.checks import suggests
from kvgeom.diagnosis.evidence import Evidence, evidence_from
from kvgeom.diagnosis.findings import mode_of
from kvgeom.diagnosis.measure import (
    FIXES,
    PAPER_SETTING,
    RANDOM,
    Measured,
    measure,
    paper_draws,
    sensitivity_of,
    trials_of,
    with_geometry,
)
from kvgeom.diagnosis.mode import Mode, ModeName
from kvgeom.diagnosis.posterior import effects
from kvgeom.diagnosis.taxonomy import FIXABLE, mode_at_face_value
from kvgeom.engines.engine import CacheConfig
from kvgeom.errors import InputError, KvgeomWarning, ModelError
from kvgeom.evaluation.baseline import Baseline, opened, run_baseline
from kvgeom.evaluation.config import LENGTHS, RUN_OPTIONS, open_run
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.geometry.sensitivity import Sensitivity
from kvgeom.prompts.load import as_prompt_set
from kvgeom.prompts.sets import PromptSet, calibration
from kvgeom.quant.placement import Placement
from kvgeom.quant.scheme import Scheme
from kvgeom.results import Composite, Result
from kvgeom.words import conversation_text

if TYPE_CHECKING:
    from kvgeom.evaluation.relabel import KeptLabels
    from kvgeom.explorer.widget import Explorer
    from kvgeom.judges.classifiers import ClassifierJudge
    from kvgeom.mitigation.plan import Plan


@dataclass(frozen=True, repr=False)
class Diagnosis(Composite):
    """All that is known of one model's failure mode; made by :func:`diagnose`.

    Attributes
    ----------
    mode : Mode
    curve : Curve
    scan : Scan
    ablation : Ablation
        Parts of the whole cache: granularity, keys or values, first and last layers, the worst layer kept.
    channels : Ablation
        Channels of the worst layer (of all layers, where none alone flips a refusal).
    pcr, pcr_paper : PCR
        At the worst layer, with the decode-faithful placement and as in the paper's released code.
    outcomes, scan_outcomes, paper_outcomes : Outcomes
        The responses behind the curve; behind scan, ablations and PCR; behind ``pcr_paper``.
    sensitivity : Sensitivity or None
        None where the geometry was left out.
    evidence : Evidence
    prompts : PromptSet
        The harmful ones were put to the model; with their harmless counterparts.
    width : ScanWidth
        At which layers were scanned, and how it was found.
    measured : int or None
        The layer that was the worst when its parts were tried.
    seed : int
    base : Baseline or None
        The model with an exact cache on the harmful prompts; None in a diagnosis that was read from a file or labelled again.
    """

    kind: ClassVar[str] = "diagnosis"
    main: ClassVar[str] = "mode"

    mode: Mode
    curve: Curve
    scan: Scan
    ablation: Ablation
    channels: Ablation
    pcr: PCR
    pcr_paper: PCR
    outcomes: Outcomes
    scan_outcomes: Outcomes
    paper_outcomes: Outcomes
    sensitivity: Sensitivity | None
    evidence: Evidence
    prompts: PromptSet
    width: ScanWidth
    measured: int | None
    seed: int
    base: Baseline | None = field(default=None, compare=False)

    @property
    def baseline(self) -> Baseline:
        """The model with an exact cache on the harmful prompts.

        Raises
        ------
        InputError
            In a diagnosis that was read from a file, which holds no model, or labelled again by another judge, for which the
            model has to answer again.
        """
        if self.base is None:
            raise InputError(
                "this diagnosis was read from a file or labelled again, and has no model; give it one: diagnosis.on(model, "
                f"judge=...), with its own judge, {self.curve.meta['judge']}"
            )
        return self.base

    @property
    def paper_mode(self) -> ModeName:
        """The mode whose advice by the paper can be tried.

        That of the diagnosis; where it names none with a fix of its own, that of the paper's rules at face value: without
        intervals, and with broken text counted as lost (:func:`~kvgeom.diagnosis.taxonomy.published_mode`).
        """
        if self.mode.name in FIXABLE:
            return self.mode.name
        whole = self.ablation.data.flips
        return mode_at_face_value(self.scan.data, int(whole.sel(recipe=ALL_LAYERS)), int(whole.sel(recipe="group-64")))

    def explore(self) -> Explorer:
        """Layers, their channels, prompts and both responses to point at: the last line of a cell, or ``.save("x.html")``.

        What was measured changes at once. Where the model is at hand, it answers under a cache that you type.
        """
        from kvgeom.diagnosis.explore import explore

        return explore(self)

    @suggests(RUN_OPTIONS)
    def on(self, model: Any, **options: Any) -> Diagnosis:
        """A diagnosis that was read from a file or labelled again, with its model, so that it can prescribe.

        Parameters
        ----------
        model : anything that :func:`kvgeom.load` takes
            The model that was diagnosed.
        **options
            As in :func:`diagnose`; ``judge`` is that of the diagnosis.

        Raises
        ------
        InputError
            If it is another model, or another judge.
        """
        loaded, run = open_run(model, options)
        if loaded.fingerprint != self.curve.meta["fingerprint"]:
            raise InputError(
                f"the diagnosis is of {self.curve.meta['model']}, not of {loaded.name}; diagnose this model"
            )
        if run.judge.name != self.curve.meta["judge"]:
            raise InputError(
                f"the diagnosis was judged by {self.curve.meta['judge']}, not by {run.judge.name}; give judge=..., the same one"
            )
        lengths = {name: self.curve.meta[name] for name in LENGTHS}
        run = replace(run, **lengths)
        return replace(self, base=run_baseline(loaded, self.prompts.harmful, run))

    @suggests()
    def relabel(self, judge: ClassifierJudge | KeptLabels) -> Diagnosis:
        """The diagnosis that follows from the same responses as a classifier labels them.

        The classifier is loaded here; the audited model may be out of memory by then (``model.release()``). What the model
        would have to be asked for again is not there afterwards: margins, if refusals begin with other tokens now, and the
        baseline. To prescribe, give the model and this judge to :meth:`on`.

        Parameters
        ----------
        judge : ClassifierJudge or KeptLabels
            From :func:`kvgeom.classifier`; its labels are kept by :class:`~kvgeom.evaluation.relabel.KeptLabels`.

        Raises
        ------
        InputError
            Unless the diagnosis was made with ``full_responses=True``.
        """
        outcomes, parts, paper = (
            part.relabel(judge) for part in (self.outcomes, self.scan_outcomes, self.paper_outcomes)
        )
        curve = curve_of(outcomes, self.curve.text, self.curve.meta)
        measured = Measured(outcomes, parts, paper, self.width, self.measured)
        # The baseline's responses end where the first judge stopped reading.
        return _conclude(measured, self.prompts, curve, self.sensitivity, self.seed, None)

    @suggests()
    def prescribe(
        self,
        *,
        memory: float = 0.02,
        scheme: CacheConfig | Scheme | str | None = None,
        bits: int | None = None,
        placement: Placement | None = None,
    ) -> Plan:
        """Find a cache that keeps the refusals: what the paper's decision tree says, and what a measured search finds.

        About 40 caches answer the calibration prompts that are refused with an exact cache; layers are ranked by the
        refusal margin that they cost, and that is compared with other rules at equal memory. The best answer the
        harmless prompts too: a cache that keeps refusals by refusing or breaking those is not chosen.

        Parameters
        ----------
        memory : float
            Budget: the share by which the cache may exceed the unmitigated one, scales and offsets counted.
        scheme : str, optional
            The cache to mitigate, a scheme as a string or an engine's preset; that of the curve by default.
        bits : int, optional
            Its width; that of the diagnosis's scan by default.
        placement : Placement, optional
            That of the preset, or decode-faithful, by default.

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

        return prescribe(self, memory=memory, scheme=scheme, bits=bits, placement=placement)

    def record(self) -> dict[str, Any]:
        """What it holds apart from its parts, in JSON types."""
        return {
            "evidence": self.evidence.to_dict(),
            "prompts": self.prompts.to_dict(),
            "width": self.width.to_dict(),
            "measured": self.measured,
            "seed": self.seed,
        }

    @classmethod
    def of_parts(cls, parts: Mapping[str, Result], record: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`parts` and :meth:`record`."""
        found: dict[str, Any] = {"sensitivity": None, **parts}
        return cls(
            **found,
            evidence=Evidence.from_dict(record["evidence"]),
            prompts=PromptSet.from_dict(record["prompts"]),
            width=ScanWidth.from_dict(record["width"]),
            measured=record["measured"],
            seed=record["seed"],
        )

    def to_text(self) -> str:
        """The model, all tables, the mode, its evidence, and how sure it is."""
        scan, meta = self.scan, self.curve.meta
        return "\n\n".join(
            [
                f"Model: {meta['model']} (weights: {meta['weights']})"
                + "".join(
                    f"; {note}" for note in (meta.get("cache"), conversation_text(meta.get("conversation", ()))) if note
                ),
                *([self.prompts.caveat] if self.prompts.caveat else []),
                self.curve.to_text(),
                f"Single layers ({scan.meta['scheme']}; {scan.meta['placement']})\n\n{scan.to_text()}",
                f"Parts of the cache\n\n{ablation_text(self.ablation, self.channels)}",
                f"PCR as a cache stores it: {self.pcr.to_text()}\nPCR as the paper simulates: {self.pcr_paper.to_text()}",
                self.mode.to_text(),
            ]
        )

    def _repr_html_(self) -> str:
        said = [*self.mode.evidence, *([self.prompts.caveat] if self.prompts.caveat else [])]
        rows = "".join(f"<li>{escape(sentence)}</li>" for sentence in said)
        return f"<p><b>{escape(self.mode.name)}</b></p><ul>{rows}</ul>"


@suggests(RUN_OPTIONS)
def diagnose(
    model: Any,
    prompts: Any = None,
    *,
    scheme: CacheConfig | Scheme | str | None = None,
    bits: Sequence[int] | int | None = None,
    scan_bits: int | None = None,
    placement: Placement | str | None = None,
    geometry: bool = True,
    gains: bool = False,
    full_responses: bool = False,
    **options: Any,
) -> Diagnosis:
    """Find out whether, where and why a model loses its refusals when its KV cache is rounded.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts : PromptSet or name of one, optional
        Its harmful requests are put to the model; the calibration set by default. The subspace is found on the same set
        if it has harmless requests too, else on the calibration set.
    scheme : Scheme or str, optional
        Of the curve: asymmetric per-token by default; also an engine's preset, such as ``"kivi"``.
    bits : int or sequence of int, optional
        Widths of the curve; see :func:`~kvgeom.behaviour.widths.at_widths`.
    scan_bits : int, optional
        Of layer scan, fixes and PCR, which round symmetric per-tensor as the paper's released code does. By default the fewest
        bits before the model stops writing language (:func:`~kvgeom.behaviour.matched.scan_width`).
    placement : Placement, "cache" or "paper", optional
        Decode-faithful by default; for the curve that of the preset, if it is one.
    geometry : bool
        Whether to measure the noise-sensitivity ratio as well; it is reported as evidence and decides nothing. Where it
        cannot be measured, a warning says why.
    gains : bool
        Whether the curve also runs the prompts that are not refused with an exact cache. None of them can flip, but
        some may be refused once the cache is rounded; without it ``curve`` counts labels of the refused ones, and gains
        are NaN.
    full_responses : bool
        Generate all responses of all prompts in full, so that :meth:`Diagnosis.relabel` can give them to a classifier.
        Takes much longer.
    **options
        Attributes of :class:`~kvgeom.evaluation.config.RunConfig` (``judge``, ``max_new_tokens``,
        ``max_reasoning_tokens``, ``batch_size``, ``journal``, ``text``, ``seed``, ``progress``), and options of
        :func:`kvgeom.load`.

    Raises
    ------
    InputError
        If an option is unknown, or the model, the prompts, the bits or the journal cannot be used.
    """
    check_scan_bits(scan_bits)
    placement = None if placement is None else Placement.parse(placement)
    series = at_widths(scheme, bits, placement)  # errors in these are reported before any work
    chosen = calibration() if prompts is None else as_prompt_set(prompts)
    loaded, run = open_run(model, options)
    with opened(loaded, chosen.harmful, run) as base, run.bars():
        widths = series.conditions(loaded)
        width = scan_width(base, scan_bits, placement)
        measured = measure(base, widths, width, placement or Placement(), gains, full_responses)
        curve = curve_of(
            measured.outcomes, text_curve(base, widths), {**series.described(base), "cache": loaded.geometry.note}
        )
        sensitivity = None
        try:
            sensitivity = sensitivity_of(loaded, chosen, width.scheme, placement, run) if geometry else None
        except ModelError as error:  # it is evidence, and decides nothing
            curve = replace(curve, meta={**curve.meta, "no_geometry": str(error)})
            warnings.warn(f"the geometry is not measured: {error}", KvgeomWarning, stacklevel=2)
    return _conclude(measured, chosen, curve, sensitivity, run.seed, base)


def _conclude(
    measured: Measured,
    prompts: PromptSet,
    curve: Curve,
    sensitivity: Sensitivity | None,
    seed: int,
    base: Baseline | None,
) -> Diagnosis:
    """What follows from responses. What was not tried at the layer that is now the worst is not known."""
    parts, paper, tensor = measured.parts, measured.paper, measured.width.scheme
    scan = scan_of(parts, tensor)
    worst = scan.worst_layer
    trials = trials_of(parts, tensor.bits, worst)
    found, tried = effects(trials, seed=seed), worst if worst == measured.worst else None
    evidence = with_geometry(evidence_from(trials, found, worst, str(measured.width)), sensitivity, worst)
    return Diagnosis(
        mode=mode_of(evidence, found),
        curve=curve,
        scan=scan,
        ablation=ablation_of(parts, [*WHOLE_CACHE, FIXES, RANDOM, PAPER_SETTING], reference=ALL_LAYERS),
        channels=ablation_of(parts, ["channels"], reference=EVERY_CHANNEL),
        pcr=pcr_of(parts, worst, tensor.bits, draws=found.pcr),
        pcr_paper=pcr_of(paper, tried, SCAN_SCHEME.bits, draws=paper_draws(trials, paper, tried, seed)),
        outcomes=measured.outcomes,
        scan_outcomes=parts,
        paper_outcomes=paper,
        sensitivity=sensitivity,
        evidence=evidence,
        prompts=prompts,
        width=measured.width,
        measured=measured.worst,
        seed=seed,
        base=base,
    )
