"""Finding, in a loaded transformers model, the modules and facts that kvgeom needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgeom.errors import InputError, ModelError, brief
from kvgeom.models.model import KVGeometry

if TYPE_CHECKING:
    from kvgeom.models.decoder import Decoder

#: Names of the modules that project queries, keys and values, and of those that project all of them at once.
_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("project_q", "project_k", "project_v"),
    ("Wq", "Wk", "Wv"),
)
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack")
#: Names of the norms of queries and keys, if there are any.
_NORMS = ("{}_norm", "{}_layernorm")


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


def projections(hf_model: Any, decoder: Decoder, geometry: KVGeometry) -> dict[int, dict[str, Projection]]:
    """The modules that project queries, keys and values of every layer that stores them, by ``"q"``, ``"k"``, ``"v"``.

    Where one module projects all three, their order in its output is found out, by a pass over some tokens: it is the one
    that gives the values that the layer hands to its cache.

    Raises
    ------
    ModelError
        If the attention has none of the names that are known, or no known order gives its values.
    """
    attentions, name = decoder.attentions, decoder.name
    kind = type(next(iter(attentions.values()))).__name__
    if len({*map(id, attentions.values())}) < len(attentions):
        raise ModelError(
            f"layers of {name} share one {kind}, so that its projections are of no single layer; attention scores and the "
            "paper placement need them, so use the cache placement"
        )
    for names in _SEPARATE:
        if all(getattr(attention, found, None) is not None for attention in attentions.values() for found in names):
            return {
                layer: {
                    site: Projection(getattr(attention, found), heads, torch.arange(heads * size))
                    for found, (site, heads, size) in zip(names, _counts(geometry, layer), strict=True)
                }
                for layer, attention in attentions.items()
            }
    fused = next((found for found in _FUSED if all(hasattr(each, found) for each in attentions.values())), None)
    if fused is None or geometry.shapes:
        raise ModelError(
            f"no projections of queries, keys and values found in {kind} of {name}: it has no k_proj/v_proj, "
            f"{' or '.join(_FUSED[:2])}; attention scores and the paper placement need them, so use the cache placement"
        )
    modules = {layer: getattr(attention, fused) for layer, attention in attentions.items()}
    seen = _projected(hf_model, decoder, modules)
    heads = {site: count for site, count, _ in _counts(geometry, geometry.stores[0])}
    for order in _orders(geometry):
        read = {
            layer: {site: Projection(module, heads[site], order[site]) for site in heads}
            for layer, module in modules.items()
        }
        if all(_gives(projection["v"], *seen[layer]) for layer, projection in read.items()):
            return read
    raise ModelError(
        f"the order in which {kind} of {name} projects queries, keys and values is not known: none that kvgeom knows gives the "
        "values that it stores; attention scores and the paper placement need it, so use the cache placement"
    )


def _counts(geometry: KVGeometry, layer: int) -> tuple[tuple[str, int, int], ...]:
    """Heads and channels of each projection of a layer."""
    keys, values = geometry.shape(layer, "k"), geometry.shape(layer, "v")
    return ("q", geometry.query_heads, keys[1]), ("k", *keys), ("v", *values)


@torch.inference_mode()
def _projected(hf_model: Any, decoder: Decoder, modules: Mapping[int, nn.Module]) -> dict[int, tuple[Tensor, Tensor]]:
    """What each module projects of some tokens, and the values that its layer hands to the cache."""
    outputs: dict[int, Tensor] = {}
    cache = decoder.new_cache()
    with ExitStack() as stack:
        for index, module in modules.items():
            keep = partial(lambda index, _module, _args, output: outputs.__setitem__(index, output), index)
            stack.callback(module.register_forward_hook(keep).remove)
        tokens = torch.arange(4, device=hf_model.device)[None]
        hf_model(input_ids=tokens, past_key_values=cache, use_cache=True)
    return {index: (output, cache.layers[index].values) for index, output in outputs.items()}


def _gives(projection: Projection, output: Any, values: Tensor) -> bool:
    if not isinstance(output, Tensor):  # some project into parts by themselves
        return False
    if int(projection.channels.max()) >= output.shape[-1]:
        return False
    read = projection.read(output)
    return read.shape == values.shape and torch.allclose(read, values, atol=1e-3 * float(values.abs().max()))


def _orders(geometry: KVGeometry) -> Iterator[dict[str, Tensor]]:
    """Known orders of queries, keys and values in the output of one module: the channels of each."""
    heads, kv, size = geometry.query_heads, geometry.kv_heads, geometry.head_dim
    every = torch.arange((heads + 2 * kv) * size)
    yield dict(zip("qkv", torch.split(every, [heads * size, kv * size, kv * size]), strict=True))
    if heads % kv == 0:  # each KV head beside its queries (Falcon; with one query each, GPT-NeoX and BLOOM)
        groups = rearrange(every, "(h g d) -> h g d", h=kv, d=size)
        yield {"q": groups[:, :-2].flatten(), "k": groups[:, -2].flatten(), "v": groups[:, -1].flatten()}
    if heads == kv and heads % 4 == 0:  # CodeGen: four parts, each of queries, values and keys
        q, v, k = rearrange(every, "(p s d) -> s (p d)", p=4, s=3)
        yield {"q": q, "k": k, "v": v}


def norm_of(attention: Any, site: str) -> Any:
    """The norm of queries or keys that comes after their projection, or None."""
    return next((norm for name in _NORMS if (norm := getattr(attention, name.format(site), None)) is not None), None)


def key_bias(attention: nn.Module, projection: Projection) -> Tensor | None:
    """Bias of a layer's keys, ``[kv_heads, head_dim]``, or None if there is none or a norm of the keys comes after it."""
    if norm_of(attention, "k") is not None:
        return None
    biases = [weight for part, weight in projection.module.named_parameters() if part.rpartition(".")[2] == "bias"]
    if not biases:
        return None
    own = biases[0].detach()[projection.channels.to(biases[0].device)]
    return rearrange(own, "(h d) -> h d", h=projection.heads)


