"""Prompt files: the text of a file, and its rows, each whole and with the line that it is from."""

from __future__ import annotations

import csv
import io
import json
import re
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from kvgeom.errors import InputError, brief, unknown
from kvgeom.paths import read_text
from kvgeom.prompts.rows import CLASSES, Row, of_class

T = TypeVar("T")

#: What a prompt file may be named.
SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl")

_JSON_BLANKS = " \t\r\n"
_BLANKS = re.compile(f"[{_JSON_BLANKS}]*")
#: The limit to the length of a field is one for all threads.
_FIELD_LIMIT = threading.RLock()


def read_rows(path: Path) -> Generator[Row, None, None]:
    """The rows of a user's file, one by one: texts, or what a table or JSON has. Close it where not all are read.

    Raises
    ------
    InputError
        If the file cannot be read whole; with the line.
    """
    readers = {".txt": _lines, ".json": _json_list, ".jsonl": _json_lines}
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"prompts must be in a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, got {path}")
    yield from readers.get(suffix, read_table)(path)


def _lines(path: Path) -> Iterator[Row]:
    r"""Lines of a text that are no comments. Only ``\n`` ends one: other separators are part of a request."""
    text = read_text(path)
    if "\n" not in text and "\r" in text.rstrip():
        raise InputError(f"line 1 of {path} has carriage returns and no line feeds; save the file with Unix line ends")
    for number, marked in enumerate(io.StringIO(text, newline="\n"), 1):
        line = marked.lstrip("\ufeff")  # files that were put together have a byte order mark in the middle
        if _is_json_object(line):
            raise InputError(
                f"line {number} of {path} is a JSON object; name the file .jsonl, or write requests as plain text"
            )
        if line.strip() and not line.lstrip().startswith("#"):
            yield Row(f"line {number} of {path}", line)


def _is_json_object(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(_DECODER.decode(line), dict)
    except (ValueError, RecursionError):
        return False


# --- tables ---


def read_table(path: Path) -> Generator[Row, None, None]:
    """The rows of a table with a header: tabs between the cells of a ``.tsv`` file, commas in any other.

    Rows without any text are no rows. As long as it is not closed, no other thread reads a table.

    Raises
    ------
    InputError
        If a row has more or fewer cells than the header, or quotes are misplaced; with the line.
    """
    text = read_text(path)
    separator = ("\t", "tabs") if path.suffix.lower() == ".tsv" else (",", "commas")
    with _fields_of_any_length(text):
        yield from _table_rows(_cells(text, separator[0], path), separator[1], path)


def _table_rows(rows: Iterator[tuple[int, list[str]]], separators: str, path: Path) -> Iterator[Row]:
    """Rows of cells under the names of the first."""
    first, header = next(rows, (1, []))
    names = [name for name in header if name.strip()]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"line {first} of {path} has two columns {brief(twice)}; rename or remove one")
    for line, cells in rows:
        where = f"line {line} of {path}"
        if len(cells) != len(header):
            raise InputError(
                f"{where} has too {'many' if len(cells) > len(header) else 'few'} cells ({len(cells)}, and {len(header)} "
                f"in the header); put text that has {separators} into quotes, and give each cell, if empty"
            )
        # pandas writes its index into a first column without a name. Text in a later one is the end of a cut request.
        if any(cell.strip() and not name.strip() for name, cell in zip(header[1:], cells[1:], strict=True)):
            raise InputError(
                f"{where} has text in a column without a name; name it in the header, or put it into quotes"
            )
        yield Row(where, dict(zip(header, cells, strict=True)))


