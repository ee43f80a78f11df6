"""Whether a loaded model is one that writes text, in numbers that are numbers: found out on one prompt, before anything else."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvgeom.errors import InputError, ModelError, reason
from kvgeom.models.decoder import FAILURES
from kvgeom.models.quiet import quiet_transformers
from kvgeom.words import counted

#: What is put to a model to see whether it runs.
REQUEST = "Hello"
#: A head with fewer logits than this share of the vocabulary is one of classes.
_LEAST_LOGITS = 0.5
#: Tokens that show whether a model reads ahead.
_TOKENS = 8
#: How far logits of the same tokens may differ, of the largest: in 32 bits, and in fewer. A mixture of experts rounds otherwise
#: when other tokens share an expert.
_SAME, _COARSE = 2e-5, 5e-2
_TOKENIZER = "give the tokenizer that belongs to the model, or resize its embedding and train it"
#: What to load instead of a type that overflows, or is too coarse.
_WIDER = {torch.float16: "'bfloat16' or 'float32'", torch.bfloat16: "'float32'"}


def check_kind(model: Any, name: str) -> None:
    """Whether an object is a causal language model whose weights lie in memory.

    Raises
    ------
    InputError
        If it has an encoder, or no language-model head.
    ModelError
        If weights are on the device meta, as those are that accelerate fetches from elsewhere when they are needed.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{name} has an encoder: it is a {type(model).__name__}; give a decoder-only language model")
    try:
        head = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):  # code that comes with a model; its logits are looked at below
        head = model
    if head is None:
        raise InputError(
            f"{name} has no language-model head: it is a {type(model).__name__}; load it with AutoModelForCausalLM"
        )
    away = [weight for weight, x in model.named_parameters() if x.is_meta]
    if away:
        raise ModelError(
            f"{counted(len(away), 'weight')} of {name} without values in memory, such as {away[0]}: on the device meta or offloaded "
            "(device_map, cpu_offload), and kvgeom reads all; use a smaller dtype, a quantization_config or more devices"
        )


def embedding_rows(model: Any) -> int:
    """Tokens that a model has an embedding of."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return int(model.config.get_text_config().vocab_size if weight is None else weight.shape[0])


def check_tokens(ids: Sequence[int], rows: int, tokenizer: Any, name: str, where: str) -> None:
    """Whether a model has an embedding of all tokens.

    Raises
    ------
    InputError
        For the first that it does not have, with what to do.
    """
    beyond = next((token for token in ids if token >= rows), None)
    if beyond is not None:
        raise InputError(
            f"{where} has token {beyond} ({tokenizer.convert_ids_to_tokens(beyond)!r}), and the embedding of {name} has {rows:,} "
            f"rows; {_TOKENIZER}"
        )


def check_vocabulary(rows: int, tokenizer: Any, name: str) -> None:
    """Whether a model has an embedding of all tokens that text becomes.

    Special tokens, which classes of tokenizers add on their own, may lie beyond: only a text that has one is refused.

    Raises
    ------
    InputError
        If it does not.
    """
    special = {token for token, found in tokenizer.added_tokens_decoder.items() if found.special}
    beyond = sorted(token for token in tokenizer.get_vocab().values() if token >= rows and token not in special)
    if beyond:
        raise InputError(
            f"the tokenizer of {name} knows {counted(len(beyond), 'token')} beyond its embedding of {rows:,} rows, such as {beyond[0]} "
            f"({tokenizer.convert_ids_to_tokens(beyond[0])!r}); {_TOKENIZER}"
        )


@torch.inference_mode()
def check_runs(model: Any, ids: Sequence[int], name: str) -> int:
    """Run a model on one prompt, without a cache.

    Returns
    -------
    int
        Number of logits of a token.

    Raises
    ------
    ModelError
        If it does not run, its logits are not those of a language model or no numbers, or it reads ahead.
    """
    with quiet_transformers():  # some models warn of tokens that might be padding
        return _check_logits(model, ids, name)


def _check_logits(model: Any, ids: Sequence[int], name: str) -> int:
    logits = _logits(model, ids, name)
    vocabulary = int(model.config.get_text_config().vocab_size)
    if (
        logits.ndim != 3
        or logits.shape[1] != len(ids)
        or logits.shape[2] < _LEAST_LOGITS * min(vocabulary, embedding_rows(model))
    ):
        raise ModelError(
            f"{name} is a {type(model).__name__}, which answers {len(ids)} tokens with {tuple(logits.shape)} numbers instead of "
            "logits of a next token; give a causal language model"
        )
    # Tokens that are never to be said may have -inf.
    if logits.isnan().any() or (logits == torch.inf).any() or (logits == -torch.inf).all(-1).any():
        raise _no_numbers(model, ids, logits, name)
    if bool((logits.amax(-1) == logits.amin(-1)).all()):
        raise ModelError(
            f"logits of {name} are the same for every token of its vocabulary, as those of a model are whose last norm or head is of zeros; "
            "get its files again"
        )
    begin = list(ids[:_TOKENS])
    other = [*begin[:-1], (begin[-1] + 1) % min(vocabulary, embedding_rows(model))]
    one, two = (_logits(model, each, name)[:, :-1].float() for each in (begin, other))
    allowed = _SAME if torch.finfo(logits.dtype).bits >= 32 else _COARSE
    if len(begin) > 1 and not torch.allclose(one, two, atol=allowed * float(one[one.isfinite()].abs().max())):
        raise ModelError(
            f"{name} reads tokens before they are written: what it computes of a token depends on those after it; give a causal "
            "language model"
        )
    return int(logits.shape[2])


def _logits(model: Any, ids: Sequence[int], name: str) -> Tensor:
    try:
        found = model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    except FAILURES as error:
        raise ModelError(f"{name} does not run: {reason(error)}") from error
    logits = getattr(found, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(f"{name} is a {type(model).__name__}, which gives no logits; give a causal language model")
    return logits


def _no_numbers(model: Any, ids: Sequence[int], logits: Tensor, name: str) -> ModelError:
    """The error for logits that are no numbers, with the first module that makes such."""
    first: list[str] = []

    def look(module_name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        if not first and any(isinstance(x, Tensor) and not x.isfinite().all() for x in parts):
            first.append(module_name)

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if path:
                stack.callback(module.register_forward_hook(partial(look, path)).remove)
        _logits(model, ids, name)
    what = "NaN" if logits.isnan().any() else "infinite numbers"
    where = f", first in {first[0]}" if first else ""
    wider = _WIDER.get(model.dtype)
    advice = (
        f"this type does not hold them: load it with dtype={wider}"
        if wider
        else "its weights are damaged, or not those of its config.json; get them again"
    )
    return ModelError(f"logits of {name} are {what} in {str(model.dtype).removeprefix('torch.')}{where}; {advice}")
