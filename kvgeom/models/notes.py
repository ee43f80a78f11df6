"""What of a model's files changes answers and is not done here, or is done otherwise: noted with every result."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvgeom.models.decoder import moving_rope_from
from kvgeom.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Attribute of a transformers model with what was found while it was read.
_NOTES = "_kvgeom_notes"
#: A matrix with a larger share of rows of zeros is noted, and an embedding or a head with a larger share of those rows that text
#: reaches. Some heads or channels may have been cut off a model.
_ZERO_SHARE, _ZERO_TOKENS = 0.1, 0.01
#: Tokens of a prompt that a norm is watched on.
_TOKENS = 8
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
    return (
        *found,
        *_zeros(model, tokenizer),
        *_silent_norms(model, prompt),
        *_generation(model),
        *_moving_rope(model),
        *_tokenizer(tokenizer, prompt),
    )


def _moving_rope(model: Any) -> list[str]:
    """That keys keep the frequencies of when they were stored."""
    config = model.config.get_text_config()
    switch = moving_rope_from(config)
    if switch is None:
        return []
    return [
        f"its rotary embedding has other frequencies for sequences of more than {switch:,} tokens; a response that comes to them keeps the "
        "keys of before, where transformers' generate would compute all keys again"
    ]


def _zeros(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Matrices of zeros, in whole or in part: room for a file is often made before it is fetched, and what did not come is zero."""
    added = frozenset(tokenizer.added_tokens_decoder)  # which is made anew each time; Gemma's has 6,000 entries
    words = [token for token in tokenizer.get_vocab().values() if token not in added]
    tables = {id(module.weight) for module in (model.get_input_embeddings(), _head(model)) if hasattr(module, "weight")}
    found: list[str] = []
    for name, x in model.named_parameters():
        if (
            x.ndim < 2 or name.endswith("bias") or not x.is_floating_point() or type(x.data) is not Tensor
        ):  # of a quantization: of other parts
            continue
        rows = x.detach().flatten(1)
        zero = rows[:, 0] == 0  # few begin so, and only these are read whole
        zero[zero.clone()] = ~rows[zero].any(1)
        most = _ZERO_SHARE
        if id(x) in tables:  # rows of no token, or of one that no text has, are often left at zero
            zero, most = zero[[token for token in words if token < len(zero)]], _ZERO_TOKENS
        if int(zero.sum()) > most * len(zero):
            found.append(name if zero.all() else f"{name} ({int(zero.sum()):,} of {len(zero):,} rows)")
    if not found:
        return []
    return [
        f"{counted(len(found), 'weight')} with zeros where numbers should be, as in a file that was not fetched to its end, such as {found[0]}"
    ]


def _head(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except (NotImplementedError, AttributeError):  # code that comes with a model
        return None


@torch.inference_mode()
def _silent_norms(model: Any, prompt: list[int]) -> list[str]:
    """Norms that write zeros, or the same of every token: their weights are zero, which only what they compute tells."""
    silent: list[str] = []

    def look(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.numel():
            same = output.ndim == 3 and output.shape[1] > 1 and bool((output == output[:, :1]).all())
            if same or not bool(output.any()):
                silent.append(name)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if "norm" in type(module).__name__.lower():
                stack.callback(module.register_forward_hook(partial(look, name)).remove)
        model(input_ids=torch.tensor([prompt[:_TOKENS]], device=model.device), use_cache=False)
    if not silent:
        return []
    return [
        f"{counted(len(silent), 'norm')} that write the same of every token, such as {silent[0]}: their weights are zeros"
    ]


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
