"""vLLM: one type for all layers, and layers that are skipped."""

from __future__ import annotations

from kvgeom.engines.export import Export, differences, kept, widest
from kvgeom.models.model import KVGeometry
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme

#: What each ``--kv-cache-dtype`` holds.
_HOLDS = {
    "int4_per_token_head": "vllm4-token-head+rht",
    "int8_per_token_head": "vllm8-token-head",
    "fp8_e4m3": "fp8_e4m3",
    "fp8_e5m2": "fp8_e5m2",
    "fp8_per_token_head": "fp8_e4m3-token-head",
}
_SINCE = {"int4_per_token_head": "0.25", "int8_per_token_head": "0.20", "fp8_per_token_head": "0.20"}


def export(recipe: Recipe, placement: Placement, geometry: KVGeometry) -> Export:
    """The flags of ``vllm serve`` that are nearest to a recipe (:class:`~kvgeom.engines.export.Export`).

    vLLM has one type for keys and values of all layers, 4 bits or 8, and keeps listed layers in the precision of the
    model. A recipe whose schemes are all 8-bit floats stays one.

    Parameters
    ----------
    recipe : Recipe
    placement : Placement
    geometry : KVGeometry
        Of the model.
    """
    skipped = kept(recipe)
    rounded = [scheme for layer, pair in enumerate(recipe) if layer not in skipped for scheme in pair if scheme]
    if not rounded:
        held, text = Recipe.exact(len(recipe)), "--kv-cache-dtype auto"
        return Export(
            "vLLM", text, "any", differences(recipe, placement, held, placement), recipe=held, placement=placement
        )
    dtype = _dtype(rounded, geometry.head_dim)
    held = Recipe.uniform(len(recipe), Scheme.parse(_HOLDS[dtype])).keep(skipped)
    text = f"--kv-cache-dtype {dtype}"
    notes = []
    if skipped:
        text += f" --kv-cache-dtype-skip-layers {' '.join(map(str, skipped))}"
        notes.append(
            "a model class with an attention of its own may ignore skipped layers; look for them in vLLM's log"
        )
    since = _SINCE.get(dtype, "0.20" if skipped else "0.9")
    if dtype in ("fp8_e4m3", "fp8_e5m2"):
        notes.append("values are cast as they are (scales 1.0), unless the checkpoint has scales of its own")
        if dtype == "fp8_e5m2":
            notes.append("vLLM refuses fp8_e5m2 for checkpoints whose weights are FP8")
    else:
        notes.append("runs on the Triton attention backend, which vLLM chooses by itself")
    return Export(
        engine="vLLM",
        text=text,
        versions=f"{since} or later, by its documentation and sources; the engine was not run",
        cannot=differences(recipe, placement, held, Placement()),
        notes=tuple(notes),
        recipe=held,
        placement=Placement(),
    )


def _dtype(schemes: list[Scheme], head_dim: int) -> str:
    for dtype in ("fp8_e4m3", "fp8_e5m2"):
        if all(scheme.format == dtype and scheme.granularity in ("none", "tensor") for scheme in schemes):
            return dtype
    if all(str(scheme.plain) == _HOLDS["fp8_per_token_head"] for scheme in schemes):
        return "fp8_per_token_head"
    # The rotation of the 4-bit type needs heads of a power of two (vLLM pull request 56198).
    return "int4_per_token_head" if widest(schemes) <= 4 and not head_dim & (head_dim - 1) else "int8_per_token_head"
