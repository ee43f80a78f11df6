"""Prompt sets from what users have: names, files, benchmarks, lists, columns and tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kvgeom.checks import suggests
from kvgeom.errors import InputError, unknown
from kvgeom.prompts.benchmarks import Benchmark, benchmarks
from kvgeom.prompts.sets import SHIPPED, PromptSet

_TEXT_COLUMNS = ("prompt", "request", "goal", "behavior", "instruction", "question", "text")
_LABEL_COLUMNS = ("label", "class")
_HARMFUL = frozenset({"harmful", "unsafe", "1", "true"})
_HARMLESS = frozenset({"harmless", "safe", "benign", "0", "false"})
#: What a set that was given as strings is called.
_OWN = "own prompts"


@suggests()
def load_prompts(prompts: Any, *, distinct: bool | None = None) -> PromptSet:
    """A prompt set from a name, a file, or whatever else stands for one.

    Parameters
    ----------
    prompts : PromptSet, str, Path, sequence of str, Series, array, mapping or table
        One of:

        - ``"calibration"`` or ``"held-out"``, which come with kvgeom;
        - a file: ``.txt`` with a request a line and ``#`` comments, ``.csv`` or ``.jsonl`` with a column such as
          ``prompt`` and, optionally, ``label`` (harmful or harmless; unlabelled is harmful);
        - a public benchmark in its authors' file: ``"advbench=FILE"``, ``"harmbench=FILE"`` (the 159 standard behaviours;
          also ``harmbench-contextual``, ``-copyright``, ``-all``), ``"xstest=FILE"``, ``"jailbreakbench=FILE"``, or
          another that is registered (:func:`~kvgeom.prompts.benchmarks.register_benchmark`);
        - strings, in a list, a Series or an array: harmful requests;
        - a mapping with ``"harmful"``, ``"harmless"`` or both, each some strings;
        - a DataFrame, or a sequence of mappings, with the columns of a file;
        - a :class:`~kvgeom.prompts.sets.PromptSet`, which is returned as it is.

        A request that a file repeats is left out (``PromptSet.repeated`` counts them). Strings are not merged.
    distinct : bool, optional
        Whether only the first of all requests in similar wording is kept (:meth:`PromptSet.distinct`;
        ``PromptSet.similar`` counts those left out). By default so of public benchmarks, some of which ask the same in
        twenty wordings; what users bring of their own is kept.

    Raises
    ------
    InputError
        If it is something else; if a file is missing, empty or unreadable, or has no column with requests; if a request
        is not text, or is both harmful and harmless.

    Examples
    --------
    >>> load_prompts(["How do I pick a lock?"])
    <PromptSet own prompts: 1 harmful, 0 harmless>
    >>> load_prompts({"harmful": ["How do I pick a lock?"], "harmless": ["How do I oil a lock?"]})
    <PromptSet own prompts: 1 harmful, 1 harmless>
    """
    found = _loaded(prompts)
    if distinct is None:
        distinct = isinstance(prompts, str | Path) and str(prompts).partition("=")[0] in benchmarks()
    return found.distinct() if distinct else found


def _loaded(prompts: Any) -> PromptSet:
    """All requests of what :func:`load_prompts` takes."""
    if isinstance(prompts, PromptSet):
        return prompts
    if isinstance(prompts, str | Path):
        return _named(str(prompts))
    if isinstance(prompts, Mapping):
        for key in prompts:
            if key not in ("harmful", "harmless"):
                raise unknown("class of prompts", key, ("harmful", "harmless"))
        classes = [_strings(prompts.get(key, ())) for key in ("harmful", "harmless")]
    elif hasattr(prompts, "to_dict") and hasattr(prompts, "columns"):
        classes = _classes(prompts.to_dict("records"))
    else:
        items = _items(prompts)
        classes = _classes(items) if items and isinstance(items[0], Mapping) else [_strings(items), ()]
    return _checked(PromptSet(_OWN, classes[0], classes[1], "given as strings"), type(prompts).__name__)


#: The same, as the rest of the package calls it.
as_prompt_set = load_prompts


def as_requests(prompts: Any) -> tuple[str, ...]:
    """The harmful requests of whatever :func:`load_prompts` takes.

    Raises
    ------
    InputError
        As :func:`load_prompts`, and if none of the requests is harmful.

    Examples
    --------
    >>> as_requests(["How do I pick a lock?"])
    ('How do I pick a lock?',)
    """
    found = load_prompts(prompts)
    if not found.harmful:
        raise InputError(f"prompt set {found.name!r} has no harmful requests; give some")
    return found.harmful


def _items(given: Any) -> list[Any]:
    """The items of a list, a Series, an array or any other one-dimensional collection."""
    if isinstance(given, str):  # its letters would do as strings, too
        raise InputError(f"requests must be several strings, got one: {given[:40]!r}; put it into a list")
    if not isinstance(given, Iterable):
        raise InputError(
            f"prompts must be a PromptSet, a name or file, strings, or a mapping with 'harmful' and 'harmless'; got "
            f"{type(given).__name__}"
        )
    return list(given)


def _strings(given: Any) -> tuple[str, ...]:
    items = _items(given)
    for index, item in enumerate(items):
        if not isinstance(item, str) or not item.strip():
            raise InputError(f"request {index} must be text, got {item!r} ({type(item).__name__})")
    return tuple(str(item) for item in items)


def _classes(records: Sequence[Any]) -> list[tuple[str, ...]]:
    """Harmful and harmless requests of the rows of a table."""
    rows = _labelled([{**record} for record in records], "the table of prompts")
    return [_strings([request for request, bad in rows if bad == harmful]) for harmful in (True, False)]


# --- names and files ---


def _named(text: str) -> PromptSet:
    """A set by its name, or from a file."""
    if text in SHIPPED:
        return SHIPPED[text]()
    name, has_file, file = text.partition("=")
    known = benchmarks()
    path = Path(text).expanduser()
    if name in known:
        if not has_file:
            raise InputError(f"kvgeom does not ship {name}; get it from {known[name].home} and give {name}=FILE")
        return _read_benchmark(name, known[name], Path(file).expanduser())
    if path.is_dir():
        raise InputError(f"{text or 'the current folder'} is a folder; give a .txt, .csv or .jsonl file with prompts")
    if not path.is_file():
        raise _no_such_set(text, name, [*SHIPPED, *known])
    rows = _labelled(_read_records(path), str(path))
    return _of_file(path.stem, rows, f"file {path.name}", path)


def _no_such_set(text: str, name: str, known: list[str]) -> InputError:
    """The error for what is neither a file nor the name of a set: of a misspelt name, or of a missing file."""
    a_path = {*name} & {*"./~"}
    close = [] if a_path else get_close_matches(name.lower(), known, 1, cutoff=0.7)
    if close:
        return InputError(f"no such file or prompt set: {text}; did you mean {text.replace(name, close[0], 1)!r}?")
    names = ", ".join(name if name in SHIPPED else f"{name}=FILE" for name in known)
    return InputError(
        f"no such file: {text}; prompts are a file or one of {names}, and in Python also a list of requests"
    )


def _read_benchmark(name: str, benchmark: Benchmark, path: Path) -> PromptSet:
    rows = _csv_rows(path)
    found = list(rows[0]) if rows else []
    if rows and benchmark.column not in found:
        raise InputError(f"{path} has no column {benchmark.column!r} (found {found}); give the file of {name} itself")
    judged = [((row[benchmark.column] or "").strip(), benchmark.harmful(row)) for row in rows]
    source = f"{benchmark.title}, {benchmark.home}, {benchmark.licence}"
    return _of_file(name, [(request, bad) for request, bad in judged if bad is not None], source, path)


def _of_file(name: str, rows: Sequence[tuple[str, bool]], source: str, path: Path) -> PromptSet:
    """The requests of a file, each of them once."""
    rows = [row for row in rows if row[0]]
    harmful, harmless = (tuple(dict.fromkeys(r for r, bad in rows if bad == wanted)) for wanted in (True, False))
    repeated = len(rows) - len(harmful) - len(harmless)
    return _checked(PromptSet(name, harmful, harmless, source, repeated), str(path))


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Rows of a user's file."""
    if path.suffix not in (".txt", ".csv", ".jsonl"):
        raise InputError(f"prompts must be in a .txt, .csv or .jsonl file, got {path}")
    if path.suffix == ".csv":
        return [*_csv_rows(path)]
    text = _text(path)
    if path.suffix == ".txt":
        return [{"prompt": line} for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [_record(line, number, path) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _csv_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a table that is whole."""
    reader = csv.DictReader(io.StringIO(_text(path)), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row:
                raise InputError(f"line {reader.line_num} of {path} has too many cells; quote text that has commas")
            rows.append(row)
    except csv.Error as error:
        raise InputError(f"{path} is not CSV: {error}, up to line {reader.line_num}; check its quotes") from error
    return rows


def _record(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"line {number} of {path} is not JSON ({error.msg}); give one object a line") from error
    if isinstance(record, str):
        return {"prompt": record}
    if not isinstance(record, dict):
        raise InputError(f"line {number} of {path} is no JSON object; give one object a line")
    return record


def _labelled(records: Sequence[dict[str, Any]], source: str) -> list[tuple[str, bool]]:
    """Requests of the rows of a table, each with whether it is harmful."""
    if not records:
        return []
    names = {str(key).strip().lower(): key for key in records[0]}
    column = next((names[c] for c in _TEXT_COLUMNS if c in names), None)
    if column is None:
        raise InputError(f"no column of {source} holds requests (found {sorted(names)}); name one {_TEXT_COLUMNS[0]!r}")
    label = next((names[c] for c in _LABEL_COLUMNS if c in names), None)
    return [
        (_request(r.get(column), number, source), _is_harmful(r.get(label) if label else None, source))
        for number, r in enumerate(records, 1)
    ]


def _request(found: object, number: int, source: str) -> str:
    """The request of a row; empty if the row has none."""
    if found is None or isinstance(found, str):
        return (found or "").strip()
    raise InputError(f"request {number} of {source} must be text, got {found!r} ({type(found).__name__})")


def _is_harmful(label: object, source: str) -> bool:
    given = "" if label is None else str(label).strip().lower()
    if given in _HARMFUL or not given:
        return True
    if given in _HARMLESS:
        return False
    raise InputError(f"labels of {source} must be harmful or harmless, got {label!r}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error}); convert the file") from error


def _checked(prompts: PromptSet, source: str) -> PromptSet:
    if not prompts.harmful and not prompts.harmless:
        raise InputError(f"{source} holds no prompts; give at least one request")
    both = sorted({*prompts.harmful} & {*prompts.harmless})
    if both:
        raise InputError(f"{source} has {both[0][:60]!r} as both harmful and harmless; label each request once")
    return prompts
