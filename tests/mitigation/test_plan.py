"""A plan as a file, and the models that it is for."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.errors import InputError
from kvgeom.mitigation.plan import Plan
from kvgeom.mitigation.plan_file import PLAN_VERSION, content_hash
from kvgeom.models.hf import HFModel
from kvgeom.quant.quantizer import Quantizer
from kvgeom.results import plain
from tests.builders.damage import anything, places
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


def edited(change: Callable[[dict], None], folder: Path, *, hashed: bool = True) -> Path:  # type: ignore[type-arg]
    """A plan that somebody has changed, who knows of its hash or does not."""
    path = plan().save(folder)
    record = json.loads(path.read_text())
    change(record)
    if hashed:
        record["hash"] = content_hash(record)
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
        (lambda r: r.pop("chosen"), "chosen: Field required"),
        (lambda r: r.update(more=1), "more: Extra inputs"),
        (lambda r: r["chosen"]["placement"].update(speed=3), "speed"),
        (lambda r: r["chosen"]["placement"].update(where="Projection"), "where of a placement 'Projection'"),
        (lambda r: r["chosen"]["placement"].update(sinks=True), r"chosen.placement.sinks"),
        (lambda r: r["chosen"]["recipe"].update(layers=[["int4-asym-token"]]), "chosen.recipe.layers.0"),
        (lambda r: r["chosen"]["recipe"].update(layers=[[None, None]]), "has 1 layers, the model 3"),
        (lambda r: r["model"].update(layers=0), "model.layers"),
        (lambda r: r["model"].update(kv_heads=0), "shape of the model"),
        (lambda r: r["model"].update(layers="3"), "layers"),
        (lambda r: r["model"].pop("rope"), "rope"),
        (lambda r: r.update(max_new_tokens=0), "max_new_tokens: .*greater than 0"),
        (lambda r: r["search"]["records"][0].update(flips=-1), "search.records.0.flips"),
        (lambda r: r["search"]["records"].append(r["search"]["records"][0]), "not as it was written"),
        (lambda r: r["search"]["records"][0].update(candidate="x"), "'x', is no candidate"),
        (lambda r: r.update(mode="sabotage"), "mode: Input should be"),
        (lambda r: r["chosen"]["recipe"].update(layers=[["int4", None]] * 3), "scheme 'int4'"),
        (lambda r: r.update(statics={}), "are missing"),
        (lambda r: r["search"].update(records=[]), "at least 1 item"),
    ],
)
def test_files_that_are_no_plan(change: Callable[[dict], None], named: str, tmp_path: Path) -> None:  # type: ignore[type-arg]
    with pytest.raises(InputError, match=named):
        Plan.load(edited(change, tmp_path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Plan.load(tmp_path / "nothing")
    path = plan().save(tmp_path)
    text = path.read_text()
    for length in (0, 1, len(text) // 2, len(text) - 3):
        path.write_text(text[:length])
        with pytest.raises(InputError, match="cannot be read"):
            Plan.load(path)
    for other in (
        "[]",
        '"plan"',
        "3",
        "[" * 100_000,
        '{"plan_version":' * 100_000,
        "\x00",
        '{"plan_version": NaN}',
        "{}",
    ):
        path.write_text(other)
        with pytest.raises(InputError, match="cannot be read"):
            Plan.load(path)


def test_a_plan_that_was_changed_is_not_what_was_proven(tmp_path: Path) -> None:
    """Also where what it says now could be true; not where it is only spaced and ordered otherwise."""
    for change in (
        lambda r: r["search"]["records"][0].update(flips=r["search"]["records"][0]["flips"] + 1),
        lambda r: r["reasons"].pop(),
        lambda r: r["chosen"].update(r["candidates"][1]),
        lambda r: r.update(verified={"status": "helps"}),
        lambda r: r["search"]["meta"].update(more=float("nan")),
    ):
        with pytest.raises(InputError, match=r"(changed after it|not as it) was written"):
            Plan.load(edited(change, tmp_path, hashed=False))
    path = edited(lambda r: r.update(reasons=r.pop("reasons")), tmp_path, hashed=False)
    assert Plan.load(path).reasons == plan().reasons


@cache
def record() -> str:
    """The content of a proven plan."""
    return json.dumps(plain(plan().with_verification(verified()).to_dict()))


@settings(max_examples=250)
@given(st.floats(0, 1, exclude_max=True), st.one_of(anything, st.just("DELETE")), st.booleans())
def test_a_tampered_plan_is_refused_or_is_another(
    tmp_path_factory: pytest.TempPathFactory, where: float, new: Any, hashed: bool
) -> None:
    """Whatever stands wherever; a plan that has the right hash may be read, and is then whole."""
    content = json.loads(record())
    found = [*places(content)]
    holder, key = found[int(where * len(found))]
    if new == "DELETE":
        del holder[key]
    else:
        holder[key] = new
    if content == json.loads(record()):
        return
    if hashed and key != "hash":
        with contextlib.suppress(ValueError):  # NaN has no hash
            content["hash"] = content_hash(content)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(json.dumps(content))
    try:
        made = Plan.load(path)
    except InputError:
        return
    assert hashed
    assert made.summary()
    assert made.chosen.name not in made.runners_up
    assert Plan.load(made.save(path.parent / "again.json")).reasons == made.reasons


@settings(max_examples=200)
@given(st.floats(0, 1), st.binary(min_size=1, max_size=30), st.integers(0, 30))
def test_damaged_bytes_of_a_plan(tmp_path_factory: pytest.TempPathFactory, where: float, new: bytes, cut: int) -> None:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    whole = record().encode()
    at = int(where * len(whole))
    path.write_bytes(whole[:at] + new + whole[at + cut :])
    try:
        found = Plan.load(path)
    except InputError:
        return
    assert plain(found.to_dict()) == json.loads(record())  # the damage was in blanks


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
    renamed, ends_early, edited = tiny_tokenizer(), tiny_hf_model("qwen2", seed=2), tiny_hf_model("qwen2", seed=2)
    renamed.add_special_tokens({"additional_special_tokens": ["<|another|>"]})
    ends_early.generation_config.eos_token_id = 9
    edited.config.rms_norm_eps = 0.01
    one_weight = tiny_hf_model("qwen2", seed=2)
    with torch.no_grad():
        one_weight.model.layers[2].mlp.down_proj.weight[0, 0] *= 1.01
    for hf in (edited, one_weight):
        with pytest.raises(InputError, match="make a plan for this model"):
            made.check(hf)
    for hf, tokenizer in ((TINY.hf_model, renamed), (ends_early, tiny_tokenizer()), (edited, tiny_tokenizer())):
        with pytest.raises(InputError, match="make a plan for this model"):
            made.check(HFModel(hf, tokenizer, name="x"))
    assert other.fingerprint != TINY.fingerprint
    made.check(other)
    made.check(HFModel(tiny_hf_model("qwen2", seed=2).to(torch.bfloat16), tiny_tokenizer(), name="in bfloat16"))
    for wrong in (tiny_model("qwen2", seed=3), tiny_model("llama", seed=2)):
        with pytest.raises(InputError, match="make a plan for this model"):
            made.check(wrong)
        with pytest.raises(InputError, match="make a plan for this model"):
            made.verify(wrong, OTHERS, judge=ArbitraryJudge(), **OPTIONS)  # type: ignore[arg-type]
