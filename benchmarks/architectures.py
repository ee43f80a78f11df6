"""What holds for every causal architecture of transformers: tiny random models of each, and docs/models.md from them.

python benchmarks/architectures.py            # about three minutes on one core; rewrites the table
python benchmarks/architectures.py qwen3 phi  # prints the rows of some
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.utils import logging as transformers_logging

import kvgeom
from kvgeom.errors import KvgeomError, reason
from kvgeom.models.hf import HFModel
from kvgeom.organisms.toy import toy_tokenizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- architectures: begin -->\n", "<!-- architectures: end -->"
#: One set of options for most; what an architecture does not know, it ignores.
OPTIONS: dict[str, Any] = {
    "is_decoder": True,  # for BERT and its kin, which are encoders otherwise
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 2,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "rotary_dim": 4,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_EVERY_OTHER = {"layer_types": ["linear_attention", "full_attention"] * 2}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 4,
    "n_group": 1,
    "topk_group": 1,
}
_INDEX = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 2, "first_k_dense_replace": 2}
_SHARED = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 259,
    "hidden_size_per_layer_input": 8,
    "head_dim": 8,
    "sliding_window": 12,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
    "shared_expert_intermediate_size": 16,
}
#: What some need beside, or instead, to be of their kind: layers of both sorts, latents, shared caches.
OWN: dict[str, dict[str, Any]] = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_d_state": 8},
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {**_MAMBA, **_EVERY_OTHER, "shared_intermediate_size": 48},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "head_dim": 8},
    "falcon_h1": {**_MAMBA, "head_dim": 8, "mamba_d_ssm": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 8,
        "mamba_d_state": 8,
        "num_key_value_heads": 4,
        "adapter_rank": 4,
    },
    "qwen3_next": {**_EVERY_OTHER, **_DELTA},
    "qwen3_5_text": {**_EVERY_OTHER, **_DELTA},
    "qwen3_5_moe_text": {**_EVERY_OTHER, **_DELTA},
    "olmo_hybrid": {**_EVERY_OTHER, **_DELTA},
    "kimi_linear": {**_LATENT, **_EVERY_OTHER, "linear_head_dim": 8, "linear_num_heads": 4},
    "bailing_hybrid": {**_LATENT, **_EVERY_OTHER},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": {**_LATENT, **_INDEX},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": {**_LATENT, **_INDEX},
    "longcat_flash": {**_LATENT, "num_layers": 2, "zero_expert_num": 1, "expert_ffn_hidden_size": 16},
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    "axk1": _LATENT,
    "axk2": {**_LATENT, **_INDEX},
    "hy_v4": {**_LATENT, **_INDEX},
    "gemma3n_text": {**_SHARED, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 4},
    "gemma4_text": {**_SHARED, "global_head_dim": 16},
    "gemma4_unified_text": {**_SHARED, "global_head_dim": 16},
    "mimo_v2_flash": {"head_dim": 12, "v_head_dim": 8, "swa_head_dim": 12, "swa_v_head_dim": 8},
    "zaya": {"num_experts_per_tok": 1, "head_dim": 8},
    "helium": {"head_dim": 8},
}
#: Larger than this a model is not tiny: it does not take the options.
LARGEST = 50_000_000
REQUESTS = ["how do i open the door", "how"]


@dataclass(frozen=True)
class Row:
    """What holds for one architecture; "yes", or why not."""

    architecture: str
    loads: str
    stored: str = ""
    keys: str = ""
    attention: str = ""
    responses: str = ""
    projections: str = ""


def tiny(kind: str) -> Any:
    """A random model of an architecture, with weights large enough that rounding changes what it says."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**OPTIONS, **OWN.get(kind, {})})
    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        size = sum(weight.numel() for weight in empty.parameters())
    if size > LARGEST:
        raise ValueError("it takes none of the common options, so that no tiny one was made")
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(6.0) if weight.ndim > 1 else weight.normal_(0, 0.5) if name.endswith("bias") else None
    return model.float().eval()


