"""What a model that reasons writes before it answers, and the answer, which alone is judged.

:data:`MARKERS` lists what models put around their reasoning; :func:`register_markers` adds to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from kvgeom.checks import flag
from kvgeom.errors import InputError, brief
from kvgeom.judges.turns import before_other_turns
from kvgeom.registry import check_free


@dataclass(frozen=True)
class Markers:
    """What stands before and after the reasoning of some models.

    Attributes
    ----------
    open, close : str
    bare : bool
        Whether these are ordinary words, left over where special tokens were dropped. They count only where no prose
        could have them: the opening one directly before the first word of the reasoning, without a space, or as a line
        of its own.

    Markers are found in capitals and in small letters, unless they are bare.
    """

    open: str
    close: str
    bare: bool = False

    def __post_init__(self) -> None:
        for name in ("open", "close"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"a marker of reasoning must be text, got {name} {brief(value)}")

        object.__setattr__(self, "bare", flag("bare", self.bare))

    def opens(self, text: str) -> re.Match[str] | None:
        """The opening marker at the beginning of a text."""
        return _pattern(self.open, self.bare).match(text)

    def first_end(self, text: str) -> int | None:
        """Where the first closing marker of a text ends; None if there is none."""
        found = _pattern(self.close, self.bare).search(text)
        return None if found is None else found.end()

    def closing(self, text: str) -> re.Match[str] | None:
        """The closing marker that ends reasoning which has begun before this text; reasoning within it ends by itself.

        Where fewer close than open, one was only spoken of, and the last that closes counts.
        """
        closes = [*_pattern(self.close, self.bare).finditer(text)]
        opens = [found.start() for found in _pattern(self.open, self.bare).finditer(text)]
        for number, close in enumerate(closes):
            if sum(at < close.start() for at in opens) <= number:
                return close
        return closes[-1] if closes else None


@lru_cache(maxsize=256)
def _pattern(marker: str, bare: bool) -> re.Pattern[str]:
    """A marker, in which gpt-oss may name a format before its message."""
    message = re.escape("<|message|>")
    named = re.escape(marker).replace(message, rf"(?:\s*<\|constrain\|>\s*\w*)?{message}")
    return re.compile(named, 0 if bare else re.I)


#: In the order in which they are tried.
MARKERS: list[Markers] = [
    Markers(
        "<think>", "</think>"
    ),  # Qwen3, DeepSeek R1 to V4, SmolLM3, LFM2.5, GLM, Kimi K2, MiniMax, Nemotron, OLMo 3, Granite 3.3
    Markers("<thinking>", "</thinking>"),
    Markers("<thought>", "</thought>"),  # EXAONE Deep
    Markers("<reasoning>", "</reasoning>"),
    Markers("<analysis>", "</analysis>"),
    Markers("<reflection>", "</reflection>"),
    Markers("<thoughts>", "</thoughts>"),
    Markers("<scratchpad>", "</scratchpad>"),
    Markers("[THINK]", "[/THINK]"),  # Magistral, special tokens
    Markers("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere Command A
    Markers("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
    Markers("<seed:think>", "</seed:think>"),  # Seed-OSS
    Markers("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    Markers("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi-VL
    Markers("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    Markers("<|channel>thought", "<channel|>"),  # Gemma 4
    Markers("analysis", "assistantfinal", bare=True),  # gpt-oss without its special tokens
    Markers("Thinking...\n", "...done thinking.", bare=True),  # any model, as Ollama shows it
]
#: What may enclose the answer, after reasoning: Hunyuan, Granite 3.3, Cohere, OpenThinker.
_ENCLOSED = (
    ("<answer>", "</answer>"),
    ("<response>", "</response>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
)
#: Who speaks, where special tokens are shown and a response begins with it.
_SPEAKER = "<|start|>assistant"
#: Ends of a response, where special tokens are shown.
_END = re.compile(r"(?:\s*(?:<\|(?:return|end|im_end|eot_id|END_OF_TURN_TOKEN)\|>|<turn\|>))+\s*\Z")
#: After a bare marker that is not closed: a word that begins a sentence.
_FIRST_WORD = re.compile(r"[A-Z][\w'\u2019]*,? +[\w\"'\u201c(]")
#: A text may begin with a byte order mark.
_BLANK = " \t\r\n\f\v\ufeff"
_QUOTES = "`'\"\u201c\u201d\u2018\u2019"
_MENTIONED = re.compile(r"[ \t]*[a-z]|[.,;:!?)]")
_SENTENCE_END = re.compile(r"(?:\A|[.!?\u2026:)\]\"\u3002]|\n)[ \t]*\Z")


def register_markers(open: str, close: str) -> Markers:
    """Let judges and evaluations know what stands before and after the reasoning of more models; returns the pair.

    Raises
    ------
    InputError
        If one is no text, or the opening one is known.

    Examples
    --------
    ::

        register_markers("<ponder>", "</ponder>")
    """
    markers = Markers(open, close)
    check_free("reasoning that begins with", open, {known.open for known in MARKERS})
    MARKERS.append(markers)
    return markers


@dataclass(frozen=True)
class Parts:
    """A response in its two parts.

    Attributes
    ----------
    reasoning : str or None
        Without its markers; None if there is none.
    answer : str or None
        None if the reasoning has not ended.
    """

    reasoning: str | None
    answer: str | None


def split(text: str, opened: Markers | bool | None = None) -> Parts:
    r"""Divide a response into reasoning and answer.

    Parameters
    ----------
    text : str
        With or without its special tokens.
    opened : Markers, False or None
        What the prompt has opened (:func:`opened_by`), False if nothing. None if that is not known: then a closing marker
        that nothing opened also ends reasoning, unless the text merely speaks of it.

    Examples
    --------
    >>> split("<think>\nMust I refuse?\n</think>\n\nSure, here it is.")
    Parts(reasoning='Must I refuse?', answer='Sure, here it is.')
    >>> split("<think>\nMust I")
    Parts(reasoning='Must I', answer=None)
    >>> split("Sure, here it is.")
    Parts(reasoning=None, answer='Sure, here it is.')
    """
    body = _body(text)
    if isinstance(opened, Markers):
        begun = opened.opens(body)
        return _closed(body[begun.end() :] if begun else body, opened)
    for markers in MARKERS:
        if _opens(body, markers):
            return _closed(body[len(markers.open) :], markers)
        if not markers.bare and _pattern(markers.close, False).match(body):
            return _closed(body, markers)
    ends = [] if opened is False else [(at, m) for m in MARKERS if (at := _lone_end(text, m)) is not None]
    if ends:
        return _closed(text, min(ends, key=lambda found: found[0])[1])
    within, rest = _without_blocks(text)
    if within:
        return Parts("\n".join(within), _bare_answer(rest))
    return Parts(None, _bare_answer(text) if _enclosed(body) else text)


def opened_by(prompt: str) -> Markers | None:
    """What the end of a prompt, special tokens included, has opened and not closed; None if nothing."""
    begun = [(found.start(), m) for m in MARKERS if not m.bare for found in _pattern(m.open, False).finditer(prompt)]
    at, markers = max(begun, key=lambda found: found[0], default=(0, None))
    return markers if markers and not _pattern(markers.close, False).search(prompt, at) else None


def begun_by(text: str) -> Markers | None:
    """The markers with which a beginning of a response, special tokens included, begins; None if with none."""
    body = _body(text)
    return next((m for m in MARKERS if not m.bare and (m.opens(body) or _pattern(m.close, False).match(body))), None)


def may_begin(text: str) -> bool:
    """Whether this beginning of a response, special tokens included, may still become a marker."""
    body = text.lstrip(_BLANK)
    own = body.removeprefix(_SPEAKER).lower()
    markers = [marker.lower() for m in MARKERS if not m.bare for marker in (m.open, m.close)]
    begun = any(marker.startswith(own) and marker != own for marker in markers)
    return bool(body) and (begun or (_SPEAKER.startswith(body)))


def shown(reasoning: str, answer: str | None) -> str:
    """Both parts as one text, whatever the model's own markers are; :func:`split` divides it again."""
    begun = f"{MARKERS[0].open}\n{reasoning}"
    return begun if answer is None else f"{begun}\n{MARKERS[0].close}\n\n{answer}"


