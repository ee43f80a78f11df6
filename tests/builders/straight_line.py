"""A Qwen2 forward pass in plain tensor operations, with the paper's rounding of K and V projections.

Shares no code with kvgeom or transformers: it reads the weights and follows the architecture's equations.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_symmetric(x: Tensor, bits: int, per_channel: bool) -> Tensor:
    """``x`` [tokens, channels] on ``2**bits - 1`` levels around 0, one scale for all of it or for each channel."""
    top = 2 ** (bits - 1) - 1
    step = (x.abs().max(dim=0).values if per_channel else x.abs().max()) / top
    step = torch.where(step == 0, torch.ones_like(step), step)
    return torch.clamp(torch.round(x / step), -top, top) * step


class StraightLineQwen2:
    """``rounding``: layer -> (bits, per_channel), for keys and values alike."""

    def __init__(self, weights: dict[str, Tensor], config) -> None:  # type: ignore[no-untyped-def]
        self.w, self.c = weights, config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.theta = config.rope_parameters["rope_theta"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.c.rms_norm_eps) * self.w[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def rope(self, x: Tensor, start: int) -> Tensor:
        """``x`` [tokens, heads, head_dim]: channel i turns with channel i + head_dim / 2."""
        half = self.head_dim // 2
        angle = (start + torch.arange(len(x)))[:, None] / self.theta ** (torch.arange(half) * 2 / self.head_dim)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    @torch.inference_mode()
    def step(
        self,
        ids: list[int],
        cache: list[tuple[Tensor, Tensor]],
        rounding: dict[int, tuple[int, bool]],
        errors,
        inputs=None,
    ):  # type: ignore[no-untyped-def]
        """Logits of the last of ``ids``; appends to ``cache``, and to ``errors`` (layer, site, rounding error).

        ``inputs``: what each layer is to read instead of the output of the one before, [tokens, width] by layer.
        """
        start = len(cache[0][0]) if cache else 0
        h = self.w["model.embed_tokens.weight"][torch.tensor(ids)]
        queries, groups = self.c.num_attention_heads, self.c.num_key_value_heads
        for layer in range(self.c.num_hidden_layers):
            name = f"model.layers.{layer}"
            h = h if inputs is None else inputs[layer]
            x = self.norm(h, f"{name}.input_layernorm.weight")
            q, k, v = (self.linear(x, f"{name}.self_attn.{p}_proj") for p in "qkv")
            if layer in rounding:
                exact = (k, v)
                k, v = (round_symmetric(t, *rounding[layer]) for t in exact)
                errors += [(layer, "k", k - exact[0]), (layer, "v", v - exact[1])]
            q = self.rope(q.view(len(ids), queries, -1), start)
            k = self.rope(k.view(len(ids), groups, -1), start)
            v = v.view(len(ids), groups, -1)
            if start:
                k, v = torch.cat([cache[layer][0], k]), torch.cat([cache[layer][1], v])
                cache[layer] = (k, v)
            else:
                cache.append((k, v))
            out = torch.empty_like(q)
            allowed = torch.arange(len(k))[None] <= start + torch.arange(len(ids))[:, None]
            for head in range(queries):
                g = head // (queries // groups)
                scores = q[:, head] @ k[:, g].T / self.head_dim**0.5
                out[:, head] = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v[:, g]
            h = h + self.linear(out.flatten(1), f"{name}.self_attn.o_proj")
            x = self.norm(h, f"{name}.post_attention_layernorm.weight")
            gate = torch.nn.functional.silu(self.linear(x, f"{name}.mlp.gate_proj"))
            h = h + self.linear(gate * self.linear(x, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")
        head = "model.embed_tokens.weight" if self.c.tie_word_embeddings else "lm_head.weight"
        return self.norm(h[-1], "model.norm.weight") @ self.w[head].T

    def generate(self, ids: list[int], rounding: dict[int, tuple[int, bool]], new_tokens: int, stop: frozenset[int]):  # type: ignore[no-untyped-def]
        """Greedy response, the prompt's logits, and the prompt's rounding errors."""
        cache: list[tuple[Tensor, Tensor]] = []
        errors: list[tuple[int, str, Tensor]] = []
        first = logits = self.step(ids, cache, rounding, errors)
        response: list[int] = []
        while len(response) < new_tokens and (token := int(logits.argmax())) not in stop:
            response.append(token)
            logits = self.step([token], cache, rounding, [])
        return response, first, errors
