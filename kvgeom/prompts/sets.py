"""Sets of harmful and harmless requests, and where they come from."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import combinations
from pathlib import Path

from kvgeom.errors import InputError

_TEXT_COLUMNS = ("prompt", "request", "goal", "behavior", "instruction", "question", "text")
_LABEL_COLUMNS = ("label", "class")
_HARMFUL = frozenset({"harmful", "unsafe", "1", "true"})
_HARMLESS = frozenset({"harmless", "safe", "benign", "0", "false"})


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
    """

    name: str
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    source: str

    @property
    def fingerprint(self) -> str:
        """Hash of all requests in their order."""
        return hashlib.sha256(json.dumps([self.harmful, self.harmless]).encode()).hexdigest()[:16]

    def take(self, n: int) -> PromptSet:
        """The first ``n`` harmful and the first ``n`` harmless requests."""
        if n < 1:
            raise InputError(f"{n} requests were asked; take at least one")
        return PromptSet(self.name, self.harmful[:n], self.harmless[:n], self.source)

    def __repr__(self) -> str:
        return f"<PromptSet {self.name}: {len(self.harmful)} harmful, {len(self.harmless)} harmless>"


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


@dataclass(frozen=True)
class Benchmark:
    """How a public benchmark's own file is read.

    Attributes
    ----------
    title, home, licence : str
    column : str
        Which column holds the request.
    harmful : callable (row) -> bool or None
        True, False, or None for a row that the chosen subset leaves out.
    """

    title: str
    home: str
    licence: str
    column: str
    harmful: Callable[[Mapping[str, str]], bool | None]


def _harmbench(subset: str) -> Benchmark:
    return Benchmark(
        f"HarmBench ({subset})",
        "github.com/centerforaisafety/HarmBench (harmbench_behaviors_text_all.csv)",
        "MIT",
        "Behavior",
        lambda row: True if subset in ("all", row.get("FunctionalCategory")) else None,
    )


def _jailbreakbench(split: str) -> Benchmark:
    return Benchmark(
        f"JailbreakBench ({split} behaviours)",
        f"huggingface.co/datasets/JailbreakBench/JBB-Behaviors ({split}-behaviors.csv)",
        "MIT",
        "Goal",
        lambda row: split == "harmful",
    )


BENCHMARKS: dict[str, Benchmark] = {
    "advbench": Benchmark(
        "AdvBench", "github.com/llm-attacks/llm-attacks (harmful_behaviors.csv)", "MIT", "goal", lambda row: True
    ),
    # Standard behaviours are plain requests; contextual ones need their context, copyright ones test memory.
    "harmbench": _harmbench("standard"),
    "harmbench-contextual": _harmbench("contextual"),
    "harmbench-copyright": _harmbench("copyright"),
    "harmbench-all": _harmbench("all"),
    "xstest": Benchmark(
        "XSTest",
        "github.com/paul-rottger/xstest (xstest_prompts.csv)",
        "CC-BY-4.0",
        "prompt",
        lambda row: row.get("label", "").strip().lower() == "unsafe",
    ),
    # The two files have the same columns; which one it is, the user says.
    "jailbreakbench": _jailbreakbench("harmful"),
    "jailbreakbench-benign": _jailbreakbench("benign"),
}