def answer_of(response: str) -> str | None:
    """The part of a response that is judged, without turns that follow it; None if its reasoning has not ended."""
    answer = split(response).answer
    return None if answer is None else before_other_turns(answer)


def _body(text: str) -> str:
    """A response without what says who speaks, or that a file begins."""
    return text.lstrip(_BLANK).removeprefix(_SPEAKER)


def _opens(body: str, markers: Markers) -> bool:
    found = markers.opens(body)
    if found is None or not markers.bare:
        return found is not None
    if markers.open.endswith("\n"):
        return True
    rest = body[found.end() :]
    return rest[:1].strip() != "" and (markers.close in rest or _FIRST_WORD.match(rest) is not None)


def _closed(rest: str, markers: Markers) -> Parts:
    """The parts of what follows an opening marker."""
    close = markers.closing(rest)
    if close is None:
        return Parts(rest.strip(), None)
    # gpt-oss shows its turns, of which the last before the answer is still part of the reasoning.
    reasoning = rest[: close.start()].strip().removesuffix(_SPEAKER).removesuffix("<|end|>").strip()
    within, answer = _without_blocks(rest[close.end() :])
    return Parts("\n".join([reasoning, *within]), _bare_answer(answer))


def _without_blocks(text: str) -> tuple[list[str], str]:
    """Reasoning within an answer, and the answer without it. An opening marker that is spoken of begins none."""
    for markers in MARKERS:
        for found in () if markers.bare else _pattern(markers.open, False).finditer(text):
            before, after = text[: found.start()], text[found.end() :]
            if not (before.strip() or after.strip()) or _spoken_of(text, found.start(), found.end()):
                continue
            close = markers.closing(after)
            reasoning, rest = (after[: close.start()], after[close.end() :]) if close else (after, "")
            more, answer = _without_blocks(f"{before.rstrip()}\n{rest.lstrip()}".strip())
            return [reasoning.strip(), *more], answer
    return [], text


