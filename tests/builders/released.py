"""The released protocol of arXiv:2606.09864 in plain arithmetic: its grids value by value, and its padded batches of 4.

Shares no code with kvgeom or transformers, and none with the release: it follows what that was seen to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.builders.straight_line import StraightLineQwen2

Round = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def block(x: NDArray[np.float32], bits: int, symmetric: bool, clamp: bool = True) -> NDArray[np.float32]:
    """Values that share a scale, in any shape."""
    one = np.float32
    if symmetric:
        top = 2 ** (bits - 1) - 1
        step = one(max(np.abs(x).max(), one(1e-8))) / one(top)
        return np.clip(np.rint(x / step), -top - 1, top) * step
    codes = 2**bits - 1
    low, high = x.min(), x.max()
    step = max((high - low) / one(codes), one(1e-8))
    zero = np.rint(-low / step)
    zero = np.clip(zero, 0, codes) if clamp else zero
    return (np.clip(np.rint(x / step + zero), 0, codes) - zero) * step


def rounded(
    x: NDArray[np.float32],
    bits: int,
    symmetric: bool,
    granularity: str,
    size: int = 0,
    channels: Sequence[int] | None = None,
    lone_by_token: bool = False,
) -> NDArray[np.float32]:
    """``x`` [rows, tokens, channels]; some channels alone with the scale of their own values."""
    if channels is not None:
        out = x.copy()
        out[..., list(channels)] = rounded(x[..., list(channels)], bits, symmetric, granularity, size)
        return out
    out = np.empty_like(x)
    rows, tokens, width = x.shape
    if lone_by_token and tokens == 1 and granularity == "channel":
        granularity = "token"
    if granularity == "tensor":
        return block(x, bits, symmetric)
    if granularity == "channel":
        for c in range(width):
            out[:, :, c] = block(x[:, :, c], bits, symmetric)
        return out
    for row in range(rows):
        for token in range(tokens):
            values = x[row, token]
            if granularity == "token":
                out[row, token] = block(values, bits, symmetric)
                continue
            for begin in range(0, width, size):
                part = values[begin : begin + size]
                filled = np.concatenate([part, np.zeros(size - len(part), np.float32)])
                out[row, token, begin : begin + size] = block(filled, bits, symmetric)[: len(part)]
    return out


class ReleasedQwen2(StraightLineQwen2):
    """Prompts as one batch padded on the left; projections of chosen layers are rounded over the whole batch."""

    @torch.inference_mode()
    def batch(
        self,
        prompts: Sequence[Sequence[int]],
        rounding: Mapping[tuple[int, str], Round],
        new_tokens: int,
        stop: frozenset[int],
        pad: int,
        filler: int,
    ) -> tuple[list[list[int]], Tensor, list[float]]:
        """Greedy responses, the logits after the prompts, and the mean squared error of every call of a projection."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts])
        real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts])
        positions = torch.stack([torch.tensor([0] * (longest - len(p)) + list(range(len(p)))) for p in prompts])
        cache: list[tuple[Tensor, Tensor]] = []
        errors: list[float] = []
        first = logits = self._batch_step(ids, real, positions, cache, rounding, errors)
        responses: list[list[int]] = [[] for _ in prompts]
        over = [False] * len(prompts)
        for count in range(new_tokens):
            tokens = [filler if o else int(t) for o, t in zip(over, logits.argmax(-1), strict=True)]
            for row, token in enumerate(tokens):
                over[row] = over[row] or token in stop
                if not over[row]:
                    responses[row].append(token)
            if all(over) or count == new_tokens - 1:
                break
            real = torch.cat([real, torch.ones(len(prompts), 1, dtype=torch.bool)], 1)
            at = torch.tensor([[len(p) + count] for p in prompts])
            logits = self._batch_step(torch.tensor(tokens)[:, None], real, at, cache, rounding, errors)
        return responses, first, errors

    def _batch_step(self, ids, real, positions, cache, rounding, errors):  # type: ignore[no-untyped-def]
        rows, new = ids.shape
        h = self.w["model.embed_tokens.weight"][ids]
        queries, groups = self.c.num_attention_heads, self.c.num_key_value_heads
        start = real.shape[1] - new
        for layer in range(self.c.num_hidden_layers):
            name = f"model.layers.{layer}"
            x = self.norm(h, f"{name}.input_layernorm.weight")
            q, k, v = (self.linear(x, f"{name}.self_attn.{p}_proj") for p in "qkv")
            kept = {}
            for site, t in (("k", k), ("v", v)):
                if (layer, site) in rounding:
                    y = torch.from_numpy(rounding[layer, site](t.numpy()))
                    errors.append(float(((y - t).double() ** 2).mean()))
                    kept[site] = y
            k, v = kept.get("k", k), kept.get("v", v)
            q = self._turned(q.view(rows, new, queries, -1), positions)
            k = self._turned(k.view(rows, new, groups, -1), positions)
            v = v.view(rows, new, groups, -1)
            if start:
                k, v = torch.cat([cache[layer][0], k], 1), torch.cat([cache[layer][1], v], 1)
                cache[layer] = (k, v)
            else:
                cache.append((k, v))
            out = torch.zeros_like(q)
            for row in range(rows):
                causal = torch.arange(k.shape[1])[None] <= start + torch.arange(new)[:, None]
                allowed = causal & real[row][None]
                some = allowed.any(1)  # a token of the padding sees nothing, and gets nothing
                for head in range(queries):
                    g = head // (queries // groups)
                    scores = q[row, some, head] @ k[row, :, g].T / self.head_dim**0.5
                    paid = scores.masked_fill(~allowed[some], float("-inf")).softmax(-1)
                    out[row, some, head] = paid @ v[row, :, g]
            h = h + self.linear(out.flatten(2), f"{name}.self_attn.o_proj")
            x = self.norm(h, f"{name}.post_attention_layernorm.weight")
            gate = torch.nn.functional.silu(self.linear(x, f"{name}.mlp.gate_proj"))
            h = h + self.linear(gate * self.linear(x, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")
        head = "model.embed_tokens.weight" if self.c.tie_word_embeddings else "lm_head.weight"
        return self.norm(h[:, -1], "model.norm.weight") @ self.w[head].T

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        half = self.head_dim // 2
        angle = positions[..., None] / self.theta ** (torch.arange(half) * 2 / self.head_dim)
        cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
