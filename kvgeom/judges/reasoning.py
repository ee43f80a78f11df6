"""What a model that reasons writes before it answers, and the answer, which alone is judged.

:data:`MARKERS` lists what models put around their reasoning; :func:`register_markers` adds to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvgeom.errors import InputError
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
        could have them: the opening one directly before the first word of the reasoning, without a space.
    """

    open: str
    close: str
    bare: bool = False

    def __post_init__(self) -> None:
        for name in ("open", "close"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"a marker of reasoning must be text, got {name} {value!r}")


#: In the order in which they are tried.
MARKERS: list[Markers] = [
    Markers(
        "<think>", "</think>"
    ),  # Qwen3, DeepSeek R1 to V4, SmolLM3, LFM2.5, GLM, Kimi K2, MiniMax, Nemotron, OLMo 3, Granite 3.3
    Markers("<thinking>", "</thinking>"),
    Markers("<thought>", "</thought>"),  # EXAONE Deep
    Markers("<reasoning>", "</reasoning>"),
    Markers("[THINK]", "[/THINK]"),  # Magistral, special tokens
    Markers("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere Command A
    Markers("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
    Markers("<seed:think>", "</seed:think>"),  # Seed-OSS
    Markers("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    Markers("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi-VL
    Markers("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    Markers("<|channel>thought", "<channel|>"),  # Gemma 4
    Markers("analysis", "assistantfinal", bare=True),  # gpt-oss without its special tokens
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
    body = text.lstrip().removeprefix(_SPEAKER)
    if isinstance(opened, Markers):
        return _closed(body.removeprefix(opened.open), opened)
    for markers in MARKERS:
        if _opens(body, markers):
            return _closed(body[len(markers.open) :], markers)
        if body.startswith(markers.close) and not markers.bare:
            return _closed(body, markers)
    ends = [] if opened is False else [(at, m) for m in MARKERS if (at := _lone_end(text, m)) is not None]
    if ends:
        return _closed(text, min(ends, key=lambda found: found[0])[1])
    return Parts(None, text)


def opened_by(prompt: str) -> Markers | None:
    """What the end of a prompt, special tokens included, has opened and not closed; None if nothing."""
    begun = [(prompt.rfind(m.open), m) for m in MARKERS if not m.bare]
    at, markers = max(begun, key=lambda found: found[0])
    return markers if at >= 0 and markers.close not in prompt[at:] else None


def begun_by(text: str) -> Markers | None:
    """The markers with which a beginning of a response, special tokens included, begins; None if with none."""
    body = text.lstrip().removeprefix(_SPEAKER)
    return next((m for m in MARKERS if not m.bare and body.startswith((m.open, m.close))), None)


def may_begin(text: str) -> bool:
    """Whether this beginning of a response, special tokens included, may still become a marker."""
    body = text.lstrip()
    own = body.removeprefix(_SPEAKER)
    markers = [marker for m in MARKERS if not m.bare for marker in (m.open, m.close)]
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


def _opens(body: str, markers: Markers) -> bool:
    if not body.startswith(markers.open):
        return False
    rest = body[len(markers.open) :]
    if not markers.bare:
        return True
    return rest[:1].strip() != "" and (markers.close in rest or _FIRST_WORD.match(rest) is not None)


def _closed(rest: str, markers: Markers) -> Parts:
    """The parts of what follows an opening marker."""
    reasoning, close, answer = rest.partition(markers.close)
    if not close:
        return Parts(reasoning.strip(), None)
    # gpt-oss shows its turns, of which the last before the answer is still part of the reasoning.
    reasoning = reasoning.strip().removesuffix(_SPEAKER).removesuffix("<|end|>").strip()
    return Parts(reasoning, _bare_answer(answer))


def _bare_answer(answer: str) -> str:
    """An answer without what encloses it."""
    answer = _END.sub("", answer).strip()
    for before, after in _ENCLOSED:
        if answer.startswith(before):
            answer = answer.removeprefix(before).removesuffix(after)
    return answer.strip()


def _lone_end(text: str, markers: Markers) -> int | None:
    """Where a closing marker ends reasoning that the prompt has opened; None if it is not there, or only spoken of."""
    at = text.find(markers.close)
    if at < 0 or markers.bare or markers.open in text[:at]:
        return None
    before, after = text[:at], text[at + len(markers.close) :]
    quoted = before[-1:] in tuple(_QUOTES) and after[:1] in tuple(_QUOTES)
    mentioned = before[-1:] in (" ", "\t") and _MENTIONED.match(after) and not _SENTENCE_END.search(before)
    return None if quoted or mentioned or before.count("```") % 2 else at
