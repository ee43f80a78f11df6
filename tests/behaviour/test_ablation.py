"""Ablations: what the recipes round, counts by hand, and the tables and figures of a diagnosis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import kvgeom
from kvgeom.behaviour.ablation import Ablation, ablate, ablation_text, channel_magnitudes, channel_subsets, whole_cache
from kvgeom.cli import main
from kvgeom.diagnosis.diagnose import Diagnosis
from kvgeom.diagnosis.mode import Finding, Mode, ModeName
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import Baseline, baseline
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.plots.mode import COLUMNS, mode_card
from kvgeom.prompts.sets import PromptSet
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.stats import mcnemar
from kvgeom.words import text_table
from tests.builders.judges import ArbitraryJudge
from tests.builders.requests import REQUESTS
from tests.builders.tiny import tiny_model

TINY = tiny_model("qwen2", seed=2)

TENSOR = Scheme(3, True, "tensor")


@pytest.fixture(scope="module")
def base() -> Baseline:
    return baseline(TINY, REQUESTS, judge=ArbitraryJudge(), max_new_tokens=5, progress=False)


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    prompts = PromptSet("tiny", tuple(REQUESTS), tuple(f"{r} too" for r in REQUESTS), "written here")
    return kvgeom.diagnose(TINY, prompts, judge=ArbitraryJudge(), bits=(8, 2), max_new_tokens=5, progress=False)


def test_families_round_what_they_say() -> None:
    flat = {name: each.recipe for name, each in whole_cache(6, TENSOR).items()}
    assert flat["all layers"] == Recipe.uniform(6, TENSOR)
    assert flat["keys only"].layers == ((TENSOR, None),) * 6
    assert flat["values only"].layers == ((None, TENSOR),) * 6
    assert flat["first 2"].touched == (0, 1)
    assert flat["last 4"].touched == (2, 3, 4, 5)
    assert {k.bits for k, _ in flat["K4 V2"].layers if k} == {4}
    assert {v.bits for _, v in flat["K4 V2"].layers if v} == {2}
    assert str(flat["group-64"]) == "int3-sym-group64"
    assert "first layers" not in {each.family for each in whole_cache(1, Scheme(8, True, "tensor")).values()}


@pytest.mark.parametrize("placement", [Placement.cache(), Placement.paper()])
def test_magnitudes_are_of_what_is_rounded(base: Baseline, placement: Placement) -> None:
    """Against a cache edit that sees the same tensors on their way to rounding."""
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}

    class Look(Quantizer):
        def __call__(self, layer: int, site: str, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            seen.setdefault((layer, site), []).append(x)
            return x

    for index in base.refused:
        TINY.forward(base.prompts[index].ids, TINY.new_cache(Look(Recipe.exact(3), placement)))
    found = channel_magnitudes(base, placement)
    for (layer, site), parts in seen.items():
        rows = torch.cat([part[0].transpose(0, 1).flatten(1) for part in parts]).double()
        np.testing.assert_allclose(found[site][layer], rows.pow(2).mean(0).sqrt(), rtol=1e-6)  # type: ignore[index]


def test_subsets_of_channels() -> None:
    rng = np.random.default_rng(0)
    magnitudes = {"k": rng.uniform(0.1, 1, (4, 40)), "v": rng.uniform(0.1, 1, (4, 40))}
    magnitudes["k"][2, [7, 30]] = 50
    made = channel_subsets(magnitudes, TENSOR, [2], share=0.05, repeats=2)  # type: ignore[arg-type]
    assert {(each.family, each.layer, each.bits) for each in made.values()} == {("channels", 2, 3)}
    assert [each.draw for each in made.values()] == [None, None, None, None, 0, 1]
    family = {name: each.recipe for name, each in made.items()}
    assert list(family) == ["every channel", "largest", "all but the largest", "low magnitude", "random 1", "random 2"]
    assert family["largest"].touched == (2,)
    keys = {name: set(recipe.scheme(2, "k").channels or ()) for name, recipe in family.items()}  # type: ignore[union-attr]
    assert keys["largest"] == {7, 30}
    assert keys["largest"] | keys["all but the largest"] == set(range(40))
    assert family["every channel"] == Recipe.uniform(
        4, TENSOR, layers=[2]
    )  # the one of the scan, which is not run twice
    assert keys["low magnitude"] == set(np.argsort(magnitudes["k"][2])[:2])
    assert keys["random 1"] != keys["random 2"]
    assert all(len(keys[n]) == 2 and not keys[n] & keys["largest"] for n in ("random 1", "random 2"))


def test_counts_and_p_values(base: Baseline) -> None:
    conditions = whole_cache(3, TENSOR)
    result = ablate(base, conditions, reference="all layers")
    frame = result.to_frame().set_index("recipe")
    assert list(frame.index) == list(conditions)
    raw: dict[str, float] = {}
    for name, condition in conditions.items():
        both = {"x": condition.recipe, "all": conditions["all layers"].recipe}
        alone = evaluate(TINY, both, base, progress=False)
        assert frame.family[name] == condition.family
        assert frame.flips[name] == alone.flips("x")["all"]
        raw[name] = mcnemar(alone.flipped("x"), alone.flipped("all"))
    least = 0.0
    for rank, name in enumerate(sorted(raw.keys() - {"all layers"}, key=raw.__getitem__)):  # Holm, step by step
        least = max(least, min(1.0, raw[name] * (len(raw) - 1 - rank)))
        assert frame.p[name] == pytest.approx(least)
    assert frame.p["all layers"] == 1
    assert isinstance(result.plot(), go.Figure)
    bars = result.plot().data[0]
    np.testing.assert_allclose(bars.x, frame.flip_rate)
    with pytest.raises(InputError, match="nothing"):
        ablate(base, conditions, reference="nothing")


def test_ablations_are_saved_and_read_again(base: Baseline, tmp_path: Path) -> None:
    result = ablate(base, whole_cache(3, TENSOR), reference="all layers")
    again = Ablation.load(result.save(tmp_path / "a.nc"))
    assert again.data.identical(result.data)
    assert again.meta == result.meta


def test_a_diagnosis_holds_together(found: Diagnosis) -> None:
    """Its parts are about the same prompts and agree where they measure the same."""
    n = len(found.baseline.refused)
    assert found.evidence.refused == found.scan.meta["prompts"] == found.ablation.meta["prompts"] == n > 0
    worst = found.scan.worst_layer
    assert found.pcr.layer == worst == found.evidence.worst_layer
    if worst is not None:
        row = found.scan.data.sel(layer=worst)
        assert int(found.pcr.data.flips_tensor) == int(row.flips_complied)
        assert int(found.pcr.data.prompts) == n - int(row.flips_degenerate)
        assert f"layer {worst} in 16 bits" in found.ablation.data.recipe
        assert int(found.channels.data.flips.sel(recipe="every channel")) == int(row.flips)
    whole = found.ablation.data.sel(recipe="all layers")
    assert found.evidence.loss is not None
    assert found.evidence.loss.value == pytest.approx(int(whole.flips_complied) / (n - int(whole.flips_degenerate)))
    assert found.evidence.bits == found.scan.meta["bits"] == found.width.scheme.bits
    for shares in found.mode.shares.values():
        assert sum(shares.values()) == pytest.approx(1)
    assert found.mode.name in found.summary()
    assert "<ul>" in found._repr_html_()


def test_a_diagnosis_runs_what_can_flip(found: Diagnosis) -> None:
    """The curve's other prompts only on demand, and then nothing else changes."""
    prompts = PromptSet("tiny", tuple(REQUESTS), (), "written here")
    options = {"judge": ArbitraryJudge(), "bits": (8, 2), "max_new_tokens": 5, "progress": False}
    gained = kvgeom.diagnose(TINY, prompts, geometry=False, gains=True, **options)  # type: ignore[arg-type]
    n = len(found.baseline.refused)
    assert (found.curve.counted, gained.curve.counted) == (n, len(REQUESTS))
    assert found.outcomes.data.sizes["prompt"] == n
    assert found.outcomes.data.label.identical(gained.outcomes.of_refused().data.label)
    assert np.isnan(found.curve.data.gains).all()
    assert np.isfinite(gained.curve.data.gains).all()
    assert found.curve.data.flips.identical(gained.curve.data.flips)
    assert f"the {n} of {len(REQUESTS)} prompts refused with an exact cache" in found.to_text()
    assert "prompts refused with an exact cache" not in gained.to_text()