def _enclosed(body: str) -> bool:
    return body.lower().startswith(tuple(before.lower() for before, _ in _ENCLOSED))


def _bare_answer(answer: str) -> str:
    """An answer without what encloses it; what stands after the enclosing marker stays."""
    answer = _END.sub("", answer).strip(_BLANK)
    for before, after in _ENCLOSED:
        found = re.match(re.escape(before), answer, re.I)
        if found:
            inner, close, rest = re.split(f"({re.escape(after)}|\\Z)", answer[found.end() :], maxsplit=1, flags=re.I)
            answer = f"{inner.strip()}\n{rest.strip()}" if close else inner
    return answer.strip()


def _lone_end(text: str, markers: Markers) -> int | None:
    """Where a closing marker ends reasoning that the prompt has opened; None if it is not there, or only spoken of."""
    found = None if markers.bare else _pattern(markers.close, False).search(text)
    if found is None or _pattern(markers.open, False).search(text[: found.start()]):
        return None
    return None if _spoken_of(text, found.start(), found.end()) else found.start()


def _spoken_of(text: str, start: int, end: int) -> bool:
    """Whether a marker stands in quotation marks, in code, or as a word of a sentence."""
    before, after = text[:start], text[end:]
    quoted = before[-1:] in tuple(_QUOTES) and after[:1] in tuple(_QUOTES)
    mentioned = before[-1:] in (" ", "\t") and _MENTIONED.match(after) is not None and not _SENTENCE_END.search(before)
    return quoted or mentioned or before.count("```") % 2 == 1
