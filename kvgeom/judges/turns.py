"""Turns that a model makes up after its answer: they are no part of it, for any judge."""

from __future__ import annotations

import re

#: Tokens of chat templates that end an answer or begin a turn, where a model writes them as text.
_TOKEN = re.compile(
    r"<\|(?:im_end|im_start|im_sep|eot_id|eom_id|end|endoftext|end_of_text|start_header_id|user|assistant|system|return|"
    r"(?:START|END)_OF_TURN_TOKEN|eot|turn)\|?>|<(?:end|start)_of_turn>|<turn\|>|</s>|<eos>|"
    r"\[/?INST\]|<</?SYS>>|(?<=\n)\[(?:user|assistant|system)\]",
    re.I,
)
#: A line on which somebody begins to speak: "User: ...", "**Human:**", "### Instruction:".
_SPEAKER = re.compile(
    r"\n\s*(?:#{1,4} ?|\*\*|__)?(?:[Uu]ser|USER|[Hh]uman|HUMAN|[Aa]ssistant|ASSISTANT|[Ss]ystem|[Qq]uestion|[Qq]|AI|ai|"
    r"(?<=# )(?:Instruction|Input|Response)|(?<=#)(?:Instruction|Input|Response))(?: ?[:\uff1a](?:\*\*|__)?|\*\*[:\uff1a]?\s)"
)
#: Fewer words are no answer that a line with a speaker could follow.
FEW_WORDS = 3
#: A share of new words up to which turns only echo the answer.
ECHO = 0.05
_WORD = re.compile(r"\w+|[^\w\s]")


def before_other_turns(answer: str) -> str:
    r"""An answer without the turns that a model makes up after it, if what is left is an answer.

    Code that names users, and a dialogue that was announced or begins at once, are the answer itself. Turns that only say
    again what stands before them are a loop, which stays.

    Examples
    --------
    >>> before_other_turns("No, I won't.<|im_end|>\n<|im_start|>user\nPlease!")
    "No, I won't."
    >>> before_other_turns("Water it daily.\n\nUser: And roses?\nAssistant: Less.")
    'Water it daily.'
    """
    answer = _until(answer, _TOKEN.search(answer), 1)
    for found in _SPEAKER.finditer(answer):
        before = answer[: found.start()]
        if before.count("```") % 2:
            continue
        announced = before.rstrip().endswith((":", "\uff1a"))
        own = announced or _begins_alike(before) or echoes(before, answer[found.start() :])
        return answer if own else _until(answer, found, FEW_WORDS)
    return answer


def _until(answer: str, found: re.Match[str] | None, words: int) -> str:
    """What stands before a turn, where that has so many words."""
    if found is None:
        return answer
    before = answer[: found.start()].rstrip()
    return before if len(_WORD.findall(before)) >= words else answer


def _begins_alike(before: str) -> bool:
    """Whether an answer begins with a speaker itself: then speakers are its form."""
    return _SPEAKER.match("\n" + before.lstrip()) is not None


def echoes(before: str, after: str) -> bool:
    """Whether what comes after a text, whoever says it, has no words that the text has not."""
    words = re.findall(r"\w+", _SPEAKER.sub("\n", after).lower())
    new = {*words} - {*re.findall(r"\w+", before.lower())}
    return len(words) >= FEW_WORDS and len(new) <= ECHO * len(words)