def _cells(text: str, delimiter: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table that have text, each with the line that it begins on."""
    # With this newline a carriage return within quotes stays, and one outside of them is an error.
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            why = "a carriage return outside quotes" if "new-line" in str(error) else str(error)
            raise InputError(f"line {line} of {path} is not CSV: {why}; check its quotes") from error
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield line, cells


@contextmanager
def _fields_of_any_length(text: str) -> Iterator[None]:
    with _FIELD_LIMIT:
        before = csv.field_size_limit(len(text) + 1)
        try:
            yield
        finally:
            csv.field_size_limit(before)


# --- JSON ---


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {brief(next(name for name in names if names.count(name) > 1))} twice in an object")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


#: Takes JSON and nothing else: the module's own decoder takes NaN, and keeps the last of two members of one name.
_DECODER = json.JSONDecoder(object_pairs_hook=_members, parse_constant=_no_number)


def _decoded(text: str, start: int, where: str, hint: str) -> tuple[Any, int]:
    """A value of JSON that begins at ``start``, and where it ends."""
    try:
        return _DECODER.raw_decode(text, start)
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply; {hint}") from error
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({getattr(error, 'msg', error)}); {hint}") from error


def _json_lines(path: Path) -> Iterator[Row]:
    r"""A value a line. Only ``\n`` ends a line: JSON may have other separators as they are."""
    hint = "give one object a line"
    for number, line in enumerate(io.StringIO(read_text(path), newline="\n"), 1):
        where, text = f"line {number} of {path}", line.strip(_JSON_BLANKS)
        if text:
            value, end = _decoded(text, 0, where, hint)
            if end < len(text):
                raise InputError(f"{where} is not JSON (more after the value); {hint}")
            yield Row(where, value)


def _json_list(path: Path) -> Iterator[Row]:
    """The items of a list, or of the lists of an object with the classes."""
    found = _Json(read_text(path), path)
    if found.next() == "[":
        yield from found.items()
    elif found.next() == "{":
        before = set[str]()
        for name in found.members():
            if name not in CLASSES:
                raise InputError(f"{unknown('class of prompts', name[:60], CLASSES)}, in {found.where}; {_JSON_HINT}")
            if name in before:
                raise found.error(f"is not JSON (key {brief(name)} twice in an object)")
            before.add(name)
            yield from (of_class(row, name) for row in found.items())
    elif found.next():
        raise found.error("is no list")
    if found.next():
        raise found.error("has more after the list")


_JSON_HINT = (
    "a .json file holds a list, or an object with lists 'harmful' and 'harmless', a .jsonl file an object a line"
)


class _Json:
    """Reads a document value by value, so that each has its line."""

    def __init__(self, text: str, path: Path) -> None:
        self.text, self.path, self.at, self.line = text, path, 0, 1

    @property
    def where(self) -> str:
        return f"line {self.line} of {self.path}"

    def error(self, what: str) -> InputError:
        return InputError(f"{self.where} {what}; {_JSON_HINT}")

    def next(self) -> str:
        """The next character that is not blank; empty at the end."""
        blanks = _BLANKS.match(self.text, self.at)
        self._go(blanks.end() if blanks else self.at)
        return self.text[self.at : self.at + 1]

    def _go(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _take(self, wanted: str) -> str:
        found = self.next()
        if not found or found not in wanted:
            raise self.error(f"is not JSON (no {' or '.join(wanted)} where it must be)")
        self._go(self.at + 1)
        return found

    def value(self) -> Row:
        """The next value, with the line that it begins on."""
        self.next()
        where = self.where
        value, end = _decoded(self.text, self.at, where, _JSON_HINT)
        self._go(end)
        return Row(where, value)

    def items(self) -> Iterator[Row]:
        """The items of the list that comes next."""
        yield from self._several("[", "]", self.value)

    def members(self) -> Iterator[str]:
        """The names of the object that comes next; the value of each must be read before the next."""
        yield from self._several("{", "}", self._name)

    def _name(self) -> str:
        if self.next() != '"':
            raise self.error("is not JSON (no name where one must be)")
        name = str(self.value().content)
        self._take(":")
        return name

    def _several(self, opens: str, closes: str, read: Callable[[], T]) -> Iterator[T]:
        self._take(opens)
        if self.next() == closes:
            self._take(closes)
            return
        separator = ","
        while separator == ",":
            yield read()
            separator = self._take("," + closes)
