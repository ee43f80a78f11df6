"""The decoder of a loaded transformers model: its layers, what each of them stores, and of which shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, DynamicLayer
from transformers.cache_utils import (
    DummyLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from kvgeom.errors import ModelError, reason
from kvgeom.models.cache import Edit, EditedCache, EditedLayer
from kvgeom.models.chat import ANY_LENGTH
from kvgeom.models.modules import attention_of

#: What a model may raise that does not run with our cache.
FAILURES = (
    *(TypeError, ValueError, AttributeError, ArithmeticError),
    *(RuntimeError, LookupError, NotImplementedError, AssertionError),
)

#: Rotary embeddings whose frequencies change with the longest sequence, as transformers names them.
MOVING_ROPES = ("longrope", "dynamic")
#: Logits of one step that differ by no more than this share of the largest are those of one sequence.
_SAME = 1e-2


@dataclass(frozen=True)
class Decoder:
    """The decoder layers of a model; made by :func:`find_decoder`.

    Attributes
    ----------
    name : str
        Of the model, for messages.
    layers : tuple of nn.Module
        All of them, first to last.
    kinds : tuple of layers of a cache
        What each layer stores into: an empty layer of a cache, edited where it takes keys and values.
    shapes : mapping of layer number to (heads and channels of keys, those of values)
        Of the layers that store keys and values.
    attentions : mapping of layer number to nn.Module
        The attention of each of these.
    batches : bool
        Whether sequences can be decoded together, padded on the left to the longest.
    batches_up_to : int
        Tokens that the longest of them may have for that; beyond, it decides about the others as well.
    """

    name: str
    layers: tuple[nn.Module, ...]
    kinds: tuple[Any, ...]
    shapes: Mapping[int, tuple[int, int, int, int]]
    attentions: Mapping[int, nn.Module]
    batches: bool = True
    batches_up_to: int = ANY_LENGTH

    def alone(self, caches: Sequence[EditedCache], more: int) -> bool:
        """Whether sequences must be decoded one at a time that shall have ``more`` tokens than their caches hold."""
        longest = max((cache.get_seq_length() for cache in caches), default=0) + more
        return not self.batches or longest > self.batches_up_to

    def new_cache(self, edit: Edit | None = None) -> EditedCache:
        """An empty cache."""
        return EditedCache(self.kinds, edit)

    @property
    def states(self) -> tuple[int, ...]:
        """Layers that hold recurrent or convolution states."""
        return tuple(n for n, kind in enumerate(self.kinds) if isinstance(kind, LinearAttentionLayer))

    @property
    def indexed(self) -> tuple[int, ...]:
        """Layers that hold the keys of an index beside those of their attention."""
        holding = (n for n in self.shapes if type(self.kinds[n]) is not EditedLayer)
        return tuple(n for n in holding if n not in self.states)

    @property
    def shares(self) -> tuple[int, ...]:
        """Layers that have an attention and read the keys and values of another."""
        none = (n for n, kind in enumerate(self.kinds) if n not in self.shapes and n not in self.states)
        return tuple(n for n in none if attention_of(self.layers[n]) is not None)


@torch.inference_mode()
def find_decoder(hf_model: Any, name: str) -> Decoder:
    """Find a model's decoder layers, and run a few tokens, then one more, to see what each of them stores.

    Raises
    ------
    ModelError
        If there is no list of decoder layers, the model does not run with a transformers cache, no layer stores keys and
        values in one, token by token, or the model keeps states elsewhere.
    """
    config = hf_model.config.get_text_config()
    count = int(config.num_hidden_layers)
    decoder_layers(hf_model, count, (), name)
    kinds = cache_kinds(hf_model.config, count, name)
    cache = EditedCache(kinds)
    try:
        for first, tokens in ((0, 3), (3, 1)):
            hf_model(
                input_ids=torch.zeros(1, tokens, dtype=torch.long, device=hf_model.device),
                position_ids=torch.arange(first, first + tokens, device=hf_model.device)[None],
                past_key_values=cache,
                use_cache=True,
            )
    except FAILURES as error:
        raise ModelError(f"{name} does not run with a transformers cache: {reason(error)}") from error
    filled = {index: (layer.keys, layer.values) for index, layer in cache.storing if layer.is_initialized}
    if not filled:
        raise ModelError(
            f"no layer of {name} stores keys and values in a transformers cache, so that there is nothing to round; kvgeom needs a "
            "model with attention layers"
        )
    for index, pair in filled.items():
        if any(x.ndim != 4 or x.shape[2] != 4 for x in pair):
            raise ModelError(
                f"layer {index} of {name} does not store one key and one value for each token (of 4 tokens "
                f"{' and '.join(str(tuple(x.shape)) for x in pair)}), so that kvgeom cannot round them; use another model"
            )
    shapes = {index: _shape(*pair) for index, pair in filled.items()}
    # What is never filled is no layer to round, whatever the configuration says.
    kinds = tuple(
        DummyLayer() if isinstance(kind, EditedLayer) and index not in filled else kind  # type: ignore[no-untyped-call]
        for index, kind in enumerate(kinds)
    )
    layers = tuple(decoder_layers(hf_model, count, tuple(filled), name))
    found = Decoder(name, layers, kinds, shapes, {index: attention_of(layers[index]) for index in shapes})
    # An index picks among tokens that are padded, too: whether that matters depends on how long the sequences are.
    batches = not found.indexed and _decodes_together(hf_model, found)
    return replace(found, batches=batches, batches_up_to=batches_up_to(config))


def max_context(config: Any) -> int:
    """Tokens that a model can read, by its configuration; :data:`ANY_LENGTH` if it names no limit."""
    found = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    return min((int(length) for length in found if length), default=ANY_LENGTH)


def batches_up_to(config: Any) -> int:
    """Up to how many tokens nothing that a model computes of a sequence depends on the longest of its batch.

    Of rotary embeddings some have one set of frequencies for all sequences of a batch, by the longest (LongRoPE, dynamic
    NTK); and Llama 4 scales queries by places that are counted with the padding.
    """
    tuned = getattr(config, "attn_temperature_tuning", None)
    limits = (moving_rope_from(config), int(getattr(config, "floor_scale", 0) or 0) if tuned else None)
    return min((limit for limit in limits if limit is not None), default=ANY_LENGTH)


def moving_rope_from(config: Any) -> int | None:
    """Beyond how many tokens the frequencies of a rotary embedding follow the longest sequence; None if they never do."""
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for each in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        if each.get("rope_type") in MOVING_ROPES:
            own = each.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", 0)
            limits.append(int(own or config.max_position_embeddings))
    return min(limits, default=None)


def _decodes_together(hf_model: Any, decoder: Decoder) -> bool:
    """Whether two sequences of unequal length say as one batch, padded on the left, what they say alone.

    Raises
    ------
    ModelError
        If the next token of a sequence depends on what the model has read in between.
    """

    def run(tokens: list[list[int]], cache: EditedCache, past: list[int]) -> Tensor:
        longest = max(past)
        positions = [list(range(one, one + len(row))) for one, row in zip(past, tokens, strict=True)]
        seen = [[0] * (longest - one) + [1] * (one + len(row)) for one, row in zip(past, tokens, strict=True)]
        ids, places, mask = (torch.tensor(x, device=hf_model.device) for x in (tokens, positions, seen))
        padded = mask if len(tokens) > 1 else None
        found = hf_model(
            input_ids=ids, attention_mask=padded, position_ids=places, past_key_values=cache, use_cache=True
        )
        logits: Tensor = found.logits[:, -1].float()
        return logits

    embedding = getattr(hf_model.get_input_embeddings(), "weight", None)
    size = int(hf_model.config.get_text_config().vocab_size)
    size = size if embedding is None else min(size, embedding.shape[0])  # there may be more logits than embeddings
    drawn = torch.randint(size, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [drawn[:8], drawn[3:6]]

    def read(prompt: list[int]) -> EditedCache:
        cache = decoder.new_cache()
        run([prompt], cache, [0])
        return cache

    lengths = [len(prompt) for prompt in prompts]
    caches = [read(prompt) for prompt in prompts]
    both = EditedCache.stack(caches)
    between = torch.cat([run([drawn[-1:]], cache, [length]) for cache, length in zip(caches, lengths, strict=True)])
    if decoder.states:
        apart = torch.cat([run([drawn[-1:]], read(prompt), [len(prompt)]) for prompt in prompts])
        if not torch.allclose(apart, between, atol=_SAME * float(apart.abs().max())):
            raise ModelError(
                f"{decoder.name} keeps states of a sequence in its modules, not in the cache, so that sequences cannot be told apart; "
                "kvgeom needs a model whose cache holds all"
            )
    try:
        together = run([drawn[-1:]] * 2, both, lengths)
    except FAILURES:
        return False
    return torch.allclose(together, between, atol=_SAME * float(between.abs().max()))


def _shape(keys: Tensor, values: Tensor) -> tuple[int, int, int, int]:
    return keys.shape[1], keys.shape[3], values.shape[1], values.shape[3]


def cache_kinds(config: Any, count: int, name: str) -> tuple[Any, ...]:
    """An empty layer of a cache for every layer of a model, edited where it stores keys and values.

    Raises
    ------
    ModelError
        As :func:`edited`.
    """
    try:
        own = DynamicCache(config=config).layers
    except FAILURES:  # transformers knows of no special layers
        own = []
    if len(own) != count:
        own = [DynamicLayer() for _ in range(count)]  # type: ignore[no-untyped-call]
    return tuple(edited(layer, index, name) for index, layer in enumerate(own))


def edited(layer: Any, index: int, name: str) -> Any:
    """The same kind of layer of a cache, whose keys and values pass an edit; all else that it holds stays exact.

    Layers with a sliding window keep the whole sequence, for the mask of the attention hides what is out of it.

    Raises
    ------
    ModelError
        If what it stores is not keys and values, states, or nothing.
    """
    kind = type(layer)
    if isinstance(layer, LinearAttentionLayer) and isinstance(layer, DynamicLayer):
        both = type("EditedStateLayer", (EditedLayer, LinearAttentionAndFullAttentionLayer), {})
        return both(index, None, number_of_states=layer.number_of_states)
    if isinstance(layer, LinearAttentionLayer | DummyLayer):
        return layer
    if kind in (DynamicLayer, DynamicSlidingWindowLayer):
        return EditedLayer(index, None)
    if isinstance(layer, DynamicLayer) and not isinstance(layer, DynamicSlidingWindowLayer):
        return type(f"Edited{kind.__name__}", (EditedLayer, kind), {})(index, None)
    raise ModelError(
        f"layer {index} of {name} stores its keys and values in a {kind.__name__}, which compresses them as they come, so that "
        "kvgeom cannot round what it holds; use another model"
    )


def decoder_layers(model: nn.Module, count: int, storing: Sequence[int], name: str) -> list[nn.Module]:
    """The decoder layers, first to last.

    Raises
    ------
    ModelError
        If there is no list of ``count`` modules of which those that store keys and values hold an attention.
    """
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    found = [m for m in found if all(attention_of(m[index]) is not None for index in storing)]
    if not found:
        raise ModelError(f"no list of {count} decoder layers with attention found in {name}")
    return list(found[-1])
