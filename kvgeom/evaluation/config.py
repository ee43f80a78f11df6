"""How responses are made and labelled: one value, built at the door from public keywords."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kvgeom import progress
from kvgeom.checks import as_path, as_seed, as_text, flag, whole
from kvgeom.errors import unknown_option
from kvgeom.judges.judge import Judge
from kvgeom.judges.registry import as_judge
from kvgeom.models.load import load, load_option_names
from kvgeom.models.model import Model
from kvgeom.prompts.sets import perplexity_text

#: Longest answer, and longest reasoning before it: what responses depend on beside model, prompt and cache.
LENGTHS = ("max_new_tokens", "max_reasoning_tokens")


@dataclass(frozen=True)
class RunConfig:
    """Everything about a run that is not the model, the prompts or the cache.

    Public functions take these as keywords (:func:`open_run`) and hand this one value on.

    Attributes
    ----------
    judge : Judge
        Labels the responses; the keyword judge by default. As a keyword, anything that
        :func:`~kvgeom.judges.registry.as_judge` takes.
    max_new_tokens : int
        Longest answer. It ends earlier where the judge reads no further.
    max_reasoning_tokens : int
        Longest reasoning before an answer, its markers included, and less where the model's context is short. Models that
        do not reason never meet it. 1,024 lets most short requests be thought through; a response that has not come to
        its answer by then is not judged, and says so.
    batch_size : int
        Most responses that are decoded together; fewer where memory is short.
    journal : Path or None
        A file that keeps all that is measured, from which an interrupted run goes on.
    text : str
        Plain text for perplexity, of which the first 2,048 tokens are read; some is shipped.
    seed : int
        Of random subspaces, channels, directions and resamples.
    progress : bool
        Whether progress bars are drawn.
    """

    judge: Judge = field(default_factory=as_judge)
    max_new_tokens: int = 24
    max_reasoning_tokens: int = 1024
    batch_size: int = 512
    journal: Path | None = None
    text: str = field(default_factory=perplexity_text, repr=False)
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        numbers = {name: whole(name, getattr(self, name), 1) for name in (*LENGTHS, "batch_size")}
        for name, value in {**numbers, "seed": as_seed(self.seed)}.items():
            object.__setattr__(self, name, value)  # an int, where a number of numpy was given
        as_text("text", self.text)
        object.__setattr__(self, "judge", as_judge(self.judge))
        object.__setattr__(self, "progress", flag("progress", self.progress))
        if self.journal is not None:
            object.__setattr__(self, "journal", as_path("journal", self.journal))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> RunConfig:
        """Build the value from keywords; those that are None stand for the default.

        Raises
        ------
        InputError
            For an unknown option, naming the nearest one.
        """
        known = {each.name for each in fields(cls)}
        for name in options:
            if name not in known:
                raise unknown_option(name, known)
        return cls(**{name: value for name, value in options.items() if value is not None})

    def options(self) -> dict[str, Any]:
        """The keywords that make this value again."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def with_journal(self, journal: Path | None) -> RunConfig:
        """The same with another journal: each is about one list of requests."""
        return replace(self, journal=journal)

    def journal_beside(self, suffix: str) -> Path | None:
        """The path of a second journal, named after the first: ``journal-harmless.jsonl``."""
        return (
            None if self.journal is None else self.journal.with_name(self.journal.stem + suffix + self.journal.suffix)
        )

    @contextmanager
    def bars(self) -> Iterator[None]:
        """Draw progress bars, or none, within a ``with`` block."""
        with progress.shown(self.progress):
            yield


#: Keywords of :func:`kvgeom.load`, and of all functions that take a model and options of it.
LOAD_OPTIONS = tuple(sorted(load_option_names()))
#: Keywords that functions take that run a model on prompts, beside their own.
RUN_OPTIONS = (*(each.name for each in fields(RunConfig)), *LOAD_OPTIONS)


def split_options(options: Mapping[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
    """Public keywords as a :class:`RunConfig` and the options of :func:`kvgeom.load`.

    Raises
    ------
    InputError
        For an option that is neither.
    """
    running = {each.name for each in fields(RunConfig)}
    loading = load_option_names()
    for name in options:
        if name not in running | loading:
            raise unknown_option(name, running | loading)
    run = RunConfig.from_options({name: value for name, value in options.items() if name in running})
    return run, {name: value for name, value in options.items() if name in loading}


def open_run(model: Any, options: Mapping[str, Any]) -> tuple[Model, RunConfig]:
    """Check the options of a public function, then load its model.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    options : mapping
        Keywords of :class:`RunConfig` and of :func:`kvgeom.load`.
    """
    run, loading = split_options(options)
    return load(model, progress=run.progress, **loading), run
