"""Presets: what they are made of, what they do step by step, and that names are kept apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicLayer

from kvgeom.cli import main
from kvgeom.engines.engine import Engine, Preset
from kvgeom.engines.registry import engines, presets, resolve, scheme_rows, widths
from kvgeom.errors import InputError
from kvgeom.models.hf import HFModel
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.tiny import tiny_model, wide_model

IDS = [1, *range(40, 75)]
DOCS = Path(__file__).parents[2] / "docs"
NAMED = {
    "paper",
    "hf-quanto",
    "hf-hqq",
    "kivi",
    "vllm-fp8-e4m3",
    "vllm-fp8-e5m2",
    "vllm-cpu-fp8-e4m3",
    "vllm-cpu-fp8-e5m2",
    "vllm-int8-per-token-head",
    "vllm-int4-per-token-head",
    "vllm-fp8-per-token-head",
    "vllm-nvfp4",
    "vllm-nvfp4-4over6",
    "vllm-turboquant-k8v4",
    "vllm-turboquant-4bit-nc",
    "vllm-turboquant-k3v4-nc",
    "vllm-turboquant-3bit-nc",
    "sglang-fp4-e2m1",
    "exllamav3",
    "ik_llama-q6_0",
    "ik_llama-q4_0-had",
    "lmdeploy-fp8-e4m3",
    "lmdeploy-turboquant",
    "llamacpp-q8_0",
    "llamacpp-q4_0",
    "lmdeploy-int4",
    "lmdeploy-int8",
    "mlx-g64",
    "rotated",
}


@pytest.fixture(scope="module")
def model() -> HFModel:
    """Heads of 64 channels, which every format divides."""
    return wide_model()


def test_built_in_presets() -> None:
    names = [preset.name for preset in presets()]
    assert set(names) >= NAMED
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("engine", "preset"),
    [(engine, preset) for engine in engines() for preset in engine.presets],
    ids=[preset.name for preset in presets()],
)
def test_every_preset_runs_and_has_a_page(model: HFModel, engine: Engine, preset: Preset) -> None:
    page = (DOCS / engine.page).read_text(encoding="utf-8")
    assert f"`{preset.name}`" in page
    assert "http" in engine.source
    for width in preset.widths:
        config = resolve(preset.name, bits=width)
        assert engine.title in config.version
        assert preset.setting in config.version
        cache = model.new_cache(Quantizer(config.recipe(3), config.placement))
        for ids in (IDS[:20], *([token] for token in IDS[20:24])):
            logits = model.forward(ids, cache)
        assert torch.isfinite(logits).all()
        assert not torch.equal(logits, model.forward(IDS[:24]))


@pytest.mark.parametrize(
    ("layers", "touched"), [(1, [0]), (2, []), (3, [1]), (5, [2]), (6, [2, 3]), (28, range(2, 26))]
)
def test_presets_that_keep_the_ends_of_a_model(layers: int, touched: list[int]) -> None:
    """Two layers at either end, but never more than half: as vLLM counts them."""
    config = resolve("vllm-turboquant-k3v4-nc")
    recipe = config.recipe(layers)
    assert recipe.touched == tuple(touched)
    assert {pair for n, pair in enumerate(recipe) if n in touched} <= {(config.k, config.v)}
    assert "first and last 2 layers exact" in config.stored


@pytest.mark.parametrize("wrong", [-1, 1.5, "two"])
def test_ends_are_a_number_of_layers(wrong: Any) -> None:
    preset = next(preset for preset in presets() if preset.name == "kivi")
    for make in (lambda: replace(preset, exact_ends=wrong), lambda: replace(resolve("kivi"), exact_ends=wrong)):
        with pytest.raises(InputError, match="exact_ends"):
            make()
    with pytest.raises(InputError, match="layer by layer"):
        replace(resolve(Recipe.exact(3)), exact_ends=1)


class _Kivi(DynamicLayer):  # type: ignore[misc]
    """KIVI's cache, written from the paper: keys by channel in groups of tokens, values by token in groups of channels."""

    def __init__(self, bits: int, group: int, residual: int) -> None:
        super().__init__()
        self.bits, self.group, self.window = bits, group, residual
        self.parts: dict[str, list[Any]] = {"k": [], "v": []}  # old tokens, quantized
        self.full: dict[str, Any] = {}

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Groups along the last axis."""
        blocks = x.unflatten(-1, (-1, self.group))
        low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
        scale, low = ((high - low) / (2**self.bits - 1)).half().float(), low.half().float()
        return (((blocks - low) / scale).round().clamp(0, 2**self.bits - 1) * scale + low).flatten(-2)

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        prefill = not self.full
        for site, new in (("k", key_states), ("v", value_states)):
            self.full[site] = new if prefill else torch.cat([self.full[site], new], dim=2)
        read = tuple(torch.cat([*self.parts[site], self.full[site]], dim=2) for site in ("k", "v"))
        keys, values = self.full["k"], self.full["v"]
        old = keys.shape[2] // self.window * self.window
        if old:
            self.parts["k"].append(self.quantize(keys[:, :, :old].transpose(2, 3)).transpose(2, 3))
            self.full["k"] = keys[:, :, old:]
        over = values.shape[2] - self.window
        if over > 0:
            self.parts["v"].append(self.quantize(values[:, :, :over]))
            self.full["v"] = values[:, :, over:]
        self.keys = read[0]  # for get_seq_length
        self.is_initialized = True
        return read


@pytest.mark.parametrize(("prompt", "residual"), [(20, 4), (16, 8), (3, 8), (9, 32)])
def test_kivi_step_by_step(model: HFModel, prompt: int, residual: int) -> None:
    """Prompts longer and shorter than the window, and just a multiple of it."""
    engine = resolve("kivi", bits=2)
    k, v = (replace(scheme, group_size=4) for scheme in (engine.k, engine.v))  # type: ignore[type-var]
    engine = replace(engine, k=k, v=v, placement=replace(engine.placement, residual=residual))
    ours = model.new_cache(Quantizer(engine.recipe(3), engine.placement))
    theirs = Cache(layers=[_Kivi(2, 4, residual) for _ in range(3)])
    position = 0
    for ids in (IDS[:prompt], *([token] for token in IDS[prompt:])):
        positions = torch.arange(position, position + len(ids))[None]
        position += len(ids)
        with torch.inference_mode():
            inputs = {"past_key_values": theirs, "position_ids": positions, "logits_to_keep": 1}
            expected = model.hf_model(torch.tensor([ids]), **inputs).logits[0, -1]
        assert torch.equal(model.forward(ids, ours)[-1], expected)


def test_paper_presets_are_the_released_simulation() -> None:
    for name, granularity in (("paper", "tensor"), ("paper-channel", "channel")):
        engine = resolve(name)
        assert engine.k == engine.v == Scheme(3, True, granularity)  # type: ignore[arg-type]
        assert engine.placement == Placement.paper()


def test_mlx_feeds_the_last_prompt_token_on_its_own(model: HFModel) -> None:
    engine = resolve("mlx-g64")
    whole = model.new_cache(Quantizer(engine.recipe(3), engine.placement))
    pieces = model.new_cache(Quantizer(engine.recipe(3), replace(engine.placement, prefill_reads="exact")))
    logits = model.forward(IDS, whole)
    assert torch.equal(model.forward(IDS[:-1], pieces)[-1], model.forward(IDS[:-1])[-1])  # read exactly
    assert torch.equal(logits, model.forward(IDS[-1:], pieces))
    assert not torch.equal(logits, model.forward(IDS))


def test_resolve() -> None:
    assert resolve("kivi", bits=2) == resolve("kivi", bits=2)
    assert resolve("asym-group64", bits=4).k == Scheme(4, False, "group", 64)
    assert resolve("q4_0").k == Scheme.parse("q4_0")
    assert resolve("q4_0", bits=4).placement == Placement()
    assert resolve("kivi", bits=4, placement=Placement()).placement == Placement()
    assert widths("kivi") == (2, 4)
    assert widths("asym-token") == (2, 3, 4, 5, 6, 7, 8)
    assert widths("q5_1") == (5,)
    assert str(resolve("kivi", bits=2)).startswith("kivi: k int2-asym-channel-group32/f16, v int2-asym-group32/f16;")


def test_resolve_takes_what_users_write() -> None:
    four = Scheme.parse("int4-asym-group64")
    assert resolve(four).k == four
    assert resolve(four).name == "int4-asym-group64"
    assert resolve("int3-sym-tensor", placement="paper").placement == Placement.paper()
    assert resolve("kivi", placement="cache").placement == Placement()
    kivi = resolve("kivi")
    assert resolve(kivi) is kivi
    assert resolve(kivi, bits=2) is kivi
    assert "KIVI" in kivi.version
    assert resolve(four).version == ""
    recipe = Recipe.uniform(5, four).keep([0])
    config = resolve(recipe, placement="paper")
    assert config.recipe(5) is recipe
    assert (config.schemes, config.bits) == ((four,), 4)
    with pytest.raises(InputError, match="4 layers"):
        config.recipe(4)
    assert resolve(Recipe.exact(2)).bits == 16


@pytest.mark.parametrize(
    ("spec", "bits", "word"),
    [
        ("kivi", 3, "2, 4"),
        ("q4_0", 8, "q4_0"),
        (Scheme(4), 3, "int4-asym-token"),
        (Recipe.uniform(2, Scheme(4)), 3, "4 bits"),
        (resolve("kivi"), 4, "kivi"),
        ("asym-token", None, "int4-asym-token"),
        ("gptq", None, "kivi"),
        ("kvii", None, "'kivi'"),
        ("KIVI", 2, "'kivi'"),
        ("vllm-fp8", None, "'vllm-fp8-e[45]m[32]'"),
        ("sym-nothing", 4, "nothing"),
        ("int4-asym-tokn", None, "tokn"),
        ("hqq5-group64", None, "hqq"),
        (4, None, "got int"),
    ],
)
def test_what_cannot_be_resolved(spec: Any, bits: int | None, word: str) -> None:
    with pytest.raises(InputError, match=word):
        resolve(spec, bits=bits)


def test_an_unknown_placement() -> None:
    with pytest.raises(InputError, match="papr"):
        resolve("kivi", placement="papr")


def test_scheme_rows() -> None:
    rows = scheme_rows()
    size = {(row["name"], row["bits"]): row["bits_per_element"] for row in rows}
    assert size["q8_0", 8] == 8.5
    assert size["q4_0", 4] == 4.5
    assert size["nvfp4", 4] == 4.5
    assert size["mxfp4", 4] == 4.25
    assert size["vllm-int4-per-token-head", 4] == 4.25
    assert size["lmdeploy-int4", 4] == 4.25
    assert {row["name"] for row in rows if row["kind"] == "preset"} == {preset.name for preset in presets()}


def test_projection_presets_need_no_cache_window() -> None:
    with pytest.raises(InputError, match="keeps no tokens"):
        Placement(where="projection", residual=4)
    with pytest.raises(InputError, match="0 to 2147483648"):
        Placement(sinks=-1)
    with pytest.raises(InputError, match="residual=0"):
        Placement(flush="all")
    assert tiny_model().geometry.head_dim == 8  # too small for blocks of 32: an error, not a wrong number
    with pytest.raises(InputError, match="head_dim=8"):
        tiny_model().forward(IDS, tiny_model().new_cache(Quantizer(resolve("llamacpp-q4_0").recipe(3))))


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schemes", "--heads", "2", "--head-dim", "64", "--tokens", "100"]) == 0
    listed = capsys.readouterr().out
    for row in scheme_rows(2, 64, 100):
        assert f"{row['name']} " in listed
        assert f"{row['bits_per_element']:.3f}" in listed
    assert main(["schemes", "--tokens", "0"]) == 2
    assert "--tokens must be a whole number, 1 to" in capsys.readouterr().err
