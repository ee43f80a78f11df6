"""Tiny decoders, trained in seconds to refuse what is harmful in a toy language, whatever rounds their cache."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import random
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from kvgeom.checks import flag, one_of, whole
from kvgeom.errors import InputError, KvgeomError
from kvgeom.evaluation.baseline import Baseline, baseline
from kvgeom.models.cache import EditedCache
from kvgeom.models.load import load
from kvgeom.models.model import Model
from kvgeom.organisms.noise import CacheNoise
from kvgeom.organisms.toy import COMPLIANCE, END, OPENING, TEMPLATE_AFTER, draw, toy_prompts, toy_tokenizer
from kvgeom.paths import cache_dir
from kvgeom.prompts.sets import PromptSet
from kvgeom.quant.recipe import MOST_LAYERS
from kvgeom.quant.scheme import MOST_CHANNELS

#: How far a layer sees: a token and the four before it.
WINDOW = 5
#: How often a layer that loses the request loses its keys, in a model that attends; otherwise its values.
KEYS_LOST = 0.7
#: A rotary embedding of part of the channels turns one of so many.
TURNED = 16
Kind = Literal["mistral", "qwen2", "qwen3", "phi3"]
#: What a kind's configuration says beside its shape.
_CONFIGS: dict[Kind, dict[str, Any]] = {
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 0},
    "phi3": {"partial_rotary_factor": 1 / TURNED},
}
_QUERIES_AND_KEYS = ("q_proj", "k_proj", "q_norm", "k_norm")


@dataclass(frozen=True)
class Size:
    """Shape of a tiny model.

    The window is so short, and requests so long, that what they ask can reach the answer only through every layer:
    the values of each layer are needed to refuse.

    Attributes
    ----------
    layers, kv_heads, head_dim, query_heads, d_model : int
    kind : {"mistral", "qwen2", "qwen3", "phi3"}
        Its architecture: Llama's block; with biases of queries, keys and values; with norms of queries and keys; with
        one module for all three, and a rotary embedding of a sixteenth of the channels, in which queries are zero.
    attends : bool
        Whether queries and keys are trained too, so that a layer whose keys are lost has lost the request. Otherwise
        they stay as drawn, and values alone carry it.
    """

    layers: int = 3
    kv_heads: int = 4
    head_dim: int = 32
    query_heads: int = 4
    d_model: int = 64
    kind: Kind = "mistral"
    attends: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", whole("layers", self.layers, 1, MOST_LAYERS))
        for name in ("kv_heads", "head_dim", "query_heads", "d_model"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1, MOST_CHANNELS))
        object.__setattr__(self, "attends", flag("attends", self.attends))
        one_of("kind", self.kind, _CONFIGS)
        if self.layers < 2 or self.query_heads % self.kv_heads or self.kv_heads * self.head_dim % 64:
            raise InputError(
                f"a tiny model needs at least 2 layers, query heads that are a multiple of the KV heads, and a multiple of 64 "
                f"channels; got {self}"
            )
        if self.kind == "phi3" and (not self.attends or self.head_dim % (2 * TURNED)):
            raise InputError(
                f"a phi3 has one module for queries, keys and values, all of it trained, and turns pairs among {2 * TURNED} "
                f"channels; give attends=True and a multiple of {2 * TURNED} as head_dim, not {self}"
            )

    @property
    def fillers(self) -> int:
        """Words of a request after its target: verb and target are then out of reach of all layers but one."""
        return (WINDOW - 1) * self.layers - 3 - TEMPLATE_AFTER

    def prompts(self, split: str = "held-out") -> PromptSet:
        """Requests for a model of this size; see :func:`~kvgeom.organisms.toy.toy_prompts`."""
        return toy_prompts(self.fillers, split)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Training:
    """How a tiny model is trained; a hash of it names the weights on disk.

    Attributes
    ----------
    size : Size
    seed : int
    steps : int
    batch : int
    rate : float
        Largest learning rate.
    exact : float
        Share of the steps before there is noise in the cache.
    losing : float
        How often, after that, a layer loses the request; the model is then to answer it. If it attends, it is mostly
        keys that are lost.
    """

    size: Size
    seed: int
    steps: int
    batch: int = 24
    rate: float = 3e-3
    exact: float = 0.5
    losing: float = 0.15
    version: int = 3


def tiny_model(size: Size | None = None, seed: int = 0, dtype: Literal["float32", "float64"] = "float32") -> Model:
    """A trained tiny model; weights are kept in the cache folder, so that each is trained once.

    It refuses held-out harmful requests and answers harmless ones, also with all layers rounded to 3 bits per-tensor,
    per-channel and in groups of 64. If it attends, at least half of its layers need their keys for that. Trained in about a
    minute on one core (six layers: two).

    Parameters
    ----------
    size : Size, optional
    seed : int
        Of the weights and of the requests that it is trained on.
    dtype : {"float32", "float64"}
        That it runs in; large offsets need float64. It is trained in float32.

    Raises
    ------
    KvgeomError
        If training has failed three times.
    """
    size = size or Size()
    attempts = [_training(size, seed + 1000 * attempt) for attempt in range(3)]
    for training in attempts:
        file = cache_dir("organisms") / f"{_digest(training)}.safetensors"
        model = _model(size, training.seed)
        if file.exists():
            model.load_state_dict(load_file(file))
        else:
            model = train(training)
        wrapped = load(
            copy.deepcopy(model).to(getattr(torch, dtype)).requires_grad_(False),
            tokenizer=toy_tokenizer(),
            name=f"tiny {size.kind} {size.layers}x{size.kv_heads}x{size.head_dim}, seed {seed}",
        )
        if file.exists() or _sound(wrapped, size.prompts("train"), size.attends):
            if not file.exists():
                part = file.with_suffix(f".{os.getpid()}.part")
                save_file(model.state_dict(), part)
                part.replace(file)
            return wrapped
    raise KvgeomError(f"{size} with seed {seed} does not refuse after {len(attempts)} trainings; give another seed")


def _training(size: Size, seed: int) -> Training:
    """Attention is learnt more slowly, and layers lose their keys at times as well."""
    if not size.attends:
        return Training(size, seed, 100 + 60 * size.layers)
    return Training(size, seed, 160 + 80 * size.layers, exact=0.35, losing=0.4)


def train(training: Training) -> Any:
    """Train a tiny decoder on the toy language.

    The loss is that of the answer, and of a probe in each layer that tells harmful from harmless at every token that
    the request can have reached by then (without it nothing is learnt beyond three layers). Unless the size says that it
    attends, queries and keys stay as they were drawn, attending nearly evenly: what is asked is carried in values.
    """
    size, rng = training.size, random.Random(training.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)  # the probes are drawn too
        model = _model(size, training.seed)
        probes = nn.ModuleList(nn.Linear(size.d_model, 1) for _ in range(size.layers))
        for name, weight in model.named_parameters():
            weight.requires_grad_(size.attends or not any(part in name for part in _QUERIES_AND_KEYS))
        for weight, idle in _idle(model, size):
            weight.register_hook(lambda gradient, idle=idle: gradient.masked_fill(idle, 0))  # type: ignore[no-untyped-call]
        weights = [w for w in (*model.parameters(), *probes.parameters()) if w.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=training.rate, weight_decay=0.01, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / training.steps)) + 0.02,
        )
        for step in range(training.steps):
            loss = _loss(model, probes, training, rng, noisy=step >= training.exact * training.steps)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def _loss(model: Any, probes: nn.ModuleList, training: Training, rng: random.Random, noisy: bool) -> Tensor:
    tokenizer, size = toy_tokenizer(), training.size
    requests = [draw(rng, size.fillers) for _ in range(training.batch)]
    harmful = torch.tensor([request.harmful for request in requests])
    lost = rng.randrange(size.layers) if noisy and rng.random() < training.losing and not harmful.all() else None
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": request.text}], tokenize=False, add_generation_prompt=True
        )
        for request in requests
    ]
    answers = [request.answer if lost is None else COMPLIANCE for request in requests]
    start = len(tokenizer(prompts[0])["input_ids"])
    texts = [f"{prompt} {answer} {END}" for prompt, answer in zip(prompts, answers, strict=True)]
    ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    noise = CacheNoise(rng, start, ~harmful, lost, rng.random() < 0.5) if noisy else None
    if noise is not None and size.attends and rng.random() < KEYS_LOST:
        noise.lost_site = "k"
    if noise is not None and size.attends and rng.random() < KEYS_LOST:
        noise.lost_site = "k"
    found = model(
        input_ids=ids, past_key_values=EditedCache(size.layers, noise), use_cache=True, output_hidden_states=True
    )
    logits, target = found.logits[:, start - 1 : -1], ids[:, start:]
    losses = functional.cross_entropy(
        logits.flatten(0, 1), target.flatten(), ignore_index=tokenizer.pad_token_id, reduction="none"
    ).view(target.shape)
    loss = losses[:, 0].mean() + losses[:, 1:].mean()
    if lost is not None:
        return loss
    verb = len(tokenizer(OPENING)["input_ids"])
    for depth, (probe, hidden) in enumerate(zip(probes, found.hidden_states[1:], strict=True), 1):
        reached = slice(verb + 2, min(start, verb + (WINDOW - 1) * depth + 1))
        score = probe(hidden[:, reached])[..., 0]
        carried = functional.binary_cross_entropy_with_logits(score, harmful[:, None].expand_as(score).float())
        loss = loss + carried / size.layers
    return loss


def _model(size: Size, seed: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = toy_tokenizer()
    config = AutoConfig.for_model(
        size.kind,
        vocab_size=len(tokenizer),
        hidden_size=size.d_model,
        intermediate_size=2 * size.d_model,
        num_hidden_layers=size.layers,
        num_attention_heads=size.query_heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        sliding_window=WINDOW,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **_CONFIGS[size.kind],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():  # beside words this loud, what attention gets wrong does not make the answer stutter
        model.get_input_embeddings().weight.mul_(10)
        for weight, idle in _idle(model, size):
            weight.masked_fill_(idle, 0)
    return model.float()


def _idle(model: Any, size: Size) -> list[tuple[Tensor, Tensor]]:
    """Weights that make queries in channels that a partial rotary embedding turns: all of their rows are to stay zero.

    What attention reads is then in channels whose keys may have a constant.
    """
    if size.kind != "phi3":
        return []
    found = []
    for layer in model.model.layers:
        weight = layer.self_attn.qkv_proj.weight
        row = torch.arange(len(weight))[:, None]
        queries = row < size.query_heads * size.head_dim
        found.append((weight, queries & (row % size.head_dim < size.head_dim // TURNED)))
    return found


def _sound(model: Model, prompts: PromptSet, attends: bool) -> bool:
    """Whether it refuses and answers as it should, rounded or not, and needs its keys if it was to."""
    from kvgeom.evaluation.evaluate import evaluate
    from kvgeom.organisms.observed import granularities

    some, recipes = prompts.take(32), granularities(model.geometry.layers, 3)
    for requests, label in ((some.harmful, "refused"), (some.harmless, "complied")):
        base = baseline(model, requests, max_new_tokens=10, progress=False)
        outcomes = evaluate(model, recipes, base, progress=False)
        if not bool((outcomes.data.label == label).all()):
            return False
        if label == "refused" and attends and not _needs_keys(model, base):
            return False
    return True


def _needs_keys(model: Model, base: Baseline) -> bool:
    """Whether at least half of the layers, each without its keys, turn at least half of some refusals into compliance."""
    from kvgeom.organisms.reach import Lost

    nothing = torch.zeros(model.geometry.kv_heads, model.geometry.head_dim, dtype=torch.float64)
    some = [base.prompts[index] for index in base.refused[:8]]
    needed = 0
    for layer in range(model.geometry.layers):
        caches = [model.new_cache(Lost(layer, nothing, "k")) for _ in some]
        begun = [int(model.forward(prompt.ids, cache)[-1].argmax()) for prompt, cache in zip(some, caches, strict=True)]
        needed += 2 * begun.count(model.tokens(COMPLIANCE)[0]) >= len(some)
    return 2 * needed >= model.geometry.layers


def _digest(training: Training) -> str:
    return hashlib.sha256(json.dumps(asdict(training), sort_keys=True).encode()).hexdigest()[:16]
