"""Tiny classifiers on disk that answer by construction: one thing if the text has an @, another if not."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers import AutoModelForSequenceClassification as Classifier

from tests.builders.tiny import SPECIAL, tiny_tokenizer

#: Contents as texts, and as lists of parts: the two forms that templates of Llama Guard want.
TEXTS = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}Safe or unsafe?"
PARTS = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}"
    "{% endfor %}{{ '\n' }}{% endfor %}Safe or unsafe?"
)
MARK = "@"
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_guard(
    folder: Path, architecture: str, after: str, steps: list[tuple[str, str]], template: str | None = None
) -> Path:
    """A causal model that goes through ``steps`` (what it says without a mark, and with one) after a prompt.

    The embedding of the last token says which step is next. The only head attends to all tokens alike and so tells
    whether one of them is the mark. The padding token counts as a mark too: padding that is not masked changes answers.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_tokens(sorted({text for step in steps for text in step}))
    model = _empty(architecture, len(tokenizer))
    ids = {text: tokenizer.convert_tokens_to_ids(text) for step in steps for text in step}
    (start,), (mark,) = (tokenizer.encode(text, add_special_tokens=False) for text in (after, MARK))
    embed, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision" not in name:
                parameter.zero_()
            if name.endswith("v_proj.weight") and "vision" not in name:
                parameter[0, 14] = 1.0
            if name.endswith("o_proj.weight") and "vision" not in name:
                parameter[15, 0] = 10.0
        embed[mark, 14] = embed[0, 14] = 1.0
        embed[start, 0] = 100.0
        for number, (without, with_mark) in enumerate(steps):
            for text in (without, with_mark):
                embed[ids[text], number + 1] = 100.0
            head[ids[with_mark], number], head[ids[with_mark], 15] = 1.0, 1.0
            if with_mark != without:
                head[ids[without], number] = 1.00005
        head[2, len(steps)] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _empty(architecture: str, vocabulary: int) -> PreTrainedModel:
    shape = {**SHAPE, "vocab_size": vocabulary}
    if architecture != "llama4":
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **shape)).float()
    text = {**shape, "intermediate_size_mlp": 16, "num_local_experts": 1, "moe_layers": []}
    vision = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 16}
    vision |= {"projector_input_dim": 16, "projector_output_dim": 16}
    config = AutoConfig.for_model(architecture, text_config=text, vision_config=vision)
    return AutoModelForImageTextToText.from_config(config).float()


def write_random(folder: Path, architecture: str = "mistral", seed: int = 0) -> Path:
    """A causal model that says anything; what it says depends on everything before, within a window."""
    torch.manual_seed(seed)
    shape = {**SHAPE, "num_hidden_layers": 2, "vocab_size": 259, "sliding_window": 96}
    config = AutoConfig.for_model(architecture, **shape)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20.0) if parameter.ndim > 1 else None
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def write_bert(folder: Path, classes: list[str], bias: list[float], seed: int = 0) -> Path:
    """A random ModernBERT with two classes."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "modernbert",
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=1024,
        local_attention=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
    )
    model = Classifier.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20.0) if parameter.ndim > 1 else None
        model.classifier.bias.copy_(torch.tensor(bias))
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    ends = [(SPECIAL[1], 1), (SPECIAL[2], 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{SPECIAL[1]} $A {SPECIAL[2]}", special_tokens=ends
    )
    tokenizer.save_pretrained(folder)
    return folder
