"""The fix: diagnosis, prescription and proof in one go, written down as ``plan.json`` and ``report.html``."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgeom.diagnosis.diagnose import Diagnosis, diagnose
from kvgeom.engines.engine import CacheConfig
from kvgeom.engines.registry import resolve, widths
from kvgeom.errors import InputError
from kvgeom.judges.judge import Judge
from kvgeom.mitigation.plan import Plan
from kvgeom.mitigation.search import check_budget
from kvgeom.mitigation.verify import Verification
from kvgeom.models.load import load
from kvgeom.paths import writable_folder, write_whole
from kvgeom.prompts.sets import PromptSet, calibration, held_out
from kvgeom.quant.placement import Placement
from kvgeom.quant.scheme import Scheme, check_bits
from kvgeom.report.mended import COLUMNS, before_and_after, sentences
from kvgeom.report.terminal import table

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: Width where none is given and the scheme offers it.
USUAL_BITS = 4


@dataclass(frozen=True)
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

    diagnosis: Diagnosis = field(repr=False)
    plan: Plan
    verification: Verification
    settings: dict[str, Any] = field(repr=False)

    @property
    def sentences(self) -> tuple[str, ...]:
        """What the verdict rests on, and what the chosen cache costs."""
        return sentences(self.plan, self.verification)

    def table(self) -> str:
        """Before and after, as text: 16 bits, unmitigated, chosen, and what the paper advises."""
        return table(COLUMNS, before_and_after(self.verification))

    def plot(self) -> go.Figure:
        """Recovery with intervals, over the controls."""
        return self.verification.plot()

    def save(self, out: str | Path) -> Path:
        """Write ``plan.json`` and ``report.html`` into a folder, each whole or not at all; return the report's path."""
        from kvgeom.report.fix_page import render

        folder, page = writable_folder(out), render(self)
        self.plan.save(folder)
        return write_whole(folder / "report.html", page)

    def __repr__(self) -> str:
        return f"<Fix {self.verification.sentence}>"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in before_and_after(self.verification)
        )
        said = "".join(f"<li>{escape(sentence)}</li>" for sentence in self.sentences)
        return f"<p><b>{escape(self.verification.sentence)}</b></p><table><tr>{head}</tr>{rows}</table><ul>{said}</ul>"


def fix(
    model: Any,
    out: str | Path | None = None,
    *,
    bits: int | None = None,
    scheme: str = "asym-token",
    memory: float = 0.02,
    prompts: PromptSet | None = None,
    verify_prompts: PromptSet | None = None,
    placement: Placement | None = None,
    judge: Judge | None = None,
    text: str | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 512,
    geometry: bool = False,
    controls: int = 3,
    progress: bool = True,
    seed: int = 0,
    **load_options: Any,
) -> Fix:
    """Find a quantized cache that keeps a model's refusals, and prove it on prompts that did not choose it.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    out : str or Path, optional
        Folder for ``plan.json``, ``report.html`` and the journals from which an interrupted fix goes on; without it
        nothing is written.
    bits : int, optional
        Width of the cache to mend: 4 by default, or, where the scheme does not offer that, its narrowest.
    scheme : str
        The cache to mend: a spelling (``"asym-token"``, ``"int3-asym-group64"``) or a preset of an engine (``"kivi"``).
    memory : float
        Budget: the share by which the cache may exceed the unmitigated one.
    prompts : PromptSet, optional
        On which the plan is chosen; the calibration set by default.
    verify_prompts : PromptSet, optional
        On which it is proven, none of them in ``prompts``; the held-out set by default.
    placement, judge, text, max_new_tokens, batch_size, geometry, progress, seed
        See :func:`kvgeom.diagnose`.
    controls : int
        Draws of errors of the same size in random directions, for every cache but the paper's.
    **load_options
        Go to :func:`kvgeom.load`.

    Raises
    ------
    InputError
        If the model refuses nothing, or model, scheme, bits, budget, prompts or folder cannot be used; before any long
        work where that can be known.
    """
    started = time.monotonic()
    config = check(bits, scheme, memory, placement, controls)
    prompts, verify_prompts = prompts or calibration(), verify_prompts or held_out()
    check_prompts(prompts, verify_prompts)
    folder = None if out is None else writable_folder(out)
    loaded = load(model, progress=progress, **load_options)
    running: dict[str, Any] = {
        "judge": judge,
        "text": text,
        "batch_size": batch_size,
        "progress": progress,
        "seed": seed,
    }
    found = diagnose(
        loaded,
        prompts,
        scheme=config,
        bits=config.bits,
        curve_bits=[config.bits],
        placement=placement,
        max_new_tokens=max_new_tokens,
        geometry=geometry,
        journal=None if folder is None else folder / "journal.jsonl",
        **running,
    )
    plan = found.prescribe(memory=memory, scheme=config, seed=seed, progress=progress)
    proof = plan.verify(
        loaded,
        verify_prompts,
        also=plan.runners_up,
        controls=controls,
        journal=None if folder is None else folder / "verify.jsonl",
        **running,
    )
    settings = {
        "calibration": _described(prompts),
        "verification": _described(verify_prompts),
        "fingerprint": loaded.fingerprint,
        "runs_on": f"{loaded.backend}, {str(loaded.dtype).removeprefix('torch.')} on {loaded.device}",
        "bits": config.bits,
        "memory": memory,
        "controls": controls,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("kvgeom", "torch", "transformers")},
    }
    made = Fix(found, plan.with_verification(proof), proof, settings)
    if out is not None:
        made.save(out)
    return made


def check(
    bits: int | None,
    scheme: CacheConfig | Scheme | str,
    memory: float,
    placement: Placement | str | None = None,
    controls: int = 0,
) -> CacheConfig:
    """The cache that is to be mended, resolved; says what is wrong with it. Needs no model.

    Raises
    ------
    InputError
        For a scheme or width that does not exist, 16 bits, or a negative budget or number of controls.
    """
    check_budget(memory)
    if controls < 0:
        raise InputError(f"controls must be 0 or more, got {controls}")
    if bits is not None and check_bits(bits) == 16:
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
                f"prompt set {given.name!r} was to {what} a plan, but it has no harmful requests; give some that the model "
                "refuses"
            )
    # A set without harmless requests borrows those of the calibration set.
    choosing = {request.strip() for request in (*prompts.harmful, *(prompts.harmless or calibration().harmless))}
    shared = [r for r in (*verify_prompts.harmful, *verify_prompts.harmless) if r.strip() in choosing]
    if shared:
        raise InputError(
            f"{len(shared)} of the requests of {verify_prompts.name!r} are also in {prompts.name!r} or among the harmless ones that go "
            f"with it, the first {shared[0][:60]!r}, but a plan is proven on requests that did not choose it; give two sets that "
            "share none"
        )


def _described(prompts: PromptSet) -> dict[str, Any]:
    return {
        "name": prompts.name,
        "source": prompts.source,
        "fingerprint": prompts.fingerprint,
        "harmful": len(prompts.harmful),
        "harmless": len(prompts.harmless),
    }
