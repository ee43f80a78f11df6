"""What of a model's files changes answers and is not done here, or is done otherwise: noted with every result."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvgeom.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Attribute of a transformers model with what was found while it was read.
_NOTES = "_kvgeom_notes"
#: Rows of a matrix that are looked at first.
_ROWS = 8
#: Settings of generation that change the next token of greedy decoding, and the value with which they do nothing.
_CHANGES: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "watermarking_config": None,
    "stop_strings": None,
}


def remember_notes(model: Any, notes: Iterable[str]) -> None:
    """Note in a transformers model what :func:`notes_of` cannot see in it."""
    setattr(model, _NOTES, tuple(notes))


def notes_of(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> tuple[str, ...]:
    """What changes answers, each as one clause.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    prompt : list of int
        Tokens of some request in the chat template.
    """
    found = getattr(model, _NOTES, ())
    return (*found, *_zeros(model), *_generation(model), *_tokenizer(tokenizer, prompt))


def _zeros(model: Any) -> list[str]:
    """Matrices of zeros: room for a file is often made before it is fetched, and what did not come is zero."""
    zero = [
        name for name, x in model.named_parameters() if x.ndim > 1 and x.is_floating_point() and _is_zero(x.detach())
    ]
    if not zero:
        return []
    return [
        f"{counted(len(zero), 'weight')} of zeros alone, as in a file that was not fetched to its end, such as {zero[0]}"
    ]


def _is_zero(x: Tensor) -> bool:
    if type(x) is not Tensor:  # of a quantization: read as what it is made of
        return False
    few = x[:: max(1, len(x) // _ROWS)]
    return not bool(few.float().any()) and not bool(x.float().any())


def _generation(model: Any) -> list[str]:
    config = getattr(model, "generation_config", None)
    found = {name: getattr(config, name, None) for name in _CHANGES}
    asked = [f"{name} {value}" for name, value in found.items() if value and value != _CHANGES[name]]
    if not asked:
        return []
    return [f"generation_config asks for {', '.join(asked)}, which greedy decoding here leaves out"]


def _tokenizer(tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> list[str]:
    first = tokenizer.bos_token_id
    if first is not None and first not in prompt[:1] and list(tokenizer("a")["input_ids"])[:1] == [first]:
        return [
            f"the chat template begins without {tokenizer.bos_token!r}, with which the tokenizer begins any other text"
        ]
    return []
