"""Prompt sets from what users have: names, files, benchmarks, lists, columns and tables."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from contextlib import closing
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kvgeom.checks import as_path, flag, suggests
from kvgeom.errors import InputError, brief, reason, unknown
from kvgeom.prompts.benchmarks import Benchmark, benchmarks
from kvgeom.prompts.files import SUFFIXES, read_rows, read_table
from kvgeom.prompts.rows import CLASSES, Row, as_request, items, labelled, of_class
from kvgeom.prompts.sets import SHIPPED, PromptSet

#: Members of tables of pandas, polars and Hugging Face.
_OF_TABLES = ("columns", "column_names")
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
        - a file: ``.txt`` with a request a line and ``#`` comments; ``.csv``, ``.tsv``, ``.json`` (a list) or ``.jsonl``
          with a column such as ``prompt`` and, optionally, ``label`` (harmful or harmless; unlabelled is harmful);
        - a public benchmark in its authors' file: ``"advbench=FILE"``, ``"harmbench=FILE"`` (the 159 standard behaviours;
          also ``harmbench-contextual``, ``-copyright``, ``-all``), ``"xstest=FILE"``, ``"jailbreakbench=FILE"``, or
          another that is registered (:func:`~kvgeom.prompts.benchmarks.register_benchmark`);
        - strings, in a list, a Series, an array or a column of a dataset: harmful requests;
        - a mapping with ``"harmful"``, ``"harmless"`` or both, each some strings;
        - a DataFrame, a dataset of Hugging Face, or a sequence of mappings, with the columns of a file;
        - a :class:`~kvgeom.prompts.sets.PromptSet`, which is returned as it is.

        A request may be given as chat messages with one user turn. A request that a file repeats is left out
        (``PromptSet.repeated`` counts them). Strings are not merged. docs/prompts.md has the details.
    distinct : bool, optional
        Whether only the first of all requests in similar wording is kept (:meth:`PromptSet.distinct`;
        ``PromptSet.similar`` counts those left out). By default so of public benchmarks, some of which ask the same in
        twenty wordings; what users bring of their own is kept.

    Raises
    ------
    InputError
        If it is something else; if a file is missing, empty, unreadable or too large; if a row has no request, several,
        or more than would be asked; if a request is not text, or is both harmful and harmless. It names file and line.

    Examples
    --------
    >>> load_prompts(["How do I pick a lock?"])
    <PromptSet own prompts: 1 harmful, 0 harmless>
    >>> load_prompts({"harmful": ["How do I pick a lock?"], "harmless": ["How do I oil a lock?"]})
    <PromptSet own prompts: 1 harmful, 1 harmless>
    """
    distinct = None if distinct is None else flag("distinct", distinct)
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
    found = [labelled(row) for row in _given(prompts)]
    harmful, harmless = (tuple(request for request, bad in found if bad == wanted) for wanted in (True, False))
    return _checked(PromptSet(_OWN, harmful, harmless, "given as strings"), type(prompts).__name__)


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


def _given(prompts: Any) -> list[Row]:
    """The rows of what is given in Python, counted from 0 as Python does."""
    if isinstance(prompts, Mapping):
        for key in prompts:
            if key not in CLASSES:
                split = f", or a split such as dataset[{key!r}]" if hasattr(prompts[key], "column_names") else ""
                raise InputError(f"{unknown('class of prompts', key, CLASSES)}{split}")
            if isinstance(prompts[key], Mapping) or any(hasattr(prompts[key], name) for name in _OF_TABLES):
                raise InputError(
                    f"{key!r} of the mapping is a table; give its column of requests, such as table['prompt'], or one table with a "
                    "column 'label'"
                )
        return [of_class(Row(f"{k} request {n}", each), k) for k in prompts for n, each in enumerate(items(prompts[k]))]
    if hasattr(prompts, "iloc") and hasattr(prompts, "columns"):
        return _frame_rows(prompts)
    if hasattr(prompts, "with_format") and hasattr(prompts, "features"):
        return _dataset_rows(prompts)
    found = items(prompts)
    named = next((each for each in found if isinstance(each, str | Path) and _is_prompt_file(each)), None)
    if named is not None:
        raise InputError(
            f"{named} in the list is the name of a file, and would be asked as a request; give one file, or load_prompts(...) of each"
        )
    return [Row(f"request {number}", each) for number, each in enumerate(found)]


def _is_prompt_file(given: str | Path) -> bool:
    text = str(given)
    return text.lower().endswith(SUFFIXES) and "\n" not in text and os.path.isfile(text)


def _frame_rows(frame: Any) -> list[Row]:
    """The rows of a DataFrame of pandas; what is missing is None."""
    if not frame.columns.is_unique:
        raise InputError(f"two columns of the table of prompts have one name ({brief([*frame.columns])}); rename one")
    records = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [Row(f"row {number} of the table of prompts", record) for number, record in enumerate(records)]


