"""A plan as a file, and the models that it is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xarray as xr

from kvgeom.errors import InputError
from kvgeom.mitigation.plan import Plan
from kvgeom.mitigation.plan_file import PLAN_VERSION
from kvgeom.models.hf import HFModel
from kvgeom.quant.quantizer import Quantizer
from tests.builders.judges import ArbitraryJudge
from tests.builders.plans import OPTIONS, OTHERS, REQUESTS, TINY, plan, verified
from tests.builders.tiny import tiny_hf_model, tiny_model, tiny_tokenizer


def test_there_and_back(tmp_path: Path) -> None:
    for made in (plan(), plan().with_verification(verified())):
        path = made.save(tmp_path / "folder")
        assert path == tmp_path / "folder" / "plan.json"
        for again in (Plan.load(path), Plan.load(tmp_path / "folder")):
            same = [f for f in Plan.__dataclass_fields__ if f not in ("search", "selection", "verified")]
            assert {f: getattr(again, f) for f in same} == {f: getattr(made, f) for f in same}
            assert again.selection is not None
            assert made.selection is not None
            for one, other in ((again.search, made.search), (again.selection, made.selection)):
                xr.testing.assert_equal(one.data, other.data)
            assert again.to_dict().keys() == made.to_dict().keys()
            assert again.save(tmp_path / "again.json").read_text() == path.read_text()
    assert "NaN" not in path.read_text()


def edited(change: Callable[[dict], None], folder: Path) -> Path:  # type: ignore[type-arg]
    path = plan().save(folder)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda r: r.update(plan_version=PLAN_VERSION + 1),
            f"layout {PLAN_VERSION + 1}, but this kvgeom reads {PLAN_VERSION}",
        ),
        (lambda r: r.update(plan_version=1), f"layout 1, but this kvgeom reads {PLAN_VERSION}"),
        (lambda r: r.pop("plan_version"), "cannot be read"),
        (lambda r: r.pop("chosen"), "incomplete: KeyError"),
        (lambda r: r["chosen"]["placement"].update(speed=3), "incomplete: TypeError"),
        (lambda r: r["chosen"]["recipe"].update(layers=[["int4-asym-token"]]), "incomplete: ValueError"),
        (lambda r: r["chosen"]["recipe"].update(layers=[["int4", None]] * 3), "scheme 'int4'"),
        (lambda r: r.update(statics={}), "are missing"),
        (lambda r: r["search"].update(records=[]), "incomplete"),
    ],
)
def test_files_that_are_no_plan(change: Callable[[dict], None], named: str, tmp_path: Path) -> None:  # type: ignore[type-arg]
    with pytest.raises(InputError, match=named):
        Plan.load(edited(change, tmp_path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        Plan.load(tmp_path / "nothing")
    path = plan().save(tmp_path)
    text = path.read_text()
    for length in (0, 1, len(text) // 2, len(text) - 3):
        path.write_text(text[:length])
        with pytest.raises(InputError, match="cannot be read"):
            Plan.load(path)
    for other in ("[]", '"plan"', "3"):
        path.write_text(other)
        with pytest.raises(InputError, match="cannot be read"):
            Plan.load(path)


@pytest.mark.parametrize("name", ["4 sink tokens", "residual window of 32"])
def test_a_plan_runs_under_the_placement_of_its_candidate(name: str, tmp_path: Path) -> None:
    found = plan().candidate(name)
    made = Plan.load(replace(plan(), chosen=found).save(tmp_path))
    assert made.chosen.placement == found.placement != made.unmitigated.placement
    assert made.placement == made.unmitigated.placement
    (prompt,) = TINY.encode([" ".join(REQUESTS[:4])])
    logits = []
    for one in (made.cache(TINY), TINY.new_cache(Quantizer(found.recipe, found.placement))):
        logits.append(TINY.forward(prompt.ids, one))
        logits.append(TINY.forward([40], one))
    for packed, simulated in zip(logits[:2], logits[2:], strict=True):
        torch.testing.assert_close(packed, simulated, atol=1e-4, rtol=1e-4)
    whole, *nearest = made.exports("plan.json")
    assert whole.engine == "transformers"
    assert whole.placement == found.placement
    for export in nearest:
        assert export.placement == found.placement or export.cannot


def test_models_that_a_plan_is_for(tmp_path: Path) -> None:
    made = plan()
    made.check(TINY)
    made.check(TINY.hf_model)
    other = HFModel(
        tiny_hf_model("qwen2", seed=2), tiny_tokenizer(), name="other", template="{{ messages[0].content }}"
    )
    assert other.fingerprint != TINY.fingerprint
    made.check(other)
    made.check(HFModel(tiny_hf_model("qwen2", seed=2).to(torch.bfloat16), tiny_tokenizer(), name="in bfloat16"))
    for wrong in (tiny_model("qwen2", seed=3), tiny_model("llama", seed=2)):
        with pytest.raises(InputError, match="make a plan for this model"):
            made.check(wrong)
        with pytest.raises(InputError, match="make a plan for this model"):
            made.verify(wrong, OTHERS, judge=ArbitraryJudge(), **OPTIONS)  # type: ignore[arg-type]
