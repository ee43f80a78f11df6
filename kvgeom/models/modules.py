"""Finding, in a loaded transformers model, the modules and facts that kvgeom needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgeom.errors import ModelError
from kvgeom.models.cache import EditedCache
from kvgeom.models.model import AttentionRule, KVGeometry

#: Names of the modules that project queries, keys, values, or all of them at once (the last two).
_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("q", "k", "v"))
_BLOCKS, _INTERLEAVED = "qkv_proj", "query_key_value"


@dataclass(frozen=True)
class Projection:
    """Where the heads of queries, keys or values lie in the output of a linear module.

    Attributes
    ----------
    module : nn.Module
    heads : int
    channels : Tensor [heads * head_dim], int64
        Indices into the last dimension of the module's output.
    """

    module: nn.Module
    heads: int
    channels: Tensor

    def read(self, output: Tensor) -> Tensor:
        """``[batch, tokens, all channels]`` to ``[batch, heads, tokens, head_dim]``."""
        return rearrange(output[..., self.channels.to(output.device)], "b t (h d) -> b h t d", h=self.heads)

    def write(self, output: Tensor, heads: Tensor) -> Tensor:
        """The output with ``heads`` in its place; ``output`` itself is left as it is."""
        edited = output.clone()
        edited[..., self.channels.to(output.device)] = rearrange(heads, "b h t d -> b t (h d)")
        return edited


def projections(layer: nn.Module, geometry: KVGeometry, name: str) -> dict[str, Projection]:
    """The modules that project queries, keys and values, by ``"q"``, ``"k"``, ``"v"``.

    Raises
    ------
    ModelError
        If the attention has none of the names that are known.
    """
    attention = attention_of(layer)
    heads = {"q": geometry.query_heads, "k": geometry.kv_heads, "v": geometry.kv_heads}
    size = geometry.head_dim
    for names in _SEPARATE:
        if all(hasattr(attention, found) for found in names):
            return {
                site: Projection(getattr(attention, found), heads[site], torch.arange(heads[site] * size))
                for site, found in zip(("q", "k", "v"), names, strict=True)
            }
    if hasattr(attention, _BLOCKS):
        counts = [heads[site] * size for site in ("q", "k", "v")]
        parts = torch.split(torch.arange(sum(counts)), counts)
    elif hasattr(attention, _INTERLEAVED):  # each head's query, key and value lie side by side
        parts = rearrange(torch.arange(3 * heads["q"] * size), "(h s d) -> s (h d)", s=3, d=size).unbind()
    else:
        raise ModelError(
            f"no projections of queries, keys and values found in {type(attention).__name__} of {name}: it has no "
            f"k_proj/v_proj, {_BLOCKS} or {_INTERLEAVED}; attention scores and the paper placement need them, so use the cache "
            "placement"
        )
    module = getattr(attention, _BLOCKS, None) or getattr(attention, _INTERLEAVED)
    return {site: Projection(module, heads[site], part) for site, part in zip(("q", "k", "v"), parts, strict=True)}


def key_bias(layer: nn.Module, geometry: KVGeometry, name: str) -> Tensor | None:
    """Bias of a layer's keys, ``[kv_heads, head_dim]``, or None if there is none or a norm of the keys comes after it."""
    if hasattr(attention_of(layer), "k_norm"):
        return None
    projection = projections(layer, geometry, name)["k"]
    biases = [weight for part, weight in projection.module.named_parameters() if part.rpartition(".")[2] == "bias"]
    if not biases:
        return None
    own = biases[0].detach()[projection.channels.to(biases[0].device)]
    return rearrange(own, "(h d) -> h d", h=geometry.kv_heads)


def decoder_layers(model: nn.Module, count: int, name: str) -> list[nn.Module]:
    """The decoder layers, first to last.

    Raises
    ------
    ModelError
        If there is no list of ``count`` modules that each hold an attention.
    """
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    found = [m for m in found if all(attention_of(layer) is not None for layer in m)]
    if not found:
        raise ModelError(f"no list of {count} decoder layers with attention found in {name}")
    return list(found[-1])


def attention_of(layer: nn.Module) -> Any:
    """The attention module of a decoder layer."""
    return next((child for child in layer.children() if "attention" in type(child).__name__.lower()), None)


