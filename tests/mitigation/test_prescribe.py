"""Prescription: what is searched, for which caches, and how it goes on from journals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import xarray as xr

from kvgeom.engines.registry import resolve
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import baseline
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.mitigation.candidates import UNMITIGATED, Candidate
from kvgeom.mitigation.methods import registry
from kvgeom.mitigation.plan import request_hash
from kvgeom.models.hf import HFModel
from tests.builders.judges import ArbitraryJudge
from tests.builders.plans import OPTIONS, OTHERS, SET, TINY, diagnosed, diagnosis, plan


def test_prescription_by_hand() -> None:
    made, base = plan(), diagnosis().baseline
    recipes = {candidate.name: candidate.condition() for candidate in made.candidates}
    fresh = baseline(TINY, SET.harmful, judge=ArbitraryJudge(), max_new_tokens=4, progress=False)
    again = evaluate(TINY, recipes, fresh, refused_only=True, progress=False)
    assert {
        str(name): int(made.search.data.flips.sel(candidate=name)) for name in made.search.data.candidate.values
    } == {name: again.flips(name)["all"] for name in recipes}
    assert made.search.meta["prompts"] == len(base.refused)
    assert made.chosen.name == made.search.chosen
    assert made.memory_overhead <= 0.6 + 1e-9
    assert made.unmitigated.name == UNMITIGATED
    assert len({(each.recipe, each.placement) for each in recipes.values()}) == len(recipes)
    assert not any("random" in name for name in recipes)
    assert made.selection is not None
    assert set(made.calibration) == {request_hash(text) for text in (*SET.harmful, *SET.harmless)}
    looked = made.search.data.harmless_lost.notnull()
    assert bool(looked.sel(candidate=UNMITIGATED))
    assert bool(looked.sel(candidate=made.chosen.name))
    assert made.chosen.name in made.summary()
    assert f"loses {int(made.search.data.flips[0])} of {len(base.refused)} refusals" in made.reasons[0]
    with pytest.raises(InputError, match="'nothing of the kind'"):
        made.candidate("nothing of the kind")


def test_a_mitigation_from_outside_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", {**registry._METHODS})

    @registry.method("wide sinks", stage="placement")
    def wide_sinks(setting: registry.Setting) -> list[Candidate]:
        base = setting.unmitigated
        placement = replace(base.placement, sinks=9)
        return [replace(base, name="9 sinks", family="wide sinks", placement=placement), base]

    made = diagnosis().prescribe(scheme="int3-sym-tensor", memory=0.6)
    before = [each.name for each in plan().candidates]
    assert [each.name for each in made.candidates] == [*before, "9 sinks"]
    assert before[-3:] == ["4 sink tokens", "residual window of 32", "residual window of 128"]
    assert made.candidate("9 sinks").placement.sinks == 9
    flips = made.search.data.flips
    xr.testing.assert_equal(flips.isel(candidate=slice(0, -1)), plan().search.data.flips)
    # Every request ends within 128 tokens: that nothing is lost there says nothing of longer ones.
    assert bool(made.search.data.untested.sel(candidate="residual window of 128"))
    assert not bool(made.search.data.untested.sel(candidate=UNMITIGATED))
    assert "residual window of 128" not in made.search.ranked(within_budget=False)
    assert made.to_frame()["candidate"].tolist() == [each.name for each in made.candidates]
    assert made.provenance()["scheme"] == "int3-sym-tensor"


@pytest.mark.parametrize("scheme", ["int3-asym-token+center", "int3-sym-tensor+equalize", "int4-asym-group8", "kivi"])
def test_caches_that_can_be_mitigated(scheme: str) -> None:
    """Those that transform already as well: what they subtract or divide by is measured."""
    made = diagnosis().prescribe(scheme=scheme, memory=1.0)
    assert made.scheme == scheme
    assert {str(s) for s in made.unmitigated.recipe.layers[0]} == {str(resolve(scheme).k), str(resolve(scheme).v)}
    assert made.memory_overhead <= 1.0


def test_an_engine_that_keeps_the_ends_of_a_model_exact_still_does() -> None:
    """Whatever a candidate does in the layer between them; and the engine is told so in one flag."""
    made = diagnosis().prescribe(scheme="vllm-turboquant-3bit-nc", memory=1.0)
    assert {"turboquant", "turboquant, residual signs of keys", "equalize"} <= {each.name for each in made.candidates}
    assert {each.recipe.touched for each in made.candidates} == {(1,), ()}
    (vllm,) = [each for each in made.exports() if each.engine == "vLLM"]
    assert (vllm.text, vllm.cannot) == ("--kv-cache-dtype turboquant_3bit_nc", ())


def test_what_cannot_be_prescribed() -> None:
    with pytest.raises(InputError, match=r"memory.* must be a number.*got -1"):
        diagnosis().prescribe(memory=-1)
    with pytest.raises(InputError, match=r"memory.* must be a number.*got nan"):
        diagnosis().prescribe(memory=float("nan"))
    with pytest.raises(InputError, match="granularity 'groups'"):
        diagnosis().prescribe(scheme="asym-groups", bits=4)
    silent = replace(diagnosis(), base=replace(diagnosis().base, labels=("complied",) * 10))
    with pytest.raises(InputError, match="refuses none of the 10 prompts"):
        silent.prescribe()


def test_journals_of_prescription_and_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run again over the journals that a first run has left, nothing is answered twice."""
    path = tmp_path / "one.jsonl"
    first_plan = diagnosed(journal=path).prescribe(scheme="int3-sym-tensor", memory=0.6)
    options = {"judge": ArbitraryJudge(), "controls": 1, "journal": tmp_path / "proof.jsonl", **OPTIONS}
    proof = first_plan.verify(TINY, OTHERS, **options)  # type: ignore[arg-type]
    names = {"one.jsonl", "one-harmless.jsonl", "proof.jsonl", "proof-harmless.jsonl"}
    assert {p.name for p in tmp_path.iterdir()} == names
    written = {name: (tmp_path / name).read_bytes() for name in names}

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a response was made again")

    again = diagnosed(journal=path)
    assert (tmp_path / "one.jsonl").read_bytes() == written["one.jsonl"]
    monkeypatch.setattr(HFModel, "generate", fail)
    second = again.prescribe(scheme="int3-sym-tensor", memory=0.6)
    assert json.dumps(second.to_dict(), default=str) == json.dumps(first_plan.to_dict(), default=str)
    twice = second.verify(TINY, OTHERS, **options)  # type: ignore[arg-type]
    xr.testing.assert_equal(twice.data, proof.data)
    assert {name: (tmp_path / name).read_bytes() for name in names} == written
    # The file is free again, and the same diagnosis can go on to another scheme.
    monkeypatch.undo()
    third = again.prescribe(scheme="int4-asym-token")
    assert third.scheme == "int4-asym-token"
    assert (tmp_path / "one.jsonl").read_bytes().startswith(written["one.jsonl"])
