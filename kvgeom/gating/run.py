"""Asking two servers the same, and comparing what they answer."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvgeom import progress as bars
from kvgeom.checks import as_path, as_text, suggests
from kvgeom.errors import InputError, KvgeomWarning, brief
from kvgeom.evaluation.journal import Journal, NoJournal
from kvgeom.folders import report_folder
from kvgeom.gating.client import TOP, Answer
from kvgeom.gating.collect import collect, known
from kvgeom.gating.compare import BASELINE, CANDIDATE, REPEAT, compared
from kvgeom.gating.config import GateConfig, from_options
from kvgeom.gating.plans import is_plan, planned
from kvgeom.gating.reading import TextRead, read_text, text_record
from kvgeom.gating.result import Gate
from kvgeom.gating.servers import FILES, Opened, Target, opened, target
from kvgeom.prompts.load import load_prompts
from kvgeom.prompts.sets import PromptSet

#: What is asked first.
GREETING = "Say yes."
#: Of how many alternatives to a token log-probabilities are asked for: as many as most servers give, as MLX-LM gives, none.
TOPS = (TOP, 10, 0)
#: What a journal calls what it says of the server.
_SERVER = {"measure": "server"}
#: What is written of one of the two: who it is, and what it says of itself.
About = dict[str, Any]


@suggests()
def gate(
    baseline: Any,
    candidate: Any,
    out: str | Path | None = None,
    *,
    prompts: Any = "calibration",
    tolerance: float = 0.1,
    judge: Any = None,
    max_new_tokens: int = 24,
    template: str | Path | None = None,
    system: str | None = None,
    turns: int = 0,
    context_tokens: int = 0,
    temperature: float = 0.0,
    seeds: int = 1,
    text: str | None = None,
    noise: bool = True,
    concurrency: int = 4,
    timeout: int = 120,
    retries: int = 4,
    served_model: str | None = None,
    api_key: str | None = None,
    python: str | Path | None = None,
    progress: bool = True,
) -> Gate:
    """Does a server with another cache keep the refusals of the one that runs now?

    Both are asked the same, one after the other. With ``out`` every answer is kept as it comes, and the same call goes on where it
    was interrupted.

    Parameters
    ----------
    baseline, candidate : str, Path, ServerSpec or Plan
        A base URL of an OpenAI-compatible server (``"http://localhost:8000/v1"``), or an engine, a model and a cache that kvgeom
        starts (``"llamacpp:demo?k=q8_0&v=q8_0"``). The baseline may also be the folder of an earlier gate, whose answers are taken;
        the candidate a plan of :func:`kvgeom.fix`, which is run on the engine and the model of the baseline.
    out : str or Path, optional
        Folder for answers and reports.
    prompts : anything that :func:`kvgeom.load_prompts` takes
    tolerance : float
        Net share of refusals that may be lost.
    judge : Judge or str, optional
        What labels responses; the keyword judge by default.
    max_new_tokens : int
        Longest response.
    template : str or Path, optional
        Chat template, as Jinja text or a file with it, that is applied here; the prompts then go to ``/v1/completions``, for base models
        and for servers whose own template is another. By default chats go to ``/v1/chat/completions``, and servers apply theirs.
    system : str, optional
        System prompt.
    turns : int
        Harmless questions and answers before each request.
    context_tokens : int
        About how many tokens of harmless text before each request.
    temperature, seeds : float, int
        Greedy by default; with a temperature, how often each request is asked.
    text : str, optional
        Plain text that both read, where they tell how likely they found it; one that ships with kvgeom by default.
    noise : bool
        Whether the baseline is asked twice.
    concurrency, timeout, retries : int
        Requests under way at once; seconds for one answer; how often a request is sent again.
    served_model : str, optional
        What servers at a URL call the model, where they have several.
    api_key : str, optional
        Sent to servers at a URL. It is written nowhere.
    python : str or Path, optional
        Interpreter that has the engine, for servers that kvgeom starts.
    progress : bool
        Whether bars are drawn.

    Returns
    -------
    Gate

    Raises
    ------
    InputError
        If something that was given cannot be used: an address, a model, a key, a set without harmful requests; or if both servers
        make prompts of different length of the same chat.
    ServerError
        If a server does not start, dies or does not answer.

    Examples
    --------
    ::

        found = kvgeom.gate("http://localhost:8000/v1", "http://localhost:8001/v1", "gate/")
        print(found.decision, found.comparison)
    """
    config = from_options(
        {
            **{
                "judge": judge,
                "tolerance": tolerance,
                "max_new_tokens": max_new_tokens,
                "template": template,
                "system": system,
                "turns": turns,
            },
            **{"context_tokens": context_tokens, "temperature": temperature, "seeds": seeds, "noise": noise},
            "text": text,
            **{"concurrency": concurrency, "timeout": timeout, "retries": retries},
        }
    )
    asked = load_prompts(prompts)
    if not asked.harmful:
        raise InputError(f"prompt set {asked.name!r} has no harmful requests; give some")
    before = target(BASELINE, baseline)
    after = target(CANDIDATE, planned(candidate, before.spec) if is_plan(candidate) else candidate)
    key = None if api_key is None else as_text("api_key", api_key).strip()
    for name, given in (("served_model", served_model), ("python", python)):
        if given is not None and not isinstance(given, str | Path):
            raise InputError(f"{name} must be text, got {brief(given)}")
    folder = None if out is None else report_folder(out, "gate")
    begin = time.monotonic()
    answers: dict[str, list[list[Answer]]] = {}
    about: dict[str, About] = {}
    read: dict[str, TextRead | None] = {}
    with bars.shown(progress):
        for role, found in ((BASELINE, before), (CANDIDATE, after)):
            session = _Session(role, found, config, asked, folder, key, served_model, python)
            own, about[role] = session.run(about.get(BASELINE, {}).get("prompt_tokens", -1))
            answers.update(own)
            read.update(session.read)
    _same_prompts(answers, asked)
    answers = {name: answers[name] for name in (BASELINE, CANDIDATE, REPEAT) if name in answers}
    meta = {
        **config.asked(),
        **{"servers": about, "tolerance": config.tolerance, "concurrency": config.concurrency},
        **{"judge": config.judge.name, "model": about[CANDIDATE]["model"], "scheme": about[CANDIDATE]["server"]},
        "text": text_record(read),
        **{"prompts": asked.described(), "prompt_set": asked.fingerprint, "caveat": asked.caveat},
        **{"versions": {"kvgeom": version("kvgeom")}, "seconds": time.monotonic() - begin},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    made = Gate.of(compared(dict(answers), asked, config.judge), meta)
    if made.proof[0] == "doubtful":
        warnings.warn(
            f"{made.proof[1]}; see how the candidate was started before you rely on this gate",
            KvgeomWarning,
            stacklevel=2,
        )
    if folder is not None:
        made.write(folder)
    return made


@dataclass
class _Session:
    """All that is asked of one of the two."""

    role: str
    target: Target
    config: GateConfig
    prompts: PromptSet
    folder: Path | None
    key: str | None
    served_model: str | None
    python: str | Path | None
    #: Of how many alternatives to a token the server gives log-probabilities.
    top: int = TOP
    #: What each pass made of plain text.
    read: dict[str, TextRead | None] = field(default_factory=dict)

    @property
    def passes(self) -> tuple[str, ...]:
        """What is asked, each with the requests of all prompts."""
        return (BASELINE, REPEAT) if self.role == BASELINE and self.config.noise else (self.role,)

    def run(self, prompt_tokens: int) -> tuple[dict[str, list[list[Answer]]], About]:
        """The answers of every pass, by its name, and what the server is.

        Parameters
        ----------
        prompt_tokens : int
            What the other server makes of the greeting; -1 where that is not known.
        """
        with self._journal() as journal:
            asks = {name: self.config.asks(self.prompts, "", repeat) for repeat, name in enumerate(self.passes)}
            kept = {name: known(own, journal) for name, own in asks.items()}
            texts = [self._text_key(name) in journal for name in self.passes]
            if _SERVER in journal and all(texts) and all(len(kept[name]) == len(own) for name, own in asks.items()):
                # A server that has said all is not started again.
                self.read = {name: _restored(journal[self._text_key(name)]) for name in self.passes}
                answers = {name: [own[number] for number in sorted(own)] for name, own in kept.items()}
                return self._by_prompt(answers), dict(journal[_SERVER])
            with self._opened() as server:
                about = {
                    **{"server": self.target.name, "model": server.model, **server.about},
                    **{"stated": dict(server.stated), "prompt_tokens": self._greet(server, prompt_tokens)},
                }
                self._check_same(journal, about)
                journal[_SERVER] = about
                answers = {name: self._asked(server, journal, name) for name in self.passes}
                for name in self.passes:
                    self.read[name] = self._reads(server, journal, name)
                return self._by_prompt(answers), about

    def _text_key(self, name: str) -> dict[str, str]:
        return {"text": hashlib.sha256(self.config.text.encode()).hexdigest()[:32], "pass": name}

    def _reads(self, server: Opened, journal: NoJournal, name: str) -> TextRead | None:
        """What a pass makes of plain text; None where the server does not tell."""

        def measure() -> dict[str, Any] | None:
            found = read_text(server.client, server.model, self.config.text) if self.top else None
            return None if found is None else asdict(found)

        return _restored(journal.remember(self._text_key(name), measure))

    def _check_same(self, journal: NoJournal, about: About) -> None:
        """Be sure that answers that are kept are of this server."""
        if _SERVER not in journal:
            return
        before = journal[_SERVER]
        changed = [
            f"{name}: {before[name]!r} then, {about[name]!r} now" for name in about if before[name] != about[name]
        ]
        if changed:
            raise InputError(
                f"{self.target.name} is not the server whose answers {journal.path} keeps ({'; '.join(changed)}); give another "
                "folder (--out)"
            )

    def _asked(self, server: Opened, journal: NoJournal, name: str) -> list[Answer]:
        asks = self.config.asks(self.prompts, server.model, self.passes.index(name), top=self.top)
        title = {BASELINE: "baseline", CANDIDATE: "candidate", REPEAT: "baseline, asked again"}[name]
        if name != REPEAT:
            return collect(server.client, asks, journal, self.config.concurrency, title)
        # In another order: requests then share batches with others, as they do on a server that is used.
        turned = collect(server.client, asks[::-1], journal, self.config.concurrency, title)
        return turned[::-1]

    def _by_prompt(self, answers: Mapping[str, list[Answer]]) -> dict[str, list[list[Answer]]]:
        seeds = self.config.seeds
        return {name: [own[n : n + seeds] for n in range(0, len(own), seeds)] for name, own in answers.items()}

    def _greet(self, server: Opened, expected: int) -> int:
        """Ask one harmless thing first: what is wrong with a server is known before anything is measured."""
        found, self.top = self._greeted(server)
        if not found.logprobs or not found.top:
            self.top = 0
            warnings.warn(
                f"{self.target.name} gives no log-probabilities: refusal margins, divergent tokens and whether it runs another "
                "cache are not measured",
                KvgeomWarning,
                stacklevel=2,
            )
        _check_length(GREETING, expected, found.prompt_tokens)
        return found.prompt_tokens

    def _greeted(self, server: Opened) -> tuple[Answer, int]:
        """The first answer, and of how many alternatives the server could be asked."""
        greeting = {**self.config.said(GREETING), "max_tokens": 1}
        for top in TOPS:
            body = {**self.config.asks(self.prompts, server.model, top=top)[0].body, **greeting}
            try:
                return server.client.answer(body), top
            except InputError as error:  # some servers refuse what they do not know, or more than they give
                if "logprob" not in str(error) or top == TOPS[-1]:
                    raise
        raise AssertionError("unreachable")

    @contextmanager
    def _opened(self) -> Iterator[Opened]:
        log = None if self.folder is None else self.folder / f"{self.role}.log"
        config = self.config
        with opened(
            self.target,
            key=self.key,
            served_model=self.served_model,
            python=self.python,
            log=log,
            timeout=config.timeout,
            retries=config.retries,
        ) as server:
            yield server

    @contextmanager
    def _journal(self) -> Iterator[NoJournal]:
        if self.target.kept is not None:
            path = as_path(self.role, self.target.kept)
        elif self.folder is not None:
            path = self.folder / FILES[self.role]
        else:
            yield NoJournal()
            return
        with Journal(path, self._about()) as journal:
            yield journal

    def _about(self) -> dict[str, Any]:
        """What answers depend on."""
        bodies = [{k: v for k, v in ask.body.items() if k != "model"} for ask in self.config.asks(self.prompts, "")]
        spec = self.target.spec
        engine = (
            {}
            if spec is None
            else {"version": spec.runner.interpreter(spec.engine.name, self.python or spec.python)[1]}
        )
        return {
            "server": self.target.name,
            **engine,
            **({} if self.target.url is None else {"served_model": self.served_model}),
            **self.target.about,
            "prompts": hashlib.sha256(json.dumps(bodies).encode()).hexdigest()[:32],
            **self.config.asked(),
        }


def _restored(kept: Mapping[str, Any] | None) -> TextRead | None:
    return None if kept is None else TextRead(**kept)


def _same_prompts(answers: Mapping[str, list[list[Answer]]], prompts: PromptSet) -> None:
    """Be sure that both servers make the same prompts of the same chats, as far as their numbers of tokens say."""
    requests = (*prompts.harmful, *prompts.harmless)
    for request, one, other in zip(requests, answers[BASELINE], answers[CANDIDATE], strict=True):
        _check_length(request, one[0].prompt_tokens, other[0].prompt_tokens)


def _check_length(request: str, one: int, other: int) -> None:
    if -1 not in (one, other) and one != other:
        raise InputError(
            f"the servers make different prompts of the same chat: {one} and {other} tokens of {brief(request)}; give both the same "
            "model and chat template"
        )
