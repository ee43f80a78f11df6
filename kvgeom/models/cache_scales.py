"""Scales of a quantized cache that a checkpoint holds, as calibration tools write them beside the weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvgeom.checks import as_path
from kvgeom.errors import InputError
from kvgeom.models.model import KVGeometry
from kvgeom.quant.recipe import Site
from kvgeom.quant.transforms import Key, Statics

if TYPE_CHECKING:
    from torch import Tensor

#: ``...layers.3.self_attn.k_proj.k_scale`` (ModelOpt), ``...self_attn.k_scale`` (compressed-tensors), ``...k_cache.scale``, and
#: ``kv_scale``, one for both.
_NAME = re.compile(r"layers\.(?P<layer>\d+)\..*\.(?:(?P<site>k|v|kv)_scale|(?P<cached>[kv])_cache\.scale)$")


def checkpoint_scales(directory: str | Path, geometry: KVGeometry) -> Statics:
    """Factors for ``equalize`` that divide keys and values by the scales of a checkpoint, as vLLM does before it casts.

    ``fp8_e4m3+equalize`` with them is an FP8 cache with calibrated scales, ``nvfp4+equalize`` an NVFP4 cache with a scale of the
    tensor. A layer without scales is cast as it is, and one with a scale of the keys alone uses it for both.

    Parameters
    ----------
    directory : str or Path
        With the checkpoint's ``.safetensors`` files.
    geometry : KVGeometry
        Of the model.

    Returns
    -------
    Statics
        One scale for all channels of a layer, or one for each KV head.

    Raises
    ------
    InputError
        If there are no such scales, they are not positive, or they are neither one nor one for each KV head.

    Examples
    --------
    ::

        scales = checkpoint_scales("Llama-3.1-8B-Instruct-FP8-KV", model.geometry)
        recipe = Recipe.uniform(model.geometry.layers, "fp8_e4m3+equalize").with_statics(factors=scales)
    """
    from safetensors import safe_open

    folder = as_path("directory", directory)
    found: dict[Key, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                match = _NAME.search(name)
                if match is not None:
                    scale = tensors.get_tensor(name).float().flatten()
                    for key in _keys(match):
                        found[key] = scale
    if not found:
        raise InputError(
            f"{folder} has no scales of a cache in .safetensors files (k_scale, v_scale, kv_scale); without them an engine uses 1.0, "
            "which is the scheme without equalize"
        )
    for layer in {layer for layer, _ in found}:
        if (layer, "k") not in found:
            raise InputError(
                f"layer {layer} of {folder} has a scale of values and none of keys; give both, or that of keys"
            )
        found.setdefault((layer, "v"), found[layer, "k"])
    return Statics.of(f"scales of {folder.name}", {key: _spread(key, scale, geometry) for key, scale in found.items()})


def _keys(match: re.Match[str]) -> list[Key]:
    site = match["site"] or match["cached"]
    sites: tuple[Site, ...] = ("k", "v") if site == "kv" else ("k",) if site == "k" else ("v",)
    return [(int(match["layer"]), each) for each in sites]


def _spread(key: Key, scale: Tensor, geometry: KVGeometry) -> Tensor:
    """One number for each channel, ``[kv_heads, head_dim]``."""
    layer, site = key
    if layer >= geometry.layers:
        raise InputError(f"the checkpoint has a scale of layer {layer}, but the model has {geometry.layers} layers")
    heads, channels = geometry.shape(layer, site)
    if len(scale) not in (1, heads):
        raise InputError(
            f"scales of layer {layer}, {site} must be 1 or {heads}, one for each KV head; got {len(scale)}"
        )
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise InputError(f"scales of layer {layer}, {site} must be positive, got {scale.tolist()}")
    return (
        scale[:, None].expand(heads, channels).contiguous()
        if len(scale) > 1
        else torch.full((heads, channels), scale.item())
    )
