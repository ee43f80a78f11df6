"""MLX-LM: a list with a cache for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from kvgeom.engines.differences import differences, widest
from kvgeom.engines.engine import Engine, Export, Preset, both
from kvgeom.engines.registry import register_engine
from kvgeom.engines.runner import Launch, Runner, checkpoint
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Schemes
from kvgeom.quant.scheme import Scheme, runs

if TYPE_CHECKING:
    from kvgeom.models.model import KVGeometry

_GROUPS = (128, 64, 32)
_DEFAULT_GROUP = 64
#: Width of a server's cache that is not quantized.
_EXACT = "16"
_WORD = 32


def export(recipe: Recipe, placement: Placement, geometry: KVGeometry) -> Export:
    """Lines of Python with the list of caches that comes nearest to a recipe (:class:`~kvgeom.engines.engine.Export`).

    In MLX-LM a layer has one width and group size for keys and values, 2, 3, 4, 5, 6 or 8 bits for 32, 64 or 128 channels
    of a head. The group is the largest that does not exceed that of the recipe (64 where the recipe has none).

    Parameters
    ----------
    recipe : Recipe
    placement : Placement
    geometry : KVGeometry
        Of the model.
    """
    layers = [_nearest(pair, geometry.head_dim) for pair in recipe]
    stored = Recipe(tuple((scheme, scheme) for scheme in layers))
    notes = ["pass the whole list: generate(..., kv_bits=...) would quantize all layers, and only from 5,000 tokens on"]
    if geometry.head_dim % min(_GROUPS):
        notes.append(f"heads of {geometry.head_dim} channels cannot be quantized: MLX needs a multiple of 32")
    if geometry.sliding_window is not None:
        notes.append(
            "layers with a sliding window store the whole sequence here; MLX-LM cannot quantize its rotating caches"
        )
    if len(geometry.stores) < geometry.layers:
        notes.append(
            f"only layers {', '.join(runs(geometry.stores))} have keys and values: replace these in the list that "
            "mlx_lm.models.cache.make_prompt_cache(model) makes, and leave the others"
        )
    entries = []
    for scheme, run in groupby(layers):
        made = (
            "KVCache()" if scheme is None else f"QuantizedKVCache(group_size={scheme.group_size}, bits={scheme.bits})"
        )
        entries.append(f"    *({made} for _ in range({len(list(run))})),")
    text = "\n".join(
        [
            "from mlx_lm.models.cache import KVCache, QuantizedKVCache",
            "",
            "cache = [",
            *entries,
            "]",
            "# a new list for each prompt: mlx_lm.generate(model, tokenizer, prompt, prompt_cache=cache)",
        ]
    )
    return Export(
        engine="MLX-LM",
        text=text,
        versions="checked with 0.32.2",
        cannot=differences(recipe, placement, stored, Placement()),
        notes=tuple(notes),
        recipe=stored,
        placement=Placement(),
    )


def _nearest(pair: Schemes, head_dim: int) -> Scheme | None:
    """What one layer stores; ``None`` where it stays in 16 bits."""
    fitting = [size for size in _GROUPS if head_dim % size == 0]
    if None in pair or not fitting:
        return None
    wanted = [scheme.group_size for scheme in pair if scheme is not None and scheme.granularity == "group"]
    limit = min((size for size in wanted if size is not None), default=_DEFAULT_GROUP)
    size = next((size for size in fitting if size <= limit), fitting[-1])
    bits = next(width for width in (2, 3, 4, 5, 6, 8) if width >= widest(pair) and _allocates(width, head_dim))
    return Scheme.parse(f"mlx{bits}-group{size}")


def _allocates(bits: int, head_dim: int) -> bool:
    """Whether an empty ``QuantizedKVCache`` reserves as many words as a head of codes takes (not so for 5 bits of 128)."""
    return head_dim // (_WORD // bits) == head_dim * bits // _WORD


def _command(launch: Launch) -> list[str]:
    command = ["-m", "mlx_lm", "server", "--model", launch.model, "--host", "127.0.0.1", "--port", str(launch.port)]
    if launch.cache["bits"] == _EXACT:
        # A quantized cache is served one request at a time, so that the exact one is, too: batches change tokens.
        return [*command, "--decode-concurrency", "1", "--prompt-concurrency", "1"]
    quantized = ["--kv-bits", launch.cache["bits"], "--kv-group-size", launch.cache["group"]]
    return [*command, *quantized, "--quantized-kv-start", "0"]


def _environment(launch: Launch) -> Mapping[str, str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    # The server lists what is there, and fails at each question where there is no such folder.
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    return {"OMP_NUM_THREADS": str(launch.threads)}  # of the processor


RUNNER = Runner(
    module="mlx_lm",
    packages=("mlx-lm",),
    install="pip install 'mlx[cpu]==0.32.4' mlx-lm==0.32.2",
    caches={"bits": (_EXACT, "8", "6", "5", "4", "3", "2"), "group": tuple(map(str, (64, 128, 32)))},
    find=checkpoint,
    name=lambda model, found: found,  # it goes by its path
    command=_command,
    stated=lambda launch, log: {},
    environment=_environment,
)

MLX = register_engine(
    Engine(
        name="mlx",
        title="MLX-LM",
        version="0.32.2 (MLX 0.32.4)",
        source="https://github.com/ml-explore/mlx-lm (mlx_lm/models/cache.py), mx.quantize",
        checked="mx.quantize bit for bit; MLX-LM itself in greedy tokens and logits",
        page="engine-mlx.md",
        presets=(
            Preset(
                "mlx-g64",
                "kv_group_size=64, quantized_kv_start=0",
                (4, 2, 3, 6, 8),
                both("mlx{bits}-group64"),
                Placement(prefill_reads="last"),
            ),
        ),
        export=export,
        runner=RUNNER,
    )
)