def load_prompts(spec: str | Path) -> PromptSet:
    """Read a prompt set.

    Parameters
    ----------
    spec : str or Path
        ``"calibration"`` or ``"held-out"``, the two sets that are shipped; a file of your own (``.txt`` with a request
        a line and ``#`` comments, ``.csv`` or ``.jsonl`` with a column such as ``prompt`` and, if you like, ``label``:
        harmful or harmless; unlabelled is harmful); or a public benchmark in its authors' file: ``"advbench=FILE"``,
        ``"harmbench=FILE"`` (the 159 standard behaviours; also ``harmbench-contextual``, ``-copyright``, ``-all``),
        ``"xstest=FILE"``, ``"jailbreakbench=FILE"``. kvgeom does not fetch benchmarks.

    Raises
    ------
    InputError
        If the file is missing, empty, unreadable, or has no column with requests.
    """
    text = str(spec)
    if text in ("calibration", "held-out"):
        return _pairs(text)
    name, has_file, file = text.partition("=")
    if name in BENCHMARKS:
        benchmark = BENCHMARKS[name]
        if not has_file:
            raise InputError(
                f"{name} was asked, but kvgeom does not carry it; get it from {benchmark.home} and give {name}=FILE"
            )
        return _read_benchmark(name, benchmark, Path(file).expanduser())
    path = Path(text).expanduser()
    if not path.is_file():
        names = ", ".join(("calibration", "held-out", *(f"{n}=FILE" for n in BENCHMARKS)))
        raise InputError(f"prompts {text} were asked, but there is no such file; give a file or one of: {names}")
    rows = _read_rows(path)
    harmful = _unique(request for request, bad in rows if bad)
    harmless = _unique(request for request, bad in rows if not bad)
    return _checked(PromptSet(path.stem, harmful, harmless, f"file {path.name}"), path)


def _read_benchmark(name: str, benchmark: Benchmark, path: Path) -> PromptSet:
    rows = list(csv.DictReader(io.StringIO(_text(path))))
    found = list(rows[0]) if rows else []
    if rows and benchmark.column not in found:
        raise InputError(
            f"{path} was asked as {name}, but it has no column {benchmark.column!r} (found {found}); give its own file"
        )
    judged = [(row[benchmark.column].strip(), benchmark.harmful(row)) for row in rows]
    harmful = _unique(request for request, bad in judged if bad is True)
    harmless = _unique(request for request, bad in judged if bad is False)
    return _checked(
        PromptSet(name, harmful, harmless, f"{benchmark.title}, {benchmark.home}, {benchmark.licence}"), path
    )


def _read_rows(path: Path) -> list[tuple[str, bool]]:
    """Requests of a user's file, each with whether it is harmful."""
    text = _text(path)
    if path.suffix == ".txt":
        return [(line.strip(), True) for line in text.splitlines() if not line.lstrip().startswith("#")]
    if path.suffix == ".csv":
        records: list[dict[str, object]] = [dict(row) for row in csv.DictReader(io.StringIO(text))]
    elif path.suffix == ".jsonl":
        records = [_record(line, number, path) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        raise InputError(
            f"prompts {path} were asked, but {path.suffix or 'no suffix'} is not read; give .txt, .csv or .jsonl"
        )
    if not records:
        return []
    names = {str(key).strip().lower(): key for key in records[0]}
    column = next((names[c] for c in _TEXT_COLUMNS if c in names), None)
    if column is None:
        raise InputError(
            f"prompts {path} were asked, but no column holds requests (found {sorted(names)}); name one {_TEXT_COLUMNS[0]!r}"
        )
    label = next((names[c] for c in _LABEL_COLUMNS if c in names), None)
    return [(str(r.get(column) or "").strip(), _is_harmful(r.get(label) if label else None, path)) for r in records]


def _record(line: str, number: int, path: Path) -> dict[str, object]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"prompts {path} were asked, but line {number} is not JSON ({error.msg}); give one object a line"
        ) from error
    if isinstance(record, str):
        return {"prompt": record}
    if not isinstance(record, dict):
        raise InputError(f"prompts {path} were asked, but line {number} is no JSON object; give one object a line")
    return record


def _is_harmful(label: object, path: Path) -> bool:
    said = "" if label is None else str(label).strip().lower()
    if said in _HARMFUL or not said:
        return True
    if said in _HARMLESS:
        return False
    raise InputError(
        f"prompts {path} were asked, but label {label!r} is neither harmful nor harmless; use these two words"
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"prompts {path} were asked, but there is no such file; give a file that exists") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"prompts {path} were asked, but they cannot be read as UTF-8 text ({error}); convert the file"
        ) from error


def _checked(prompts: PromptSet, path: Path) -> PromptSet:
    if not prompts.harmful and not prompts.harmless:
        raise InputError(f"prompts {path} were asked, but the file holds no request; give one request a line or row")
    return prompts


def _unique(requests: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(request for request in requests if request))


def _shipped(name: str) -> str:
    return files("kvgeom.prompts").joinpath("data", name).read_text(encoding="utf-8")
