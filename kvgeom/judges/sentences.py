"""A response as sentences: code, quotations and lists are told from what is said, and "but" begins a sentence of its own."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

_PLAIN = str.maketrans({"\u2019": "'", "\u2018": "'", "`": "'", "*": None, "_": None})
#: Contractions as they are typed in haste.
_APOSTROPHE = re.compile(r"\b(can|won|don|isn|wouldn|couldn|shouldn|doesn|didn|aren)(t)\b|\b(i)(m)\b")
_OPENING, _CLOSING = "\"'\u201c\u2018\u00ab\u300c\u201e", "\"'\u201d\u2019\u00bb\u300d\u201c"
#: What may stand before an answer in quotation marks.
_LABEL = re.compile(r"\s*(?:\**(?:answer|response|reply|output|assistant)\**\s*:\**\s*)", re.I)
#: What is quoted is not said by the one who answers.
_QUOTED = re.compile(
    r"\"[^\"\n]{3,}\"|\u201c[^\u201d\n]{3,}\u201d|\u00ab[^\u00bb\n]{3,}\u00bb|\u300c[^\u300d\n]{3,}\u300d|\u201e[^\u201c\u201d\n]{3,}[\u201c\u201d]"
)
#: Keys under which an answer is spoken in JSON, and what an answer in JSON says of itself.
_SPOKEN = (
    "response",
    "answer",
    "reply",
    "message",
    "content",
    "output",
    "text",
    "error",
    "reason",
    "refusal",
    "result",
    "detail",
    "assistant",
)
_KEYS = (*_SPOKEN, "status", "code", "type", "role", "refused", "declined", "blocked", "success", "ok")
_JSON = re.compile(r"\s*(?:```(?:json)?\s*)?(\{.*)", re.S)
#: A text in JSON that breaks off.
_VALUE = re.compile(r'\{\s*"(\w+)"\s*:\s*"((?:[^"\\]|\\.)*)\Z', re.S)
_FENCED = re.compile(r"```([^\n`]*)\n(.*?)(?:```|\Z)", re.S)
#: Fences of what is no code.
_TEXT = ("", "text", "txt", "plaintext", "markdown", "md", "email", "answer")
_CODE_LINE = re.compile(
    r"\s*(?:(?:import|from|def|class|func|function|fn|let|const|var|public|private|static|using|package) [\w{\"*]|#include|#!/|"
    r"(?:for|while|if|elif|else|try|return|print|echo)\b.*[({:;]\s*$|[\w.\[\]]+ ?[-+*/]?= ?\S|[\w.]+\(.*\)?;?\s*$|[{}\])];?\s*$)"
)
_PROGRAM = re.compile(r"\s*(?:import \S|from \w+ import|def \w+\(|class \w+|#include|#!/|(?:const|let|var) \w+ =)")
_COMMENT = re.compile(r"\s*(?:#|//|/\*|\*|--)|\s{2,}\S|\s*$")
_ITEM = re.compile(r"\s*(?:[-*\u2022+]|\(?\d{1,2}[.)]|\**step \d+[:.]?\**|#+)\s+(?=\S)", re.I)
#: Ends of sentences, lines, and numbers of items within a line.
_END = re.compile(
    r"(?<=[.!?;\u3002\uff01\uff1f\u061f])(?<!\d\.)(?<!e\.g\.)(?<!i\.e\.)[\"')\]]*\s+|(?<=[\u3002\uff01\uff1f])|\n+|(?<=[:.;]) (?=\d{1,2}[.)] )"
)
_BUT = (
    "but|however|yet|nevertheless|still,|aber|doch|jedoch|pero|sin embargo|mas|por\u00e9m|mais|cependant|ma|tuttavia|maar|echter|"
    "\u043d\u043e|\u043e\u0434\u043d\u0430\u043a\u043e|ale|jednak|ama|fakat|ancak|\u0648\u0644\u0643\u0646|\u4f46\u662f|\u4f46|\u4e0d\u8fc7|\u4e0d\u904e|\u7136\u800c|\u305f\u3060\u3057|\u3057\u304b\u3057|\ud558\uc9c0\ub9cc"
)
#: Where a sentence turns around.
_TURN = re.compile(rf"(?:[,;:\u2013\u2014-]\s*|[,\uff0c\u3001]\s*)(?=(?:{_BUT})(?:\b|(?<=[\u3040-\uffff])))", re.I)
_BEGINS_WITH_BUT = re.compile(
    rf"(?:and )?(?:{_BUT}|that said|having said that|that being said|even so|all the same)(?:\b|(?<=[\u3040-\uffff]))[,:\uff0c\u3001]? ?"
)
#: Half a sentence that is nothing without the other half.
_NO_WHOLE = re.compile(
    r"(?:i'm |i am )?(?:so |very |really |truly )?(?:sorry|afraid|apologi[sz]e)\b.{0,12}|no|nope|i (?:do )?apologi[sz]e.{0,20}|unfortunately|my apologies|"
    r".{0,24}(?:leid|sorry|siento|lamento|muito|d\u00e9sol\u00e9e?|dispiace|spijt|przykro|niestety|\u0438\u0437\u0432\u0438\u043d\u0438\u0442\u0435|\u00fczg\u00fcn\u00fcm|\u062d\u0630\u0631\u0627|\u0622\u0633\u0641|\u62b1\u6b49|\u5bf9\u4e0d\u8d77|\u5c0d\u4e0d\u8d77)[^ ]{0,4}"
)


@dataclass(frozen=True)
class Sentence:
    """A sentence, or half of one that turns around with "but".

    Attributes
    ----------
    text : str
        Lower case, plain apostrophes, single spaces; without markdown, quotations and the "but" at its beginning.
    item : bool
        It begins an item of a list or is a heading.
    turns : bool
        It began with "but", "however" or "that said".
    code : bool
        It is a line or block of code.
    ends : bool
        It ends as sentences and lines do; False where the response broke off.
    """

    text: str
    item: bool = False
    turns: bool = False
    code: bool = False
    ends: bool = True


def sentences(text: str) -> list[Sentence]:
    """What a response says, in order."""
    found: list[Sentence] = []
    for block, code in _blocks(unquoted(text)):
        found += [Sentence(plain(block, heads=False), code=True)] if code else _prose(block)
    if found and not found[-1].code and not re.search(r"[.!?:;\u3002\uff01\uff1f\u061f\"')\]\u201d]\s*\Z", text):
        last = found[-1]
        found[-1] = Sentence(last.text, last.item, last.turns, ends=False)
    return found


def spoken(text: str) -> str:
    r"""What an answer in JSON says; any other answer as it is.

    Examples
    --------
    >>> spoken('{"error": "request refused"}')
    'request refused'
    >>> spoken('{"response": "I cannot')
    'I cannot'
    >>> spoken('{"guard": "I cannot help you."}')
    '{"guard": "I cannot help you."}'
    """
    found = _JSON.fullmatch(text)
    if found is None:
        return text
    body = found.group(1).strip().removesuffix("```").strip()
    try:
        said = json.loads(body)
    except ValueError:
        value = _VALUE.fullmatch(body)
        return value.group(2) if value and value.group(1).lower() in _SPOKEN else text
    while isinstance(said, dict) and len(said) == 1 and isinstance(inner := next(iter(said.values())), dict):
        said = inner
    if not isinstance(said, dict) or not {key.lower() for key in said} <= {*_KEYS}:
        return text
    lines = [value for key, value in said.items() if key.lower() in _SPOKEN and isinstance(value, str)]
    lines += [f"request {key}" for key in ("refused", "declined", "blocked") if said.get(key) is True]
    lines += [value for value in (said.get("status"),) if value in ("refused", "declined", "denied", "rejected")]
    return "\n".join(lines) or text


def plain(text: str, *, heads: bool = True) -> str:
    """Lower case, plain apostrophes, single spaces; markdown's emphasis would otherwise stand between words."""
    text = " ".join(text.lower().translate(_PLAIN).split())
    return text.lstrip("#>\"'- ") if heads else text.lstrip(">\"' ")


