"""Broken text: loops of words, of letters, and of anything that packs far better than language."""

from __future__ import annotations

import re
import zlib
from collections import Counter

#: A word of fewer letters may repeat itself by chance.
MANY_LETTERS = 12
#: A text of fewer bytes does not pack well, whatever it says.
MANY_BYTES = 80
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?|[^\w\s]")

#: Dots, dashes or lines that lead from one word to the next, as in a table of contents.
_LEADER = re.compile(r"([.\u2026\u00b7=_~-])\1{2,}(?=\s*\w)")


def words_of(text: str) -> list[str]:
    """Words and punctuation marks."""
    return _WORD.findall(text)


def without_leaders(text: str) -> str:
    """A text whose leaders ("flour......... 200 g") are one character; what no word follows is no leader."""
    return _LEADER.sub(r"\1", text)


def loop_share(words: list[str], longest: int = 8) -> float:
    """Share of the words that only repeat the ``n`` words before them, for the worst ``n`` up to ``longest``.

    A repeat counts where all ``n`` words come again in a row, so that a list whose items are made alike is no loop; numbers
    count as one word, so that a loop that numbers itself is one. Texts in which one word is found over and over, in whatever
    order, count by that word.
    """
    if len(words) < 6:
        return 0.0
    alike = ["#" if word.isdigit() else word for word in words]
    worst = 0.0
    for n in range(1, longest + 1):
        if len(words) >= 2 * n:
            worst = max(worst, _repeated(alike, n) / (len(words) - n))
    contents = Counter(word for word in words if word[0].isalnum() and len(word) > 3)
    most = contents.most_common(1)[0][1] if contents else 0
    return max(worst, most / len(words) if most > 3 else 0.0)


def _repeated(words: list[str], n: int) -> int:
    """How many words lie in runs of at least ``n`` words, each the same as the one ``n`` before it."""
    total = run = 0
    for now, before in [*zip(words[n:], words, strict=False), ("", None)]:
        if now == before:
            run += 1
        else:
            total += run if run >= n else 0
            run = 0
    return total


def letter_loop_share(words: list[str], longest: int = 16) -> float:
    """Share of the letters that lie in long words which repeat themselves.

    Sees loops that no space divides into words, such as "useruseruser": at least :data:`MANY_LETTERS` letters of which
    four in five repeat the ``n`` before them, for some ``n`` up to ``longest``.
    """

    def loops(word: str) -> bool:
        return len(word) >= MANY_LETTERS and any(
            sum(a == b for a, b in zip(word, word[n:], strict=False)) >= 0.8 * (len(word) - n)
            for n in range(1, min(longest, len(word) // 2) + 1)
        )

    letters = [len(word) for word in words if word[0].isalnum()]
    looping = [len(word) for word in words if word[0].isalnum() and loops(word)]
    return sum(looping) / sum(letters) if looping else 0.0


def packed(text: str) -> float:
    """Length of a text once it is compressed, over its length; 1 of a text too short to tell.

    Sees loops whose parts are longer than a few words, or come in another order.
    """
    given = text.encode()
    return len(zlib.compress(given, 9)) / len(given) if len(given) >= MANY_BYTES else 1.0
