"""Engines by name: what each holds in its cache, as a recipe and a placement.

A preset is a recipe factory. Those here name engine, version and source; the page of each in the documentation says
what it does and how that was checked. Add your own with :func:`register`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvgeom.errors import InputError
from kvgeom.quant.memory import bits_per_element
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Schemes
from kvgeom.quant.scheme import BITS, BLOCK_FORMATS, FLOAT_FORMATS, Scheme


@dataclass(frozen=True)
class Engine:
    """What an engine does to a cache, at some width.

    Attributes
    ----------
    name : str
        That of the preset, or the spelling of the scheme.
    k, v : Scheme or None
    placement : Placement
    """

    name: str
    k: Scheme | None
    v: Scheme | None
    placement: Placement

    def recipe(self, n_layers: int) -> Recipe:
        """All layers of a model with ``n_layers``."""
        return Recipe(((self.k, self.v),) * n_layers)

    def __str__(self) -> str:
        both = str(self.k) if self.k == self.v else f"k {self.k}, v {self.v}"
        return f"{self.name}: {both}; {self.placement}"


@dataclass(frozen=True)
class Preset:
    """A named engine.

    Attributes
    ----------
    name : str
    engine : str
        Which engine, and of which version this is true.
    source : str
        Where the behaviour is defined.
    checked : str
        What it was compared with, in a few words; the page in the documentation has the numbers.
    widths : tuple of int
        Bits that the engine offers; the first is the default.
    schemes : callable (bits) -> (Scheme or None, Scheme or None)
        Rounding of keys and values at a width.
    placement : Placement
    page : str
        Of the documentation.
    """

    name: str
    engine: str
    source: str
    checked: str
    widths: tuple[int, ...]
    schemes: Callable[[int], Schemes]
    placement: Placement
    page: str

    def at(self, bits: int | None = None) -> Engine:
        """The engine at a width, its default one if none is given.

        Raises
        ------
        InputError
            If the engine does not offer that width.
        """
        width = self.widths[0] if bits is None else bits
        if width not in self.widths:
            offered = ", ".join(map(str, self.widths))
            raise InputError(f"{self.name} was asked with {width} bits, but {self.engine} offers {offered}")
        k, v = self.schemes(width)
        return Engine(self.name, k, v, self.placement)


_PRESETS: dict[str, Preset] = {}


def register(preset: Preset) -> Preset:
    """Make a preset known by its name.

    Raises
    ------
    InputError
        If the name is taken, or would be read as a scheme.
    """
    if preset.name in _PRESETS:
        raise InputError(f"preset {preset.name!r} was registered, but there is one of that name; choose another")
    if not preset.widths or any(width not in BITS for width in preset.widths):
        raise InputError(f"preset {preset.name!r} was registered with widths {preset.widths}; give some of {BITS}")
    for width in preset.widths:
        preset.at(width)
    _PRESETS[preset.name] = preset
    return preset


def presets() -> tuple[Preset, ...]:
    """All presets that are registered."""
    return tuple(_PRESETS.values())


def preset(name: str, bits: int | None = None) -> Engine:
    """An engine by the name of its preset, for instance ``preset("kivi", bits=2)``.

    Raises
    ------
    InputError
        If there is none of that name, or the engine does not offer that width.
    """
    if name not in _PRESETS:
        raise InputError(f"preset {name!r} was asked, but there are only {', '.join(_PRESETS)}")
    return _PRESETS[name].at(bits)


def resolve(text: str, bits: int | None = None, placement: Placement | None = None) -> Engine:
    """What a user means by a scheme: a preset, a scheme, or a scheme without its width.

    Parameters
    ----------
    text : str
        ``"kivi"``, ``"q4_0+hadamard"``, ``"int4-asym-group64"`` or, with ``bits``, ``"asym-group64"``.
    bits : int, optional
        Width. A preset has a default; a scheme that spells its own must agree with it.
    placement : Placement, optional
        Instead of the preset's, or of the decode-faithful default.

    Raises
    ------
    InputError
        If it is none of these.

    Examples
    --------
    >>> str(resolve("asym-group64", 4).k)
    'int4-asym-group64'
    >>> resolve("kivi", 2).placement.residual
    128
    """
    if text in _PRESETS:
        found = preset(text, bits)
        return found if placement is None else replace(found, placement=placement)
    if text.startswith(("sym-", "asym-")):
        if bits is None:
            raise InputError(f"scheme {text!r} was asked without a width; give one, for instance int4-{text}")
        text = f"int{bits}-{text}"
    try:
        scheme = Scheme.parse(text)
    except InputError as error:
        raise InputError(f"{error}; or give one of the presets {', '.join(_PRESETS)}") from error
    if bits not in (None, scheme.bits):
        raise InputError(f"scheme {text!r} was asked with {bits} bits, but it has {scheme.bits}; give one of the two")
    return Engine(text, scheme, scheme, placement or Placement())


def offers(text: str) -> tuple[int, ...]:
    """The widths in which :func:`resolve` can give a scheme: for a curve over bits."""
    if text in _PRESETS:
        return tuple(sorted(_PRESETS[text].widths))
    return BITS if text.startswith(("sym-", "asym-")) else (Scheme.parse(text).bits,)


def scheme_rows(kv_heads: int = 8, head_dim: int = 128, tokens: int = 4096) -> list[dict[str, Any]]:
    """What ``kvgeom schemes`` lists: formats and presets, with bits per element for a cache of that shape.

    Returns
    -------
    list of dict
        ``kind`` (``"format"`` or ``"preset"``), ``name``, ``bits``, ``bits_per_element`` (scales, offsets and waiting
        tokens at 16 bits included; mean of k and v), ``note``.
    """
    rows: list[dict[str, Any]] = []
    shape = (kv_heads, head_dim, tokens)
    for text, note in _FORMATS.items():
        scheme = Scheme.parse(text)
        rows.append(_row("format", text, scheme.bits, Engine(text, scheme, scheme, Placement()), shape, note))
    for known in presets():
        rows += [_row("preset", known.name, width, known.at(width), shape, known.engine) for width in known.widths]
    return rows


def _row(kind: str, name: str, bits: int, engine: Engine, shape: tuple[int, int, int], note: str) -> dict[str, Any]:
    size = bits_per_element(engine.recipe(1), engine.placement, *shape)
    return {"kind": kind, "name": name, "bits": bits, "bits_per_element": size, "note": note}


_INTEGER = {
    "tensor": "one scale for a sequence",
    "head": "one scale for a head",
    "channel": "one scale for a channel",
    "token": "one scale for a token",
    "token-head": "one scale for a head of a token",
    "group64": "one scale for 64 channels of a token; any size",
    "channel-group32": "one scale for 32 tokens of a channel; any size",
}
_FORMATS = {
    **{f"int4-asym-{granularity}": f"2-8 bits, sym or asym; {note}" for granularity, note in _INTEGER.items()},
    **dict.fromkeys(FLOAT_FORMATS, "cast, saturating; with -tensor, -token, -head, ...: scaled first"),
    **{name: f"blocks of {size} channels" for name, (_, size) in BLOCK_FORMATS.items()},
    "mlx4-group64": "MLX's own grid; 2, 3, 4, 5, 6 or 8 bits",
    "hqq4-group64": "HQQ's solver; 2, 3, 4 or 8 bits",
    "vllm4-token-head+rht": "vLLM's own grids: vllm4 and vllm8",
}


def _both(text: str) -> Callable[[int], Schemes]:
    return lambda bits: (Scheme.parse(text.format(bits=bits)),) * 2


def _add(
    name: str,
    engine: str,
    source: str,
    checked: str,
    widths: tuple[int, ...],
    schemes: Callable[[int], Schemes],
    page: str,
    placement: Placement | None = None,
) -> None:
    register(Preset(name, engine, source, checked, widths, schemes, placement or Placement(), page))


_add(
    "paper",
    "code released with arXiv:2606.09864, per tensor",
    "https://arxiv.org/abs/2606.09864",
    "an independent straight-line implementation",
    (3, 2, 4, 5, 6, 7, 8),
    _both("int{bits}-sym-tensor"),
    "engine-paper.md",
    Placement.paper(),
)
_add(
    "paper-channel",
    "code released with arXiv:2606.09864, per channel",
    "https://arxiv.org/abs/2606.09864",
    "an independent straight-line implementation",
    (3, 2, 4, 5, 6, 7, 8),
    _both("int{bits}-sym-channel"),
    "engine-paper.md",
    Placement.paper(),
)
_TRANSFORMERS = "https://github.com/huggingface/transformers (src/transformers/cache_utils.py, QuantizedLayer)"
_WAITS = Placement(prefill_reads="exact", residual=128, flush="all")
_add(
    "hf-quanto",
    "transformers 5.23, QuantizedCache('quanto'), optimum-quanto 0.2.7",
    _TRANSFORMERS,
    "the engine itself",
    (4, 2),
    _both("int{bits}-asym-group64"),
    "engine-transformers.md",
    _WAITS,
)
_add(
    "hf-hqq",
    "transformers 5.23, QuantizedCache('hqq', axis 1), hqq 0.2.8",
    _TRANSFORMERS,
    "the engine itself",
    (4, 2, 3, 8),
    _both("hqq{bits}-group64"),
    "engine-transformers.md",
    _WAITS,
)
_add(
    "hf-fp8",
    "transformers 5.23, QuantizedCache('fp8')",
    _TRANSFORMERS,
    "the engine itself",
    (8,),
    _both("fp8_e4m3-tensor"),
    "engine-transformers.md",
    Placement(prefill_reads="exact"),
)
_add(
    "kivi",
    "KIVI (arXiv:2402.02750), released code, group 32, residual 128",
    "https://github.com/jy-yuan/KIVI (models/llama_kivi.py)",
    "a straight-line implementation of its attention; its kernels need a GPU",
    (2, 4),
    lambda bits: (
        Scheme.parse(f"int{bits}-asym-channel-group32/f16"),
        Scheme.parse(f"int{bits}-asym-group32/f16"),
    ),
    "engine-kivi.md",
    Placement(prefill_reads="exact", residual=128),
)
_VLLM = "https://github.com/vllm-project/vllm"
for _kind in ("e4m3", "e5m2"):
    _add(
        f"vllm-fp8-{_kind}",
        f"vLLM 0.28, kv_cache_dtype='fp8_{_kind}', scales 1.0",
        f"{_VLLM} (csrc/cache_kernels.cu, docs/features/quantization/quantized_kvcache.md)",
        "the casts of torch and ml_dtypes",
        (8,),
        _both(f"fp8_{_kind}"),
        "engine-vllm.md",
    )
_add(
    "vllm-int8-per-token-head",
    "vLLM 0.28, kv_cache_dtype='int8_per_token_head'",
    f"{_VLLM} (vllm/v1/attention/ops/triton_reshape_and_cache_flash.py)",
    "its kernel in Triton's interpreter, bit for bit",
    (8,),
    _both("vllm8-token-head"),
    "engine-vllm.md",
)
_add(
    "vllm-int4-per-token-head",
    "vLLM 0.28, kv_cache_dtype='int4_per_token_head'",
    f"{_VLLM} (vllm/v1/attention/ops/int4_per_token_head.py)",
    "its kernel in Triton's interpreter, bit for bit",
    (4,),
    _both("vllm4-token-head+rht"),
    "engine-vllm.md",
)


def _rotated_blocks(kind: str) -> Callable[[int], Schemes]:
    return lambda _: (Scheme.parse(f"{kind}+hadamard"), Scheme.parse(f"{kind}+hadamard64"))


for _kind, _bits in (("q8_0", 8), ("q4_0", 4)):
    _add(
        f"llamacpp-{_kind}",
        f"llama.cpp (July 2026, in llama-cpp-python 0.3.36), type_k = type_v = {_kind}",
        "https://github.com/ggml-org/llama.cpp (src/llama-kv-cache.cpp, ggml/src/ggml-quants.c)",
        "its blocks bit for bit (gguf package); the engine itself in greedy tokens and logits",
        (_bits,),
        _rotated_blocks(_kind),
        "engine-llamacpp.md",
    )
for _bits in (4, 8):
    _add(
        f"lmdeploy-int{_bits}",
        f"LMDeploy (TurboMind), quant_policy={_bits}",
        "https://github.com/InternLM/lmdeploy (src/turbomind/kernels/attention/kv_cache_utils_v2.cu, quantization.h)",
        "its source alone",
        (_bits,),
        _both("int{bits}-asym-token-head/f16"),
        "engine-lmdeploy.md",
    )
_add(
    "mlx-4bit-g64",
    "MLX-LM (MLX 0.32), kv_bits=4, kv_group_size=64, quantized_kv_start=0",
    "https://github.com/ml-explore/mlx-lm (mlx_lm/models/cache.py), mx.quantize",
    "mx.quantize itself, bit for bit",
    (4, 2, 3, 6, 8),
    _both("mlx{bits}-group64"),
    "engine-mlx.md",
    Placement(prefill_reads="last"),
)
_add(
    "rotated",
    "no single engine: a Hadamard rotation of each head, then integers per token and head (as QuaRot)",
    "https://arxiv.org/abs/2404.00456",
    "properties of the rotation",
    (4, 2, 3, 5, 6, 7, 8),
    _both("int{bits}-asym-token-head/f16+hadamard"),
    "engine-rotated.md",
)