def attention_write(layer: nn.Module) -> nn.Module:
    """The module whose output attention adds to the residual stream."""
    # Gemma normalizes once more what attention has made, before it is added.
    if hasattr(layer, "pre_feedforward_layernorm"):
        return layer.get_submodule("post_attention_layernorm")
    attention: nn.Module = attention_of(layer)
    return attention


def attention_rule(layer: nn.Module, config: Any, geometry: KVGeometry) -> AttentionRule:
    """How a layer turns queries and keys into attention."""
    attention = attention_of(layer)
    windowed = getattr(attention, "sliding_window", None)
    if windowed is None and not getattr(config, "layer_types", None):
        windowed = geometry.sliding_window
    return AttentionRule(
        scale=float(getattr(attention, "scaling", None) or geometry.head_dim**-0.5),
        window=int(windowed) if windowed else None,
        softcap=getattr(config, "attn_logit_softcapping", None),
    )


@torch.inference_mode()
def read_geometry(model: Any, config: Any, layers: list[nn.Module], name: str) -> KVGeometry:
    """Run one token and look at what the cache then holds: the shapes are the model's own."""
    cache = EditedCache(len(layers))
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{name} does not run with a transformers cache: {error}") from error
    shapes = {tuple(t.shape) for layer in cache.layers for t in (layer.keys, layer.values) if t is not None}
    if len(shapes) != 1 or not all(layer.is_initialized for layer in cache.layers):
        raise ModelError(f"the layers of {name} do not all store keys and values of one shape (found {sorted(shapes)})")
    _, kv_heads, _, head_dim = shapes.pop()
    return KVGeometry(
        layers=len(layers),
        query_heads=int(config.num_attention_heads),
        kv_heads=kv_heads,
        head_dim=head_dim,
        d_model=int(config.hidden_size),
        key_bias=_key_bias(attention_of(layers[0])),
        rope=_rope_kind(config, model),
        sliding_window=getattr(config, "sliding_window", None) if _slides(config) else None,
    )


def _key_bias(attention: nn.Module) -> bool:
    """Whether a module that projects keys, wrapped or not, has a bias."""
    parts = {part for name, _ in attention.named_parameters() if name.endswith("bias") for part in name.split(".")}
    return bool(parts & {"k_proj", "k", _BLOCKS, _INTERLEAVED, "c_attn"})


def _slides(config: Any) -> bool:
    types = getattr(config, "layer_types", None)
    return "sliding_attention" in types if types else getattr(config, "sliding_window", None) is not None


def _rope_kind(config: Any, model: nn.Module) -> str:
    if not any("rotary" in type(m).__name__.lower() for m in model.modules()):
        return "none"
    parameters = getattr(config, "rope_parameters", None) or {}
    # Models whose layer types have their own rotary embeddings nest the parameters by layer type.
    kinds = {p.get("rope_type", "default") for p in parameters.values() if isinstance(p, dict)}
    return "+".join(sorted(kinds)) if kinds else str(parameters.get("rope_type", "default"))


def weights_fingerprint(model: nn.Module, template: str) -> str:
    """Hash of kind, template and a sample of every weight: tells models apart in seconds, not minutes."""
    return _hashed(model, template, lambda weight: (str(weight.dtype), weight.float()))


def weights_identity(model: nn.Module) -> str:
    """The same whatever the chat template and the floating-point type that the weights were loaded in.

    Weights that were trained in float32 and stored in float16 alone are an exception: they may differ from those in
    bfloat16.
    """
    return _hashed(model, "", lambda weight: ("", _coarse(weight) if weight.is_floating_point() else weight))


def _coarse(weight: Tensor) -> Tensor:
    """What all floating-point types have of a weight: 8 significant bits, and nothing below float16's normal numbers."""
    coarse = weight.to(torch.bfloat16).float()
    return torch.where(coarse.abs() < 2.0**-14, 0.0, coarse)


def _hashed(model: nn.Module, template: str, sampled: Callable[[Tensor], tuple[str, Tensor]]) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", "")
    digest = hashlib.sha256(f"{kind}\n{template}".encode())
    for parameter_name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        dtype, sample = sampled(flat[:: max(1, flat.numel() // 64)][:64])
        plain = parameter_name.replace("_original_component.", "")  # as TransformerLens wraps modules
        digest.update(f"{plain}{tuple(weight.shape)}{dtype}".encode() + sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a response."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None)


def model_name(model: Any) -> str:
    """What a loaded transformers model is called: its hub id or folder, or else its class."""
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
