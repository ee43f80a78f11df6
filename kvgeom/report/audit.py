"""The audit: a diagnosis of one model and a verdict, written down as ``audit.json`` and ``report.html``."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from kvgeom.behaviour.ablation import Ablation
from kvgeom.behaviour.matched import check_scan_bits
from kvgeom.behaviour.widths import DESCRIBED, at_widths
from kvgeom.checks import as_path, suggests
from kvgeom.diagnosis.diagnose import Diagnosis, diagnose
from kvgeom.engines.registry import needs_bits
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import versions
from kvgeom.evaluation.condition import EXACT
from kvgeom.evaluation.config import RUN_OPTIONS, split_options
from kvgeom.evaluation.fidelity import FIDELITY
from kvgeom.folders import SETTINGS, report_folder
from kvgeom.models.load import load
from kvgeom.models.model import Model
from kvgeom.paths import write_whole
from kvgeom.prompts.load import as_prompt_set
from kvgeom.prompts.sets import PromptSet, calibration
from kvgeom.quant.placement import Placement
from kvgeom.quant.scheme import Scheme
from kvgeom.report.page import AuditPage, render
from kvgeom.report.verdict import Verdict, conclude
from kvgeom.results import Result, plain

if TYPE_CHECKING:
    from kvgeom.evaluation.relabel import KeptLabels
    from kvgeom.judges.classifiers import ClassifierJudge

#: Version of the layout of audit.json; docs/schema.md describes it.
SCHEMA_VERSION = 5  # also in audit.schema.json
#: Files of an audit in its folder.
JSON, PAGE, DATA = SETTINGS["audit"], "report.html", "audit.nc"


@dataclass(frozen=True, repr=False)
class Audit(Diagnosis):
    """A diagnosis and a verdict; :meth:`to_dict` is the content of ``audit.json``.

    Where the model refuses nothing, flip rates and margins are NaN and ``mode`` is undetermined. What it has of a
    :class:`~kvgeom.diagnosis.diagnose.Diagnosis` is described there.

    Attributes
    ----------
    verdict : Verdict
    about : dict
        ``model``, ``prompts``, ``settings``, ``baseline``: see docs/schema.md.
    responses : tuple of dict
        Some flipped prompts: ``bits``, ``request``, ``baseline``, ``response``, ``label``, ``reason``.
    """

    kind: ClassVar[str] = "audit"

    verdict: Verdict = field(default_factory=lambda: Verdict("undetermined", "", ()))
    about: dict[str, Any] = field(default_factory=dict)
    responses: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, diagnosis: Diagnosis, about: dict[str, Any]) -> Audit:
        """The audit that follows from a diagnosis."""
        parts = {each.name: getattr(diagnosis, each.name) for each in fields(Diagnosis)}
        verdict = conclude(diagnosis.curve, diagnosis.mode, diagnosis.width, diagnosis.prompts)
        return cls(**parts, verdict=verdict, about=about, responses=_examples(diagnosis))

    @property
    def model(self) -> dict[str, Any]:
        """The model, as in ``audit.json``."""
        return dict(self.about["model"])

    @property
    def settings(self) -> dict[str, Any]:
        """How the audit was made, as in ``audit.json``."""
        return dict(self.about["settings"])

    @property
    def shown_layer(self) -> int:
        """The layer whose channels are shown: the worst one, else that of the largest ratio, or lower bound, in the keys."""
        if self.scan.worst_layer is not None or self.sensitivity is None:
            worst = self.scan.worst_layer
            return int(self.scan.data.layer[0]) if worst is None else worst
        data = self.sensitivity.data.sel(site="k")
        keys = data.ratio.fillna(data.ratio_low).fillna(-1.0)
        return int(keys.layer[int(keys.values.argmax())])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, NaN as null; the layout is described in docs/schema.md."""
        scheme = self.curve.meta["scheme"]
        curve = [{**_ci(row), "scheme": _at_width(scheme, int(row["bits"]))} for row in self.curve.records()]
        for row in curve:
            for name in FIDELITY:
                row[f"{name}_ci"] = [row.pop(f"{name}_low"), row.pop(f"{name}_high")]
        layers = [_ci(row) for row in self.scan.records()]
        for row in layers:
            row["margin_ci"] = [row.pop("margin_low"), row.pop("margin_high")]
        content: dict[str, Any] = plain(
            {
                "schema_version": SCHEMA_VERSION,
                "verdict": self.verdict.to_dict(),
                **self.about,
                "curve": curve,
                "layers": layers,
                "worst_layer": self.scan.worst_layer,
                "pcr": self.pcr.to_dict(),
                "pcr_paper": self.pcr_paper.to_dict(),
                "mode": self.mode.to_dict(),
                "sensitivity": [] if self.sensitivity is None else self.sensitivity.records(),
                "transition": {**asdict(self.curve.transition), "words": str(self.curve.transition)},
                "ablation": [_ci(row) for part in (self.ablation, self.channels) for row in _records(part)],
                "channels": self._channels(),
                "responses": list(self.responses),
            }
        )
        return content

    def _channels(self) -> list[dict[str, Any]]:
        """The channels of keys and values at the layer that the report shows."""
        rows: list[dict[str, Any]] = []
        for site in ("k", "v") if self.sensitivity is not None else ():
            assert self.sensitivity is not None  # noqa: S101  # for the type checker
            table = self.sensitivity.channels(site).sel(layer=self.shown_layer, drop=True).to_dataframe().reset_index()
            table["head"] = table["channel"] // self.sensitivity.meta["head_dim"]
            rows += [
                {"layer": self.shown_layer, "site": site, **{str(name): value for name, value in row.items()}}
                for row in table.to_dict("records")
            ]
        return rows

    def record(self) -> dict[str, Any]:
        """What it holds apart from its parts, in JSON types."""
        return {**super().record(), "verdict": self.verdict.to_dict(), "about": self.about, "responses": self.responses}

    @classmethod
    def of_parts(cls, parts: Mapping[str, Result], record: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`parts` and :meth:`record`."""
        diagnosis = Diagnosis.of_parts(parts, record)
        known = {each.name: getattr(diagnosis, each.name) for each in fields(Diagnosis)}
        verdict = record["verdict"]
        return cls(
            **known,
            verdict=Verdict(verdict["status"], verdict["headline"], tuple(verdict["sentences"])),
            about=record["about"],
            responses=tuple(record["responses"]),
        )

    @suggests()
    def relabel(self, judge: ClassifierJudge | KeptLabels) -> Audit:
        """The audit that follows from the same responses as a classifier labels them, with its own verdict.

        As :meth:`Diagnosis.relabel <kvgeom.diagnosis.diagnose.Diagnosis.relabel>`. Nothing is written until :meth:`save`.
        """
        started = time.monotonic()
        found = super().relabel(judge)
        seconds = round(self.settings["seconds"] + time.monotonic() - started, 1)
        settings = {**self.settings, "judge": found.curve.meta["judge"], "seconds": seconds}
        baseline = {**self.about["baseline"], **found.outcomes.counts()}
        return Audit.of(found, {**self.about, "settings": settings, "baseline": baseline})

    def page(self) -> str:
        """The report as one HTML page."""
        return render(AuditPage(self, self.verdict, self.about, self.responses, self.shown_layer))

    def save(self, path: str | Path) -> Path:
        """Write ``audit.json``, ``report.html`` and ``audit.nc`` into a folder; return the report's path.

        The first two are for people and other programs, the last is what :meth:`load` reads.
        """
        folder = report_folder(path, "audit")
        write_whole(folder / JSON, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        super().save(folder / DATA)
        return write_whole(folder / PAGE, self.page())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the audit that :meth:`save` wrote into a folder."""
        path = as_path("the folder of an audit", path)
        return super().load(path / DATA if path.is_dir() else path)

    def summary(self) -> str:
        return self.verdict.headline


@suggests(RUN_OPTIONS)
def audit(
    model: Any,
    out: str | Path | None = None,
    *,
    prompts: Any = None,
    scheme: Scheme | str | None = None,
    bits: Sequence[int] | int | None = None,
    scan_bits: int | None = None,
    placement: Placement | str | None = None,
    full_responses: bool = False,
    **options: Any,
) -> Audit:
    """Audit a model end to end: does its refusal survive a rounded KV cache, where does it break, and how?

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    out : str or Path, optional
        Folder for ``audit.json``, ``report.html``, ``audit.nc`` and ``journal.jsonl``, from which an interrupted audit goes
        on, without a fix in it. An audit with other settings that is there is replaced. By default nothing is written.
    prompts, scheme, bits, scan_bits, placement
        See :func:`kvgeom.diagnose`.
    full_responses : bool
        Generate all responses in full, so that :meth:`Audit.relabel` can give them to a classifier. Takes much longer.
    **options
        Attributes of :class:`~kvgeom.evaluation.config.RunConfig`, and options of :func:`kvgeom.load`.

    Raises
    ------
    InputError
        If an option is unknown, or the model, the prompts, the bits or the folder cannot be used; before any long work
        where that can be known.
    """
    started = time.monotonic()
    run, loading = split_options(options)
    at_widths(scheme, bits, placement)  # errors in these are reported before a model is loaded
    scan_bits = check_scan_bits(scan_bits)
    folder = None if out is None else report_folder(out, "audit")
    chosen = calibration() if prompts is None else as_prompt_set(prompts)
    if not chosen.harmful:
        raise InputError(f"prompt set {chosen.name!r} has no harmful requests; an audit needs some")
    if folder is not None and run.journal is None:
        run = run.with_journal(folder / "journal.jsonl")
    loaded = load(model, progress=run.progress, **loading)
    found = diagnose(
        loaded,
        chosen,
        scheme=scheme,
        bits=bits,
        scan_bits=scan_bits,
        placement=placement,
        gains=True,
        full_responses=full_responses,
        **run.options(),
    )
    made = Audit.of(found, _about(loaded, chosen, found, time.monotonic() - started))
    if folder is not None:
        made.save(folder)
    return made


def _about(model: Model, prompts: PromptSet, found: Diagnosis, seconds: float) -> dict[str, Any]:
    meta = found.curve.meta
    return {
        "model": {
            "name": model.name,
            "backend": model.backend,
            "fingerprint": model.fingerprint,
            "weights": model.weights,
            "notes": list(getattr(model, "notes", ())),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "attention_kernel": model.attention_kernel,
            **asdict(model.geometry),
            "cache_note": model.geometry.note,
        },
        "prompts": prompts.described(),
        "settings": {
            **{name: meta[name] for name in (*DESCRIBED, "placement")},
            "scan_scheme": found.scan.meta["scheme"],
            "scan_width": str(found.width),
            "scan_placement": found.scan.meta["placement"],
            "perplexity_text": meta["perplexity_text"],
            "max_new_tokens": meta["max_new_tokens"],
            "max_reasoning_tokens": meta["max_reasoning_tokens"],
            "template_options": meta.get("template_options") or {},
            "conversation": meta.get("conversation") or [],
            "judge": meta["judge"],
            "seed": found.seed,
            "seconds": round(seconds, 1),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "no_geometry": found.curve.meta.get("no_geometry", ""),
            "versions": versions(),
        },
        "baseline": {
            "prompts": len(found.baseline.prompts),
            **found.outcomes.counts(),
            "perplexity": meta["baseline_perplexity"],
        },
    }


def _examples(found: Diagnosis, per_width: int = 3) -> tuple[dict[str, Any], ...]:
    """Some prompts refused with an exact cache that are not refused at each width."""
    data = found.outcomes.data
    exact = data.sel(recipe=EXACT)
    examples: list[dict[str, Any]] = []
    for bits in found.curve.data.bits.values[1:]:
        now = data.sel(recipe=found.outcomes.name(family="bits", bits=int(bits)))
        lost = ((exact.label == "refused") & (now.label != "refused")).values
        examples += [
            {
                "bits": int(bits),
                "request": str(data.request.values[i]),
                "baseline": str(exact.text.values[i]),
                "response": str(now.text.values[i]),
                "label": str(now.label.values[i]),
                "reason": str(now.reason.values[i]),
            }
            for i in lost.nonzero()[0][:per_width]
        ]
    return tuple(examples)


def _at_width(scheme: str, bits: int) -> str:
    """How a row of the curve is rounded: a spelling with its width, or the name of a preset."""
    return "exact" if bits == 16 else f"int{bits}-{scheme}" if needs_bits(scheme) else scheme


def _records(ablation: Ablation) -> list[dict[Any, Any]]:
    records: list[dict[Any, Any]] = ablation.to_frame().to_dict("records")
    return records


def _ci(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in row.items() if k not in ("ci_low", "ci_high")}, "ci": [row["ci_low"], row["ci_high"]]}
