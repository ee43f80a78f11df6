"""Derivatives of a score of the next token: by keys, values and the outputs of attention heads."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvgeom.errors import InputError, ModelError
from kvgeom.models import hooks
from kvgeom.models.attention import scores, weights
from kvgeom.models.modules import attention_write

if TYPE_CHECKING:
    from kvgeom.models.hf import HFModel

Places = Mapping[tuple[int, Literal["k", "v"]], Tensor]
#: So many tokens show which module of an attention its heads are handed to.
_TOKENS = 8
#: How far what was rebuilt may be from the model's own, of its largest number: at least, and in roundings.
_OFF, _ROUNDINGS = 1e-3, 16


@dataclass(frozen=True)
class HeadOutputs:
    """What the attention heads of a layer return for one sequence, before the output projection.

    Attributes
    ----------
    output, grad : Tensor [query_heads, tokens, head_dim], float32
        The outputs, and the derivative of the score.
    along : Tensor [query_heads, tokens, head_dim], float32, or None
        Derivative, at each token, of the inner product of a direction with what the attention of this layer writes into
        the residual stream there; None where no directions were given.
    """

    output: Tensor
    grad: Tensor
    along: Tensor | None = None


@dataclass(frozen=True)
class Gradients:
    """A score of the next token, and its derivative with respect to keys and values.

    Attributes
    ----------
    score : float
    x, grad : dict of (layer, site) to Tensor [1, kv_heads, tokens, head_dim]
        The keys (``"k"``) and values (``"v"``) of every layer before anything was added to them, and the derivative.
    heads : dict of layer to HeadOutputs
        Empty unless it was asked for.
    """

    score: float
    x: dict[tuple[int, Literal["k", "v"]], Tensor]
    grad: dict[tuple[int, Literal["k", "v"]], Tensor]
    heads: Mapping[int, HeadOutputs] = field(default_factory=dict)


@dataclass
class GradientProbe:
    """An edit that adds a zero to all keys and values, with respect to which derivatives are taken.

    Attributes
    ----------
    where : {"cache", "projection"}
    added : mapping of (layer, site) to Tensor [1, kv_heads, tokens, head_dim]
        What is added besides, as a constant.
    zeros, x : dict of (layer, site) to Tensor [1, kv_heads, tokens, head_dim]
        The zeros, and the keys and values before anything was added to them.
    """

    where: str
    added: Places = field(default_factory=dict)
    zeros: dict[tuple[int, Literal["k", "v"]], Tensor] = field(default_factory=dict)
    x: dict[tuple[int, Literal["k", "v"]], Tensor] = field(default_factory=dict)
    prefill_reads_exact: bool = False

    @property
    def kind(self) -> Hashable:
        """Its own only."""
        return id(self)

    def __call__(self, layer: int, site: Literal["k", "v"], x: Tensor) -> Tensor:
        """``x``, with what is added to it, as a function of a new zero."""
        zero = torch.zeros_like(x, requires_grad=True)
        self.zeros[layer, site], self.x[layer, site] = zero, x.detach()
        added = self.added.get((layer, site))
        return x + zero if added is None else x + added.to(x) + zero

    def rows(self, rows: Tensor) -> GradientProbe:
        raise NotImplementedError("derivatives are taken of single sequences")

    @staticmethod
    def stack(parts: Sequence[Any]) -> GradientProbe:
        raise NotImplementedError("derivatives are taken of single sequences")


def gradients(
    model: HFModel,
    ids: Sequence[int],
    score: Callable[[Tensor], Tensor],
    where: Literal["cache", "projection"],
    added: Places | None,
    heads: bool,
    directions: Tensor | None,
) -> Gradients:
    """See :meth:`kvgeom.models.model.Model.gradients`."""
    if directions is not None and directions.shape not in (
        (model.geometry.d_model,),
        (model.geometry.layers, model.geometry.d_model),
    ):
        raise InputError(
            f"directions must have shape [{model.geometry.d_model}] or [{model.geometry.layers}, {model.geometry.d_model}], got "
            f"{list(directions.shape)}"
        )
    probe = GradientProbe(where, added or {})
    tokens = torch.tensor([list(ids)], device=model.device)
    outputs = head_outputs(model) if heads or directions is not None else {}
    zeros: dict[int, Tensor] = {}
    entered: dict[int, Tensor] = {}
    with torch.enable_grad(), hooks.during(_probe_inputs(outputs, zeros, entered)):
        positions = torch.arange(tokens.shape[1], device=model.device)[None]
        logits = model._run(tokens, model.new_cache(probe), positions, None, 1)
        value = score(logits[0, -1])
        wanted = [*probe.zeros.values(), *zeros.values()]
        found = [x.detach() for x in torch.autograd.grad(value, wanted)]
    by_head = {
        layer: HeadOutputs(
            _split(entered[layer], model.geometry.query_heads),
            _split(grad, model.geometry.query_heads),
            None if directions is None else _towards(model, layer, outputs[layer], entered[layer], directions),
        )
        for layer, grad in zip(zeros, found[len(probe.zeros) :], strict=True)
    }
    return Gradients(
        score=float(value.detach()), x=probe.x, grad=dict(zip(probe.zeros, found, strict=False)), heads=by_head
    )


def _probe_inputs(
    modules: Mapping[int, nn.Module], zeros: dict[int, Tensor], entered: dict[int, Tensor]
) -> Iterator[RemovableHandle]:
    """Add a zero to what enters each module, and keep both."""

    def hook(layer: int) -> Callable[..., Any]:
        def before(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            entered[layer], zeros[layer] = args[0].detach(), torch.zeros_like(args[0], requires_grad=True)
            return (args[0] + zeros[layer], *args[1:])

        return before

    for layer, module in modules.items():
        yield module.register_forward_pre_hook(hook(layer))


def _towards(model: HFModel, layer: int, output: nn.Module, entered: Tensor, directions: Tensor) -> Tensor:
    """Derivative of what attention writes along a direction, by what its heads return."""
    direction = (directions if directions.ndim == 1 else directions[layer]).to(entered.device, torch.float32)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = entered.clone().requires_grad_()
        along = (_written(model, layer, output, leaf).float() * direction).sum()
        (found,) = torch.autograd.grad(along, [leaf])
    return _split(found, model.geometry.query_heads)


def _written(model: HFModel, layer: int, output: nn.Module, entered: Tensor) -> Tensor:
    """What attention adds to the residual stream, of what its heads return."""
    write = attention_write(model.decoder.layers[layer])
    written: Tensor = output(entered)
    return written if write is model.decoder.attentions[layer] else write(written)


def _split(x: Tensor, heads: int) -> Tensor:
    """``[1, tokens, heads * head_dim]`` as ``[heads, tokens, head_dim]`` in float32."""
    return rearrange(x[0].float(), "tokens (heads channels) -> heads tokens channels", heads=heads)


def head_outputs(model: HFModel) -> dict[int, nn.Module]:
    """The module of each attention that is handed the outputs of its heads, found once, with a short pass, and proven.

    Raises
    ------
    ModelError
        If no module of a layer gets what its attention weights make of its values, or what attention writes is something
        else than what that module makes of it.
    """
    if model._heads is None:
        model._heads = _find(model)
    return model._heads


@torch.inference_mode()
def _find(model: HFModel) -> dict[int, nn.Module]:
    rules = {layer: model.attention(layer) for layer in model.geometry.stores}
    seen: dict[int, dict[nn.Module, Tensor]] = {layer: {} for layer in rules}
    wrote: dict[int, Tensor] = {}
    queries: dict[int, Tensor] = {}
    rotations: dict[int, Any] = {}
    ids, cache = [index % model.vocabulary for index in range(3, 3 + _TOKENS)], model.new_cache()
    with ExitStack() as stack:
        for layer in rules:
            write = attention_write(model.decoder.layers[layer])
            stack.callback(write.register_forward_hook(_keep_output(wrote, layer)).remove)
            for module in model.decoder.attentions[layer].modules():
                if module is not model.decoder.attentions[layer]:
                    stack.callback(module.register_forward_pre_hook(_keep_input(seen[layer])).remove)
        model.forward(ids, cache, on_query=queries.__setitem__, on_rotation=rotations.__setitem__)
    found = {}
    for layer, rule in rules.items():
        q = rotations[layer].rotate(queries[layer][0]).float()
        k, v = (x[0].float() for x in (cache.layers[layer].keys, cache.layers[layer].values))
        group = len(q) // len(k)
        rebuilt = weights(scores(q, k.repeat_interleave(group, 0), rule), rule) @ v.repeat_interleave(group, 0)
        flat = rebuilt.transpose(0, 1).flatten(1)[None]
        fitting = [one for one, x in seen[layer].items() if _alike(x, flat, model.dtype)]
        if not fitting:
            raise ModelError(
                f"in layer {layer} of {model.name} no module gets the outputs of the attention heads, so that errors cannot be "
                "followed through them; first order and patching work"
            )
        module = fitting[0]  # the outermost
        if not _alike(_written(model, layer, module, seen[layer][module]), wrote[layer], model.dtype):
            raise ModelError(
                f"what attention writes in layer {layer} of {model.name} is not what {type(module).__name__} makes of the heads, so "
                "that errors cannot be followed to the residual stream; first order and patching work"
            )
        found[layer] = module
    return found


def _alike(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    if one.shape != other.shape:
        return False
    off = max(_OFF, _ROUNDINGS * torch.finfo(dtype).eps) * float(other.abs().max())
    return bool((one.float() - other.float()).abs().max() <= off)


def _keep_input(kept: dict[nn.Module, Tensor]) -> Callable[..., None]:
    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            kept[module] = args[0]

    return before


def _keep_output(kept: dict[int, Tensor], layer: int) -> Callable[..., None]:
    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        kept[layer] = output[0] if isinstance(output, tuple) else output

    return after
