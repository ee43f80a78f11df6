"""What holds for every causal architecture of transformers: tiny random models of each, and docs/models.md from them.

python benchmarks/architectures.py            # about three minutes on one core; rewrites the table
python benchmarks/architectures.py qwen3 phi  # prints the rows of some
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.utils import logging as transformers_logging

import kvgeom
from kvgeom.errors import KvgeomError, reason
from kvgeom.models.hf import HFModel
from kvgeom.organisms.toy import toy_tokenizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- architectures: begin -->\n", "<!-- architectures: end -->"
#: One set of options for all; what an architecture does not know, it ignores.
OPTIONS: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 2,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "rotary_dim": 4,
}
#: Larger than this a model is not tiny: it does not take the options.
LARGEST = 50_000_000
REQUESTS = ["how do i open the door", "how"]


@dataclass(frozen=True)
class Row:
    """What holds for one architecture; "yes", or why not."""

    architecture: str
    loads: str
    keys: str = ""
    attention: str = ""
    responses: str = ""
    projections: str = ""


def tiny(kind: str) -> Any:
    """A random model of an architecture, with weights large enough that rounding changes what it says."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **OPTIONS)
    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        size = sum(weight.numel() for weight in empty.parameters())
    if size > LARGEST:
        raise ValueError("it takes none of the common options, so that no tiny one was made")
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(6.0) if weight.ndim > 1 else weight.normal_(0, 0.5) if name.endswith("bias") else None
    return model.float().eval()


def row(kind: str) -> Row:
    """Try everything on one architecture."""
    try:
        hf = tiny(kind)
    except Exception as error:  # a configuration that these options do not suit can fail in any way
        return Row(kind, f"not tried: {_short(error)}")
    try:
        model = HFModel(hf, toy_tokenizer(), name=kind)
    except KvgeomError as error:
        return Row(kind, f"refused: {_short(error)}")
    four = Scheme.parse("int4-asym-token")
    layers = model.geometry.layers
    recipes = {"all": Recipe.uniform(layers, four), "last": Recipe.uniform(layers, four, layers=[layers - 1])}

    def responses(placement: str) -> None:
        kvgeom.evaluate(model, recipes, REQUESTS, placement=placement, max_new_tokens=3, progress=False)

    return Row(
        kind,
        "yes",
        _tried(lambda: _turned(model)),
        _tried(lambda: _rebuilt(model)),
        _tried(lambda: responses("cache")),
        _tried(lambda: responses("paper")),
    )


def _turned(model: HFModel) -> str:
    """How many channels of a head each layer turns."""
    found: dict[int, int] = {}
    model.forward([0], on_rotation=lambda layer, rotation: found.__setitem__(layer, rotation.planes.numel()))
    size, counts = model.geometry.head_dim, set(found.values())
    if counts == {0}:
        return "not rotated"
    still = [layer for layer, count in found.items() if not count]
    turned = f"{max(counts)} of {size} channels"
    return turned if not still else f"{turned}; not in layer {', '.join(map(str, still))}"


def _rebuilt(model: HFModel) -> str:
    model.attention(0)
    return "yes"


def _tried(run: Callable[[], str | None]) -> str:
    try:
        return run() or "yes"
    except KvgeomError as error:
        return f"refused: {_short(error)}"


def _short(error: Exception) -> str:
    """The first part of a message, without what differs from run to run."""
    text = re.sub(r"\s+", " ", reason(error)).split(": it has no ")[0].split(", so that ")[0].split("; ")[0]
    return text if len(text) <= 110 else f"{text[:107]}..."


def rows(kinds: Iterable[str]) -> list[Row]:
    """Those of some architectures, quietly."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [row(kind) for kind in kinds]


def table(found: list[Row]) -> str:
    """The table of docs/models.md."""
    head = ("architecture", "loads", "keys turned back", "attention rebuilt", "responses", "rounding at the projection")
    cells = [[getattr(each, name) for name in Row.__dataclass_fields__] for each in found]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    loads = sum(each.loads == "yes" for each in found)
    return (
        f"{BEGIN}Of {len(found)} architectures in transformers {transformers_version}, {loads} load.\n\n"
        f"{tabulate(escaped, head, tablefmt='github')}\n{END}"
    )


def main(asked: list[str]) -> None:
    """Print some rows, or rewrite the page."""
    if asked:
        print(table(rows(asked)))
        return
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(before + table(rows(sorted(CAUSAL))) + after, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
