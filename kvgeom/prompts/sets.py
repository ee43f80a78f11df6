"""Sets of harmful and harmless requests, and those that come with kvgeom."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from typing import Any

from kvgeom.checks import as_text, check_texts, suggests, whole
from kvgeom.errors import InputError, brief
from kvgeom.prompts.rows import CLASSES, as_request, items
from kvgeom.prompts.similar import clusters
from kvgeom.words import counted, listed


def fingerprint(harmful: Iterable[str], harmless: Iterable[str] = ()) -> str:
    """Hash of requests in their order; that of a :class:`PromptSet` that holds them."""
    return hashlib.sha256(json.dumps([[*harmful], [*harmless]]).encode()).hexdigest()[:16]


@suggests()
@dataclass(frozen=True, repr=False)
class PromptSet:
    """Requests to ask a model.

    Attributes
    ----------
    name : str
    harmful, harmless : tuple of str
        Either may be empty, and none is in both. Other collections of strings are made tuples, and blanks around a request are taken off.
    source : str
        Where they come from, and their licence if it is known.
    repeated : int
        How many requests of a file were left out because the same had come before.
    similar : int or None
        How many were left out because one in similar wording had come before; None where none was looked for
        (:meth:`distinct`).

    Raises
    ------
    InputError
        If a request is blank or not text, or both harmful and harmless; if name or source is not text, or what was
        left out is no count.
    """

    name: str
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    source: str
    repeated: int = 0
    similar: int | None = None

    def __post_init__(self) -> None:
        check_texts("a prompt set", self, "name", "source")
        for name in ("name", "source"):
            if getattr(self, name):
                as_text(f"{name} of a prompt set", getattr(self, name))
        for name in ("repeated", "similar"):
            if (count := getattr(self, name)) is not None or name == "repeated":
                object.__setattr__(self, name, whole(f"{name} of a prompt set", count))
        for name in CLASSES:
            requests = [as_request(f"{name} request {n}", each) for n, each in enumerate(items(getattr(self, name)))]
            object.__setattr__(self, name, tuple(requests))
        both = sorted({*self.harmful} & {*self.harmless})
        if both:
            raise InputError(
                f"prompt set {brief(self.name)} has {brief(both[0])} as both harmful and harmless; label each request once"
            )

    @property
    def fingerprint(self) -> str:
        """Hash of all requests in their order."""
        return fingerprint(self.harmful, self.harmless)

    @cached_property
    def clusters(self) -> tuple[int, int]:
        """How many clusters of similar wording the harmful and the harmless requests make.

        Statistics take each request for an observation of its own. Where there are fewer clusters than requests, they are
        surer of what they say than they should be; :meth:`distinct` has one request of each. A cluster has requests of
        one class: a harmful request and its harmless twin are two things.
        """
        if self.similar is not None:
            return len(self.harmful), len(self.harmless)
        harmful, harmless = (len({*clusters(requests)}) for requests in (self.harmful, self.harmless))
        return harmful, harmless

    def distinct(self) -> PromptSet:
        """The same with one request, the first, of each cluster; see :func:`kvgeom.prompts.similar.clusters`.

        Examples
        --------
        >>> PromptSet("mine", ("How do I pick a lock?", "Explain how to pick locks"), (), "own").distinct()
        <PromptSet mine: 1 harmful, 0 harmless, 1 similar request left out>
        """
        if self.similar is not None:
            return self
        harmful, harmless = _first_of_each(self.harmful), _first_of_each(self.harmless)
        left_out = len(self.harmful) + len(self.harmless) - len(harmful) - len(harmless)
        return replace(self, harmful=harmful, harmless=harmless, similar=left_out)

    def described(self) -> dict[str, Any]:
        """What a report says of it: name, source, fingerprint, requests and clusters of each class, and what was left out."""
        harmful, harmless = self.clusters
        return {
            "name": self.name,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "harmful": len(self.harmful),
            "harmless": len(self.harmless),
            "harmful_clusters": harmful,
            "harmless_clusters": harmless,
            "repeated": self.repeated,
            "similar": self.similar or 0,
        }

    @property
    def caveat(self) -> str:
        """That each request is counted by itself though some are in similar wording; empty where none are."""
        return caveat(self.described())

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return {
            "name": self.name,
            "harmful": list(self.harmful),
            "harmless": list(self.harmless),
            "source": self.source,
            "repeated": self.repeated,
            "similar": self.similar,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> PromptSet:
        """The inverse of :meth:`to_dict`."""
        return cls(
            record["name"],
            tuple(record["harmful"]),
            tuple(record["harmless"]),
            record["source"],
            record.get("repeated", 0),
            record.get("similar"),
        )

    def take(self, n: int) -> PromptSet:
        """The first ``n`` harmful and the first ``n`` harmless requests."""
        n = whole("the number of requests", n, 1)
        return replace(self, harmful=self.harmful[:n], harmless=self.harmless[:n])

    def __repr__(self) -> str:
        counts = ((self.repeated, "repeated request"), (self.similar or 0, "similar request"))
        left_out = "".join(f", {counted(count, noun)} left out" for count, noun in counts if count)
        return f"<PromptSet {self.name}: {len(self.harmful)} harmful, {len(self.harmless)} harmless{left_out}>"


def caveat(described: Mapping[str, Any]) -> str:
    """The caveat of a prompt set, from what :meth:`PromptSet.described` says of it."""
    alike = [
        f"{described[kind]} {kind} requests make {counted(described[f'{kind}_clusters'], 'cluster')} of similar wording"
        for kind in ("harmful", "harmless")
        if described[f"{kind}_clusters"] < described[kind]
    ]
    if not alike:
        return ""
    return (
        f"Prompts {described['name']}: {listed(alike)}. Each request is counted by itself, so that all intervals are narrower, "
        "and what follows from them is surer, than they should be; ask one of each cluster (--distinct)."
    )


def _first_of_each(requests: tuple[str, ...]) -> tuple[str, ...]:
    """The first request of each cluster, in their order."""
    first: dict[int, str] = {}
    for request, cluster in zip(requests, clusters(requests), strict=True):
        first.setdefault(cluster, request)
    return tuple(first.values())


def calibration() -> PromptSet:
    """The calibration set written for this project: 32 harmful requests, each with a harmless twin.

    Twins share form and length, so that what separates the classes is not grammar. Any first part of the
    list spans many categories of harm. None contains operational detail.
    """
    return _pairs("calibration")


def held_out() -> PromptSet:
    """A second set of the same make, 24 pairs and 40 more harmless requests: for what was found on other prompts.

    With 24 harmless requests no cache, however good, could be shown to keep nine in ten of them.
    """
    return _pairs("held-out")


def _pairs(name: str) -> PromptSet:
    lines = [json.loads(line) for line in _shipped(f"{name}.jsonl").splitlines()]
    return PromptSet(
        name,
        tuple(line["harmful"] for line in lines if "harmful" in line),
        tuple(line["harmless"] for line in lines),
        "written for kvgeom (Apache-2.0)",
    )


#: The sets that come with kvgeom, by the name that :func:`kvgeom.load_prompts` takes.
SHIPPED = {"calibration": calibration, "held-out": held_out}


def concept_contrasts() -> tuple[PromptSet, ...]:
    """19 contrasts that have nothing to do with safety: what a ratio must be above to be called safety-specific.

    Each is a set of twins, as the calibration set is, written for this project: the harmless requests of the calibration set,
    and the same with one change of 1 to 5 words that all twins of a contrast have in common. Eleven change what the request
    is about (music, food, sport, sea, winter, gardens, animals, toys, space, history, computers) and keep its length, eight
    how it is put (colours, numbers, named places, languages, questions, politeness, past tense, negation). The changed
    requests stand in the place of the harmful ones. All share their other side with each other and with the calibration
    set, so that safety, were it one more change of the kind, would be above all 19 in one of twenty cases.
    """
    entries = [json.loads(line) for line in _shipped("contrasts.jsonl").splitlines()]
    shared = calibration().harmless
    return tuple(
        PromptSet(name, tuple(entry[name] for entry in entries), shared, "written for kvgeom (Apache-2.0)")
        for name in entries[0]
        if name != "id"
    )


def perplexity_text() -> str:
    """Some 1,250 words of plain English on eleven subjects, written for this project; perplexity is measured on it by default."""
    return _shipped("perplexity.txt")


def _shipped(name: str) -> str:
    return files("kvgeom.prompts").joinpath("data", name).read_text(encoding="utf-8")
