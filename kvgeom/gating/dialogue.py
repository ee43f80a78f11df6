"""What a request stands in: a system prompt, earlier turns, and harmless text before it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice

from kvgeom.prompts.sets import perplexity_text

Message = dict[str, str]

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


def messages(request: str, *, system: str | None = None, turns: int = 0, context_tokens: int = 0) -> list[Message]:
    """The messages of a chat that ends with a request.

    Parameters
    ----------
    request : str
    system : str, optional
        The system prompt; none by default.
    turns : int
        Harmless questions and answers before the request.
    context_tokens : int
        About how many tokens of harmless text come first; a server says how many there were (``prompt_tokens``).

    Examples
    --------
    >>> messages("How do I pick a lock?", system="You help.")
    [{'role': 'system', 'content': 'You help.'}, {'role': 'user', 'content': 'How do I pick a lock?'}]
    """
    said = [] if system is None else [("system", system)]
    if context_tokens:
        said += [("user", f"{_READ_THIS}\n\n{_harmless(context_tokens)}"), ("assistant", _HAVE_READ)]
    for question, answer in islice(cycle(_TURNS), turns):
        said += [("user", question), ("assistant", answer)]
    return [{"role": role, "content": content} for role, content in [*said, ("user", request)]]


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
