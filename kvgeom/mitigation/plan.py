"""A plan: the cache that is advised, the one that the paper would advise, and why."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgeom.checks import as_path, suggests
from kvgeom.errors import InputError, unknown
from kvgeom.evaluation.baseline import opened
from kvgeom.evaluation.config import LENGTHS, RUN_OPTIONS, RunConfig, split_options
from kvgeom.folders import check_replaceable
from kvgeom.mitigation.candidates import UNMITIGATED, Candidate
from kvgeom.mitigation.harmless import opened_on
from kvgeom.mitigation.layers import LayerSelection
from kvgeom.mitigation.plan_file import json_path, read, written
from kvgeom.mitigation.search import Search
from kvgeom.mitigation.verify import CHOSEN, PAPER, Verification, prove
from kvgeom.models.identity import weights_identity
from kvgeom.models.load import load
from kvgeom.models.model import KVGeometry
from kvgeom.paths import writable_folder, write_whole
from kvgeom.prompts.load import as_prompt_set
from kvgeom.prompts.sets import held_out
from kvgeom.quant.placement import Placement
from kvgeom.results import plain

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from kvgeom.engines.engine import Export
    from kvgeom.models.packed import PackedCache


@dataclass(frozen=True)
class Plan:
    """What to do about a model's cache; made by :meth:`kvgeom.diagnosis.diagnose.Diagnosis.prescribe`.

    It is a claim about the calibration prompts until :meth:`verify` has run it on others.

    Attributes
    ----------
    model, identity : str
        The model that it was made for, and a hash of its weights, configuration, tokenizer and stop tokens that is the same in
        all floating-point types and under any chat template.
    geometry : KVGeometry
    scheme : str
        The cache to mitigate: a scheme or preset.
    mode : str
        Failure mode of the diagnosis.
    paper_mode : str
        The mode that the paper's advice is for: that of the diagnosis, or, where it names none with a fix, that of the
        paper's own rules at face value.
    chosen : Candidate
        What the measured search found within the memory budget.
    paper : Candidate
        What the decision tree of arXiv:2606.09864 advises for ``paper_mode``, whatever it takes.
    candidates : tuple of Candidate
        All that were tried, the unmitigated cache first.
    reasons : tuple of str
        Why these.
    search : Search
    selection : LayerSelection
    judge : str
        That labelled the responses.
    max_new_tokens, max_reasoning_tokens : int
        Longest answer, and longest reasoning before it.
    calibration : tuple of str
        Hashes of the requests that chose it.
    verified : dict or None
        What :meth:`verify` found, if it has been run and kept (:meth:`with_verification`).
    """

    model: str
    identity: str
    geometry: KVGeometry
    scheme: str
    mode: str
    paper_mode: str
    chosen: Candidate
    paper: Candidate
    candidates: tuple[Candidate, ...]
    reasons: tuple[str, ...]
    search: Search = field(repr=False)
    selection: LayerSelection | None = field(repr=False)
    judge: str
    max_new_tokens: int
    calibration: tuple[str, ...] = field(repr=False)
    verified: dict[str, Any] | None = field(default=None, repr=False)
    max_reasoning_tokens: int = RunConfig.max_reasoning_tokens

    @property
    def unmitigated(self) -> Candidate:
        """The cache to mitigate."""
        return self.candidates[0]

    @property
    def placement(self) -> Placement:
        """Placement of the unmitigated cache; each candidate has its own."""
        return self.unmitigated.placement

    @property
    def memory_overhead(self) -> float:
        """Share by which the chosen cache exceeds the unmitigated one."""
        return self.overhead(self.chosen)

    def overhead(self, candidate: Candidate) -> float:
        """Share by which a candidate exceeds the unmitigated cache."""
        sizes = [c.bytes_per_token(self.geometry) for c in (candidate, self.unmitigated)]
        return sizes[0] / sizes[1] - 1

    @property
    def runners_up(self) -> tuple[str, ...]:
        """The best within the budget of each family but that of the chosen: what a proof may want beside it."""
        families = {candidate.name: candidate.family for candidate in self.candidates}
        best: dict[str, str] = {}
        for name in self.search.ranked(within_budget=True):
            best.setdefault(families[name], name)
        return tuple(name for name in best.values() if name != self.chosen.name)

    @property
    def paper_tried(self) -> str | None:
        """What the paper's prescription is called among the candidates."""
        return next((found.name for found in self.candidates if found.same_cache(self.paper)), None)

    def candidate(self, name: str) -> Candidate:
        """One of those that were tried, by name.

        Raises
        ------
        InputError
            If there is none of that name.
        """
        for found in (*self.candidates, self.paper):
            if found.name == name:
                return found
        raise unknown("candidate", name, [found.name for found in self.candidates])

    @suggests(RUN_OPTIONS)
    def verify(
        self,
        model: Any,
        prompts: Any = None,
        *,
        also: Sequence[str] = (),
        controls: int = 3,
        **options: Any,
    ) -> Verification:
        """Run the plan on prompts that were not used to choose it.

        The unmitigated cache, the chosen one and the paper's prescription answer the harmful prompts and the harmless
        ones, and perplexity is measured. The controls say what a perturbation of equal size but random direction does.

        Parameters
        ----------
        model : anything that :func:`kvgeom.load` takes
            The model that the plan was made for.
        prompts : PromptSet or name of one, optional
            The held-out set written for this project by default.
        also : sequence of str
            Names of other candidates to run beside these (:attr:`runners_up`, for instance).
        controls : int
            Draws of random directions for every cache but the paper's; 0 for none.
        **options
            Attributes of :class:`~kvgeom.evaluation.config.RunConfig` (but for ``max_new_tokens`` and
            ``max_reasoning_tokens``, which are those of the plan), and options of :func:`kvgeom.load`. ``judge`` is the one that the plan was made with. Harmless prompts
            have a journal of their own beside ``journal``, ``*-harmless.jsonl``.

        Raises
        ------
        InputError
            If model or judge is another one, there are no harmful prompts, one of the prompts chose the plan, or an
            option is unknown.
        """
        lengths = {name: getattr(self, name) for name in LENGTHS}
        for name in lengths.keys() & options.keys():
            raise InputError(f"a plan is verified with the {name} it was made with, {lengths[name]}; leave it out")
        run, loading = split_options({**options, **lengths})
        proving = held_out() if prompts is None else as_prompt_set(prompts)
        if run.judge.name != self.judge:
            raise InputError(
                f"the plan was chosen by judge {self.judge!r}, not by {run.judge.name!r}; give the same: judge=..."
            )
        others = {name: self.candidate(name) for name in also}
        loaded = load(model, progress=run.progress, **loading)
        self.check(loaded)
        if not proving.harmful:
            raise InputError(f"prompt set {proving.name!r} has no harmful requests; give some that the model refuses")
        requests, known = (*proving.harmful, *proving.harmless), set(self.calibration)
        used = [request for request in requests if request_hash(request) in known]
        if used:
            raise InputError(
                f"{len(used)} of {len(requests)} prompts of {proving.name!r} chose the plan, the first {used[0]!r}; prove a "
                "plan on others"
            )
        roles = {UNMITIGATED: self.unmitigated, CHOSEN: self.chosen, PAPER: self.paper, **others}
        with (
            opened(loaded, proving.harmful, run) as base,
            opened_on(loaded, proving.harmless, run, "-harmless") as harmless,
            run.bars(),
        ):
            return prove(base, roles, harmless=harmless, controls=controls, source=proving.name)

    def with_verification(self, found: Verification) -> Plan:
        """The same plan, with its proof for ``plan.json``."""
        return replace(self, verified=found.to_dict())

    def check(self, model: Any) -> None:
        """Refuse a model that the plan was not made for.

        Parameters
        ----------
        model : Model or PreTrainedModel
            Of a PreTrainedModel, which has no tokenizer, weights and configuration are compared.

        Raises
        ------
        InputError
            If its weights, configuration, tokenizer or stop tokens are others.
        """
        identity, own = getattr(model, "identity", None), self.identity
        if identity is None:
            identity, own = weights_identity(model), own.partition(".")[0]
        if identity != own:
            name = getattr(model, "name", type(model).__name__)
            raise InputError(
                f"a plan for {self.model} (identity {own}) was given {name} (identity {identity}); make a plan for this model with "
                "kvgeom fix"
            )

    # --- as a file ---

    def to_dict(self) -> dict[str, Any]:
        """Content of ``plan.json``; docs/mitigation.md describes it."""
        return written({each.name: getattr(self, each.name) for each in fields(self)}, self.overhead)

    def save(self, path: str | Path) -> Path:
        """Write ``plan.json`` (into a folder, or to a path that ends in .json), whole or not at all.

        Raises
        ------
        InputError
            If it cannot be written, or the folder has a ``plan.json`` that kvgeom did not write.
        """
        file = json_path(path)
        folder = writable_folder(file.parent)
        if as_path("plan", path) != file:  # else the user named that very file
            check_replaceable(folder, [file.name])
        return write_whole(file, json.dumps(plain(self.to_dict()), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that :meth:`save` wrote (the file, or its folder).

        Raises
        ------
        InputError
            If there is none, or it cannot be read.
        """
        return cls(**read(json_path(path)))

    # --- deployment ---

    def cache(self, model: Any, candidate: str | None = None) -> PackedCache:
        """A cache for one sequence, really packed: ``model.generate(**inputs, past_key_values=plan.cache(model))``.

        Parameters
        ----------
        model : PreTrainedModel or Model
            The model that the plan was made for.
        candidate : str, optional
            Another one than the chosen.

        Raises
        ------
        InputError
            If the model is another one, or the placement rounds where no cache does.
        """
        from kvgeom.models.packed import quantized_cache

        self.check(model)
        found = self.candidate(candidate) if candidate else self.chosen
        return quantized_cache(model, found.recipe, found.placement)

    def save_checkpoint(self, directory: str | Path, model: Any, candidate: str | None = None) -> Path:
        """Write a standard checkpoint with what of a candidate can be folded into weights.

        With an exact cache its logits are those of the model; under the plain cache of any engine it behaves as the
        model does under the candidate.

        Parameters
        ----------
        directory : str or Path
        model : anything that :func:`kvgeom.load` takes
            The model that the plan was made for, in plain transformers.
        candidate : str, optional
            Another one than the chosen, for instance ``"equalize"`` or ``"hadamard"``.

        Raises
        ------
        InputError
            If the model is another one, or nothing of the candidate can be folded.
        ModelError
            If the weights cannot be edited without changing what the model computes.
        """
        from kvgeom.models.checkpoint import fold, foldable, save_checkpoint

        loaded = load(model)
        self.check(loaded)
        found = self.candidate(candidate) if candidate else self.chosen
        sites = foldable(found.recipe)
        if not sites:
            able = ", ".join(repr(c.name) for c in self.candidates if foldable(c.recipe))
            raise InputError(
                f"nothing of candidate {found.name!r} can be folded into weights; give candidate= one of {able}, or run the plan in a "
                "cache (plan.cache)"
            )
        folded = fold(loaded, found.recipe, sites)
        return save_checkpoint(folded, directory, [f"{found.name}, {' and '.join(sites)}"])

    def exports(self, file: str | Path = "plan.json") -> tuple[Export, ...]:
        """How to run the chosen cache in every engine that can be configured, and what each cannot do.

        Engines that run the plan as it is come first.

        Parameters
        ----------
        file : str or Path
            Where the plan is (or will be) saved.

        Raises
        ------
        InputError
            If the placement rounds where no cache does.
        """
        from kvgeom.engines.registry import engines

        recipe, placement = self.chosen.recipe, self.chosen.placement
        if placement.where != "cache":
            raise InputError(f"placement '{placement}' is a simulation, which no engine runs; it has no exports")
        whole = (engine.export_plan(file, recipe, placement) for engine in engines() if engine.export_plan)
        nearest = (
            engine.export(recipe, placement, self.geometry)
            for engine in engines()
            if engine.export and not engine.export_plan
        )
        return (*(found for found in whole if found is not None), *nearest)

    # --- words and figures ---

    def summary(self) -> str:
        """What is advised, in a line."""
        return f"{self.mode}: {self.chosen.name} at {self.memory_overhead:+.1%} memory; {self.chosen.description}"

    def __repr__(self) -> str:
        return f"<Plan {self.summary()}>"

    def _repr_html_(self) -> str:
        rows = "".join(f"<li>{escape(reason)}</li>" for reason in self.reasons)
        return f"<p><b>{escape(self.summary())}</b></p><ul>{rows}</ul>"

    def to_frame(self, table: str | None = None) -> pd.DataFrame:
        """One row for each candidate; see :class:`~kvgeom.mitigation.search.Search`."""
        return self.search.to_frame(table)

    def plot(self, kind: str | None = None, **options: Any) -> go.Figure:
        """A figure of the search; flips against bytes per token of all candidates by default."""
        marked = {"paper": self.paper_tried} if kind in (None, "pareto_front") else {}
        return self.search.plot(kind, **{**marked, **options})

    def provenance(self) -> dict[str, Any]:
        """Where it comes from."""
        return {**self.search.provenance(), "scheme": self.scheme, "identity": self.identity}


def request_hash(request: str) -> str:
    """Names a request without holding it."""
    return hashlib.sha256(request.strip().encode()).hexdigest()[:16]