def row(kind: str) -> Row:
    """Try everything on one architecture."""
    try:
        hf = tiny(kind)
    except Exception as error:  # a configuration that these options do not suit can fail in any way
        return Row(kind, f"not tried: {_short(error)}")
    try:
        model = HFModel(hf, toy_tokenizer(), name=kind)
    except KvgeomError as error:
        return Row(kind, f"refused: {_short(error)}")
    four = Scheme.parse("int4-asym-token")
    layers = model.geometry.layers
    last = model.geometry.stores[-1:]
    recipes = {"all": Recipe.uniform(layers, four), "last": Recipe.uniform(layers, four, layers=last)}

    def responses(placement: str) -> None:
        kvgeom.evaluate(model, recipes, REQUESTS, placement=placement, max_new_tokens=3, progress=False)

    return Row(
        kind,
        "yes",
        _stored(model),
        _tried(lambda: _turned(model)),
        _tried(lambda: _rebuilt(model)),
        _tried(lambda: responses("cache")),
        _tried(lambda: responses("paper")),
    )


def _stored(model: HFModel) -> str:
    """Which layers store keys and values, and what others, or the same, hold beside them."""
    g = model.geometry
    parts = ["all layers" if len(g.stores) == g.layers else _layers(g.stores)]
    parts += ["a latent and rotated keys"] if g.latent else ["of several shapes"] if g.shapes else []
    parts += [f"states in {_layers(g.states)}"] if g.states else []
    parts += [f"an index in {_layers(g.indexed)}"] if g.indexed else []
    parts += [f"{_layers(g.shares)} share"] if g.shares else []
    return "; ".join(parts)


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"


def _turned(model: HFModel) -> str:
    """How many channels of a head each layer turns."""
    found: dict[int, int] = {}
    model.forward([0], on_rotation=lambda layer, rotation: found.__setitem__(layer, rotation.planes.numel()))
    if not any(found.values()):
        return "not rotated"
    still = [layer for layer, count in found.items() if not count]
    sizes = {(count, model.geometry.shape(layer, "k")[1]) for layer, count in found.items() if count}
    turned = " or ".join(f"{count} of {size}" for count, size in sorted(sizes)) + " channels"
    return turned if not still else f"{turned}; not in layer {', '.join(map(str, still))}"


def _rebuilt(model: HFModel) -> str:
    model.attention(model.geometry.stores[0])
    return "yes"


def _tried(run: Callable[[], str | None]) -> str:
    try:
        return run() or "yes"
    except KvgeomError as error:
        return f"refused: {_short(error)}"


def _short(error: Exception) -> str:
    """The first part of a message, without what differs from run to run."""
    text = re.sub(r"\s+", " ", reason(error)).split(": it has no ")[0].split(", so that ")[0].split("; ")[0]
    return text if len(text) <= 110 else f"{text[:107]}..."


def rows(kinds: Iterable[str]) -> list[Row]:
    """Those of some architectures, quietly."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [row(kind) for kind in kinds]


def table(found: list[Row]) -> str:
    """The table of docs/models.md."""
    head = (
        "architecture",
        "loads",
        "stored",
        "keys turned back",
        "attention rebuilt",
        "responses",
        "rounding at the projection",
    )
    cells = [[getattr(each, name) for name in Row.__dataclass_fields__] for each in found]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    loads = sum(each.loads == "yes" for each in found)
    return (
        f"{BEGIN}Of {len(found)} architectures in transformers {transformers_version}, {loads} load.\n\n"
        f"{tabulate(escaped, head, tablefmt='github')}\n{END}"
    )


def main(asked: list[str]) -> None:
    """Print some rows, or rewrite the page."""
    if asked:
        print(table(rows(asked)))
        return
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(before + table(rows(sorted(CAUSAL))) + after, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
