"""Hooks in a model's decoder layers for a pass: to watch, to edit, to join branches and to skip layers.

Each function but :func:`skip_below` sets its hooks while it is iterated and yields their handles; :func:`during` takes
them away again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvgeom.errors import ModelError
from kvgeom.models.cache import Edit, RotaryEdit
from kvgeom.models.modules import Projection, attention_write, norm_of
from kvgeom.models.rotary import Rotary

if TYPE_CHECKING:
    from kvgeom.models.model import QueryHook, ResidEdit, ResidHook, RotationHook

Layers = Sequence[nn.Module]
#: Of every layer that stores keys and values, by its number: its attention; the projections of that by ``"q"``, ``"k"`` and
#: ``"v"``; and how it rotates.
Attentions = Mapping[int, nn.Module]
Projections = Mapping[int, Mapping[str, Projection]]
Rotaries = Mapping[int, Rotary]


@contextmanager
def during(*hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Have hooks only inside of a ``with`` block."""
    with ExitStack() as stack:
        for handle in chain(*hooks):
            stack.callback(handle.remove)
        yield


def watch_resid(layers: Layers, show: ResidHook) -> Iterator[RemovableHandle]:
    """Show the residual stream after each layer."""

    def hook(layer: int) -> Callable[..., None]:
        def after(module: nn.Module, _args: Any, output: Any) -> None:
            stream = output[0] if isinstance(output, tuple) else output
            if stream.ndim != 3:
                raise ModelError(
                    f"a {type(module).__name__} passes on {len(stream)} streams, not one residual stream, so that the geometry is not "
                    "measured; responses, perplexity, scans, diagnosis and fixes work"
                )
            show(layer, stream)

        return after

    for layer, module in enumerate(layers):
        yield module.register_forward_hook(hook(layer))


def watch_rotation(attentions: Attentions, rotary: Rotaries, show: RotationHook) -> Iterator[RemovableHandle]:
    """Show how each layer rotates the new tokens, before its attention."""

    def hook(layer: int) -> Callable[..., None]:
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            show(layer, rotary[layer].read(module, args, kwargs).row(0))

        return before

    for layer, module in attentions.items():
        yield module.register_forward_pre_hook(hook(layer), with_kwargs=True)


def watch_queries(attentions: Attentions, projections: Projections, show: QueryHook) -> Iterator[RemovableHandle]:
    """Show each layer's queries before their rotary embedding, after their norm where there is one."""

    def hook(layer: int, projection: Projection, norm: nn.Module | None) -> Callable[..., None]:
        def after(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if norm is None or output.ndim == 3:
                show(layer, projection.read(output))
            else:  # [b, t, h, d] or [b, h, t, d]: heads lie next to each other in memory, tokens do not
                by_token = args[0].stride(1) >= args[0].stride(2)
                show(layer, output.transpose(1, 2) if by_token else output)

        return after

    for layer, module in attentions.items():
        norm, projection = norm_of(module, "q"), projections[layer]["q"]
        yield (norm or projection.module).register_forward_hook(hook(layer, projection, norm))


def pass_rotations(attentions: Attentions, rotary: Rotaries, edit: Edit) -> Iterator[RemovableHandle]:
    """Give an edit that needs it the rotation to the positions of the new tokens, before each layer's keys come."""
    if not isinstance(edit, RotaryEdit) or not edit.needs_rotation:
        return

    def hook(layer: int) -> Callable[..., None]:
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            edit.set_rotation(layer, rotary[layer].read(module, args, kwargs).of_vectors)

        return before

    for layer, module in attentions.items():
        yield module.register_forward_pre_hook(hook(layer), with_kwargs=True)


def edit_stream(layers: Layers, edit: ResidEdit) -> Iterator[RemovableHandle]:
    """Edit the residual stream: before layer 0, what each attention writes into it, and after each layer."""

    def entering(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (edit(-1, "pre", args[0]), *args[1:]), kwargs

    def leaving(layer: int, point: Literal["attn", "post"]) -> Callable[..., Any]:
        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit(layer, point, output[0]), *output[1:])
            return edit(layer, point, output)

        return after

    yield layers[0].register_forward_pre_hook(entering, with_kwargs=True)
    for layer, module in enumerate(layers):
        yield attention_write(module).register_forward_hook(leaving(layer, "attn"))
        yield module.register_forward_hook(leaving(layer, "post"))


def edit_projections(projections: Projections, edit: Edit) -> Iterator[RemovableHandle]:
    """Edit keys and values as they leave their projections."""

    def hook(layer: int, site: Literal["k", "v"], projection: Projection) -> Callable[..., Tensor]:
        return lambda _module, _args, output: projection.write(output, edit(layer, site, projection.read(output)))

    sites: tuple[Literal["k", "v"], ...] = ("k", "v")
    for layer, found in projections.items():
        for site in sites:
            yield found[site].module.register_forward_hook(hook(layer, site, found[site]))


def join_branches(layers: Layers, joining: Mapping[int, int]) -> Iterator[RemovableHandle]:
    """Before each of some layers, add so many copies of row 0 to the batch."""

    def hook(rows: int) -> Callable[..., Any]:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            clean = args[0][:1].expand(rows, -1, -1)
            return (torch.cat([args[0], clean]), *args[1:]), kwargs

        return before

    for layer, rows in joining.items():
        yield layers[layer].register_forward_pre_hook(hook(rows), with_kwargs=True)


@contextmanager
def skip_below(layers: Layers, layer: int, resid: Tensor) -> Iterator[None]:
    """Replace what enters ``layer`` by ``resid``, and let the layers below pass their input on."""

    def replace(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (resid, *args[1:]), kwargs

    below = layers[:layer]
    saved = [module.__dict__.get("forward") for module in below]
    handle = layers[layer].register_forward_pre_hook(replace, with_kwargs=True)
    try:
        for module in below:  # into the instance itself: TransformerLens passes attributes on to what it wraps
            module.__dict__["forward"] = lambda hidden_states, *args, **kwargs: hidden_states
        yield
    finally:
        handle.remove()
        for module, forward in zip(below, saved, strict=True):
            if forward is None:
                del module.__dict__["forward"]
            else:  # e.g. accelerate's wrapper of a model spread over devices
                module.__dict__["forward"] = forward
