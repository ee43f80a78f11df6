"""One model on the paper's prompts: baselines, responses, errors and critical layers that all tables share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvgeom.checks import as_path
from kvgeom.errors import InputError, ModelError
from kvgeom.evaluation.baseline import Baseline, run_baseline
from kvgeom.evaluation.condition import Condition
from kvgeom.evaluation.config import RunConfig, open_run
from kvgeom.evaluation.evaluate import run_conditions
from kvgeom.evaluation.journal import NoJournal
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.evaluation.padded import mean_error
from kvgeom.models.hf import HFModel
from kvgeom.models.model import Model
from kvgeom.models.reading import read
from kvgeom.models.templates import Message, in_conversation
from kvgeom.paper.protocol import Mode, Protocol
from kvgeom.prompts.load import load_prompts
from kvgeom.quant.quantizer import Quantizer

#: The categories of the paper's own set, each a file of that name in the folder of its release.
CATEGORIES = ("refusal", "privacy", "jailbreak")
#: The width at which the paper rounds layers and channels.
LAYER_BITS = 3


@dataclass(frozen=True)
class Suite:
    """Requests that tables are about.

    Attributes
    ----------
    name : str
        ``"custom"`` (the paper's own 63) or ``"advbench"``, by what it stands in for.
    source : str
        What the requests really are.
    requests : tuple of str
    categories : tuple of str
        One for each request.
    harmless : tuple of str
        Harmless requests beside them; none where a list of requests or a folder was given.
    """

    name: str
    source: str
    requests: tuple[str, ...]
    categories: tuple[str, ...]
    harmless: tuple[str, ...] = ()


def as_suite(name: str, given: Any) -> Suite:
    """A suite from a folder with ``refusal.txt``, ``privacy.txt`` and ``jailbreak.txt``, or whatever :func:`kvgeom.load_prompts` takes.

    Raises
    ------
    InputError
        If a folder lacks one of the files, or as :func:`kvgeom.load_prompts`.
    """
    if isinstance(given, str | Path) and Path(given).is_dir():
        folder = Path(given)
        missing = [f"{each}.txt" for each in CATEGORIES if not (folder / f"{each}.txt").is_file()]
        if missing:
            raise InputError(
                f"folder {folder} has no {missing[0]}; give a folder with refusal.txt, privacy.txt and jailbreak.txt, as the "
                "paper's release has it in data/prompts, or a file"
            )
        sets = {each: load_prompts(folder / f"{each}.txt").harmful for each in CATEGORIES}
        requests = tuple(request for each in sets.values() for request in each)
        return Suite(name, f"folder {folder.name}", requests, tuple(each for each in sets for _ in sets[each]))
    found = load_prompts(given, distinct=False)
    if not found.harmful:
        raise InputError(f"prompt set {found.name!r} has no harmful requests; give some")
    return Suite(
        name, f"{found.name} ({found.source})", found.harmful, ("refusal",) * len(found.harmful), found.harmless
    )


@dataclass(frozen=True)
class CriticalLayers:
    """Layers by what rounding each alone flips.

    Attributes
    ----------
    ranked : tuple of int
        Most flips first; of equals, the one that loses more margin, then the lower one.
    flips : mapping of layer to bool array [refused prompts]
    """

    ranked: tuple[int, ...]
    flips: Mapping[int, NDArray[np.bool_]]

    @property
    def first(self) -> int:
        """The critical layer."""
        return self.ranked[0]

    @property
    def alone(self) -> bool:
        """Whether it flips anything."""
        return bool(self.flips[self.first].any())

    @property
    def note(self) -> str:
        """What must be said of it; empty if nothing must."""
        if not len(self.flips[self.first]):
            return "The model refuses none of the prompts, so that nothing can be lost."
        if self.alone:
            return ""
        return f"No layer flips a refusal alone; layer {self.first} costs most of the refusal margin, and stands in."


@dataclass
class Study:
    """A model, its run and the suites; what several tables need is measured once.

    Attributes
    ----------
    model : Model
    run : RunConfig
    suites : mapping of name to Suite
    folder : Path or None
        Where journals go, from which an interrupted run goes on.
    """

    model: Model
    run: RunConfig
    suites: Mapping[str, Suite]
    folder: Path | None = None
    _bases: dict[tuple[str, ...], Baseline] = field(default_factory=dict, repr=False)
    _after: dict[str, Study] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        model: Any,
        *,
        prompts: Any = "calibration",
        advbench: Any = None,
        folder: str | Path | None = None,
        **options: Any,
    ) -> Study:
        """A study for the cells of a notebook; elsewhere :func:`open_study`, which has these parameters, lets go of its journals too."""
        if options.get("journal") is not None:
            raise InputError("a study keeps journals of its own; give a folder for them, and leave journal out")
        suites = suites_of(prompts, advbench)
        loaded, run = open_run(model, options)
        return cls(loaded, run, suites, None if folder is None else as_path("folder", folder))

    def protocol(self, mode: Mode) -> Protocol:
        """A protocol for this model."""
        return Protocol(mode, self.model.geometry)

    def base(self, suite: str = "custom") -> Baseline:
        """The exact cache on a suite; two suites with the same requests share it."""
        requests = self.suites[suite].requests
        if requests not in self._bases:
            journal = None if self.folder is None else self.folder / f"{suite}.jsonl"
            base = run_baseline(self.model, requests, self.run.with_journal(journal))
            self._bases[requests] = base if journal else replace(base, journal=_InMemory())
        return self._bases[requests]

    def with_harmless(self, table: str) -> Suite:
        """The suite in the place of the paper's own, for a table that asks harmless requests too.

        Raises
        ------
        InputError
            If it has none.
        """
        own = self.suites["custom"]
        if not own.harmless:
            raise InputError(
                f"{table} needs harmless requests, and {own.source} has none; give a set with both, such as "
                "--prompts xstest=FILE"
            )
        return own

    def harmless(self, table: str) -> Baseline:
        """The exact cache on the harmless requests of :meth:`with_harmless`."""
        own = self.with_harmless(table)
        as_own = Suite("custom-harmless", own.source, own.harmless, ("harmless",) * len(own.harmless))
        return replace(self, suites={as_own.name: as_own}).base(as_own.name)

    def after(self, name: str, conversation: Sequence[Message]) -> Study:
        """The same study with messages before each request; ``name`` tells conversations apart, and names their journals.

        Raises
        ------
        ModelError
            If the model's template takes no such messages, or its backend no other template.
        """
        if name not in self._after:
            text = getattr(self.model, "template", None)
            if text is None or not isinstance(self.model, HFModel):
                raise ModelError(
                    f"{self.model.name} runs on backend {self.model.backend!r}, which takes no other chat template; load it with a "
                    "backend of kvgeom"
                )
            told = in_conversation(
                text, conversation, self.model.tokenizer, self.model.name, self.model.template_options
            )
            folder = None if self.folder is None else self.folder / name
            self._after[name] = replace(self, model=self.model.with_template(told), folder=folder, _bases={}, _after={})
        return self._after[name]

    def refused(self, suite: str = "custom", category: str | None = None) -> list[int]:
        """Prompts refused with an exact cache, of one category or of all."""
        categories = self.suites[suite].categories
        return [index for index in self.base(suite).refused if category in (None, categories[index])]

    def outcomes(
        self, conditions: Mapping[str, Condition], suite: str = "custom", title: str = "responses"
    ) -> Outcomes:
        """Responses of the refused prompts, in which alone something can flip."""
        base = self.base(suite)
        return run_conditions(base, conditions, prompts=base.refused, title=title)

    def flipped(
        self, conditions: Mapping[str, Condition], suite: str = "custom", title: str = "responses"
    ) -> dict[str, NDArray[np.bool_]]:
        """Which refused prompts flip under each condition."""
        found = self.outcomes(conditions, suite, title)
        return {name: found.flipped(name) for name in conditions}

    def error(self, condition: Condition, suite: str = "custom") -> list[float]:
        """Mean squared error of keys and values, over all prompts.

        Where prompts share scales it is one number, of the calls of the run itself, as the released code counts it. Else one
        for each prompt: what rounding does to exact keys and values, mean over layers and sites.
        """
        base = self.base(suite)
        if condition.placement.batch > 1:
            return [mean_error(base, condition)]
        key = {"measure": "kv error", **condition.key}
        found: list[float] = base.known(key, lambda: [_error(base, condition, n) for n in range(len(base.prompts))])
        return found

    def critical(self, protocol: Protocol) -> CriticalLayers:
        """Layers by the flips of each alone, at 3 bits, symmetric, one scale for a tensor."""
        scheme = protocol.by_tensor(LAYER_BITS)
        conditions = {
            f"layer {layer}": protocol.over(scheme, layers=[layer], family="layer")
            for layer in protocol.geometry.stores
        }
        found = self.outcomes(conditions, title="single layers")
        flips = {layer: found.flipped(name) for layer, name in zip(protocol.geometry.stores, conditions, strict=True)}
        drops = np.nan_to_num(found.margin_drops([*conditions]).mean(0), nan=0.0) if len(found.data.prompt) else None
        order = sorted(
            range(len(flips)),
            key=lambda n: (
                -int(flips[protocol.geometry.stores[n]].sum()),
                0.0 if drops is None else -float(drops[n]),
                n,
            ),
        )
        return CriticalLayers(tuple(protocol.geometry.stores[n] for n in order), flips)

    @contextmanager
    def opened(self) -> Iterator[Study]:
        """Let go of all journals at the end of a ``with`` block."""
        try:
            yield self
        finally:
            for study in (self, *self._after.values()):
                for base in study._bases.values():
                    base.journal.close()


class _InMemory(NoJournal):
    """What stands in for a journal where no folder was named: nothing is measured twice by one study."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        return json.dumps(key, sort_keys=True) in self._known

    def __getitem__(self, key: Mapping[str, Any]) -> Any:
        return self._known[json.dumps(key, sort_keys=True)]

    def __setitem__(self, key: Mapping[str, Any], value: Any) -> None:
        self._known[json.dumps(key, sort_keys=True)] = value

    def remember(self, key: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        if key not in self:
            self[key] = measure()
        return self[key]


def _error(base: Baseline, condition: Condition, index: int) -> float:
    quantizer = Quantizer(condition.recipe, condition.placement)
    errors: list[float] = []
    for found in read(base.model, base.prompts[index], "cache" if quantizer.where == "cache" else "projection"):
        for site, x in (("k", found.k), ("v", found.v)):
            if condition.recipe.scheme(found.layer, site) is not None:  # type: ignore[arg-type]
                rounded = quantizer(found.layer, site, x)  # type: ignore[arg-type]
                errors.append(float((rounded - x).float().square().mean()))
    return float(np.mean(errors)) if errors else 0.0


@contextmanager
def open_study(
    model: Any, *, prompts: Any = "calibration", advbench: Any = None, folder: str | Path | None = None, **options: Any
) -> Iterator[Study]:
    """A study that several tables share, in a ``with`` block; what is wrong is said before the model is loaded.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts, advbench
        As of each table.
    folder : str or Path, optional
        Where journals go; what is measured is kept in memory by default.
    **options
        Of :class:`~kvgeom.evaluation.config.RunConfig` (but ``journal``) and of :func:`kvgeom.load`.

    Raises
    ------
    InputError
        For an unknown option, or prompts that cannot be used.
    """
    study = Study.of(model, prompts=prompts, advbench=advbench, folder=folder, **options)
    with study.opened(), study.run.bars():
        yield study


def suites_of(prompts: Any, advbench: Any) -> dict[str, Suite]:
    """The two suites of the paper, or what stands in for them: without AdvBench, the other one."""
    custom = as_suite("custom", prompts)
    return {"custom": custom, "advbench": custom if advbench is None else as_suite("advbench", advbench)}


def described(suites: Mapping[str, Suite], used: Sequence[str]) -> str:
    """What was asked, in a sentence."""
    names = {"custom": "the paper's own set", "advbench": "AdvBench"}
    return " ".join(
        f"Asked in the place of {names[each]}: {suites[each].source}, {len(suites[each].requests)} requests."
        for each in used
    )
