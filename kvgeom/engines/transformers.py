"""transformers: its own quantized caches, and a cache of packed codes that its ``generate`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from kvgeom.engines.engine import Engine, Export, Preset, both
from kvgeom.engines.registry import register_engine, resolve
from kvgeom.engines.runner import Launch, Runner, from_any_folder
from kvgeom.errors import InputError
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe

if TYPE_CHECKING:
    from kvgeom.models.model import KVGeometry

_VERSIONS = "5.0 or later, with kvgeom; checked with 5.23"
_SINGLE = "one sequence without padding; greedy or sampled, no beams and no draft model"


def export(
    recipe: Recipe, placement: Placement, geometry: KVGeometry | None = None, *, file: str | Path | None = None
) -> Export:
    """Lines of Python that run a recipe in transformers' own ``generate``; nothing of it is lost.

    Parameters
    ----------
    recipe : Recipe
    placement : Placement
    geometry : KVGeometry, optional
        Not needed: every shape can be stored.
    file : str or Path, optional
        Where :func:`~kvgeom.quant.serialization.save_recipe` has put both. Needed for offsets and factors.

    Raises
    ------
    InputError
        As :func:`~kvgeom.models.packed.quantized_cache`, and without a file for a recipe with offsets or factors.
    """
    from kvgeom.models.packed import check_packable  # imports torch, which listing engines must not

    check_packable(recipe, placement)
    lines = ["from kvgeom.models.packed import quantized_cache"]
    if file is not None:
        lines += [
            "from kvgeom.quant.serialization import load_recipe",
            "",
            f"recipe, placement = load_recipe({str(file)!r})",
        ]
    else:
        lines += _as_python(recipe, placement)
    lines += [
        "",
        "cache = quantized_cache(hf_model, recipe, placement)  # a new one for each prompt",
        "output = hf_model.generate(**inputs, past_key_values=cache)",
    ]
    text = "\n".join(lines)
    return Export("transformers", text, _VERSIONS, (), (_SINGLE,), recipe, placement)


def export_plan(file: str | Path, recipe: Recipe, placement: Placement) -> Export | None:
    """Lines of Python that run a saved plan; ``None`` if the placement feeds the last prompt token separately.

    Parameters
    ----------
    file : str or Path
        Where the plan is saved.
    recipe, placement : Recipe, Placement
        What it stores.
    """
    if placement.prefill_reads == "last":
        return None
    text = (
        "import kvgeom\n\n"
        f"plan = kvgeom.Plan.load({str(file)!r})\n"
        "cache = plan.cache(model)  # a new one for each prompt\n"
        "output = model.generate(**inputs, past_key_values=cache)"
    )
    return Export("transformers", text, _VERSIONS, (), (_SINGLE,), recipe, placement)


def _as_python(recipe: Recipe, placement: Placement) -> list[str]:
    if recipe.offsets is not None or recipe.factors is not None:
        raise InputError(
            "offsets and factors of a recipe are tensors and cannot be pasted; write them with "
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


#: What a server says of its cache, in its log.
STATED = "the cache is "


def is_plan_file(text: str) -> bool:
    """Whether a plan is saved there, or in that folder."""
    if not text:
        return False
    path = Path(text)
    with suppress(OSError, ValueError):  # of what is no path
        return (path if path.suffix == ".json" else path / "plan.json").is_file()
    return False


def _cache(option: str, value: str) -> str:
    """A plan by its whole path; presets and schemes as they are, once they are known."""
    if is_plan_file(value):
        return from_any_folder(value)
    resolve(value)
    return value


def _command(launch: Launch) -> list[str]:
    options = {
        "model": launch.model,
        "name": launch.name,
        "port": launch.port,
        "cache": launch.cache["cache"],
        "context": launch.context,
        "threads": launch.threads,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return ["-m", "kvgeom.gating.transformers_server", *flags]


def _stated(launch: Launch, log: str) -> Mapping[str, str]:
    found = [line.removeprefix(STATED) for line in log.splitlines() if line.startswith(STATED)]
    return {"cache": found[-1]} if found else {}


RUNNER = Runner(
    module="kvgeom",
    packages=("transformers",),
    install="pip install kvgeom",
    caches={"cache": ("exact",)},
    other=_cache,
    plan_option="cache",
    find=from_any_folder,
    command=_command,
    stated=_stated,
)

_WAITS = Placement(prefill_reads="exact", residual=128, flush="all")

TRANSFORMERS = register_engine(
    Engine(
        name="transformers",
        title="transformers",
        version="5.23",
        source="https://github.com/huggingface/transformers (src/transformers/cache_utils.py, QuantizedLayer)",
        checked="the engine itself, bit for bit",
        page="engine-transformers.md",
        presets=(
            Preset(
                "hf-quanto",
                "QuantizedCache('quanto'), optimum-quanto 0.2.7",
                (4, 2),
                both("int{bits}-asym-group64"),
                _WAITS,
            ),
            Preset(
                "hf-hqq",
                "QuantizedCache('hqq', axis 1), hqq 0.2.8",
                (4, 2, 8),  # the engine also takes 3, and fails at every length
                both("hqq{bits}-group64"),
                _WAITS,
            ),
            Preset("hf-fp8", "QuantizedCache('fp8')", (8,), both("fp8_e4m3-tensor"), Placement(prefill_reads="exact")),
        ),
        export=export,
        export_plan=export_plan,
        runner=RUNNER,
    )
)