def test_a_diagnosis_without_geometry_says_less(found: Diagnosis) -> None:
    prompts = PromptSet("tiny", tuple(REQUESTS), tuple(f"{r} too" for r in REQUESTS), "written here")
    short = kvgeom.diagnose(
        TINY, prompts, judge=ArbitraryJudge(), bits=(8,), max_new_tokens=5, geometry=False, progress=False
    )
    assert short.sensitivity is None
    assert short.mode.name == found.mode.name
    assert short.evidence.signal_gap is None


def test_tables(found: Diagnosis) -> None:
    text = found.to_text()
    for part in (found.curve.to_text(), found.scan.to_text(), ablation_text(found.ablation, found.channels)):
        assert part in text
    assert found.mode.reason in text
    assert "Transition" in text
    lines = text_table(("name", "n"), [("a", 1), ("longer", 22)]).splitlines()
    assert [line.split() for line in lines if "-" not in line] == [["name", "n"], ["a", "1"], ["longer", "22"]]
    assert len({len(line) for line in lines}) == 1  # numbers end together
    assert "-" in text_table(("x",), [(float("nan"),)])


def test_the_mode_card() -> None:
    findings = (
        Finding("PCR", "95 % at layer <3>", ("outlier-crushes-safety",), True),
        Finding("Geometry", "gap 3"),
    )
    shares: dict[str, dict[ModeName, float]] = {
        "posterior": {"outlier-crushes-safety": 0.9, "undetermined": 0.1},
        "thresholds": {"outlier-crushes-safety": 1.0},
    }
    figure = mode_card(Mode.of("outlier-crushes-safety", "because.", "", "concentrated", findings, "p", shares))
    grid, dots, bars, diamonds = figure.data
    assert len(grid.x) == len(COLUMNS) * 2
    assert list(dots.x) == ["outlier-crushes-safety"]
    assert "&lt;3&gt;" in dots.y[0]
    assert list(bars.x) == [0.9, 0.1]
    assert list(diamonds.x) == [1.0, 0.0]