def _dataset_rows(dataset: Any) -> list[Row]:
    """The rows of a dataset of Hugging Face, with the names of classes in the place of their numbers."""
    classes = {
        column: names for column, kind in (dataset.features or {}).items() if (names := getattr(kind, "names", None))
    }
    if (getattr(dataset, "format", None) or {}).get("type") == "custom":
        raise InputError(
            "the dataset of prompts has a transform, which is not applied here; apply it with dataset.map(...)"
        )
    rows = []
    for number, record in enumerate(dataset.with_format(None)):
        for column, names in classes.items():
            value = record[column]
            record[column] = names[value] if value is not None and value >= 0 else None
        rows.append(Row(f"row {number} of the dataset", record))
    return rows


# --- names and files ---


def _named(text: str) -> PromptSet:
    """A set by its name, or from a file."""
    if text in SHIPPED:
        return SHIPPED[text]()
    name, has_file, file = text.partition("=")
    known = benchmarks()
    if name in known:
        if not file:
            given = f"{text} names no file" if has_file else f"kvgeom does not ship {name}"
            raise InputError(f"{given}; get it from {known[name].home} and give {name}=FILE")
        return _read_benchmark(name, known[name], as_path("the file of prompts", file))
    path = as_path("the file of prompts", text)
    if _is_missing(path):
        raise _no_such_set(text, name, [*SHIPPED, *known])
    if os.path.isdir(path):
        raise InputError(
            f"{text or 'the current folder'} is a folder; give a file with prompts ({', '.join(SUFFIXES)})"
        )
    # A name that is no UTF-8 could not be written into a report.
    stem, name = (part.encode("utf-8", "backslashreplace").decode() for part in (path.stem, path.name))
    with closing(read_rows(path)) as rows:
        return _of_file(stem, map(labelled, rows), f"file {name}", path)


def _is_missing(path: Path) -> bool:
    """Whether a path leads nowhere, which it also does if it is too long."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


def _no_such_set(text: str, name: str, known: list[str]) -> InputError:
    """The error for what is neither a file nor the name of a set: of a misspelt name, or of a missing file."""
    a_path = {*name} & {*"./~"}
    given = text if len(text) < 200 and text.isprintable() else brief(text)
    close = [] if a_path else get_close_matches(name[:80].lower(), known, 1, cutoff=0.7)
    if close:
        return InputError(f"no such file or prompt set: {given}; did you mean {given.replace(name, close[0], 1)!r}?")
    names = ", ".join(name if name in SHIPPED else f"{name}=FILE" for name in known)
    return InputError(
        f"no such file: {given}; prompts are a file or one of {names}, and in Python also a list of requests"
    )


def _read_benchmark(name: str, benchmark: Benchmark, path: Path) -> PromptSet:
    source = f"{benchmark.title}, {benchmark.home}, {benchmark.licence}"
    with closing(read_table(path)) as rows:
        found = (_benchmark_row(name, benchmark, row) for row in rows)
        return _of_file(name, (row for row in found if row is not None), source, path)


def _benchmark_row(name: str, benchmark: Benchmark, row: Row) -> tuple[str, bool] | None:
    """The request of a row and whether it is harmful; None if the row is left out."""
    cells: Mapping[str, str] = row.content
    if benchmark.column not in cells:
        raise _not_of(name, row, benchmark.column)
    try:
        harmful = benchmark.harmful(cells)
        request = "" if harmful is None else benchmark.request(cells)
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from error
    except KeyError as error:
        raise _not_of(name, row, error.args[0] if error.args else "") from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{row.where} is not read as {name} ({reason(error)}); give the file of {name} itself"
        ) from error
    if harmful is None:
        return None
    if harmful not in (True, False):
        raise InputError(f"the rule of {name} says neither harmful nor harmless of {row.where}, but {brief(harmful)}")
    if not cells[benchmark.column].strip():
        raise InputError(f"{row.where} has no request (nothing in {benchmark.column}); give one, or remove it")
    return as_request(row.where, request), bool(harmful)


def _not_of(name: str, row: Row, column: object) -> InputError:
    found = brief([*row.content])
    return InputError(f"{row.where} has no column {column!r} (found {found}); give the file of {name} itself")


def _of_file(name: str, rows: Iterable[tuple[str, bool]], source: str, path: Path) -> PromptSet:
    """The requests of a file, each of them once."""
    harmful, harmless, count = dict[str, None](), dict[str, None](), 0
    for request, bad in rows:
        count += 1
        if request in (harmless if bad else harmful):
            raise InputError(f"{path} has {brief(request)} as both harmful and harmless; label each request once")
        (harmful if bad else harmless).setdefault(request)
    repeated = count - len(harmful) - len(harmless)
    return _checked(PromptSet(name, tuple(harmful), tuple(harmless), source, repeated), str(path))


def _checked(prompts: PromptSet, source: str) -> PromptSet:
    if not prompts.harmful and not prompts.harmless:
        raise InputError(f"{source} holds no prompts; give at least one request")
    return prompts
