"""Edits of weights that change what a KV cache holds and leave the function of the model as it is.

Each edit works in place, on a model that plain transformers runs (``backend="hf"``) with unquantized weights; others get a
ModelError. Make a copy first where the original is still needed (:func:`copied`). Arithmetic is in float64 and the result is stored in the dtype of the weights, so that "unchanged"
holds to the precision of that dtype.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from kvgeom.errors import InputError, ModelError
from kvgeom.models.hf import HFModel
from kvgeom.models.model import Model
from kvgeom.models.modules import Projection, norm_of, projections

_OUTPUTS = ("o_proj", "dense", "out_proj")
#: Parts of an attention that stand between values and output projection, or take a share of the attention.
_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
_BETWEEN = ("v_norm", "sub_norm", "attn_sub_norm", "g_proj", "gate_proj")


def copied(model: Model, name: str | None = None) -> Model:
    """The same model with weights of its own, to edit.

    Call it once more after the last edit: a model's fingerprint is taken when it is made.
    """
    own = editable(model)
    return rewrapped(own, copy.deepcopy(own.hf_model), name)


def rewrapped(own: HFModel, hf_model: Any, name: str | None = None) -> HFModel:
    """A transformers model with the tokenizer and the chat template of another; its fingerprint is taken now."""
    return HFModel(
        hf_model,
        own.tokenizer,
        name=name or own.name,
        template=own.template,
        template_options=own.template_options,
    )


def editable(model: Model) -> HFModel:
    """The model itself, if its weights can be edited.

    Raises
    ------
    ModelError
        If something else than plain transformers runs it.
    """
    if not isinstance(model, HFModel) or model.backend != "hf":
        raise ModelError(
            f"the weights of {model.name} cannot be edited, because backend {model.backend!r} runs it; load it with backend='hf'"
        )
    return model


@torch.no_grad()
def transform_values(model: Model, layer: int, head: int, matrix: Tensor) -> None:
    """Store ``matrix @ v`` instead of ``v`` in one head; the output projection takes it back.

    Attention mixes tokens and leaves channels alone, so any invertible matrix commutes with it. Every query head
    that reads the KV head gets the inverse.

    Parameters
    ----------
    model : Model
    layer, head : int
        The layer and its KV head.
    matrix : Tensor [head_dim, head_dim]
        Scales, permutations, rotations, shears, ...

    Raises
    ------
    InputError
        If there is no such head, or the matrix has another shape or no inverse.
    ModelError
        If the model has no linear projections that can be edited, or normalizes or gates what attention returns.
    """
    size, group = model.geometry.head_dim, model.geometry.query_heads // model.geometry.kv_heads
    attention = _attention(model, layer)
    _check_head(model, head)
    matrix, inverse = _invertible(matrix, size, "the output projection")
    _refuse(attention, _BETWEEN, "values are normalized or gated after their projection", model)
    value = _projections(model, layer)["v"]
    rows = value.channels[head * size : (head + 1) * size]
    _left(value.module, rows, matrix)
    output = _output(attention, model)
    for query in range(head * group, (head + 1) * group):
        columns = slice(query * size, (query + 1) * size)
        output.weight[:, columns] = (output.weight[:, columns].double() @ inverse.to(output.weight.device)).to(
            output.weight.dtype
        )


@torch.no_grad()
def offset_values(model: Model, layer: int, offset: Tensor) -> None:
    """Store ``v + offset``; a bias of the output projection takes it back.

    Attention weights sum to one, so that the offset passes attention as it is. Biases are made where there are
    none; the class of the model may not load them from a checkpoint again.

    Parameters
    ----------
    model : Model
    layer : int
    offset : Tensor [kv_heads, head_dim]

    Raises
    ------
    InputError
        If the offset has another shape.
    ModelError
        As :func:`transform_values`, and if attention sinks take a share of the attention weights.
    """
    g = model.geometry
    offset = _per_channel(model, offset, "offset")
    attention = _attention(model, layer)
    _refuse(attention, (*_BETWEEN, "sinks"), "attention does not pass a constant on", model)
    value = _projections(model, layer)["v"]
    output = _output(attention, model)
    _bias(value.module)[value.channels] += _like(offset.flatten(), value.module)
    read = offset.repeat_interleave(g.query_heads // g.kv_heads, dim=0).flatten()
    _bias(output).sub_(_like(output.weight.double() @ read.to(output.weight.device), output))


@torch.no_grad()
def scale_keys(model: Model, layer: int, scales: Tensor) -> None:
    """Store ``scales * k``; queries are divided by the same.

    A rotary embedding mixes the two channels of each pair that it turns, so that they must have one scale. Where queries and keys are normalized after their projection, the gain of the norms carries the scale; all
    heads that share a gain must then have the same.

    Parameters
    ----------
    model : Model
    layer : int
    scales : Tensor [kv_heads, head_dim]
        Positive.

    Raises
    ------
    InputError
        If the scales have another shape, are not positive, or differ within a pair or between heads that share one.
    ModelError
        If the projections or norms cannot be edited.
    """
    g = model.geometry
    scales = _per_channel(model, scales, "scales")
    if not bool((scales > 0).all()):
        raise InputError("scales of keys must be positive")
    first, second = rotary_planes(model, layer).unbind(1)
    differs = (scales[:, first] != scales[:, second]).any(0).nonzero().flatten().tolist()
    if differs:
        one, other = int(first[differs[0]]), int(second[differs[0]])
        raise InputError(f"scales differ within a rotary pair; channels {one} and {other} of a head need the same")
    attention = _attention(model, layer)
    wide = scales.repeat_interleave(g.query_heads // g.kv_heads, dim=0)
    for site, factor in (("k", scales), ("q", 1 / wide)):
        norm = norm_of(attention, site)
        if norm is not None:
            _scale_norm(norm, factor, site, model)
            continue
        projection = _projections(model, layer)[site]
        for weight in _parameters(projection.module):
            scaled = weight[projection.channels].double() * factor.flatten().to(weight.device).reshape(
                -1, *[1] * (weight.ndim - 1)
            )
            weight[projection.channels] = scaled.to(weight.dtype)


@torch.no_grad()
def transform_keys(model: Model, layer: int, head: int, matrix: Tensor) -> None:
    """Store ``matrix @ k`` in the channels of one head that no rotary embedding turns; queries get the inverse transpose.

    Parameters
    ----------
    model : Model
    layer, head : int
        The layer and its KV head.
    matrix : Tensor [free, free]
        For the channels :func:`free_channels`.

    Raises
    ------
    InputError
        If there is no such head, or the matrix has another shape or no inverse.
    ModelError
        If the projections cannot be edited, or queries or keys are normalized after them.
    """
    g, free = model.geometry, free_channels(model, layer)
    attention = _attention(model, layer)
    _check_head(model, head)
    matrix, inverse = _invertible(matrix, len(free), "queries")
    _refuse(attention, _NORMS, "keys are normalized after their projection", model)
    found, group = _projections(model, layer), g.query_heads // g.kv_heads
    key = found["k"]
    _left(key.module, key.channels[head * g.head_dim + free], matrix)
    for query in range(head * group, (head + 1) * group):
        rows = found["q"].channels[query * g.head_dim + free]
        _left(found["q"].module, rows, inverse.T)


@torch.no_grad()
def offset_keys(model: Model, layer: int, offset: Tensor) -> None:
    """Store ``k + offset`` in channels that no rotary embedding turns.

    There it adds ``q . offset`` to all scores of a query, which softmax cannot see. In a rotated channel it would
    add an amount that depends on the distance of the two tokens, so that no exact offset exists there.

    Parameters
    ----------
    model : Model
    layer : int
    offset : Tensor [kv_heads, head_dim]
        Zero in all channels but :func:`free_channels`.

    Raises
    ------
    InputError
        If the offset has another shape or touches a rotated channel.
    ModelError
        If scores are capped, keys normalized, or there are attention sinks: a shift of all scores is then seen.
    """
    offset = _per_channel(model, offset, "offset")
    rotated = rotary_planes(model, layer).flatten()
    if bool(offset[:, rotated].any()):
        raise InputError(
            f"keys of {model.name} can have an offset only in those {model.geometry.head_dim - len(rotated)} channels of a head "
            "that no rotary embedding turns (kvgeom.models.edits.free_channels); set the others to 0"
        )
    attention = _attention(model, layer)
    _refuse(
        attention, ("k_norm", "k_layernorm", "sinks"), "keys are normalized, or a shift of all scores is seen", model
    )
    if model.attention(layer).softcap is not None:
        raise ModelError(
            f"keys of {model.name} cannot have an offset: it caps its scores, so that a shift of them is seen"
        )
    key = _projections(model, layer)["k"]
    _bias(key.module)[key.channels] += _like(offset.flatten(), key.module)


def rotary_planes(model: Model, layer: int) -> Tensor:
    """The pairs of channels of a head that a layer's rotary embedding turns, ``[planes, 2]``."""
    found: dict[int, Tensor] = {}
    model.forward([0], on_rotation=lambda index, rotation: found.__setitem__(index, rotation.planes))
    return found[layer]


