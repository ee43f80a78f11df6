"""Engines by name: built-in ones are found, and one from outside the package works wherever an engine does."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvgeom.cli import main
from kvgeom.engines import registry
from kvgeom.engines.differences import differences
from kvgeom.engines.engine import Engine, Export, Preset, both
from kvgeom.engines.registry import engines, presets, register_engine, resolve, scheme_rows
from kvgeom.errors import InputError
from kvgeom.mitigation.candidates import UNMITIGATED, Candidate
from kvgeom.mitigation.plan import Plan
from kvgeom.models.model import KVGeometry
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.mitigation import search

GEOMETRY = KVGeometry(layers=3, query_heads=4, kv_heads=2, head_dim=64, d_model=64, key_bias=False, rope="default")


def export(recipe: Recipe, placement: Placement, geometry: KVGeometry) -> Export:
    stored = Recipe.uniform(len(recipe), Scheme.parse("int8-asym-token"))
    cannot = differences(recipe, placement, stored, Placement())
    return Export("Mine", f"--heads {geometry.kv_heads}", "1.2", cannot, (), stored, Placement())


MINE = Engine(
    name="mine",
    title="Mine",
    version="1.2",
    source="https://example.org/mine",
    checked="not yet",
    page="https://example.org/mine",
    presets=(Preset("mine-int", "cache=int", (8, 4), both("int{bits}-asym-token"), Placement(sinks=1)),),
    export=export,
)


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(registry, "_ENGINES", {engine.name: engine for engine in engines()})
    return register_engine(MINE)


def plan(placement: Placement) -> Plan:
    base = Candidate(UNMITIGATED, "unmitigated", resolve("int4-asym-token").recipe(3), placement, "")
    return Plan(
        model="m", identity="i", geometry=GEOMETRY, scheme="int4-asym-token", mode="mixed", paper_mode="mixed", chosen=base,
        paper=base, candidates=(base,), reasons=(), search=search(), selection=None, judge="keyword", max_new_tokens=4,
        calibration=(),
    )  # fmt: skip


def test_built_in_engines_need_no_torch_to_be_listed() -> None:
    code = (
        "import sys; from kvgeom.engines.registry import engines; "
        "print(*(e.name for e in engines())); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    names, heavy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {
        "exllamav3",
        "ik_llama",
        "kivi",
        "llamacpp",
        "lmdeploy",
        "mlx",
        "paper",
        "quarot",
        "sglang",
        "transformers",
        "vllm",
    } <= set(names.split())
    assert heavy == "False False"


def test_an_engine_that_is_imported_first_is_registered_once() -> None:
    code = (
        "from kvgeom.engines.vllm import VLLM; from kvgeom.engines.registry import engines; "
        "print([e.name for e in engines()].count('vllm'), VLLM in engines())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1 True\n"


def test_it_resolves_and_is_listed(mine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolve("mine-int", bits=4)
    assert config.k == config.v == Scheme.parse("int4-asym-token")
    assert config.placement.sinks == 1
    assert config.version == "Mine 1.2, cache=int"
    assert mine in engines()
    assert mine.presets[0] in presets()
    assert [row["bits"] for row in scheme_rows() if row["name"] == "mine-int"] == [8, 4]
    assert main(["schemes"]) == 0
    assert "mine-int" in capsys.readouterr().out
    with pytest.raises(InputError, match="'mine-int'"):
        resolve("mine-imt")


@pytest.mark.usefixtures("mine")
def test_it_is_swept_and_audited(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--limit", "2", "--max-new-tokens", "2", "--quiet", "--scheme", "mine-int"]
    assert main(["sweep", str(checkpoint), *options]) == 0
    assert "Mine 1.2" in capsys.readouterr().out
    assert main(["audit", str(checkpoint), "--out", str(tmp_path), *options]) == 0
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["settings"]["engine"] == "Mine 1.2, cache=int"
    assert [row["bits"] for row in found["curve"]] == [16, 8, 4]


def test_its_export_is_among_those_of_a_plan(mine: Engine) -> None:
    found = {made.engine: made for made in plan(Placement()).exports()}
    assert set(found) == {"transformers", "vLLM", "MLX-LM", "llama.cpp", "ExLlamaV3", mine.title}
    assert found["Mine"].text == "--heads 2"
    assert "int8-asym-token" in found["Mine"].cannot[0]


def test_exports_of_a_plan() -> None:
    first, *others = plan(Placement()).exports("here.json")
    assert "here.json" in first.text
    assert first.recipe == plan(Placement()).chosen.recipe
    assert {made.engine for made in others} == {"vLLM", "MLX-LM", "llama.cpp", "ExLlamaV3"}
    assert "transformers" not in {made.engine for made in plan(Placement(prefill_reads="last")).exports()}
    with pytest.raises(InputError, match="projection"):
        plan(Placement.paper()).exports()


def test_what_cannot_be_registered(mine: Engine) -> None:
    (preset,) = mine.presets
    for wrong, word in (
        (mine, "'mine'"),
        (replace(mine, name="other"), "'mine-int'"),
        (replace(mine, name="kivi"), "'kivi'"),
        (replace(mine, name="other", presets=(replace(preset, name="kivi"),)), "'kivi'"),
        (replace(mine, name="other", presets=(replace(preset, name="a"),) * 2), "'a'"),
        (replace(mine, name="other", presets=(replace(preset, name="int4-mine"),)), "reads as a scheme"),
        (replace(mine, name="other", presets=(replace(preset, name="a", widths=(9,)),)), "9"),
        (replace(mine, name="other", presets=(replace(preset, name="a", widths=()),)), "widths"),
        (replace(mine, name="other", presets=(replace(preset, name="a", schemes=both("q4")),)), "q4"),
    ):
        with pytest.raises(InputError, match=word):
            register_engine(wrong)
    assert "other" not in {engine.name for engine in engines()}
