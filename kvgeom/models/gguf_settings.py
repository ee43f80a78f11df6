"""Settings of a GGUF file that transformers does not read: given to the converted model, refused, or noted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from kvgeom.errors import InputError

#: In the folder of a conversion: what the file says and is not done.
_KEPT = "kvgeom-notes.json"
#: Settings of an architecture, and what configurations of transformers call them: the first of these names that one has.
_NAMES = {
    "attention.sliding_window": ("sliding_window",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_used_count": ("num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
    "use_parallel_residual": ("use_parallel_residual",),
    "logit_scale": ("logit_scale",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
}
#: Settings that shapes of weights prove, that :mod:`kvgeom.models.gguf_rotary` compares, or that change no answer.
_SETTLED = frozenset({
    "block_count", "context_length", "embedding_length", "embedding_length_per_layer_input", "expert_count",
    "expert_feed_forward_length", "expert_shared_feed_forward_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.key_length_swa", "attention.value_length_swa", "attention.causal", "tensor_data_layout",
    "rope.dimension_count", "rope.dimension_count_swa", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned", "rope.scaling.original_context_length",
})  # fmt: skip
#: Types of tokenizers in GGUF files that split text by a rule which the file names.
_SPLIT_BY_RULE = "gpt2"
#: Rules that split text as GPT-2 does, which is what is done where no rule is known; the same with single digits.
_AS_GPT2 = frozenset({"default", "gpt-2", "gpt2", "olmo", "mpt", "phi-2"})
_SINGLE_DIGITS = frozenset({"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"})
#: Before the names of further chat templates.
_TEMPLATE = "tokenizer.chat_template."
#: Tokens besides ``eos`` that end a turn or a message.
_ENDS = ("eot", "eom")


def settle(model: Any, tokenizer: Any, reader: Any, path: Path) -> list[str]:
    """Give a converted model and its tokenizer what their file says and transformers has left out.

    Parameters
    ----------
    model : PreTrainedModel
        Its configuration is completed, and counts when it is loaded the next time.
    tokenizer : PreTrainedTokenizerBase
        Its rule for splitting text is set.
    reader : gguf.GGUFReader
    path : Path
        For messages.

    Returns
    -------
    list of str
        What the file says and is not done, each as one clause.

    Raises
    ------
    InputError
        If the file is no whole language model by itself.
    """
    kind = general(reader, "general.type")
    if kind not in (None, "model"):
        raise InputError(f"{path} is of type {kind}, not a model; give the model's own file")
    parts = general(reader, "split.count")
    if parts is not None and int(parts) > 1:
        raise InputError(f"{path} is one of {int(parts)} parts; merge them into one file (llama-gguf-split --merge)")
    if setting(reader, "attention.causal") is False:
        raise InputError(f"the attention of {path} also reads ahead, so that it writes no text; give a language model")
    _stop_at_turns(model, reader)
    notes = [*_configured(model.config.get_text_config(), reader), *_splits(tokenizer, reader)]
    named = [key.removeprefix(_TEMPLATE) for key in reader.fields if key.startswith(_TEMPLATE)]
    if named:
        notes.append(f"the file has further chat templates that are not used: {', '.join(named)}")
    return notes


def keep_notes(notes: list[str], folder: Path) -> None:
    """Write what :func:`settle` notes beside the conversion."""
    (folder / _KEPT).write_text(json.dumps(notes), encoding="utf-8")


def kept_notes(folder: Path) -> list[str]:
    """What the file of a conversion says and is not done."""
    kept = folder / _KEPT
    return [str(note) for note in json.loads(kept.read_text(encoding="utf-8"))] if kept.is_file() else []


def general(reader: Any, name: str) -> Any:
    """A field of the file; None if it is not there."""
    field = reader.get_field(name)
    return None if field is None else field.contents()


def setting(reader: Any, name: str) -> Any:
    """A setting of the file's architecture; None if it is not there."""
    return general(reader, f"{general(reader, 'general.architecture')}.{name}")


def _configured(config: Any, reader: Any) -> list[str]:
    """Complete a configuration; what it has no place for is noted."""
    prefix = f"{general(reader, 'general.architecture')}."
    ignored = []
    for key in (key.removeprefix(prefix) for key in reader.fields if key.startswith(prefix)):
        said = setting(reader, key)
        name = next((name for name in _NAMES.get(key, ()) if hasattr(config, name)), None)
        if name is not None and isinstance(said, bool | int | float):
            if key == "attention.sliding_window":
                said = said or None
                if said is not None and getattr(config, "use_sliding_window", True) is False:
                    ignored.append(f"{key} = {said}")
                    continue
            if not _same(getattr(config, name), said):
                setattr(config, name, said)
        elif key not in _SETTLED and not _is_read(prefix[:-1], key):
            ignored.append(f"{key} = {said}" if isinstance(said, bool | int | float | str) else key)
    return [f"settings of the file that are not read: {', '.join(ignored)}"] if ignored else []


def _same(ours: Any, said: Any) -> bool:
    if isinstance(ours, int | float) and isinstance(said, float):
        return abs(ours - said) <= 1e-6 * abs(said)  # files hold 32 bits
    return bool(ours == said)


def _is_read(architecture: str, key: str) -> bool:
    """Whether transformers gives a setting to the configuration."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    read: Any = GGUF_CONFIG_MAPPING
    names = {architecture, architecture.replace("-", "_"), architecture.replace("moe", "_moe")}
    return any(read.get(name, {}).get(key) is not None for name in names)


def _stop_at_turns(model: Any, reader: Any) -> None:
    """Let the tokens that end a turn end a response, as in llama.cpp."""
    named = (general(reader, f"tokenizer.ggml.{name}_token_id") for name in _ENDS)
    more = {int(token) for token in named if token is not None}
    own = model.generation_config.eos_token_id
    known = set() if own is None else {own} if isinstance(own, int) else {*own}
    if more - known:
        model.generation_config.eos_token_id = sorted(known | more)


def _splits(tokenizer: Any, reader: Any) -> list[str]:
    """Split text as the file says before it becomes tokens; a rule that is not known is noted."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    rule = general(reader, "tokenizer.ggml.pre")
    if general(reader, "tokenizer.ggml.model") != _SPLIT_BY_RULE or rule is None or rule in _AS_GPT2:
        return []
    if rule in GGUF_PRE_TOKENIZER_SPLITS:
        return []
    if rule in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        return []
    return [f"the file splits text by the rule {rule!r}, which is not known here: it is split as for GPT-2"]
