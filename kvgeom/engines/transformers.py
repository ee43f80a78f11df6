"""Plain transformers: a cache that holds codes, for ``generate`` of a model that knows nothing of kvgeom."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvgeom.engines.export import Export
from kvgeom.errors import InputError
from kvgeom.models.hf import HFModel
from kvgeom.models.modules import decoder_layers
from kvgeom.models.packed import PackedCache
from kvgeom.models.rotary import Rotary
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Rounder
from kvgeom.quant.recipe import Recipe

_SINGLE = "one sequence, not padded; greedy or sampled, no beams and no draft model"


def quantized_cache(
    model: PreTrainedModel | HFModel, recipe: Recipe, placement: Placement | None = None
) -> PackedCache:
    """An empty cache of one sequence: ``hf_model.generate(**inputs, past_key_values=quantized_cache(hf_model, recipe))``.

    It holds packed codes and decodes them whenever attention reads, so that it is small and slow. Where the recipe takes
    offsets out of rotated keys (``center``), it asks the model's own rotary embedding for them, at positions 0, 1, 2, ...:
    inputs must not be padded, not even one sequence. Layers with a sliding window hold the whole sequence.

    Parameters
    ----------
    model : PreTrainedModel or HFModel
        A plain transformers model, or kvgeom's view of one. Nothing in it is changed.
    recipe : Recipe
    placement : Placement, optional
        As in :class:`~kvgeom.quant.quantizer.Rounder`; the decode-faithful default.

    Returns
    -------
    PackedCache
        For one prompt and what follows it; make a new one for the next.

    Raises
    ------
    InputError
        If the recipe has another number of layers or rounds single channels, of which no codes exist; or if the placement
        rounds at the projection, or runs the last prompt token apart, which ``generate`` does not.
    ModelError
        If offsets of keys must be turned and the model's rotary embedding cannot be followed.
    """
    hf_model: Any = model.hf_model if isinstance(model, HFModel) else model
    name = model.name if isinstance(model, HFModel) else type(model).__name__
    count = int(hf_model.config.get_text_config().num_hidden_layers)
    if len(recipe) != count:
        raise InputError(f"a recipe of {len(recipe)} layers was given for {name}, which has {count} layers")
    placement = placement or Placement()
    _check(recipe, placement)
    rounder = Rounder(recipe, placement)
    centered = any(keys is not None and keys.transform == "center" for keys, _ in recipe)
    if not (rounder.needs_rotation and centered):
        return PackedCache(count, rounder)
    return PackedCache(count, rounder, Rotary(hf_model, decoder_layers(hf_model, count, name), name).turn)


def _check(recipe: Recipe, placement: Placement) -> None:
    if placement.where != "cache":
        raise InputError(
            f"a cache was asked under '{placement}', which stores nothing rounded; give a placement with where='cache'"
        )
    if placement.prefill_reads == "last":
        raise InputError(
            "a cache for generate was asked whose prompt is fed without its last token first, which generate does not; give a "
            "placement with prefill_reads='rounded' or 'exact'"
        )
    partial = [
        n for n, pair in enumerate(recipe) for scheme in pair if scheme is not None and scheme.channels is not None
    ]
    if partial:
        raise InputError(
            f"a cache was asked that rounds some channels of layer {partial[0]} only, but codes are made of whole heads; give "
            "schemes without channels"
        )


def export(recipe: Recipe, placement: Placement, file: str | Path | None = None) -> Export:
    """Lines of Python that run a recipe in transformers' own ``generate``; nothing of it is lost.

    Parameters
    ----------
    recipe : Recipe
    placement : Placement
    file : str or Path, optional
        Where :func:`~kvgeom.quant.serialization.save_recipe` has put both. Needed for offsets and factors.

    Raises
    ------
    InputError
        As :func:`quantized_cache`, and without a file for a recipe with offsets or factors.
    """
    _check(recipe, placement)
    lines = ["from kvgeom.engines.transformers import quantized_cache"]
    if file is not None:
        lines += [
            "from kvgeom.quant.serialization import load_recipe",
            "",
            f"recipe, placement = load_recipe({str(file)!r})",
        ]
    else:
        lines += _spelled(recipe, placement)
    lines += [
        "",
        "cache = quantized_cache(hf_model, recipe, placement)  # a new one for each prompt",
        "output = hf_model.generate(**inputs, past_key_values=cache)",
    ]
    return Export(
        engine="transformers",
        text="\n".join(lines),
        versions="5.0 or later, with kvgeom; checked with 5.23",
        cannot=(),
        notes=(_SINGLE,),
        recipe=recipe,
        placement=placement,
    )


def export_plan(file: str | Path) -> Export:
    """Lines of Python that run a plan.

    Parameters
    ----------
    file : str or Path
        Where the plan is saved.
    """
    return Export(
        engine="transformers",
        text=(
            "import kvgeom\n\n"
            f"plan = kvgeom.Plan.load({str(file)!r})\n"
            "cache = plan.cache(model)  # a new one for each prompt\n"
            "output = model.generate(**inputs, past_key_values=cache)"
        ),
        versions="5.0 or later, with kvgeom; checked with 5.23",
        cannot=(),
        notes=(_SINGLE,),
    )


def _spelled(recipe: Recipe, placement: Placement) -> list[str]:
    if recipe.offsets is not None or recipe.factors is not None:
        raise InputError(
            "lines of Python were asked for a recipe with offsets or factors, which are tensors; write them with "
            "kvgeom.quant.serialization.save_recipe and give file="
        )
    pairs = [tuple(scheme and str(scheme) for scheme in pair) for pair in recipe]
    return [
        "from kvgeom.quant.placement import Placement",
        "from kvgeom.quant.recipe import Recipe",
        "from kvgeom.quant.scheme import Scheme",
        "",
        "layers = [",
        *(f"    *[{pair!r}] * {len(list(run))}," for pair, run in groupby(pairs)),
        "]",
        "recipe = Recipe(tuple(tuple(text and Scheme.parse(text) for text in pair) for pair in layers))",
        f"placement = {placement!r}",
    ]