@pytest.mark.parametrize("command", [pytest.param("diagnose", marks=pytest.mark.slow), "sweep", "scan"])
def test_commands(command: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [command, str(checkpoint), "--limit", "2", "--max-new-tokens", "3", "--quiet"]
    assert main(asked) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert {"diagnose": "Failure mode", "sweep": "perplexity", "scan": "Critical layer"}[command] in shown.out
    assert main([*asked, "--out", str(tmp_path / "kept")]) == 0
    first = capsys.readouterr().out
    tables = tmp_path / "kept" / f"{command}.txt"
    assert first == f"{shown.out}\ntables: {tables}\n"
    assert tables.read_text() == shown.out[1:]
    before = (tmp_path / "kept" / "journal.jsonl").read_bytes()
    assert main([*asked, "--out", str(tmp_path / "kept")]) == 0
    assert capsys.readouterr().out == first
    assert (tmp_path / "kept" / "journal.jsonl").read_bytes() == before
    assert main([*asked, "--out", str(tmp_path / "kept"), "--prompts", str(_prompts(tmp_path))]) == 2
    assert "about something else" in capsys.readouterr().err


def _prompts(folder: Path) -> Path:
    (folder / "p.txt").write_text("how are you\nwho is there\n")
    return folder / "p.txt"


def test_text_for_perplexity(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["sweep", str(checkpoint), "--limit", "2", "--max-new-tokens", "2", "--bits", "4", "--quiet", "--text"]
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog.")
    assert main([*asked, str(tmp_path / "t.txt")]) == 0
    assert main([*asked, str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err
