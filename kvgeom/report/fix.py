"""The fix: diagnosis, prescription and proof in one go, written down as ``plan.json`` and ``report.html``."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kvgeom.checks import MOST_DRAWS, as_path, suggests, whole
from kvgeom.diagnosis.diagnose import Diagnosis, diagnose
from kvgeom.engines.engine import CacheConfig
from kvgeom.engines.registry import resolve, widths
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import versions
from kvgeom.evaluation.config import LENGTHS, RUN_OPTIONS, split_options
from kvgeom.folders import SETTINGS, report_folder
from kvgeom.mitigation.plan import Plan
from kvgeom.mitigation.search import as_budget
from kvgeom.mitigation.verify import Verification
from kvgeom.models.load import load
from kvgeom.models.templates import conversation_of
from kvgeom.paths import write_whole
from kvgeom.prompts.load import as_prompt_set
from kvgeom.prompts.sets import PromptSet, calibration, caveat, held_out
from kvgeom.quant.placement import Placement
from kvgeom.quant.scheme import Scheme, check_bits
from kvgeom.report.fix_page import render
from kvgeom.report.fix_text import COLUMNS, before_and_after, sentences
from kvgeom.report.folder import FixSettings
from kvgeom.results import plain
from kvgeom.sealed import read_json
from kvgeom.words import text_table

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

#: Width where none is given and the scheme offers it.
USUAL_BITS = 4
#: Files of a fix in its folder, beside ``plan.json`` and ``report.html``.
DIAGNOSIS, VERIFICATION = "diagnosis.nc", "verification.nc"


@dataclass(frozen=True, repr=False)
class Fix:
    """A diagnosis, the plan that follows from it, and its proof; made by :func:`fix`.

    Attributes
    ----------
    diagnosis : Diagnosis
    plan : Plan
        With its verification, as it is written to ``plan.json``.
    verification : Verification
    settings : dict
        Prompt sets, seconds, versions and what else made it.
    """

    diagnosis: Diagnosis
    plan: Plan
    verification: Verification
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def sentences(self) -> tuple[str, ...]:
        """What the verdict rests on, what the chosen cache costs, and where requests in similar wording make it too sure."""
        asked = [self.settings[use] for use in ("calibration", "verification") if use in self.settings]
        return (*sentences(self.plan, self.verification), *filter(None, map(caveat, asked)))

    def table(self) -> str:
        """Before and after, as text: 16 bits, unmitigated, chosen, and what the paper advises."""
        return text_table(COLUMNS, before_and_after(self.verification))

    def to_frame(self, table: str | None = None) -> pd.DataFrame:
        """The proof as a frame; see :class:`~kvgeom.mitigation.verify.Verification`."""
        return self.verification.to_frame(table)

    def plot(self, kind: str | None = None, **options: Any) -> go.Figure:
        """A figure of the proof; recovery with intervals, over the controls, by default."""
        return self.verification.plot(kind, **options)

    def provenance(self) -> dict[str, Any]:
        """Where it comes from."""
        return {**self.verification.provenance(), "versions": self.settings.get("versions")}

    def to_text(self, folder: str | Path | None = None) -> str:
        """Verdict, before and after, reasons, where things are, and what to do next."""

        def listed(lines: Iterable[str]) -> str:
            return "\n".join(f"  - {line}" for line in lines)

        parts = [
            self.verification.sentence,
            self.table(),
            listed(self.sentences),
            f"Why this cache (failure mode: {self.plan.mode}):\n{listed(self.plan.reasons)}",
        ]
        if folder is not None:
            parts.append(f"plan:   {Path(folder) / 'plan.json'}\nreport: {Path(folder) / 'report.html'}")
        return "\n\n".join([*parts, self._next_step(folder or "fix/")])

    def _next_step(self, folder: str | Path) -> str:
        plan, status = self.plan, self.verification.status
        if plan.placement.where != "cache":
            return "Next: this placement rounds where no cache does; mitigate one with --placement cache."
        if self.verification.recovery is None:
            return "Next: nothing, the cache as it is loses no refusal here; narrower caches may (kvgeom sweep)."
        if plan.chosen.same_cache(plan.unmitigated) or status == "does not help":
            return "Next: try a larger --memory, more --bits or another --scheme; until then this cache stays unsafe."
        lines = f'plan = kvgeom.Plan.load("{folder}")\nmodel.generate(**inputs, past_key_values=plan.cache(model))'
        if status == "undetermined":
            return f"Next: prove it on more prompts (--verify-prompts). To try it, in Python:\n\n{lines}"
        return f"Next, in Python (other engines: see the report):\n\n{lines}"

    def page(self) -> str:
        """The report as one HTML page."""
        return render(self.plan, self.verification, self.diagnosis.mode, self.sentences, self.settings)

    def save(self, path: str | Path) -> Path:
        """Write ``plan.json``, ``report.html`` and what :meth:`load` reads into a folder; return the report's path.

        What an earlier fix has left there is replaced. A folder with an audit is refused.
        """
        folder, page = report_folder(path, "fix"), self.page()
        self.plan.save(folder)
        self.diagnosis.save(folder / DIAGNOSIS)
        self.verification.save(folder / VERIFICATION)
        write_whole(folder / SETTINGS["fix"], json.dumps(plain(self.settings), indent=1) + "\n")
        return write_whole(folder / "report.html", page)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the fix that :meth:`save` wrote into a folder.

        Raises
        ------
        InputError
            If something of it is missing or cannot be read.
        """
        folder = as_path("a fix", path)
        try:
            settings = read_json(folder / SETTINGS["fix"], FixSettings).model_dump()
        except InputError as error:
            raise InputError(
                f"cannot load a fix from {folder}: {error}; give a folder that kvgeom fix wrote"
            ) from error
        return cls(
            Diagnosis.load(folder / DIAGNOSIS),
            Plan.load(folder),
            Verification.load(folder / VERIFICATION),
            settings,
        )

    def summary(self) -> str:
        """The verdict in words."""
        return self.verification.sentence

    def __repr__(self) -> str:
        return f"<Fix {self.summary()}>"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in before_and_after(self.verification)
        )
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in self.sentences)
        return f"<p><b>{escape(self.verification.sentence)}</b></p><table><tr>{head}</tr>{rows}</table><ul>{items}</ul>"


