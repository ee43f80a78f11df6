"""How layers turn queries and keys into attention: read off the model, and proven against its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvgeom.errors import ModelError
from kvgeom.models import hooks
from kvgeom.models.decoder import Decoder
from kvgeom.models.model import AttentionRule, KVGeometry
from kvgeom.models.rotary import RotaryEmbedding, TokenRotation

#: The proof runs so many tokens, and more to look past a window of at most so many.
_TOKENS, _LONGEST_WINDOW = 32, 512
#: How far a weight that was rebuilt may be from the model's own: at least, and in roundings of the number format.
_OFF, _ROUNDINGS = 1e-3, 16


def attention_rule(attention: nn.Module, config: Any, geometry: KVGeometry, layer: int) -> AttentionRule:
    """What the attention of a layer says of itself: its scale, window, soft cap and sinks."""
    windowed = getattr(attention, "sliding_window", None)
    if windowed is None and not getattr(config, "layer_types", None):
        windowed = geometry.sliding_window
    sinks = getattr(attention, "sinks", None)
    return AttentionRule(
        scale=float(getattr(attention, "scaling", None) or geometry.shape(layer, "k")[1] ** -0.5),
        window=int(windowed) if windowed else None,
        softcap=getattr(config, "attn_logit_softcapping", None),
        sinks=tuple(sinks.detach().float().flatten().tolist()) if isinstance(sinks, Tensor) else None,
    )


def scores(q: Tensor, k: Tensor, rule: AttentionRule) -> Tensor:
    """Attention scores, from ``q [query_heads, queries, head_dim]`` and ``k [query_heads, tokens, head_dim]``."""
    found: Tensor = q @ k.transpose(-1, -2) * rule.scale
    return found if rule.softcap is None else rule.softcap * torch.tanh(found / rule.softcap)


def weights(scored: Tensor, rule: AttentionRule) -> Tensor:
    """Attention of the last queries of a sequence to all its tokens.

    Parameters
    ----------
    scored : Tensor [query_heads, queries, tokens]
        Of :func:`scores`.
    rule : AttentionRule

    Returns
    -------
    Tensor [query_heads, queries, tokens]
        Rows sum to one, or less with sinks.
    """
    hidden = scored.masked_fill(~seen(scored.shape[-2], scored.shape[-1], rule).to(scored.device), -torch.inf)
    if rule.sinks is None:
        return hidden.softmax(-1)
    sinks = torch.tensor(rule.sinks).to(scored)[:, None, None].expand(-1, scored.shape[1], 1)
    return torch.cat([hidden, sinks], dim=-1).softmax(-1)[..., :-1]


def seen(queries: int, tokens: int, rule: AttentionRule) -> Tensor:
    """Which tokens the last queries of a sequence attend to, ``[queries, tokens]``."""
    ahead = torch.arange(tokens - queries, tokens)[:, None] - torch.arange(tokens)[None]
    return (ahead >= 0) if rule.window is None else (ahead >= 0) & (ahead < rule.window)


@torch.inference_mode()
def check_attention(
    hf_model: Any,
    decoder: Decoder,
    projections: hooks.Projections,
    rotary: RotaryEmbedding,
    rules: Mapping[int, AttentionRule],
) -> None:
    """Rebuild the attention of a sequence from queries and keys, and compare it with what the model has computed.

    Costs one pass over some tokens.

    Raises
    ------
    ModelError
        If it differs in some layer, or the model does not show its own.
    """
    windows = [rule.window for rule in rules.values() if rule.window is not None and rule.window <= _LONGEST_WINDOW]
    config = hf_model.config.get_text_config()
    count = min(_TOKENS + max(windows, default=0), getattr(config, "max_position_embeddings", None) or _TOKENS)
    drawn = torch.randint(config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0)).to(hf_model.device)
    queries: dict[int, Tensor] = {}
    rotations: dict[int, TokenRotation] = {}
    own: dict[int, Any] = {}
    cache, attentions = decoder.new_cache(), decoder.attentions
    watching = (
        hooks.watch_queries(attentions, projections, queries.__setitem__),
        hooks.watch_rotation(attentions, rotary.layers, rotations.__setitem__),
        (module.register_forward_hook(_keep(own, index)) for index, module in attentions.items()),
    )
    with _shown(hf_model), hooks.during(*watching):
        positions = torch.arange(count, device=hf_model.device)[None]
        hf_model(input_ids=drawn, position_ids=positions, past_key_values=cache, use_cache=True)
    for index, rule in rules.items():
        q = rotations[index].rotate(queries[index][0]).float()
        k = cache.layers[index].keys[0].float().repeat_interleave(len(q) // len(cache.layers[index].keys[0]), 0)
        rebuilt, theirs = weights(scores(q, k, rule), rule), own.get(index)
        shown = isinstance(theirs, Tensor) and theirs[0].shape == rebuilt.shape
        off = float((theirs[0].float() - rebuilt).abs().max()) if shown and theirs is not None else float("nan")
        if not off <= max(_OFF, _ROUNDINGS * torch.finfo(hf_model.dtype).eps):
            why = f"a weight differs by {off:.2g}" if shown else "the model does not show its own"
            raise ModelError(
                f"the attention of layer {index} of {decoder.name} cannot be rebuilt from its queries and keys ({why}), so that "
                "nothing is said of errors of attention; responses, perplexity and the geometry of keys and values work"
            )


def _keep(own: dict[int, Any], index: int) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        own[index] = output[1] if isinstance(output, tuple) and len(output) > 1 else None

    return hook


@contextmanager
def _shown(hf_model: Any) -> Iterator[None]:
    """Have the kernel that shows its weights; others do not."""
    kernel = hf_model.config._attn_implementation
    if kernel == "eager":
        yield
        return
    hf_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        hf_model.set_attn_implementation(kernel)
