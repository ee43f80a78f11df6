"""A loaded classifier: from requests and responses to its answers, in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kvgeom.errors import InputError, ModelError, reason
from kvgeom.judges.guards import Guard
from kvgeom.models.hub import check_hub
from kvgeom.models.quiet import quiet_transformers

if TYPE_CHECKING:
    import torch


class GuardModel:
    """A classifier in memory; made by :func:`load_guard`."""

    def __init__(self, model: Any, tokenizer: Any, guard: Guard, source: str) -> None:
        self._model, self._tokenizer, self._guard = model, tokenizer, guard
        # Whether the chat template wants contents as lists of parts.
        self._parts = guard.prompt is None and _wants_parts(tokenizer, source)

    def ask(self, pairs: Sequence[tuple[str, str]], batch_size: int) -> Iterator[tuple[int, str | None]]:
        """Index and answer of every pair of request and response, the short ones first.

        An answer is what the model generates, or the name of its class; None if the pair is longer than it reads.
        """
        import torch

        with quiet_transformers():
            prompts = [self._prompt(*pair) for pair in pairs]
            ids = self._tokenizer(prompts, add_special_tokens=self._guard.special_tokens)["input_ids"]
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            fits = [index for index in batch if len(ids[index]) + self._guard.new_tokens <= context]
            answers: dict[int, str] = {}
            if fits:
                with quiet_transformers(), torch.inference_mode():
                    padded = self._tokenizer.pad({"input_ids": [ids[index] for index in fits]}, return_tensors="pt")
                    answers = dict(zip(fits, self._answers(padded.to(self._model.device)), strict=True))
            yield from ((index, answers.get(index)) for index in batch)

    def _answers(self, padded: Any) -> list[str]:
        if not self._guard.new_tokens:
            return [self._model.config.id2label[index] for index in self._model(**padded).logits.argmax(-1).tolist()]
        tokens = self._model.generate(
            **padded,
            max_new_tokens=self._guard.new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        new = tokens[:, padded["input_ids"].shape[1] :]
        answers: list[str] = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

    def _prompt(self, request: str, response: str) -> str:
        if self._guard.prompt is not None:
            return self._guard.prompt.format(request=request, response=response)
        return _chat(self._tokenizer, request, response, self._parts)


def check_access(name: str, revision: str | None) -> None:
    """Whether the hub has the model and would hand it out: better asked now than after an audit."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError

    check_hub(name, revision)
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    try:
        HfApi().auth_check(name)
    except GatedRepoError as error:
        raise InputError(
            f"the terms of {name} have to be accepted first, at https://huggingface.co/{name}; then run: hf auth login"
        ) from error


def load_guard(
    source: str,
    guard: Guard,
    device: str,
    dtype: torch.dtype | str,
    revision: str | None,
    options: dict[str, Any],
) -> GuardModel:
    """Load a classifier and its tokenizer.

    Raises
    ------
    InputError
        If it cannot be loaded, or weights of its kind are missing.
    ModelError
        If it lacks what is needed: a chat template, its classes, a token to pad with.
    """
    import transformers

    try:
        with quiet_transformers():
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
            config = transformers.AutoConfig.from_pretrained(source, revision=revision)
            auto: Any = transformers.AutoModelForSequenceClassification
            if guard.new_tokens:
                several = hasattr(config, "vision_config")  # Llama Guard 4, and the vision variant of 3
                auto = transformers.AutoModelForImageTextToText if several else transformers.AutoModelForCausalLM
            model, report = auto.from_pretrained(
                source, dtype=dtype, revision=revision, use_safetensors=True, output_loading_info=True, **options
            )
            if "device_map" not in options and not getattr(model, "is_quantized", False):
                model = model.to(device)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"classifier {source} cannot be loaded: {reason(error)}") from error
    if report["missing_keys"]:  # transformers would make them up
        raise InputError(
            f"classifier {source} has no weights for {sorted(report['missing_keys'])[0]}; is it of kind {guard.kind}?"
        )
    if not guard.new_tokens:
        _name_classes(model.config, guard, source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer of {source} has neither a padding nor an end token")
    tokenizer.padding_side = "left" if guard.new_tokens else "right"
    return GuardModel(model.eval(), tokenizer, guard, source)


def _name_classes(config: Any, guard: Guard, source: str) -> None:
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    if names == [f"LABEL_{index}" for index in range(len(guard.classes))]:
        config.id2label = dict(enumerate(guard.classes))
    elif sorted(guard.read(name) is None for name in names) != [False, False]:
        raise ModelError(
            f"classes of {guard.kind} are {', '.join(guard.classes)}, but those of {source} are {', '.join(names)}"
        )


def _chat(tokenizer: Any, request: str, response: str, parts: bool) -> str:
    def content(text: str) -> Any:
        return [{"type": "text", "text": text}] if parts else text

    turns = [{"role": "user", "content": content(request)}, {"role": "assistant", "content": content(response)}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _wants_parts(tokenizer: Any, source: str) -> bool:
    """Whether contents must be lists of parts, as for Llama Guard 3 1B and 4, or plain texts, as for 2 and 3 8B."""
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer of {source} has no chat template, which would be its prompt")
    for parts in (False, True):
        try:
            shown = _chat(tokenizer, "the-request", "the-response", parts)
        except Exception:  # noqa: S112 -- a template may do anything with contents that it does not expect
            continue
        if "the-request" in shown and "the-response" in shown:
            return parts
    raise ModelError(f"the chat template of {source} does not show both a request and a response")