@suggests(RUN_OPTIONS)
def fix(
    model: Any,
    out: str | Path | None = None,
    *,
    bits: int | None = None,
    scheme: CacheConfig | Scheme | str = "asym-token",
    memory: float = 0.02,
    prompts: Any = None,
    verify_prompts: Any = None,
    placement: Placement | str | None = None,
    geometry: bool = False,
    controls: int = 3,
    **options: Any,
) -> Fix:
    """Find a quantized cache that keeps a model's refusals, and prove it on prompts that did not choose it.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    out : str or Path, optional
        Folder for ``plan.json``, ``report.html`` and the journals from which an interrupted fix goes on, without an audit
        in it. A fix with other settings that is there is replaced. By default nothing is written.
    bits : int, optional
        Width of the cache to mitigate: 4 by default, or, where the scheme does not offer that, its narrowest.
    scheme : str
        The cache to mitigate: a spelling (``"asym-token"``, ``"int3-asym-group64"``) or a preset of an engine (``"kivi"``).
    memory : float
        Budget: the share by which the cache may exceed the unmitigated one.
    prompts : PromptSet or name of one, optional
        On which the plan is chosen; the calibration set by default.
    verify_prompts : PromptSet or name of one, optional
        On which it is proven, none of them in ``prompts``; the held-out set by default.
    placement, geometry
        See :func:`kvgeom.diagnose`.
    controls : int
        Draws of errors of the same size in random directions, for every cache but the paper's.
    **options
        Attributes of :class:`~kvgeom.evaluation.config.RunConfig`, and options of :func:`kvgeom.load`.

    Raises
    ------
    InputError
        If an option is unknown, the model refuses nothing, or model, scheme, bits, budget, prompts or folder cannot be
        used; before any long work where that can be known.
    """
    started = time.monotonic()
    run, loading = split_options(options)
    config, memory = check(bits, scheme, memory, placement, controls), as_budget(memory)
    chosen = calibration() if prompts is None else as_prompt_set(prompts)
    proving = held_out() if verify_prompts is None else as_prompt_set(verify_prompts)
    check_prompts(chosen, proving)
    folder = None if out is None else report_folder(out, "fix")
    loaded = load(model, progress=run.progress, **loading)
    found = diagnose(
        loaded,
        chosen,
        scheme=config,
        bits=config.bits,
        scan_bits=config.bits,
        placement=placement,
        geometry=geometry,
        **run.with_journal(None if folder is None else folder / "journal.jsonl").options(),
    )
    plan = found.prescribe(memory=memory, scheme=config)
    proving_run = run.with_journal(None if folder is None else folder / "verify.jsonl")
    # The plan has the lengths that it was made with.
    verifying = {name: value for name, value in proving_run.options().items() if name not in LENGTHS}
    proof = plan.verify(loaded, proving, also=plan.runners_up, controls=controls, **verifying)
    settings = {
        "calibration": chosen.described(),
        "verification": proving.described(),
        "fingerprint": loaded.fingerprint,
        "weights": loaded.weights,
        "conversation": conversation_of(getattr(loaded, "template", None)),
        "notes": list(getattr(loaded, "notes", ())),
        "runs_on": f"{loaded.backend}, {str(loaded.dtype).removeprefix('torch.')} on {loaded.device}",
        "scheme": config.name,
        "bits": config.bits,
        "placement": str(config.placement),
        "geometry": geometry,
        "max_new_tokens": run.max_new_tokens,
        "max_reasoning_tokens": run.max_reasoning_tokens,
        "memory": memory,
        "controls": controls,
        "seed": run.seed,
        "seconds": round(time.monotonic() - started, 1),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    made = Fix(found, plan.with_verification(proof), proof, settings)
    if folder is not None:
        made.save(folder)
    return made


def check(
    bits: int | None,
    scheme: CacheConfig | Scheme | str,
    memory: float,
    placement: Placement | str | None = None,
    controls: int = 0,
) -> CacheConfig:
    """The cache that is to be mitigated, resolved, once what is wrong with it has been reported. Needs no model.

    Raises
    ------
    InputError
        For an unknown scheme or width, 16 bits, or a negative budget or number of controls.
    """
    as_budget(memory)
    whole("controls", controls, 0, MOST_DRAWS)
    if bits is not None and check_bits(whole("bits", bits, 2, 16)) == 16:
        raise InputError("bits must be 2 to 8, got 16, which rounds nothing")
    if bits is None:
        offered = widths(scheme)
        bits = USUAL_BITS if USUAL_BITS in offered else offered[0]
    return resolve(scheme, bits=bits, placement=placement)


def check_prompts(prompts: PromptSet, verify_prompts: PromptSet) -> None:
    """Say what is wrong with the prompts that choose a plan and those that prove it. Needs no model.

    Raises
    ------
    InputError
        If either set has no harmful requests, or they share requests.
    """
    for what, given in (("choose", prompts), ("prove", verify_prompts)):
        if not given.harmful:
            raise InputError(
                f"prompt set {given.name!r} has no harmful requests to {what} a plan with; give some that the model refuses"
            )
    # A set without harmless requests borrows those of the calibration set.
    choosing = {request.strip() for request in (*prompts.harmful, *(prompts.harmless or calibration().harmless))}
    shared = [r for r in (*verify_prompts.harmful, *verify_prompts.harmless) if r.strip() in choosing]
    if shared:
        raise InputError(
            f"{len(shared)} of the requests of {verify_prompts.name!r} are also in {prompts.name!r} or the harmless requests asked "
            f"with it, such as {shared[0][:60]!r}; prove a plan on requests that did not choose it"
        )
