"""What a row says: the request, whole, and whether it is harmful. Nothing is dropped, cut or guessed."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from kvgeom.checks import as_text
from kvgeom.errors import InputError, brief

#: Columns with requests, in the order in which errors list them.
TEXT_COLUMNS = ("prompt", "request", "goal", "behavior", "instruction", "question", "text", "messages")
LABEL_COLUMNS = ("label", "class")
#: The classes of requests, as labels and as keys of a mapping name them.
CLASSES = ("harmful", "harmless")
#: Columns whose text belongs to a request without being part of it, however their words are joined.
BESIDE = (
    "context",
    "contexts",
    "contextstring",
    "document",
    "history",
    "input",
    "passage",
    "system",
    "systemmessage",
    "systemprompt",
)

#: Columns that may say what is harmful, each in a way of its own: of a prompt or of an answer, by yes or by no.
_LIKE_A_LABEL = re.compile(r"(?:.*[_ -])?(?:labels?|classes|(?:un)?safe|harmful|harmless|benign)(?:[_ -].*)?")
#: Columns that may say it where they have numbers or yes and no; where they have text, that may be a topic or an answer.
_LIKE_A_FLAG = re.compile(
    r"(?:.*[_ -])?(?:is|non|un|not)?(?:harm\w{0,8}|(?:un)?safe(?:ty)?|toxic(?:ity)?|malicious|danger(?:ous)?|benign|unethical|illegal|"
    r"offensive|flagged|jailbreak|refus(?:e|ed|al)|target|gold|y)"
)
_YES_OR_NO = frozenset({"yes", "no", "y", "n", "true", "false", "t", "f"})
_HARMFUL = frozenset({"harmful", "unsafe", "1", "true"})
_HARMLESS = frozenset({"harmless", "safe", "benign", "0", "false"})
#: What a column that is no label says of a harmless request, without what joins its words.
_SAYS_HARMLESS = frozenset(
    {
        "harmless",
        "benign",
        "safe",
        "innocuous",
        *(no + bad for no in ("un", "non", "not") for bad in ("harmful", "toxic")),
    }
)
_JOINTS = re.compile("[_ -]")
#: What a label may be; the text of anything else may have no end.
_PLAIN = (str, Real, np.bool_)
#: What a chat message may have: who speaks, what is said, and what no model reads.
_OF_MESSAGES = frozenset({"role", "content", "name", "id", "weight", "created", "timestamp"})
#: Chat messages, or the start of them, that a table has as text: JSON, or what Python writes for a list.
_WRITTEN_MESSAGES = re.compile(r"\s*(\[\s*)?\{\s*(['\"])(role|content)\2\s*:")


class Row(NamedTuple):
    """What one place of a file or a collection has.

    Attributes
    ----------
    where : str
        For errors, such as ``"line 3 of mine.csv"``.
    content : object
        A text, chat messages, or a mapping of columns to values.
    """

    where: str
    content: Any


def of_class(row: Row, name: str) -> Row:
    """A row that has a request alone, in the class of that name."""
    return Row(row.where, {"prompt": row.content, "label": name})


def as_request(where: str, found: object) -> str:
    r"""A request without the blanks around it, which no chat template keeps.

    Parameters
    ----------
    where : str
        For the error.
    found : object

    Raises
    ------
    InputError
        If it is not text, has none, or has characters that cannot be kept.

    Examples
    --------
    >>> as_request("request 0", "How do I pick a lock?\n")
    'How do I pick a lock?'
    >>> as_request("request 0", 3)
    Traceback (most recent call last):
    kvgeom.errors.InputError: request 0 must be text, got 3 (int)
    """
    text = as_text(where, found)
    if not _plain(text):
        raise InputError(f"{where} has nothing that can be read, only signs that nobody sees: {found!a}; remove it")
    if "\0" in text:
        raise InputError(f"{where} has a NUL character, where other programs end a text; remove it: {brief(text)}")
    return text.strip()


def items(given: Any) -> list[Any]:
    """The items of a list, a Series, an array or any other one-dimensional collection.

    Raises
    ------
    InputError
        If it is none, or a single text.
    """
    if isinstance(given, str | bytes):  # its letters would do as strings, too
        raise InputError(f"requests must be several strings, got one: {brief(given)}; put it into a list")
    if isinstance(given, AbstractSet):  # its order is another in each run
        raise InputError(
            "a set of requests has no order, and results name requests by their place; give a list, such as sorted(...)"
        )
    try:
        return list(given)
    except TypeError as error:  # an array without dimensions is iterable by its type
        raise InputError(
            f"prompts must be a PromptSet, a name or file, strings, or a mapping with 'harmful' and 'harmless'; got "
            f"{type(given).__name__}"
        ) from error


def labelled(row: Row) -> tuple[str, bool]:
    """The request of a row, and whether it is harmful; so are requests without a label.

    Raises
    ------
    InputError
        If the row has no request or several, more than can be asked, or a label that is not known.
    """
    where, content = row
    if not isinstance(content, Mapping):
        return _request(where, content, replies=False), True
    columns: dict[str, Any] = {}
    for key, value in content.items():
        name = _plain(key if isinstance(key, str) else brief(key))
        if name in columns:
            raise InputError(f"{where} has two columns {brief(name)}, in capitals or not; rename or remove one")
        columns[name] = value
    return _single_request(where, columns), _is_harmful(where, columns)


def _plain(text: str) -> str:
    """A name or a short value as it is compared: in small letters, without blanks around it or what nobody sees in it."""
    seen = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    return seen.strip().lower()


def _single_request(where: str, columns: Mapping[str, Any]) -> str:
    known = [name for name in TEXT_COLUMNS if name in columns]
    if not known:
        found = brief(sorted(columns))
        raise InputError(f"no column of {where} holds requests (found {found}); name one {TEXT_COLUMNS[0]!r}")
    requests = {
        name: _request(where if len(known) == 1 else f"{name!r} in {where}", columns[name], replies=name == "messages")
        for name in known
        if not _is_blank(columns[name])
    }
    if not requests:
        raise InputError(f"{where} has no request (nothing in {', '.join(known)}); give one, or remove it")
    if len({*requests.values()}) > 1:
        raise InputError(
            f"{where} has several texts that may be the request (in {', '.join(requests)}); leave only one of these "
            "columns, or name a public benchmark, as in advbench=FILE"
        )
    beside = next((name for name in columns if _JOINTS.sub("", name) in BESIDE and not _is_blank(columns[name])), None)
    if beside:
        raise InputError(
            f"{where} has something in {brief(beside)}, without which the request is not whole; put it into the request, or remove "
            "the column"
        )
    return next(iter(requests.values()))


def _is_blank(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_harmful(where: str, columns: Mapping[str, Any]) -> bool:
    labels = {name: columns[name] for name in LABEL_COLUMNS if name in columns}
    like = next((name for name, value in columns.items() if _is_like_a_label(name, value)), None)
    if like and not labels:
        raise InputError(
            f"{where} has {brief(like)}, which may say what is harmful, and no 'label'; rename that column to 'label', or "
            "remove it"
        )
    kind = columns.get("type")
    if not labels and isinstance(kind, str) and kind.strip().lower().startswith("contrast_"):
        raise InputError(
            f"{where} has type {brief(kind)} and no label, as files of XSTest have, where only such types are unsafe; give it as xstest=FILE"
        )
    means = {_meaning(value) for value in labels.values()} - {None}
    # The first is the label. A second one may be of anything, but not against it.
    first = next(iter(labels), "")
    if first and not _is_blank(labels[first]) and _meaning(labels[first]) is None:
        raise InputError(f"{first!r} in {where} must be harmful or harmless, got {brief(labels[first])}")
    if len(means) > 1:
        raise InputError(f"{where} is harmful and harmless, by {' and '.join(labels)}; remove one of these columns")
    against = None if means else next((name for name in columns if _says_harmless(name, columns[name])), None)
    if against:
        raise InputError(
            f"{where} has {brief(columns[against])} in {brief(against)} and no label, without which it is harmful; rename that "
            "column to 'label', or remove it"
        )
    return means != {False}


def _is_like_a_label(name: str, value: object) -> bool:
    """Whether a column that is not called a label may say what is harmful."""
    if _is_blank(value) or name in TEXT_COLUMNS:
        return False
    return bool(_LIKE_A_LABEL.fullmatch(name) or (_LIKE_A_FLAG.fullmatch(name) and _is_a_flag(value)))


def _is_a_flag(value: object) -> bool:
    """Whether a value is a number, or yes or no, also as text."""
    if not isinstance(value, str):
        return isinstance(value, _PLAIN)
    try:
        return math.isfinite(float(value))
    except ValueError:
        return _plain(value) in _YES_OR_NO


def _says_harmless(name: str, value: object) -> bool:
    """Whether a column that is neither a label nor a request calls it harmless in so many words."""
    if name in TEXT_COLUMNS or not isinstance(value, str):
        return False
    return len(value) < 40 and _JOINTS.sub("", _plain(value)) in _SAYS_HARMLESS


def _meaning(label: object) -> bool | None:
    """What a label says of harm, if anything. A column of numbers with a gap has its whole numbers as floats."""
    if not isinstance(label, _PLAIN):
        return None
    given = str(bool(label) if label in (0, 1) else label).strip().lower()
    return True if given in _HARMFUL else False if given in _HARMLESS else None


# --- requests as chat messages ---


def _request(where: str, found: Any, *, replies: bool) -> str:
    """A request that is given as text, or as chat messages; ``replies``: whether an answer may follow."""
    if isinstance(found, str) and _WRITTEN_MESSAGES.match(found):
        raise InputError(
            f"{where} has chat messages as text; give them as JSON in a .json or .jsonl file: {brief(found)}"
        )
    is_list = isinstance(found, list | tuple) or (isinstance(found, np.ndarray) and found.ndim == 1)
    if is_list and len(found) and all(isinstance(message, Mapping) for message in found):
        return _user_turn(where, [*found], replies)
    return as_request(where, found)


def _user_turn(where: str, messages: Sequence[Mapping[str, Any]], replies: bool) -> str:
    """The request of a chat that has one, and nothing before it that would be lost."""
    for message in messages:
        more = next((key for key, value in message.items() if key not in _OF_MESSAGES and not _is_blank(value)), None)
        if more is not None:
            raise InputError(
                f"{where} has {brief(more)} in a chat message, which would be lost; give the user's request alone"
            )
    turns = [(message.get("role"), message.get("content")) for message in messages]
    for role, _ in turns:
        if not isinstance(role, str) or role not in ("system", "developer", "user", "assistant"):
            raise InputError(f"{where} has a message of role {brief(role)}; give the user's request alone")
    if any(role in ("system", "developer") and not _is_blank(content) for role, content in turns):
        raise InputError(
            f"{where} has a system prompt, which would be lost; put it into the chat template, or remove it"
        )
    spoken = [(role, content) for role, content in turns if role in ("user", "assistant")]
    users = [content for role, content in spoken if role == "user"]
    if len(users) != 1:
        raise InputError(f"{where} has {len(users)} user turns; give chats of one, or the request alone")
    if spoken[0][0] != "user" or (len(spoken) > 1 and not replies):
        raise InputError(f"{where} has an assistant's turn, which would be lost; give the user's request alone")
    return as_request(f"the user's turn of {where}", _content(users[0]))


def _content(found: Any) -> Any:
    """The text of a message, also where it is a list with one part of text."""
    if isinstance(found, list | tuple | np.ndarray) and len(found) == 1 and isinstance(found[0], Mapping):
        part = found[0]
        return part.get("text") if part.get("type") == "text" else found
    return found
