"""Rounding errors followed through attention: to the scores, to who is attended, to the outputs of heads, and on to refusal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from einops import einsum, rearrange, reduce
from numpy.typing import NDArray
from torch import Tensor

from kvgeom.checks import suggests
from kvgeom.errors import InputError, brief
from kvgeom.evaluation.config import LOAD_OPTIONS
from kvgeom.evaluation.inputs import as_tokens, made_with, opened
from kvgeom.evaluation.scores import margin
from kvgeom.geometry.attention import variance
from kvgeom.geometry.rounding import DEFAULT_SCHEME, CacheSpec, Rounding
from kvgeom.models.attention import scores, seen, weights
from kvgeom.models.model import AttentionRule, Model
from kvgeom.models.reading import read
from kvgeom.progress import shown, track
from kvgeom.quant.placement import Placement
from kvgeom.results import Result

SITES = ("k", "v")
#: Over what each number of :func:`through_attention` is, beside the layer; those by channel and token are of KV heads.
_HEADS = ("score_error", "score_gap", "attention_moved")
_HEAD_SITES = ("output_error", "margin_drop", "first_order", "direction_shift")
_TOKENS = ("token_drop", "reader_drop")
_CHANNELS = ("channel_margin_drop", "channel_first_order", "channel_direction_shift", "channel_error")


@dataclass(frozen=True, repr=False)
class ErrorPaths(Result):
    """What rounding errors become on their way through attention. Made by :func:`follow_errors`.

    Keys and values are rounded one at a time, layer by layer; queries, and all that the error does not pass, are exact.
    ``data`` has the dimensions ``prompt``, ``layer``, ``query_head``, ``site`` (``"k"``, ``"v"``), ``channel`` (of the cache) and
    ``token`` (counted from the end of the prompt: -1 is the last, from which the first response token is predicted). Over
    (prompt, layer, query_head), of the last token's query:

    - ``score_error`` (nats): standard deviation of the error of its scores under its attention. A shift of all scores is none;
    - ``score_gap`` (nats): by how much the scores of the tokens that it attends to exceed the mean of all that it sees;
    - ``attention_moved``: share of its attention that goes to other tokens than before (total variation);

    over these and ``site``:

    - ``output_error``: squared error of the head's output at the last token, over the squared output;
    - ``margin_drop`` (nats): what the errors of the head's outputs at all tokens cost, by the gradient of the refusal margin.
      The softmax is computed, not linearized; what comes after it is. ``first_order`` linearizes both, and adds up to
      :func:`~kvgeom.geometry.causal.first_order`. NaN without refusal tokens;
    - ``direction_shift``: inner product of the direction with the error of what the head writes into the residual stream at
      the last token. NaN without directions;

    over (layer, site, channel), means of the prompts, each channel rounded alone:

    - ``channel_margin_drop``, ``channel_first_order`` (nats), ``channel_direction_shift``: the same by channel, sums over
      the heads that read it;
    - ``channel_error``: root mean square over these heads, of keys the ``score_error`` (nats), of values the error of the
      head's output relative to its norm;

    and over (prompt, layer, site, token), NaN where the prompt is shorter:

    - ``token_drop`` (nats): ``first_order`` by the token whose key or value is rounded;
    - ``reader_drop`` (nats): ``margin_drop`` by the token that reads it.
    """

    kind: ClassVar[str] = "error-paths"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "heads": ("prompt", "layer", "query_head", "site"),
        "channels": ("layer", "site", "channel"),
        "tokens": ("prompt", "layer", "site", "token"),
    }

    @property
    def by_layer(self) -> xr.Dataset:
        """By prompt and layer: sums of what adds up, means over heads of what does not."""
        data = self.data[[*_HEADS, *_HEAD_SITES]]
        sums = {name: data[name].sum(("query_head", "site"), skipna=False) for name in _HEAD_SITES[1:]}
        means = {name: data[name].mean("query_head") for name in _HEADS}
        return xr.Dataset({**means, "output_error": data.output_error.mean("query_head").sum("site"), **sums})

    def summary(self) -> str:
        sizes = self.data.sizes
        return f"{sizes['layer']} layers x {sizes['query_head']} query heads under {self.meta['scheme']}, {sizes['prompt']} prompts"


@suggests(LOAD_OPTIONS)
def follow_errors(
    model: Any,
    prompts: Any,
    scheme: CacheSpec = DEFAULT_SCHEME,
    refusal_tokens: Iterable[int] = (),
    *,
    directions: NDArray[np.floating] | None = None,
    placement: Placement | str | None = None,
    progress: bool = True,
    **load_options: Any,
) -> ErrorPaths:
    """Follow the rounding errors of all layers, heads and channels through attention.

    Costs two forward passes and a backward pass a prompt, and the arithmetic of the scores once more for each channel of a head.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts : EncodedPrompts, requests, or the name of a set
    scheme : CacheConfig, Recipe, Scheme or str
        Anything that :func:`kvgeom.engines.registry.resolve` takes; see :class:`~kvgeom.geometry.rounding.Rounding`.
        3-bit symmetric per-tensor by default.
    refusal_tokens : iterable of int
        Without any, nothing is said of margins.
    directions : array [d_model] or [layers, d_model], optional
        Towards refusal, in the residual stream: the same for all layers, or one for each. They are taken as they are, so that
        of a class difference over its squared length, shifts are shares of the class difference.
    placement : Placement or {"cache"}, optional
        Instead of the preset's, or of the decode-faithful default.
    **load_options
        Of :func:`kvgeom.load`.

    Raises
    ------
    InputError
        Without prompts, for directions of another shape, if ``scheme`` cannot be resolved, or for a placement at the projection.
    ModelError
        If the model's attention, or the outputs of its heads, cannot be rebuilt from queries, keys and values.
    """
    model, prompts = opened(model, prompts, load_options, progress)
    tokens = as_tokens(model, refusal_tokens)
    rounding = Rounding.in_cache(model, scheme, placement)
    geometry = model.geometry
    geometry.check_alike(model.name)
    given = None if directions is None else _directions(directions, (geometry.layers, geometry.d_model))
    longest = max(len(prompt) for prompt in prompts)
    heads, layers = geometry.query_heads, len(geometry.stores)
    shapes = {
        **dict.fromkeys(_HEADS, (heads,)),
        **dict.fromkeys(_HEAD_SITES, (heads, 2)),
        **dict.fromkeys(_TOKENS, (2, longest)),
    }
    found = {name: np.full((len(prompts), layers, *shape), np.nan) for name, shape in shapes.items()}
    channels = {name: np.zeros((layers, 2, geometry.channels)) for name in _CHANNELS}
    with shown(progress):
        for row, prompt in enumerate(track(prompts, "errors through attention", len(prompts))):
            for at, numbers in enumerate(_layers(model, prompt, rounding, tokens, given)):
                for name, values in numbers.items():
                    if name in channels:
                        channels[name][at] += (values**2 if name == "channel_error" else values) / len(prompts)
                    elif name in _TOKENS:
                        found[name][row, at, :, longest - values.shape[-1] :] = values
                    else:
                        found[name][row, at] = values
    channels["channel_error"] **= 0.5
    dims = {
        **dict.fromkeys(_HEADS, ("prompt", "layer", "query_head")),
        **dict.fromkeys(_HEAD_SITES, ("prompt", "layer", "query_head", "site")),
        **dict.fromkeys(_TOKENS, ("prompt", "layer", "site", "token")),
        **dict.fromkeys(_CHANNELS, ("layer", "site", "channel")),
    }
    data = xr.Dataset(
        {name: (dims[name], values) for name, values in (found | channels).items()},
        coords={
            "prompt": np.arange(len(prompts)),
            "layer": list(geometry.stores),
            "query_head": np.arange(heads),
            "site": list(SITES),
            "token": np.arange(-longest, 0),
            "channel": np.arange(geometry.channels),
        },
    )
    meta = {
        **made_with(model, [prompt.text for prompt in prompts]),
        **rounding.made,
        "head_dim": geometry.head_dim,
        "kv_heads": geometry.kv_heads,
    }
    return ErrorPaths(data, meta)


def _directions(given: Any, shape: tuple[int, int]) -> Tensor:
    """Directions as a tensor; the same for all layers or one for each."""
    try:
        found = np.asarray(given, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        found = np.empty(0, dtype=np.float32)
    if found.shape not in (shape, shape[1:]) or not np.isfinite(found).all():
        raise InputError(
            f"directions must have shape [{shape[1]}] or [{shape[0]}, {shape[1]}] and be finite, got {brief(given)}"
        )
    return torch.as_tensor(found)


def _layers(model: Model, prompt: Any, rounding: Rounding, tokens: frozenset[int], directions: Tensor | None) -> Any:
    """The numbers of every layer for one prompt."""
    heads: Mapping[int, Any] = {}
    if tokens or directions is not None:
        score = (lambda logits: margin(logits, tokens)) if tokens else torch.sum
        heads = model.gradients(prompt.ids, score, heads=True, directions=directions).heads
    for one in read(model, prompt, queries=True):
        layer, k, v = one.layer, one.k[0].float(), one.v[0].float()
        k_error, v_error = rounding.errors(one)
        own = heads.get(layer)
        grad = own.grad if own is not None and tokens else None
        along = own.along if own is not None else None
        yield through_attention(one.queries, k, v, k_error, v_error, model.attention(layer), grad, along)


def through_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_error: Tensor,
    v_error: Tensor,
    rule: AttentionRule,
    grad: Tensor | None = None,
    along: Tensor | None = None,
) -> dict[str, NDArray[np.float64]]:
    """What errors of one layer's keys and values become; see :class:`ErrorPaths`.

    Parameters
    ----------
    q : Tensor [query_heads, tokens, head_dim]
        In the frame of ``k``.
    k, v, k_error, v_error : Tensor [kv_heads, tokens, head_dim]
    rule : AttentionRule
    grad, along : Tensor [query_heads, tokens, head_dim], optional
        Derivative of the margin, and of the projection on a direction, by the outputs of the heads.

    Returns
    -------
    dict of str to array
        ``[query_heads]`` and ``[query_heads, 2]``; by channel ``[2, kv_heads * head_dim]``; by token ``[2, tokens]``.
    """
    kv_heads, group = len(k), len(q) // len(k)
    k, v, k_error, v_error = (x.repeat_interleave(group, 0) for x in (k, v, k_error, v_error))
    exact = scores(q, k, rule)
    shift = scores(q, k + k_error, rule) - exact
    paid, paid_rounded = weights(exact, rule), weights(exact + shift, rule)
    output = paid @ v
    errors = torch.stack([(paid_rounded - paid) @ v, paid @ v_error])  # [site, head, token, channel]

    def flat(x: Tensor) -> NDArray[np.float64]:
        """``[site, query_head, channel]`` summed over the query heads of a KV head."""
        summed = reduce(x.double(), "site (kv group) channel -> site (kv channel)", "sum", kv=kv_heads)
        return summed.cpu().numpy()

    last, size = paid[:, -1], (output[:, -1] ** 2).sum(-1)
    # One row for each channel that is rounded alone, at the last query.
    slope = rule.scale if rule.softcap is None else rule.scale * (1 - (exact / rule.softcap) ** 2)
    alone = einsum(q[:, -1], k_error, "head channel, head token channel -> head channel token")
    alone = alone * (slope if isinstance(slope, float) else slope[:, -1, None])
    by_score = torch.sqrt(variance(last[:, None], alone, rule)) / group**0.5
    by_output = (errors[1, :, -1] / size.sqrt()[:, None]).abs() / group**0.5
    found = {
        "score_error": variance(last, shift[:, -1], rule).sqrt(),
        "score_gap": _gap(last, exact[:, -1], rule),
        "attention_moved": _moved(last, paid_rounded[:, -1]),
        "output_error": rearrange((errors[:, :, -1] ** 2).sum(-1) / size, "site head -> head site"),
    }
    numbers = {name: values.double().cpu().numpy() for name, values in found.items()}
    numbers["channel_error"] = np.sqrt(flat(torch.stack([by_score**2, by_output**2])))
    if grad is not None:
        lost = -(errors * grad).sum(-1)  # [site, head, token]
        numbers["margin_drop"] = rearrange(lost.double().sum(-1), "site head -> head site").cpu().numpy()
        numbers["reader_drop"] = lost.double().sum(1).cpu().numpy()
        toward = grad @ v.transpose(-1, -2)  # what it would be worth to attend to each token
        pull = -paid * (toward - (grad * output).sum(-1, keepdim=True)) * slope
        of_keys = (pull.transpose(-1, -2) @ q) * k_error  # [head, token, channel]
        of_values = -(paid.transpose(-1, -2) @ grad) * v_error
        both = torch.stack([of_keys, of_values])
        numbers["token_drop"] = both.double().sum((1, 3)).cpu().numpy()
        numbers["first_order"] = rearrange(both.double().sum((2, 3)), "site head -> head site").cpu().numpy()
        numbers["channel_first_order"] = flat(both.sum(2))
        numbers["channel_margin_drop"] = flat(
            torch.stack([-_each_channel(q, k, k_error, rule, paid, toward), of_values.sum(1)])
        )
    if along is not None:
        along = along[:, -1:]
        numbers["direction_shift"] = rearrange((errors[:, :, -1:] * along).sum((2, 3)), "site head -> head site").double().cpu().numpy()  # fmt: skip
        toward = along @ v.transpose(-1, -2)
        shifts = _each_channel(q[:, -1:], k, k_error, rule, last[:, None], toward)
        numbers["channel_direction_shift"] = flat(torch.stack([shifts, (errors[1, :, -1:] * along)[:, 0]]))
    return numbers


def _each_channel(q: Tensor, k: Tensor, k_error: Tensor, rule: AttentionRule, paid: Tensor, toward: Tensor) -> Tensor:
    """What attention gains of what it is worth to attend to each token, ``[head, channel]``, if one channel alone is rounded.

    Parameters
    ----------
    q, paid, toward : Tensor [head, queries, channels or tokens]
    """
    raw = q @ k.transpose(-1, -2)
    gains = []
    for channel in range(q.shape[-1]):
        shifted = raw + q[..., channel, None] * k_error[:, None, :, channel]
        capped = shifted * rule.scale
        capped = capped if rule.softcap is None else rule.softcap * torch.tanh(capped / rule.softcap)
        gains.append(((weights(capped, rule) - paid) * toward).sum((1, 2)))
    return torch.stack(gains, -1)


def _gap(paid: Tensor, scored: Tensor, rule: AttentionRule) -> Tensor:
    """Mean score under attention, less the mean of all tokens that the last query sees."""
    open_to = seen(1, scored.shape[-1], rule)[0].to(scored.device)
    inside = scored.masked_fill(~open_to, 0)
    return (paid * inside).sum(-1) / paid.sum(-1) - inside.sum(-1) / open_to.sum()


def _moved(paid: Tensor, rounded: Tensor) -> Tensor:
    to_sinks = (paid.sum(-1) - rounded.sum(-1)).abs()
    return ((paid - rounded).abs().sum(-1) + to_sinks) / 2
