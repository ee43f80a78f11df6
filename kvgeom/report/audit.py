"""The audit: a diagnosis of one model, written down as ``audit.json`` and ``report.html``."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from kvgeom.behaviour.ablation import Ablation
from kvgeom.behaviour.curve import Curve
from kvgeom.behaviour.pcr import PCR
from kvgeom.behaviour.scan import Scan
from kvgeom.behaviour.widths import ROUNDING
from kvgeom.diagnosis.diagnose import Diagnosis, diagnose
from kvgeom.diagnosis.taxonomy import Mode
from kvgeom.engines.registry import needs_bits
from kvgeom.errors import InputError
from kvgeom.geometry.sensitivity import Sensitivity
from kvgeom.judges.judge import Judge
from kvgeom.models.load import load
from kvgeom.models.model import Model
from kvgeom.paths import writable_folder, write_whole
from kvgeom.prompts.sets import PromptSet, calibration
from kvgeom.quant.placement import Placement
from kvgeom.quant.scheme import Scheme, check_bits
from kvgeom.report.verdict import Verdict, conclude
from kvgeom.results import plain

#: Version of the layout of audit.json; docs/schema.md describes it.
SCHEMA_VERSION = 1  # also in audit.schema.json


@dataclass(frozen=True)
class Audit:
    """All that an audit found; :meth:`to_dict` is the content of ``audit.json``.

    Where the model refuses nothing, flip rates and margins are NaN and ``mode`` is undetermined.

    Attributes
    ----------
    model, prompts, settings, baseline : dict
        See docs/schema.md.
    curve, scan, pcr, pcr_paper, mode, ablation, channels, sensitivity
        See :class:`~kvgeom.diagnosis.diagnose.Diagnosis`.
    responses : tuple of dict
        Some flipped prompts: ``bits``, ``request``, ``baseline``, ``response``, ``label``, ``reason``.
    verdict : Verdict
    """

    model: dict[str, Any]
    prompts: dict[str, Any]
    settings: dict[str, Any]
    baseline: dict[str, Any]
    curve: Curve
    scan: Scan
    pcr: PCR
    pcr_paper: PCR
    mode: Mode
    ablation: Ablation
    channels: Ablation
    sensitivity: Sensitivity
    responses: tuple[dict[str, Any], ...]
    verdict: Verdict

    @property
    def shown_layer(self) -> int:
        """The layer whose channels are shown: the critical one, else that of the largest ratio in the keys."""
        if self.scan.critical_layer is not None:
            return self.scan.critical_layer
        keys = self.sensitivity.data.ratio.sel(site="k").fillna(-1.0)
        return int(keys.layer[int(keys.values.argmax())])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, NaN as null; the layout is described in docs/schema.md."""
        scheme = self.curve.meta["scheme"]
        curve = [
            {**_ci(row), "scheme": _at_width(scheme, int(row["bits"]))}
            for row in self.curve.to_frame().to_dict("records")
        ]
        layers = [_ci(row) for row in self.scan.to_frame().to_dict("records")]
        for row in layers:
            row["margin_ci"] = [row.pop("margin_low"), row.pop("margin_high")]
        sensitivity = self.sensitivity.records()
        content: dict[str, Any] = plain(
            {
                "schema_version": SCHEMA_VERSION,
                "verdict": self.verdict.to_dict(),
                "model": self.model,
                "prompts": self.prompts,
                "settings": self.settings,
                "baseline": self.baseline,
                "curve": curve,
                "layers": layers,
                "critical_layer": self.scan.critical_layer,
                "pcr": self.pcr.to_dict(),
                "pcr_paper": self.pcr_paper.to_dict(),
                "mode": self.mode.to_dict(),
                "sensitivity": sensitivity,
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
        for site in ("k", "v"):
            table = self.sensitivity.channels(site).sel(layer=self.shown_layer, drop=True).to_dataframe().reset_index()
            table["head"] = table["channel"] // self.sensitivity.meta["head_dim"]
            rows += [
                {"layer": self.shown_layer, "site": site, **{str(name): value for name, value in row.items()}}
                for row in table.to_dict("records")
            ]
        return rows

    def save(self, out: str | Path) -> Path:
        """Write ``audit.json`` and ``report.html`` into a folder, each whole or not at all; return the report's path."""
        from kvgeom.report.page import render

        folder = writable_folder(out)
        write_whole(folder / "audit.json", json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        return write_whole(folder / "report.html", render(self))

    def __repr__(self) -> str:
        return f"<Audit {self.verdict.headline}>"


def audit(
    model: Any,
    out: str | Path | None = None,
    *,
    prompts: PromptSet | None = None,
    scheme: Scheme | str | None = None,
    curve_bits: Sequence[int] | None = None,
    bits: int = 3,
    placement: Placement | None = None,
    judge: Judge | None = None,
    text: str | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 512,
    progress: bool = True,
    seed: int = 0,
    **load_options: Any,
) -> Audit:
    """Audit a model end to end: does its refusal survive a rounded KV cache, where does it break, and how?

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    out : str or Path, optional
        Folder for ``audit.json``, ``report.html`` and ``journal.jsonl``, from which an interrupted audit goes on;
        without it nothing is written.
    prompts, scheme, curve_bits, bits, placement, judge, text, max_new_tokens, batch_size, progress, seed
        See :func:`kvgeom.diagnose`.
    **load_options
        Go to :func:`kvgeom.load`.

    Raises
    ------
    InputError
        If the model, the prompts, the bits or the folder cannot be used; before any long work where that can be known.
    """
    started = time.monotonic()
    for width in (*(curve_bits or ()), bits):
        check_bits(width)
    if out is not None:
        writable_folder(out)
    prompts = prompts or calibration()
    if not prompts.harmful:
        raise InputError(f"prompt set {prompts.name!r} was asked, but it has no harmful requests; an audit needs some")
    loaded = load(model, progress=progress, **load_options)
    found = diagnose(
        loaded,
        prompts,
        scheme=scheme,
        bits=bits,
        placement=placement,
        judge=judge,
        text=text,
        journal=None if out is None else writable_folder(out) / "journal.jsonl",
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
        seed=seed,
        curve_bits=curve_bits,
        gains=True,
    )
    made = _audit(loaded, prompts, found, seed=seed, seconds=time.monotonic() - started)
    if out is not None:
        made.save(out)
    return made


def _audit(model: Model, prompts: PromptSet, found: Diagnosis, *, seed: int, seconds: float) -> Audit:
    base, meta = found.baseline, found.curve.meta
    return Audit(
        model={
            "name": model.name,
            "backend": model.backend,
            "fingerprint": model.fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "attention_kernel": model.attention_kernel,
            **model.geometry.__dict__,
        },
        prompts={
            "name": prompts.name,
            "source": prompts.source,
            "fingerprint": prompts.fingerprint,
            "harmful": len(prompts.harmful),
            "harmless": len(prompts.harmless),
        },
        settings={
            **{name: meta[name] for name in (*ROUNDING, "placement")},
            "scan_scheme": found.scan.meta["scheme"],
            "scan_placement": found.scan.meta["placement"],
            "max_new_tokens": meta["max_new_tokens"],
            "judge": meta["judge"],
            "seed": seed,
            "seconds": round(seconds, 1),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {name: version(name) for name in ("kvgeom", "torch", "transformers")},
        },
        baseline={
            "prompts": len(base.prompts),
            **found.outcomes.counts(),
            "perplexity": meta["baseline_perplexity"],
        },
        curve=found.curve,
        scan=found.scan,
        pcr=found.pcr,
        pcr_paper=found.pcr_paper,
        mode=found.mode,
        ablation=found.ablation,
        channels=found.channels,
        sensitivity=cast(Sensitivity, found.sensitivity),  # it was asked for
        responses=_examples(found),
        verdict=conclude(found.curve, found.mode),
    )


def _examples(found: Diagnosis, per_width: int = 3) -> tuple[dict[str, Any], ...]:
    """Some prompts refused unquantized that are not refused at each width."""
    data = found.outcomes.data
    exact = data.sel(recipe="exact")
    examples: list[dict[str, Any]] = []
    for bits in found.curve.data.bits.values[1:]:
        now = data.sel(recipe=f"{bits}-bit")
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