def free_channels(model: Model, layer: int) -> Tensor:
    """The channels of a head that a layer's rotary embedding does not turn, in ascending order."""
    turned = rotary_planes(model, layer).flatten()
    every = torch.arange(model.geometry.head_dim)
    return every[~torch.isin(every, turned)]


def shares_key_norm(model: Model, layer: int) -> bool:
    """Whether all heads of a layer have one norm of keys, so that :func:`scale_keys` scales all of them alike."""
    norm = norm_of(_attention(model, layer), "k")
    return norm is not None and norm.weight.numel() == model.geometry.head_dim


# --- finding and changing weights ---


def _attention(model: Model, layer: int) -> Any:
    own = editable(model)
    model.geometry.check_alike(model.name)
    model.geometry.check_stores([layer], model.name)
    return own.decoder.attentions[layer]


def _projections(model: Model, layer: int) -> dict[str, Projection]:
    own = editable(model)
    found = projections(own.hf_model, own.decoder, model.geometry)[layer]
    for projection in found.values():
        _check_linear(projection.module, model)
    return found


def _output(attention: Any, model: Model) -> Any:
    module = next((getattr(attention, name) for name in _OUTPUTS if hasattr(attention, name)), None)
    if module is None:
        raise ModelError(
            f"no output projection found in {type(attention).__name__} of {model.name}, which has none of {', '.join(_OUTPUTS)}"
        )
    return _check_linear(module, model)


