"""vLLM: one type for all layers, and layers that are skipped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvgeom.engines.differences import differences, unrounded, widest
from kvgeom.engines.engine import Engine, Export, Preset, both
from kvgeom.engines.registry import register_engine
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
        if all(scheme.format == dtype and scheme.granularity in ("none", "tensor") for scheme in schemes):
            return dtype
    if all(str(scheme.plain) == _STORES["fp8_per_token_head"] for scheme in schemes):
        return "fp8_per_token_head"
    # The rotation of the 4-bit type needs heads of a power of two (vLLM pull request 56198).
    return "int4_per_token_head" if widest(schemes) <= 4 and not head_dim & (head_dim - 1) else "int8_per_token_head"


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
                Preset(f"vllm-{dtype.replace('_', '-')}", f"kv_cache_dtype='{dtype}'", (bits,), both(_STORES[dtype]))
                for dtype, bits in (("int8_per_token_head", 8), ("int4_per_token_head", 4))
            ),
        ),
        export=export,
    )
)
