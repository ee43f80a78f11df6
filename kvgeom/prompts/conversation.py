"""What a request may stand in: a system prompt, earlier turns, and harmless text before it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice

from kvgeom.checks import as_text, suggests, whole
from kvgeom.prompts.sets import perplexity_text

Message = dict[str, str]

#: Least and most turns and tokens before a request.
TURNS, CONTEXT_TOKENS = (0, 10_000), (0, 10_000_000)
#: Earlier turns, written for kvgeom, of which a dialogue has the first ones again and again.
_TURNS = (
    ("What is the tallest mountain in the world?", "Mount Everest, at 8,849 metres above the sea."),
    ("How long should I boil an egg?", "About six minutes for a soft egg, and ten for a hard one."),
    (
        "Thank you. Which rivers flow through Vienna?",
        "The Danube, and the small river Wien, after which the city is said to be named.",
    ),
    ("What does a violin have more than a guitar?", "A bow, and no frets; but it has two strings less."),
)
_READ_THIS = "Please read this text; I will ask you something else afterwards."
_HAVE_READ = "I have read it. What would you like to ask?"
#: Words of English in a token, for most tokenizers.
_WORDS_PER_TOKEN = 0.75


@suggests()
def conversation(*, system: str | None = None, turns: int = 0, context_tokens: int = 0) -> list[Message]:
    """What may stand before a request in a chat: a system prompt, a harmless text, harmless turns, in this order.

    Parameters
    ----------
    system : str, optional
        The system prompt; none by default.
    turns : int
        Harmless questions with their answers.
    context_tokens : int
        About how many tokens of harmless text come before them, in a message that asks to read it.

    Returns
    -------
    list of dict
        Messages with ``role`` and ``content``, for ``kvgeom.load(conversation=...)``.

    Raises
    ------
    InputError
        If the system prompt is no text, or a number is negative.

    Examples
    --------
    >>> conversation(system="You help.", turns=1)[:2]
    [{'role': 'system', 'content': 'You help.'}, {'role': 'user', 'content': 'What is the tallest mountain in the world?'}]
    """
    said = [] if system is None else [("system", as_text("system", system))]
    if whole("context_tokens", context_tokens, *CONTEXT_TOKENS):
        said += [("user", f"{_READ_THIS}\n\n{_harmless(context_tokens)}"), ("assistant", _HAVE_READ)]
    for question, answer in islice(cycle(_TURNS), whole("turns", turns, *TURNS)):
        said += [("user", question), ("assistant", answer)]
    return [{"role": role, "content": content} for role, content in said]


def _harmless(tokens: int) -> str:
    """Paragraphs of the text that perplexity is measured on, from its beginning again where it ends."""
    found: list[str] = []
    left = tokens * _WORDS_PER_TOKEN
    for paragraph in _paragraphs():
        found.append(paragraph)
        left -= len(paragraph.split())
        if left <= 0:
            break
    return "\n\n".join(found)


def _paragraphs() -> Iterator[str]:
    return cycle([part for part in perplexity_text().split("\n\n") if part.strip()])
