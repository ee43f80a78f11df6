"""Rotary frequencies of a GGUF file: what the file stores must be what the converted model rotates with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvgeom.errors import InputError
from kvgeom.models.gguf_settings import setting

#: How far frequencies may differ, of each: files hold them in 32 bits.
_SAME = 1e-3
#: What llama.cpp takes where a header says nothing.
_BASE = 10000.0
#: Of Llama 3.1 and later, which have no other; the factors of those that are known, if no plane has all of it.
_LOW, _HIGH, _CONTEXT = 1.0, 4.0, 8192
_FACTORS = (8.0, 32.0)
_OTHERWISE = "give the checkpoint that the file was made of instead"


def match_rotary(model: Any, reader: Any, path: Path) -> None:
    """Give a converted model the frequencies of its file where transformers has left them out.

    A file may have a table of factors (``rope_freqs``, of Llama 3.1 and later) and settings of ``rope.scaling``, which transformers
    does not read for most architectures: the model would rotate by other angles.

    Parameters
    ----------
    model : PreTrainedModel
        Converted from the file. Its configuration is completed.
    reader : gguf.GGUFReader
    path : Path
        For messages.

    Raises
    ------
    InputError
        If the model rotates otherwise than the file says, and no setting of transformers is known that does the same.
    """
    rotaries = [module for module in model.modules() if _frequencies(module)]
    scaling = str(setting(reader, "rope.scaling.type") or "none").lower()
    tables = {tensor.name: tensor for tensor in reader.tensors if "rope_f" in tensor.name}
    if not rotaries:
        if tables or scaling != "none":
            raise _refused(path, "rotary frequencies that the converted model has no place for")
        return
    config = model.config.get_text_config()
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if scaling not in ("none", "linear"):
        if parameters.get("rope_type") != scaling or tables:
            raise _refused(path, f"rope.scaling.type {scaling}, which transformers does not read from it")
        return
    if any("rope_factors" in name for name in tables) or len(tables) > 1:
        raise _refused(
            path, f"a table of rotary factors ({sorted(tables)[0]}), which transformers does not read from it"
        )
    factor = float(setting(reader, "rope.scaling.factor") or 1.0) if scaling == "linear" else 1.0
    factor *= float(setting(reader, "rope.scale_linear") or 1.0)
    factors = None
    if tables:
        (table,) = tables.values()
        factors = torch.tensor(table.data.tolist(), dtype=torch.float64).flatten()
    base = float(setting(reader, "rope.freq_base") or _BASE)
    if _all_match(rotaries, reader, base, factor, factors):
        return
    channels = setting(reader, "rope.dimension_count")
    if channels is not None:
        heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        parameters["partial_rotary_factor"] = config.partial_rotary_factor = int(channels) / heads
    for completed in _settings(parameters, base, factor, factors, reader):
        config.rope_parameters = completed
        again = [type(rotary)(config=config) for rotary in rotaries]
        if _all_match(again, reader, base, factor, factors):
            return
    raise _refused(path, "rotary frequencies that are not those of the converted model")


def _refused(path: Path, what: str) -> InputError:
    return InputError(f"{path} has {what}: it would turn keys by other angles; {_OTHERWISE}")


def _frequencies(module: Any) -> list[Tensor]:
    """Inverse frequencies of a rotary module; of several where kinds of layers have their own."""
    return [
        x for name, x in module.named_buffers(recurse=False) if name.endswith("inv_freq") and "original" not in name
    ]


def _all_match(rotaries: list[Any], reader: Any, base: float, factor: float, factors: Tensor | None) -> bool:
    found = [x for rotary in rotaries for x in _frequencies(rotary)]
    local = setting(reader, "rope.freq_base_swa") or (_BASE if len(found) > 1 else None)
    channels = setting(reader, "rope.dimension_count")

    def global_(x: Tensor) -> bool:
        planes = len(x) if channels is None else int(channels) // 2
        return len(x) == planes and _same(x, _expected(planes, base, factor, factors))

    return all(
        global_(x) or (local is not None and _same(x, _expected(len(x), float(local), 1.0, None))) for x in found
    ) and any(map(global_, found))


def _same(found: Tensor, expected: Tensor | None) -> bool:
    return expected is not None and torch.allclose(found.double(), expected, rtol=_SAME, atol=0.0)


def _expected(planes: int, base: float, factor: float, factors: Tensor | None) -> Tensor | None:
    """Inverse frequencies as llama.cpp has them; None if the table is of another length."""
    plain = base ** (-torch.arange(planes, dtype=torch.float64) / planes) / factor
    if factors is None:
        return plain
    return plain / factors if len(factors) == planes else None


def _settings(
    parameters: dict[str, Any], base: float, factor: float, factors: Tensor | None, reader: Any
) -> list[dict[str, Any]]:
    """Rotary settings of transformers that may be meant; none where kinds of layers have their own."""
    if any(isinstance(value, dict) for value in parameters.values()):
        return []
    plain = {**parameters, "rope_theta": base, "rope_type": "default"}
    if factors is None:
        return [plain, {**plain, "rope_type": "linear", "factor": factor}]
    return [
        {
            **plain,
            "rope_type": "llama3",
            "factor": each,
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": int(
                setting(reader, "rope.scaling.original_context_length") or _CONTEXT
            ),
        }
        for each in (round(float(factors.max()), 3), *_FACTORS)
    ]
