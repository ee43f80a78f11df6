"""Sets of harmful and harmless requests, and those that come with kvgeom."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import combinations
from typing import Any

from kvgeom.checks import suggests, whole
from kvgeom.words import counted


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
        Either may be empty.
    source : str
        Where they come from, and their licence if it is known.
    repeated : int
        How many requests of a file were left out because the same had come before.
    """

    name: str
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    source: str
    repeated: int = 0

    @property
    def fingerprint(self) -> str:
        """Hash of all requests in their order."""
        return fingerprint(self.harmful, self.harmless)

    def described(self) -> dict[str, Any]:
        """What a report says of it: name, source and fingerprint, and how many requests of each class."""
        return {
            "name": self.name,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "harmful": len(self.harmful),
            "harmless": len(self.harmless),
        }

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return {
            "name": self.name,
            "harmful": list(self.harmful),
            "harmless": list(self.harmless),
            "source": self.source,
            "repeated": self.repeated,
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
        )

    def take(self, n: int) -> PromptSet:
        """The first ``n`` harmful and the first ``n`` harmless requests."""
        n = whole("the number of requests", n, 1)
        return replace(self, harmful=self.harmful[:n], harmless=self.harmless[:n])

    def __repr__(self) -> str:
        left_out = f", {counted(self.repeated, 'repeated request')} left out" if self.repeated else ""
        return f"<PromptSet {self.name}: {len(self.harmful)} harmful, {len(self.harmless)} harmless{left_out}>"


def calibration() -> PromptSet:
    """The calibration set written for this project: 32 harmful requests, each with a harmless twin.

    Twins share form and length, so that what separates the classes is not grammar. Any first part of the
    list spans many categories of harm. None contains operational detail.
    """
    return _pairs("calibration")


def held_out() -> PromptSet:
    """A second set of the same make, 24 pairs: for what must not be measured on the prompts that it was found on."""
    return _pairs("held-out")


def _pairs(name: str) -> PromptSet:
    lines = [json.loads(line) for line in _shipped(f"{name}.jsonl").splitlines()]
    return PromptSet(
        name,
        tuple(line["harmful"] for line in lines),
        tuple(line["harmless"] for line in lines),
        "written for kvgeom (Apache-2.0)",
    )


#: The sets that come with kvgeom, by the name that :func:`kvgeom.load_prompts` takes.
SHIPPED = {"calibration": calibration, "held-out": held_out}


def concept_contrasts() -> tuple[PromptSet, ...]:
    """Contrasts that have nothing to do with safety: what a ratio must exceed to be called safety-specific.

    Harmless requests about three topics, half of them questions and half imperatives, written for this project: each
    pair of topics is a contrast (32 against 32), and so is form (48 against 48). The two classes stand in the places
    of harmful and harmless.
    """
    topics: dict[str, list[str]] = {}
    forms: dict[str, list[str]] = {"question": [], "imperative": []}
    for line in _shipped("topics.jsonl").splitlines():
        entry = json.loads(line)
        topics.setdefault(entry["topic"], []).append(entry["request"])
        forms[entry["form"]].append(entry["request"])
    classes = [*combinations(topics.items(), 2), tuple(forms.items())]
    return tuple(
        PromptSet(f"{one} or {other}", tuple(first), tuple(second), "written for kvgeom (Apache-2.0)")
        for (one, first), (other, second) in classes
    )


def perplexity_text() -> str:
    """Some 700 words of plain English written for this project, on which perplexity is measured by default."""
    return _shipped("perplexity.txt")


def _shipped(name: str) -> str:
    return files("kvgeom.prompts").joinpath("data", name).read_text(encoding="utf-8")
