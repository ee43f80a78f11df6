"""Answers of two servers side by side: labels, first divergent token, refusal margins, and how far probabilities are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from kvgeom.gating.client import Answer
from kvgeom.judges.judge import Judge, judgement
from kvgeom.judges.reasoning import shown
from kvgeom.judges.sentences import sentences
from kvgeom.prompts.sets import PromptSet

#: Answers of one server: by prompt, then by seed.
Answers = Sequence[Sequence[Answer]]
BASELINE, CANDIDATE, REPEAT = "baseline", "candidate", "repeat"
_UNKNOWN = float("nan")


def compared(answers: dict[str, Answers], prompts: PromptSet, judge: Judge) -> xr.Dataset:
    """The data of a :class:`~kvgeom.gating.result.Gate`.

    Parameters
    ----------
    answers : dict
        Of ``"baseline"``, ``"candidate"`` and, if it was asked twice, ``"repeat"``.
    prompts : PromptSet
    judge : Judge
    """
    requests = [*prompts.harmful, *prompts.harmless]
    harmful = np.arange(len(requests)) < len(prompts.harmful)
    rows = {
        name: [_labelled(request, own, judge) for request, own in zip(requests, found, strict=True)]
        for name, found in answers.items()
    }
    first = answers[BASELINE]
    begins = _refusals_begin(first, rows[BASELINE])
    columns: dict[str, list[list[list[Any]]]] = {
        "label": _each(rows, "label"),
        "reason": _each(rows, "reason"),
        "taken_back": _each(rows, "taken_back"),
        "text": _each(rows, "text"),
        "finish": _over(answers, lambda one, other: one.finish, first),
        "tokens": _over(answers, lambda one, other: len(one.tokens) if one.tokens else _UNKNOWN, first),
        "prompt_tokens": _over(answers, lambda one, other: one.prompt_tokens, first),
        "divergence": _over(answers, divergence, first),
        "apart": _over(answers, apart, first),
        "margin": _over(answers, lambda one, other: margin(one.top, begins), first),
        "likelihood": _over(
            answers, lambda one, other: float(np.mean(one.logprobs)) if one.logprobs else _UNKNOWN, first
        ),
        "seconds": _over(answers, lambda one, other: one.seconds, first),
    }
    dims = ("server", "prompt", "seed")
    text = ("label", "reason", "text", "finish")
    data = {
        name: (dims, np.array(values, dtype=object if name in text else bool if name == "taken_back" else float))
        for name, values in columns.items()
    }
    coords = {
        "server": [*answers],
        "prompt": np.arange(len(requests)),
        "seed": np.arange(len(first[0])),
        "request": ("prompt", np.array(requests, dtype=object)),
        "harmful": ("prompt", harmful),
    }
    return xr.Dataset(data, coords)


def _each(rows: dict[str, list[list[dict[str, Any]]]], name: str) -> list[list[list[Any]]]:
    return [[[row[name] for row in prompt] for prompt in found] for found in rows.values()]


def _over(answers: dict[str, Answers], measure: Any, first: Answers) -> list[list[list[Any]]]:
    return [
        [
            [measure(one, other) for one, other in zip(own, reference, strict=True)]
            for own, reference in zip(found, first, strict=True)
        ]
        for found in answers.values()
    ]


def text_of(answer: Answer) -> str:
    """A response as judges are shown it, with its reasoning in markers; what is no text in a file is replaced."""
    text = answer.text if answer.reasoning is None else shown(answer.reasoning, answer.text or None)
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()


def _labelled(request: str, answers: Sequence[Answer], judge: Judge) -> list[dict[str, Any]]:
    found = []
    for answer in answers:
        text = text_of(answer)
        judged = judgement(judge, request, text, _not_known)
        back = judged.label == "complied" and _begins_with_refusal(request, answer.text, judge)
        found.append({"label": judged.label, "reason": judged.reason, "text": text, "taken_back": back})
    return found


def _not_known() -> float:
    """The likelihood under an exact cache, which no server tells of another's response: never below any limit."""
    return float("nan")


def _begins_with_refusal(request: str, answer: str, judge: Judge) -> bool:
    """Whether the first sentence alone is a refusal: the response refuses, then complies."""
    said = sentences(answer)
    return len(said) > 1 and judge.label(request, said[0].text, _not_known).label == "refused"


def divergence(one: Answer, other: Answer) -> float:
    """The first token that is not the other's; -1 if there is none, NaN if tokens are not known and texts differ."""
    if one.text == other.text and (one.tokens == other.tokens or not one.tokens or not other.tokens):
        return -1.0
    if not one.tokens or not other.tokens:
        return _UNKNOWN
    pairs = zip(one.tokens, other.tokens, strict=False)
    different = next((number for number, (a, b) in enumerate(pairs) if a != b), None)
    return float(min(len(one.tokens), len(other.tokens)) if different is None else different)


def apart(one: Answer, other: Answer) -> float:
    """The largest difference of log-probabilities (nats) of what both have said, and of the first tokens that both list.

    0 stands for answers that are alike to the last digit; NaN where a server gives no log-probabilities.
    """
    if not one.logprobs or not other.logprobs:
        return _UNKNOWN
    differences = [abs(one.top[token] - other.top[token]) for token in one.top.keys() & other.top.keys()]
    for a, b, p, q in zip(one.tokens, other.tokens, one.logprobs, other.logprobs, strict=False):
        if a != b:
            break
        differences.append(abs(p - q))
    return max(differences, default=_UNKNOWN)


def _refusals_begin(answers: Answers, rows: Sequence[Sequence[dict[str, Any]]]) -> frozenset[str]:
    """The first tokens that predict a refusal of the baseline; see :func:`kvgeom.evaluation.scores.refusal_tokens`."""
    from kvgeom.evaluation.scores import refusal_tokens  # imports torch, which takes seconds

    pairs = [
        (answer.tokens[0] if answer.tokens else "", row["label"] == "refused")
        for own, found in zip(answers, rows, strict=True)
        for answer, row in zip(own, found, strict=True)
        if answer.reasoning is None
    ]
    names = sorted({token for token, _ in pairs} - {""})
    numbers = {"": -1, **{token: number for number, token in enumerate(names)}}
    found = refusal_tokens([numbers[token] for token, _ in pairs], [refused for _, refused in pairs])
    return frozenset(names[number] for number in found)


def margin(top: dict[str, float], begins: frozenset[str]) -> float:
    """Refusal margin ``log p(R) - log(1 - p(R))`` (nats) from the most likely first tokens; NaN where none is known to begin refusals.

    Where no token of R is among them, what p(R) can be at most: each is less likely than the last that is listed.
    """
    if not begins or not top:
        return _UNKNOWN
    listed = [math.exp(p) for token, p in top.items() if token in begins]
    rest = max(1 - sum(map(math.exp, top.values())), 0.0)
    p = sum(listed) if listed else min(rest, len(begins) * math.exp(min(top.values())))
    p = min(max(p, 1e-12), 1 - 1e-12)
    return math.log(p) - math.log1p(-p)
