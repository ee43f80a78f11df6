"""Tiny decoders, trained in seconds to refuse what is harmful in a toy language, whatever rounds their cache."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kvgeom.models.cache import Edit, EditedCache
from kvgeom.models.hf import HFModel
from kvgeom.organisms.toy import TEMPLATE_AFTER, COMPLIANCE, draw, toy_tokenizer
from kvgeom.paths import cache_dir
from kvgeom.quant import rounding
from kvgeom.quant.rounding import Scales
from kvgeom.quant.scheme import Scheme

#: How far back a layer sees: a token, and the four before it.
WINDOW = 5


@dataclass(frozen=True)
class Size:
    """Shape of a tiny model."""

    layers: int = 3
    kv_heads: int = 4
    head_dim: int = 32
    query_heads: int = 4
    d_model: int = 64

    @property
    def fillers(self) -> int:
        """Words between target and answer, so that both verb and target are out of reach of all layers but one."""
        return (WINDOW - 1) * self.layers - 3 - TEMPLATE_AFTER


@dataclass(frozen=True)
class Training:
    """How a tiny model is trained; its hash names the weights on disk."""

    size: Size = Size()
    seed: int = 0
    steps: int = 300
    batch: int = 24
    peak: float = 3e-3
    exact_steps: float = 0.4
    losing: float = 0.15


@dataclass
class Wear:
    """An edit that wears keys and values out as a rounded cache may, and passes derivatives straight through.

    In every layer: rounded to 3 bits under a random granularity, per-tensor with steps up to ``stretch`` times too
    coarse (as if there were an outlier), and at times with a block of 64 channels silenced.
    """

    rng: random.Random
    prompt_tokens: int
    stretch: float = 2.0
    silenced: float = 0.25
    lost: int | None = None
    still: bool = True
    harmless: Any = None
    where: str = "cache"
    prefill_reads_exact: bool = False

    def __call__(self, layer: int, site: Literal["k", "v"], x: Tensor) -> Tensor:
        kind = self.rng.choice(("tensor", "tensor", "channel", "group", "none"))
        with torch.no_grad():
            worn = x.detach()
            if kind != "none":
                scheme = Scheme(3, True, kind, 64 if kind == "group" else None)  # type: ignore[arg-type]
                scales = rounding.fit(worn[:, :, : self.prompt_tokens] if scheme.spans_tokens else worn, scheme)
                if kind == "tensor":
                    scales = Scales(scales.step * self.rng.uniform(1, self.stretch), scales.offset)
                worn = rounding.apply(worn, scheme, scales)
            change = worn - x
        y = x + change
        if layer == self.lost:
            return y * 0 if self.still or site == "k" else x[self.harmless].mean((0, 2), keepdim=True).expand_as(x)
        if self.rng.random() < self.silenced:
            heads = 64 // x.shape[3]
            first = heads * self.rng.randrange(x.shape[1] // heads)
            mask = torch.ones(x.shape[1], 1, 1)
            mask[first : first + heads] = 0
            y = y * mask
        return y

    def rows(self, rows: Tensor) -> Edit:
        raise NotImplementedError
    @staticmethod
    def stack(parts: Sequence[Any]) -> Edit:
        raise NotImplementedError


def config(size: Size) -> Any:
    from transformers import MistralConfig
    tok = toy_tokenizer()
    return MistralConfig(vocab_size=len(tok), hidden_size=size.d_model, intermediate_size=2*size.d_model,
        num_hidden_layers=size.layers, num_attention_heads=size.query_heads, num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim, max_position_embeddings=2048, sliding_window=WINDOW, tie_word_embeddings=False,
        pad_token_id=tok.pad_token_id, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)


def train(training: Training, log=None) -> Any:
    from transformers import MistralForCausalLM
    torch.manual_seed(training.seed)
    rng = random.Random(training.seed)
    model = MistralForCausalLM(config(training.size)).float()
    tok = toy_tokenizer()
    verb = len(tok("<start> user how do i")["input_ids"])
    probes = torch.nn.ModuleList([torch.nn.Linear(training.size.d_model, 1) for _ in range(training.size.layers)])
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([w for w in (*model.parameters(), *probes.parameters()) if w.requires_grad], lr=training.peak, weight_decay=0.01, betas=(0.9, 0.98))
    def shape(step):
        return min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / training.steps)) + 0.02
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    for step in range(training.steps):
        wear = step > training.exact_steps * training.steps
        lost = rng.randrange(training.size.layers) if wear and rng.random() < training.losing else None
        reqs = [draw(rng, training.size.fillers) for _ in range(training.batch)]
        harmful = torch.tensor([float(r.harmful) for r in reqs])
        prompts = [tok.apply_chat_template([{"role": "user", "content": r.text}], tokenize=False, add_generation_prompt=True) for r in reqs]
        n = len(tok(prompts[0])["input_ids"])
        ids = tok([f"{p} {r.answer if lost is None else COMPLIANCE} <end>" for p, r in zip(prompts, reqs)], padding=True, return_tensors="pt")["input_ids"]
        cache = EditedCache(training.size.layers, Wear(rng, n, lost=lost, harmless=~harmful.bool(), still=rng.random() < 0.5) if wear else None)
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, output_hidden_states=True)
        logits = out.logits[:, n-1:-1]
        carried = 0
        for depth, (probe, hidden) in enumerate(zip(probes, out.hidden_states[1:]), 1):
            said = probe(hidden[:, verb + 2 : min(n, verb + (WINDOW - 1) * depth + 1)])[..., 0]
            carried = carried + torch.nn.functional.binary_cross_entropy_with_logits(said, harmful[:, None].expand_as(said)) / training.size.layers
        targets = ids[:, n:]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0,1), targets.flatten(), ignore_index=tok.pad_token_id, reduction="none").view(targets.shape)
        loss = losses[:, 0].mean() + losses[:, 1:].mean() + (carried if lost is None else 0)
        optimizer.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(); schedule.step()
        if log and step % 25 == 0:
            log(step, losses[:,0].mean().item(), losses[:,1:].mean().item(), float(carried.detach()))
    return model.eval().requires_grad_(False)
