"""A quick look: what it counts, what it says, and that it points where damage was planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kvgeom
from kvgeom.cli import main
from kvgeom.engines.registry import resolve
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import baseline
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.organisms import Organism
from kvgeom.organisms.observed import NEW_TOKENS
from kvgeom.quant.placement import Placement
from tests.builders.judges import CountingJudge
from tests.builders.organisms import size_of
from tests.builders.tiny import tiny_model


@pytest.fixture(scope="module")
def screened() -> kvgeom.Screen:
    return kvgeom.screen(
        tiny_model("qwen2", seed=1),
        kvgeom.calibration().take(8),
        judge=CountingJudge(6),
        max_new_tokens=6,
        progress=False,
    )


def test_counts_are_of_first_tokens_that_generation_changes(screened: kvgeom.Screen) -> None:
    model = tiny_model("qwen2", seed=1)
    base = baseline(model, kvgeom.calibration().take(8), judge=CountingJudge(6), max_new_tokens=6, progress=False)
    assert screened.refused == len(base.refused) > 0
    for bits in screened.data.bits.values:
        made = evaluate(None, {"x": resolve("asym-token", bits=int(bits))}, base, refused_only=True, progress=False)
        changed = (made.data.divergence.sel(recipe="x").values == 0).sum()
        assert int(screened.data.expected_lost.sel(bits=bits)) == changed
        assert (screened.data.first_change.sel(bits=bits).values == 0).sum() == changed


def test_it_is_a_result_like_all_others(screened: kvgeom.Screen, tmp_path: Path) -> None:
    assert screened.to_frame().bits.tolist() == [8, 6, 5, 4, 3, 2]
    assert {*screened.to_frame("layers").columns} >= {"layer", "site", "first_order", "ratio", "ratio_low"}
    assert screened.to_frame("caches").cache.tolist()[:3] == ["as it is", "keys alone", "values alone"]
    back = kvgeom.Screen.load(screened.save(tmp_path / "screen.nc"))
    assert back.data.equals(screened.data)
    assert (back.expectation, back.meta) == (screened.expectation, screened.meta)
    for name in screened.figures():
        assert screened.plot(name).data or screened.plot(name).layout.annotations
    assert screened.provenance()["scheme"] == "asym-token"


def test_organisms_lose_what_is_expected(organism: Organism) -> None:
    """Of each mode: the expected losses are the measured ones, and the planted layers cost most margin."""
    prompts = size_of(organism.mode).prompts("train").take(16)
    found = kvgeom.screen(
        organism.model,
        prompts,
        scheme="sym-tensor",
        bits=[8, organism.bits],
        scan_bits=organism.bits,
        max_new_tokens=NEW_TOKENS,
        geometry=False,
        progress=False,
    )
    base = baseline(organism.model, prompts, max_new_tokens=NEW_TOKENS, progress=False)
    made = evaluate(None, {"x": resolve("sym-tensor", bits=organism.bits)}, base, refused_only=True, progress=False)
    lost = made.flips("x")["all"]
    expected = int(found.data.expected_lost.sel(bits=organism.bits))
    assert abs(expected - lost) <= 0.15 * found.refused
    if organism.mode == "robust":
        assert (found.first_loss, expected) == (None, 0)
        return
    assert found.first_loss == organism.bits
    assert str(organism.bits) in found.expectation
    assert {*found.worst(len(organism.layers)).layer} == {*organism.layers}
    assert {*found.worst(1).site} == {"v"}
    if organism.mode == "outlier-crushes-safety":
        assert found.lost_under("per-channel keys") == found.lost_under("as it is")  # it is in the values


def test_a_model_that_refuses_nothing_is_said_to() -> None:
    class Complies(CountingJudge):
        name = "complies"

        def label(self, request, response, likelihood):  # type: ignore[no-untyped-def]
            found = super().label(request, response, likelihood)
            return type(found)("complied", "always")

    found = kvgeom.screen(
        tiny_model("llama", seed=1), ["a", "b"], judge=Complies(6), max_new_tokens=4, geometry=False, progress=False
    )
    assert found.refused == 0
    assert "refuses none" in found.expectation
    assert "refuses none" in found.to_text()
    assert np.isnan(found.data.kl.values).all()
    for name in found.figures():
        found.plot(name)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 16}, "none but 16"),
        ({"placement": Placement.released()}, "shares scales"),
        ({"scheme": "nonsense"}, "nonsense"),
        ({"scan_bits": 99}, "99"),
        ({"geometri": False}, "geometry"),
    ],
)
def test_bad_input_is_one_line(options: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        kvgeom.screen(tiny_model("llama", seed=1), ["a", "b"], judge=CountingJudge(6), progress=False, **options)


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what is expected, keeps it, and goes on from its journal."""
    asked = ["screen", str(checkpoint), "--limit", "4", "--max-new-tokens", "4", "--quiet", "--no-geometry"]
    assert main([*asked, "--out", str(tmp_path)]) == 0
    first = capsys.readouterr().out
    journal = (tmp_path / "journal.jsonl").read_bytes()
    assert main([*asked, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == first
    assert (tmp_path / "journal.jsonl").read_bytes() == journal
    assert (tmp_path / "screen.txt").read_text().strip() in first
