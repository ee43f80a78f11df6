"""Plain text that both servers read, where they tell how likely they found it: perplexity, KL divergence and agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvgeom.errors import InputError, ServerError
from kvgeom.evaluation.fidelity import PASSAGE, TOKENS, Reading, TextFidelity, fidelity_columns
from kvgeom.gating.client import TOP, Client
from kvgeom.gating.compare import BASELINE

#: A text that is longer than a server's context is halved so often.
_HALVED = 3
#: Least tokens that two blocks can be made of.
_FEWEST = 4


@dataclass(frozen=True)
class TextRead:
    """How likely a server found the tokens of a text; JSON types, as a journal keeps it.

    Attributes
    ----------
    tokens : list of str
        Those that were predicted: all but the first.
    logprobs : list of float
        Log-probability of each (nats).
    top : list of dict of str to float
        The tokens that were most likely in its place, with their log-probabilities.
    """

    tokens: list[str]
    logprobs: list[float]
    top: list[dict[str, float]]


def read_text(client: Client, model: str, text: str) -> TextRead | None:
    """Let a server read a text as the prompt of a completion (``echo``); None where it does not tell what it expected.

    As much of the text is read as the server takes: all of it, or the first half, quarter or eighth.
    """
    for part in range(_HALVED + 1):
        begin = text[: len(text) >> part]
        body = {
            **{"model": model, "prompt": begin, "max_tokens": 1, "temperature": 0.0},
            **{"echo": True, "logprobs": TOP},
        }
        try:
            found = client.completion(body)
        except InputError:  # another path, an option that it does not know, or a text that is too long
            continue
        except ServerError:  # it has answered all requests before this one
            return None
        return _kept(found, begin)
    return None


def _kept(found: object, text: str) -> TextRead | None:
    """The part of a completion that is the text, if it has one."""
    try:
        said = found["choices"][0]["logprobs"]  # type: ignore[index]
        tokens = [str(token) for token in said["tokens"]][:TOKENS]
        logprobs = [math.nan if value is None else float(value) for value in said["token_logprobs"]][:TOKENS]
        top = [{str(token): float(value) for token, value in (each or {}).items()} for each in said["top_logprobs"]][
            :TOKENS
        ]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None
    predicted = [n for n, value in enumerate(logprobs) if math.isfinite(value) and top[n]]
    # Servers that ignore "echo" tell of the token alone that they have written.
    if len(predicted) < _FEWEST or tokens[1] not in text:
        return None
    return TextRead([tokens[n] for n in predicted], [logprobs[n] for n in predicted], [top[n] for n in predicted])


def compared_text(baseline: TextRead | None, candidate: TextRead | None) -> TextFidelity | None:
    """What the candidate makes of the text beside the baseline; None where one of them tells nothing, or they read other tokens.

    Of the distributions only the likeliest tokens are known. The divergence is that of these and of all others taken
    together, which is never more than the whole one (data processing inequality): it is at least so large.
    """
    if baseline is None or candidate is None:
        return None
    count = min(len(baseline.tokens), len(candidate.tokens))
    if baseline.tokens[:count] != candidate.tokens[:count]:
        return None
    pairs = list(zip(baseline.top[:count], candidate.top[:count], strict=True))
    kl = [least_divergence(one, other) for one, other in pairs]
    same = [max(one, key=one.__getitem__) == max(other, key=other.__getitem__) for one, other in pairs]
    lengths = [len(part) for part in np.array_split(np.arange(count), math.ceil(count / PASSAGE))]
    before, after = (Reading.of(-np.array(each.logprobs[:count]), kl, same, lengths) for each in (baseline, candidate))
    return after.against(before)


def text_record(read: Mapping[str, TextRead | None]) -> dict[str, Any]:
    """For ``meta`` of a gate: ``tokens`` that both have read, and how each but the baseline did, beside it."""
    before = read.get(BASELINE)
    others = {name: compared_text(before, after) for name, after in read.items() if name != BASELINE}
    known = {name: fidelity_columns([found]) for name, found in others.items() if found is not None}
    return {"tokens": len(before.tokens) if before and known else 0, **known}


def least_divergence(one: dict[str, float], other: dict[str, float]) -> float:
    """Least Kullback-Leibler divergence (nats) of two distributions of which only some log-probabilities are known.

    Examples
    --------
    >>> round(least_divergence({"a": -0.5}, {"a": -0.5}), 6)
    0.0
    >>> least_divergence({"a": -0.1, "b": -3.0}, {"a": -1.0, "b": -1.0}) > 0.5
    True
    """
    shared = sorted(one.keys() & other.keys())
    p, q = (np.exp([each[token] for token in shared]) for each in (one, other))
    p, q = (np.append(each, max(1.0 - each.sum(), 0.0)) for each in (p, q))
    known = (p > 0) & (q > 0)
    # A rest that is nothing but rounding for one of them tells nothing.
    return float(max((p[known] * np.log(p[known] / q[known])).sum(), 0.0))