def attention_of(layer: nn.Module) -> Any:
    """The attention module of a decoder layer, the outermost there is; None without one.

    Some layers wrap another layer that has it (Zamba2).
    """
    level = list(layer.children())
    while level:
        named = ((child, type(child).__name__.lower()) for child in level)
        found = next((child for child, kind in named if "attention" in kind and not kind.endswith("layer")), None)
        if found is not None:
            return found
        level = [below for child in level for below in child.children()]
    return None


def attention_write(layer: nn.Module) -> nn.Module:
    """The module whose output attention adds to the residual stream."""
    # Gemma normalizes once more what attention has made, before it is added.
    if hasattr(layer, "pre_feedforward_layernorm"):
        return layer.get_submodule("post_attention_layernorm")
    attention: nn.Module = attention_of(layer)
    return attention


def read_geometry(model: Any, decoder: Decoder) -> KVGeometry:
    """The shapes that a decoder was seen to store, and what the configuration says beside them."""
    config = model.config.get_text_config()
    shapes, attention = list(decoder.shapes.values()), next(iter(decoder.attentions.values()))
    kv_heads, head_dim, *_ = shapes[0]
    return KVGeometry(
        layers=len(decoder.layers),
        query_heads=int(config.num_attention_heads),
        kv_heads=kv_heads,
        head_dim=head_dim,
        d_model=int(config.hidden_size),
        key_bias=_key_bias(attention),
        rope=_rope_kind(config, model),
        sliding_window=getattr(config, "sliding_window", None) if _slides(config) else None,
        stores=tuple(decoder.shapes),
        shapes=() if {*shapes} == {(kv_heads, head_dim, kv_heads, head_dim)} else tuple(shapes),
        states=decoder.states,
        shares=decoder.shares,
        indexed=decoder.indexed,
        alone=not decoder.batches,
        latent=kv_heads == 1 and getattr(attention, "kv_lora_rank", None) == head_dim,
    )


def _key_bias(attention: nn.Module) -> bool:
    """Whether a module that projects keys, wrapped or not, has a bias."""
    parts = {part for name, _ in attention.named_parameters() if name.endswith("bias") for part in name.split(".")}
    return bool(parts & {*(names[1] for names in _SEPARATE), *_FUSED})


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


def named_stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> frozenset[int]:
    """Tokens that end a response, as the generation configuration and the tokenizer name them.

    Raises
    ------
    InputError
        If the configuration names something that is no whole number.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list | tuple) else [] if configured is None else [configured]
    for token in listed:
        if not isinstance(token, int) or isinstance(token, bool):
            raise InputError(
                f"eos_token_id in the generation_config of {name} must be a whole number or a list of them, got {brief(configured)}; "
                "correct it"
            )
    return frozenset([*listed, *([] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)])])


def stop_tokens(named: frozenset[int], vocabulary: int) -> tuple[frozenset[int], tuple[str, ...]]:
    """Those of some tokens that can end a response, because there are logits of them, and notes of those that cannot."""
    able = frozenset(token for token in named if 0 <= token < vocabulary)
    notes = [f"eos_token_id {token} is no token that the model can write" for token in sorted(named - able)]
    notes += [] if able else ["no token ends a response: each goes on until it has the most new tokens"]
    return able, tuple(notes)


def model_name(model: Any) -> str:
    """What a loaded transformers model is called: its hub id or folder, or else its class."""
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
