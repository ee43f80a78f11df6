"""How the weights of a loaded transformers model are stored, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Attribute of a transformers model whose file stores the weights in another form than the model holds.
_STORED = "_kvgeom_stored"
#: Names of methods of quantization that are not written as transformers writes them.
_NAMES = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM FP8",
    "fp8": "FP8",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "spqr": "SpQR",
    "vptq": "VPTQ",
}


def remember_stored(model: PreTrainedModel, stored: str) -> None:
    """Note in a transformers model what :func:`weights_stored` cannot see in it: of which file it was made."""
    setattr(model, _STORED, stored)


def weights_stored(model: PreTrainedModel) -> str:
    """How a model's weights are stored, and in what they are computed with where that is something else.

    Examples
    --------
    ``"float32"``, ``"bitsandbytes 4-bit (nf4)"``, ``"AWQ 4-bit"``, ``"Q4_K_M (GGUF), dequantized to float32"``
    """
    dtype = str(model.dtype).removeprefix("torch.")
    stored: str | None = getattr(model, _STORED, None)
    config = getattr(model.config, "quantization_config", None)
    if config is not None:
        found = config if isinstance(config, Mapping) else config.to_dict()
        quantized = _quantization(found)
        unpacked = getattr(config, "dequantize", found.get("dequantize")) or (quantized == "GGUF" and _is_dense(model))
        method = f"{quantized}, dequantized to {dtype}" if unpacked else quantized
        return f"{method}, made of {stored}" if stored else method
    if stored is None:
        return dtype
    if stored.startswith(f"{dtype} "):
        return stored
    return f"{stored}, {'converted' if stored.startswith(('float', 'bfloat')) else 'dequantized'} to {dtype}"


def drop_weights(model: nn.Module) -> None:
    """Put empty weights of the same shapes in the place of a model's own, in place.

    ``model.to("meta")`` fails for models that bitsandbytes has quantized.
    """
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(weight.data, device="meta"), False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device="meta"))
        for beside in ("state", "quant_state"):  # where bitsandbytes keeps what it computes with
            module.__dict__.pop(beside, None)


def _quantization(config: Mapping[str, Any]) -> str:
    """The method of a quantization config of transformers, and how many bits it leaves."""
    method = getattr(config["quant_method"], "value", config["quant_method"])
    name = str(_NAMES.get(method, method))
    if method == "bitsandbytes":
        kind = config.get("bnb_4bit_quant_type", "fp4")
        return f"{name} 4-bit ({kind})" if config.get("load_in_4bit") else f"{name} 8-bit"
    if isinstance(weights := config.get("weights"), str):
        return f"{name} {weights}"
    bits = "/".join(map(str, sorted({*_bits(config)})))
    return f"{name} {bits}-bit" if bits else name


def _bits(config: Mapping[str, Any]) -> Iterator[int]:
    """Widths of weights, wherever in a quantization config they stand."""
    for key, value in config.items():
        if key in ("bits", "nbits", "num_bits") and isinstance(value, int):
            yield value
        elif isinstance(value, Mapping) and "activation" not in key and "cache" not in key:
            yield from _bits(value)


def _is_dense(model: PreTrainedModel) -> bool:
    return all(parameter.is_floating_point() for parameter in model.parameters())
