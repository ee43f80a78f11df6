"""The words of a request: what they are, which of them say what it is about, and which turn it into its opposite."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

#: Letters of scripts without spaces: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3041-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U000323af"
)
_RUN = re.compile(f"[{_SPACELESS}]+|[^{_SPACELESS} ]+")
_ALONE = re.compile(f"[{_SPACELESS}]")
#: Letters that hold a Japanese sentence together, where others say what it is about.
_HIRAGANA = re.compile("[\u3041-\u309f]+")
#: So many letters of a script without spaces say about as much as a word.
LETTERS_A_WORD = 2
#: Prefixes that are also written apart ("non-violent") and belong to the next word.
_PREFIX_APART = re.compile(r"\b(non|un|anti) (?=[^\W\d_]{3})")


def words(text: str) -> list[str]:
    """Words without case and punctuation; composed and decomposed letters are one, and so is a run without spaces.

    Examples
    --------
    >>> words("Why don't I pick a non-standard LOCK?")
    ['why', 'dont', 'i', 'pick', 'a', 'nonstandard', 'lock']
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    letters = re.sub("n['\u2019]t\\b", "nt", folded)
    kept = "".join(_kept(letter, unicodedata.category(letter)) for letter in letters)
    joined = _PREFIX_APART.sub(r"\1", " ".join(kept.split()))
    return [word for word in _RUN.findall(joined) if any(letter.isalnum() for letter in word)]


def _kept(letter: str, category: str) -> str:
    """A letter, digit or mark as it is; nothing of what cannot be seen; a space for all others."""
    return letter if category[0] in "LNM" else "" if category == "Cf" else " "


#: Words that hold sentences together. Of many requests TF-IDF finds out that they say little; of few it cannot.
FUNCTION_WORDS = frozenset(
    words(
        "a about all also an and any are as at be been but by can could do does for from had has have her his how "
        "i if in into is it its me might my of on or our s should so some t than that the their them then there "
        "these they this those to us was we were what when where which who why will with would you your"
    )
)
#: Words in which one asks for an answer, of whatever: a tutorial on how to build something is a guide to building it.
ASKING_WORDS = frozenset(
    words(
        "advice compose create demonstrate describe design detail detailed details develop draft explain "
        "explanation generate give guidance guide illustrate instruct instruction instructions list manual offer "
        "outline produce provide publish show step steps suggest teach tell tips tutorial way ways write "
        "방법 방법을 방법은 방법이 알려 알려줘 알려주세요 설명해 설명해줘 설명해주세요 가르쳐 가르쳐주세요 어떻게 주세요"
    )
)
_ASKING = re.compile(
    "(?:教えて|説明して)(?:ください|下さい)?|やり方|方法|[请請]?告[诉訴]我|如何|怎[么麼样樣]|解[释釋]|介[绍紹]|\\b[请請]|"
    "[的了吗嗎呢吧在我你您把给給个個这這那]"
)


def content(form: str) -> str:
    """What words, joined by spaces, are about; all of them if they say nothing else."""
    return _about(form) or form


def weight(form: str) -> float:
    """How many words say what it is about, where letters without spaces are counted as words of two."""
    return sum(len(word) / LETTERS_A_WORD if _ALONE.match(word) else 1 for word in _about(form).split())


def _about(form: str) -> str:
    left = [word for word in _ASKING.sub(" ", form).split() if word not in FUNCTION_WORDS | ASKING_WORDS]
    return " ".join(part for word in left for part in _HIRAGANA.sub(" ", word).split())


def units(form: str) -> list[str]:
    """Words, of scripts without spaces letters: what two requests may begin with alike."""
    return [unit for word in form.split() for unit in (word if _ALONE.match(word) else [word])]


def joined(parts: Iterable[str]) -> str:
    """The inverse of :func:`units`, as far as runs without spaces go."""
    return re.sub(f"(?<=[{_SPACELESS}]) (?=[{_SPACELESS}])", "", " ".join(parts))


def grams(form: str) -> list[str]:
    """Character n-grams within words: three to five with the spaces around, one and two of scripts without spaces."""
    found: list[str] = []
    for word in form.split():
        alone = _ALONE.match(word)
        text, sizes = (word, (1, 2)) if alone else (f" {word} ", (3, 4, 5))
        found += [text[at : at + size] for size in sizes for at in range(len(text) - size + 1)]
    return found or [form]


#: Words and letters that negate.
_NEGATIONS = frozenset(
    words(
        "not never no dont doesnt didnt isnt arent wasnt werent wont wouldnt shouldnt cant cannot couldnt mustnt "
        "nicht nie niemals kein keine keinen keinem keiner pas jamais non nunca não niet geen nooit не нет нельзя "
        "않는 않은 않고 않게 않도록 않으려면 안 못 없는 없이 말고 नहीं मत لا ليس değil"
    )
)
_NEGATING = re.compile("[不没沒非無无未勿别別]|な(?:い|く|かった)|ません|ずに|ไม่")
#: What turns a word into its opposite; "de" of long words only, for to defraud is fraud.
_BEFORE = re.compile(r"\A(?:un|il|im|in|ir|non|dis|anti|counter|de(?=\w{6})|[불비무반])(?=\w\w)")
_AFTER = re.compile(r"less(?:ly|ness)?\Z")
#: So many letters may a word have at its end that another of its root does not have.
_ENDING = 4


def opposites(forms: Sequence[str]) -> NDArray[np.bool_]:
    """Which requests say the opposite of each other, as far as words show it, ``[requests, requests]``.

    One of them negates more than the other, or has a word (*illegally*, *harmless*) whose negated root (*legal*, *harm*)
    the other has instead.
    """
    said = [{*form.split()} for form in forms]
    negated = np.array(
        [len(_NEGATING.findall(form)) + sum(word in _NEGATIONS for word in form.split()) for form in forms]
    )
    found: NDArray[np.bool_] = negated[:, None] != negated[None, :]
    vocabulary = {word for each in said for word in each}
    by_stem: dict[str, set[str]] = {}
    for word in vocabulary:
        for stem in _stems(word):
            by_stem.setdefault(stem, set()).add(word)
    for word in vocabulary:
        has = np.array([word in each for each in said])
        for root in _roots(word):
            near = by_stem.get(root, set()) | {stem for stem in _stems(root) if stem in vocabulary}
            for other in near - {word}:
                others = np.array([other in each for each in said])
                turned = np.outer(has & ~others, others & ~has)
                found |= turned | turned.T
    return found


def _stems(word: str) -> list[str]:
    """A word without up to so many letters at its end."""
    return [word[: len(word) - cut] for cut in range(_ENDING + 1) if len(word) - cut >= 3] or [word]


def _roots(word: str) -> list[str]:
    """What a word may negate."""
    found = [_BEFORE.sub("", word), _AFTER.sub("", word)]
    return [root for root in found if root != word and len(root) >= (3 if root.isascii() else 2)]
