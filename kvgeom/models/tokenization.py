"""Whether a tokenizer reads text by the rules of its file: classes of transformers bring some of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from kvgeom.errors import ModelError, brief, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Texts in which the rules that tokenizers have differ: capitals, accents in one and in two characters, ligatures, wide and
#: Chinese characters, numbers, contractions, blanks of all kinds, code.
_PROBES = (
    "How do I SORT a List of 12345678 Numbers in Python?",
    " two  blanks,\ttabs and\n\nlines \r\n at the end  ",
    "na\u00efve nai\u0308ve \ufb01ne \uff26\uff55\uff4c\uff4c \u2460 \u00bd\u00a0km",
    "I'll, he'S, don\u2019t; e-mail: a_b@c.de/f?g=h#i \u2014 \u20ac5.00 (50%)",
    "\u6587\u5b57\u5316\u3051\u3067\u3059\u3002 \u041f\u0440\u0438\u0432\u0435\u0442! \u0645\u0631\u062d\u0628\u0627 \U0001f642",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": not x}  # done",
)


def tokenized(tokenizer: PreTrainedTokenizerBase, text: str, name: str, **options: Any) -> Any:
    """What a tokenizer makes of a text, without special tokens.

    Raises
    ------
    ModelError
        If it fails, as one does whose files do not belong together.
    """
    try:
        return tokenizer(text, add_special_tokens=False, **options)
    except Exception as error:  # tokenizers raises no other class
        raise ModelError(
            f"the tokenizer of {name} fails on a plain text: {reason(error)}; its files do not belong together"
        ) from error


def other_rules(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """A note if some text becomes other tokens than by the ``tokenizer.json`` of a folder.

    The class that transformers chooses by the type of a model builds some parts anew, whatever the file has there.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        As it was loaded from the folder.
    folder : Path
        Not a folder, or one without the file: nothing is compared.

    Returns
    -------
    list of str
        One note or none. Rules that differ in no text that was tried, such as those of a pattern that none has, are not seen.
    """
    path = folder / "tokenizer.json"
    if not path.is_file() or not tokenizer.is_fast:
        return []
    stored = Tokenizer.from_file(str(path))
    stored.no_truncation()
    rules = [json.loads(part.__getstate__()) for part in (stored.normalizer, stored.pre_tokenizer) if part is not None]
    for text in (*_PROBES, *dict.fromkeys(_literals(rules))):
        found = tokenized(tokenizer, text, str(folder))["input_ids"]
        if found != stored.encode(text, add_special_tokens=False).ids:
            return [
                f"the {type(tokenizer).__name__} of transformers reads text by rules of its own, and not by those of tokenizer.json: "
                f"{brief(text)} becomes other tokens"
            ]
    return []


def _literals(part: Any) -> Iterator[str]:
    """The texts that rules of a tokenizer look for, as words and inside one: they may be unlike any other text."""
    if isinstance(part, list):
        for value in part:
            yield from _literals(value)
    elif isinstance(part, dict):
        for name, value in part.items():
            if name in ("String", "content", "prepend") and isinstance(value, str) and value:
                yield f"a{value}b {value} c"
            yield from _literals(value)