def _check_linear(module: Any, model: Model) -> Any:
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise ModelError(
            f"the weights of {model.name} cannot be edited: a projection is a {type(module).__name__}; load the model with plain "
            "transformers and unquantized weights"
        )
    return module


def _refuse(attention: Any, names: tuple[str, ...], why: str, model: Model) -> None:
    found = [name for name in names if getattr(attention, name, None) is not None]
    if found:
        raise ModelError(f"this edit would change what {model.name} computes: {why} ({', '.join(found)})")


def _invertible(matrix: Tensor, size: int, undoes: str) -> tuple[Tensor, Tensor]:
    """A matrix and its inverse, in float64."""
    matrix = torch.as_tensor(matrix, dtype=torch.float64)
    if matrix.shape != (size, size):
        raise InputError(f"the matrix must have shape {(size, size)}, got {tuple(matrix.shape)}")
    inverse, singular = torch.linalg.inv_ex(matrix)
    if int(singular) or not bool(torch.isfinite(inverse).all()):
        raise InputError(f"the matrix has no inverse, so that {undoes} could not undo it")
    return matrix, inverse


def _check_head(model: Model, head: int) -> None:
    if not 0 <= head < model.geometry.kv_heads:
        raise InputError(f"KV head must be 0 to {model.geometry.kv_heads - 1} in {model.name}, got {head}")


def _per_channel(model: Model, given: Tensor, what: str) -> Tensor:
    g = model.geometry
    values = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    if values.shape != (g.kv_heads, g.head_dim) or not bool(torch.isfinite(values).all()):
        raise InputError(
            f"{what} must be finite and of shape {(g.kv_heads, g.head_dim)}, got shape {tuple(values.shape)}"
        )
    return values


def _left(module: Any, rows: Tensor, matrix: Tensor) -> None:
    for weight in _parameters(module):
        weight[rows] = (matrix.to(weight.device) @ weight[rows].double()).to(weight.dtype)


def _parameters(module: Any) -> list[Any]:
    return [module.weight] if module.bias is None else [module.weight, module.bias]


def _bias(module: Any) -> Any:
    if module.bias is None:
        module.bias = nn.Parameter(torch.zeros_like(module.weight[:, 0]), requires_grad=module.weight.requires_grad)
    return module.bias


def _like(values: Tensor, module: Any) -> Tensor:
    return values.to(module.weight.device, module.weight.dtype)


def _scale_norm(norm: Any, factor: Tensor, site: str, model: Model) -> None:
    """Multiply the gain of a norm, which may be its weight or one more than that."""
    weight: Any = getattr(norm, "weight", None)
    width = 0 if weight is None else weight.numel()
    if width not in (factor.shape[1], factor.numel()):
        raise ModelError(f"keys of {model.name} cannot be scaled: its {site} norm has no gain for each channel")
    # Of equal entries a root mean square norm makes its gain, up to its epsilon.
    gain = norm(torch.full_like(weight, 100.0))
    extra = next((e for e in (0.0, 1.0) if torch.allclose(gain, weight + e, atol=1e-3, rtol=1e-3)), None)
    if extra is None:
        raise ModelError(f"keys of {model.name} cannot be scaled: its {site} norm is no RMS norm")
    if width == factor.shape[1]:
        if not torch.equal(factor, factor[:1].expand_as(factor)):
            raise InputError(
                f"scales differ between heads, but all heads of {model.name} share one norm of keys; give every head the same"
            )
        factor = factor[:1]
    scaled = (weight.double() + extra) * factor.flatten().to(weight.device) - extra
    weight.copy_(scaled.to(weight.dtype))
