"""Tiny random models that reason before they answer."""

from __future__ import annotations

import torch
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from kvgeom.models.hf import HFModel
from tests.builders.tiny import TEMPLATE, tiny_config, tiny_tokenizer

OPEN, CLOSE = 259, 260
#: Template of a model that is told to reason, unless it is told not to.
SWITCHED = TEMPLATE.replace(
    "<|start|>assistant\n",
    "<|start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
)


def reasoning_tokenizer(
    markers: tuple[str, str] = ("<think>", "</think>"), *, special: bool
) -> PreTrainedTokenizerFast:
    """The tokenizer of tiny models, and two tokens more."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(marker, special=special, normalized=False) for marker in markers], special)
    assert tokenizer.convert_tokens_to_ids(list(markers)) == [OPEN, CLOSE]
    return tokenizer


def reasoning_model(
    kind: str = "llama",
    *,
    opens: bool = True,
    special: bool = False,
    markers: tuple[str, str] = ("<think>", "</think>"),
    loud: float = 1.6,
    seed: int = 1,
    template: str = TEMPLATE,
) -> HFModel:
    """Random, but for markers that are loud: reasoning begins in the prompt or in most responses, and ends somewhere."""
    tokenizer = reasoning_tokenizer(markers, special=special)
    tokenizer.chat_template = template.replace("assistant\n{%", f"assistant\n{markers[0]}\n{{%") if opens else template
    torch.manual_seed(seed)
    config = tiny_config(kind) | {"vocab_size": 261}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0) if parameter.ndim > 1 else None
        head = model.get_output_embeddings().weight
        head[[0, 1, 2]] *= 0.2  # responses that end at once show little
        head[CLOSE] *= loud
        head[OPEN] *= 1.0 if opens else 2 * loud
    return HFModel(model, tokenizer, name=f"reasoning-{kind}")
