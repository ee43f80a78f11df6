"""Finding, in a loaded transformers model, the modules and facts that kvgeom needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgeom.errors import ModelError, reason
from kvgeom.models.cache import EditedCache
from kvgeom.models.model import KVGeometry

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


def projections(
    hf_model: Any, layers: Sequence[nn.Module], geometry: KVGeometry, name: str
) -> list[dict[str, Projection]]:
    """The modules of every layer that project queries, keys and values, by ``"q"``, ``"k"``, ``"v"``.

    Where one module projects all three, their order in its output is found out, by a pass over some tokens: it is the one
    that gives the values that the layer hands to its cache.

    Raises
    ------
    ModelError
        If the attention has none of the names that are known, or no known order gives its values.
    """
    counts = {"q": geometry.query_heads, "k": geometry.kv_heads, "v": geometry.kv_heads}
    kind = type(attention_of(layers[0])).__name__
    for names in _SEPARATE:
        if all(hasattr(attention_of(layer), found) for layer in layers for found in names):
            every = {site: torch.arange(heads * geometry.head_dim) for site, heads in counts.items()}
            return [
                {
                    site: Projection(getattr(attention_of(layer), found), counts[site], every[site])
                    for site, found in zip(counts, names, strict=True)
                }
                for layer in layers
            ]
    fused = next((found for found in _FUSED if all(hasattr(attention_of(layer), found) for layer in layers)), None)
    if fused is None:
        raise ModelError(
            f"no projections of queries, keys and values found in {kind} of {name}: it has no k_proj/v_proj, "
            f"{' or '.join(_FUSED[:2])}; attention scores and the paper placement need them, so use the cache placement"
        )
    modules = [getattr(attention_of(layer), fused) for layer in layers]
    seen = _projected(hf_model, modules)
    for order in _orders(geometry):
        found = [{site: Projection(module, counts[site], order[site]) for site in counts} for module in modules]
        if all(_gives(projection["v"], *one) for projection, one in zip(found, seen, strict=True)):
            return found
    raise ModelError(
        f"the order in which {kind} of {name} projects queries, keys and values is not known: none that kvgeom knows gives the "
        "values that it stores; attention scores and the paper placement need it, so use the cache placement"
    )


@torch.inference_mode()
def _projected(hf_model: Any, modules: Sequence[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """What each module projects of some tokens, and the values that its layer hands to the cache."""
    outputs: dict[int, Tensor] = {}
    cache = EditedCache(len(modules))
    with ExitStack() as stack:
        for index, module in enumerate(modules):
            keep = partial(lambda index, _module, _args, output: outputs.__setitem__(index, output), index)
            stack.callback(module.register_forward_hook(keep).remove)
        tokens = torch.arange(4, device=hf_model.device)[None]
        hf_model(input_ids=tokens, past_key_values=cache, use_cache=True)
    return [(outputs[index], layer.values) for index, layer in enumerate(cache.layers)]


def _gives(projection: Projection, output: Tensor, values: Tensor) -> bool:
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


def key_bias(layer: nn.Module, projection: Projection, geometry: KVGeometry) -> Tensor | None:
    """Bias of a layer's keys, ``[kv_heads, head_dim]``, or None if there is none or a norm of the keys comes after it."""
    if norm_of(attention_of(layer), "k") is not None:
        return None
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


@torch.inference_mode()
def read_geometry(model: Any, config: Any, layers: list[nn.Module], name: str) -> KVGeometry:
    """Run a few tokens, then one more, and look at what the cache then holds: the shapes are the model's own."""
    cache = EditedCache(len(layers))
    try:
        for first, count in ((0, 3), (3, 1)):
            model(
                input_ids=torch.zeros(1, count, dtype=torch.long, device=model.device),
                position_ids=torch.arange(first, first + count, device=model.device)[None],
                past_key_values=cache,
                use_cache=True,
            )
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError, NotImplementedError) as error:
        raise ModelError(f"{name} does not run with a transformers cache: {reason(error)}") from error
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