def unquoted(text: str) -> str:
    """A response without the quotation marks, or the label, that enclose the whole of it."""
    inner = text[found.end() :] if (found := _LABEL.match(text)) else text
    inner = inner.strip()
    if inner[:1] and inner[0] in _OPENING:
        rest = inner[1:].rstrip()
        closed = rest[-1:] in tuple(_CLOSING)
        body = rest[:-1] if closed else rest
        if not any(mark in body for mark in '"\u201c\u201d\u00ab\u00bb\u300c\u300d') and (
            closed or inner[0] not in "'\u2018"
        ):
            return body
    return inner if found else text


def _blocks(text: str) -> list[tuple[str, bool]]:
    """Parts of a text, each with whether it is code. A fence around prose makes no code of it."""
    blocks: list[tuple[str, bool]] = []
    at = 0
    for found in _FENCED.finditer(text):
        blocks += _unfenced(text[at : found.start()])
        language, inside = found.groups()
        code = language.strip().lower() not in _TEXT or any(_CODE_LINE.match(line) for line in inside.splitlines())
        blocks.append((inside, code))
        at = found.end()
    return [(block, code) for block, code in [*blocks, *_unfenced(text[at:])] if block.strip()]


def _unfenced(text: str) -> list[tuple[str, bool]]:
    """A program without a fence begins with an import or a definition, and has comments and indented lines after it."""
    blocks: list[tuple[str, bool]] = []
    program = False
    for line in text.splitlines(keepends=True):
        program = bool(_PROGRAM.match(line) or (program and (_COMMENT.match(line) or _CODE_LINE.match(line))))
        if blocks and blocks[-1][1] == program:
            blocks[-1] = (blocks[-1][0] + line, program)
        else:
            blocks.append((line, program))
    return blocks


def _prose(text: str) -> list[Sentence]:
    found: list[Sentence] = []
    for part in _END.split(_QUOTED.sub('""', text)):
        marker = _ITEM.match(part or "")
        for number, half in enumerate(_halves(part[marker.end() :] if marker else part or "")):
            words = _APOSTROPHE.sub(r"\1\3'\2\4", plain(half))
            turn = _BEGINS_WITH_BUT.match(words)
            rest = words[turn.end() :] if turn else words
            if any(letter.isalpha() for letter in words):
                found.append(Sentence(rest or words, marker is not None and number == 0, turn is not None))
    return found


def _halves(part: str) -> list[str]:
    """The two halves of a sentence that turns around, unless the first says nothing by itself."""
    turn = _TURN.search(part)
    if turn is None or not part[: turn.start()].strip() or _NO_WHOLE.fullmatch(plain(part[: turn.start()])):
        return [part]
    return [part[: turn.start()], part[turn.end() :]]
