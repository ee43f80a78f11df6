"""Search, comparison of layer rules, plans and their proof: every number recomputed from responses, every border met."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import kvgeom
from kvgeom.diagnosis.diagnose import Diagnosis
from kvgeom.engines.registry import resolve
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import baseline
from kvgeom.evaluation.condition import UNQUANTIZED, Condition
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.geometry.attention import attention_to_request
from kvgeom.judges.judge import LABELS
from kvgeom.mitigation import layers
from kvgeom.mitigation.candidates import UNMITIGATED, Candidate, protect
from kvgeom.mitigation.harmless import SIGNIFICANT, Harmless, harmless_outcomes, harmless_under
from kvgeom.mitigation.layers import LayerSelection, counts, layer_orders, protections, selection_of
from kvgeom.mitigation.methods import registry
from kvgeom.mitigation.plan import Plan, request_hash
from kvgeom.mitigation.plan_file import PLAN_VERSION
from kvgeom.mitigation.search import Search, search_of
from kvgeom.mitigation.verify import Verification
from kvgeom.models.hf import HFModel
from kvgeom.models.model import KVGeometry
from kvgeom.prompts.sets import PromptSet
from kvgeom.quant.memory import cache_bytes
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.stats import mcnemar, reduction_estimate, wilson
from tests.builders.judges import ArbitraryJudge
from tests.builders.mitigation import selection as drawn_selection
from tests.builders.mitigation import verification as drawn_verification
from tests.builders.tiny import tiny_hf_model, tiny_model, tiny_tokenizer

SHAPE = KVGeometry(6, 4, 2, 64, 32, False, "default")
NAMES = [UNMITIGATED, "group-64", "keys", "layers", "equalize", "8 bits"]
RECIPES = [
    resolve("int4-asym-token").recipe(6),
    resolve("int4-asym-group64").recipe(6),
    Recipe.uniform(6, Scheme(4), sites=["v"]),
    resolve("int4-asym-token").recipe(6).keep([0, 3]),
    resolve("int4-asym-token").recipe(6),
    resolve("int8-asym-token").recipe(6),
]
CANDIDATES = [Candidate(n, "refine", r, Placement(), f"does {n}") for n, r in zip(NAMES, RECIPES, strict=True)]


def outcomes_of(labels: Sequence[Sequence[str]], names: Sequence[str], margins: np.ndarray | None = None) -> Outcomes:
    """Responses that nobody gave; the unquantized model refuses all prompts."""
    rows = np.array([["refused"] * len(labels[0]), *labels], dtype=object)
    shape = rows.shape
    columns = {name: (("recipe", "prompt"), np.full(shape, "", dtype=object)) for name in ("text", "reason")}
    columns["label"] = (("recipe", "prompt"), rows)
    lost = np.zeros((len(names), shape[1])) if margins is None else margins
    columns["margin"] = (("recipe", "prompt"), np.concatenate([np.full((1, shape[1]), 5.0), 5.0 - lost]))
    meta = {"model": "m", "fingerprint": "f", "judge": "j", "max_new_tokens": 4, "seed": 0, "versions": {}}
    coords = {
        "recipe": [UNQUANTIZED, *names],
        "prompt": np.arange(shape[1]),
        "placement": ("recipe", np.full(len(rows), "p", dtype=object)),
    }
    return Outcomes(xr.Dataset(columns, coords=coords), meta)


def label_rows(count: int) -> st.SearchStrategy[list[list[str]]]:
    return st.integers(1, 9).flatmap(
        lambda n: st.lists(st.lists(st.sampled_from(LABELS), min_size=n, max_size=n), min_size=count, max_size=count)
    )


# --- the search ---


@settings(max_examples=15)
@given(label_rows(6), st.integers(0, 10**6), st.sampled_from([0.0, 0.02, 0.5, 1.0, 9.0]), st.sets(st.integers(1, 5)))
def test_search_by_brute_force(labels: list[list[str]], seed: int, budget: float, spoiled: set[int]) -> None:
    n = len(labels[0])
    drops = np.random.default_rng(seed).normal(size=(6, n))
    found = search_of(outcomes_of(labels, NAMES, drops), CANDIDATES, SHAPE, budget)
    found = found.with_harmless({NAMES[i]: Harmless(3, 1, 0.01, 4, True) for i in spoiled})
    size = [cache_bytes(recipe, Placement(), 2, 64, 4096) / 4096 for recipe in RECIPES]
    flips = [sum(label != "refused" for label in row) for row in labels]
    data = found.data
    np.testing.assert_allclose(data.bytes_per_token, size)
    np.testing.assert_allclose(data.memory_overhead, np.array(size) / size[0] - 1)
    assert data.flips.values.tolist() == flips
    assert data.flips_complied.values.tolist() == [row.count("complied") for row in labels]
    assert data.flips_degenerate.values.tolist() == [row.count("degenerate") for row in labels]
    np.testing.assert_allclose(data.margin_drop, drops.mean(1))
    rows = np.array(labels) != "refused"
    for i in range(6):
        assert bool(data.affordable[i]) == (size[i] <= size[0] * (1 + budget) + 1e-6)
        beaten = [
            j for j in range(6) if size[j] <= size[i] and flips[j] <= flips[i] and (size[j], flips[j]) != (size[i], flips[i])
        ]  # fmt: skip
        assert bool(data.pareto[i]) == (not beaten)
        assert float(data.p[i]) == mcnemar(rows[i], rows[0])
        assert (float(data.ci_low[i]), float(data.ci_high[i])) == wilson(flips[i], n)
        recovery = reduction_estimate(rows[0], rows[i])
        reported = [float(data[name][i]) for name in ("recovery", "recovery_low", "recovery_high")]
        np.testing.assert_equal(
            reported, [np.nan] * 3 if recovery is None else [recovery.value, recovery.low, recovery.high]
        )
        assert bool(data.spoils[i]) == (i in spoiled)
    usable = [i for i in range(1, 6) if flips[i] < flips[0] and i not in spoiled]
    for within in (True, False):
        some = [i for i in usable if data.affordable[i] or not within]
        best = min(some, key=lambda i: (flips[i], size[i], drops[i].mean()), default=None)
        assert found.ranked(within_budget=within)[:1] == ([] if best is None else [NAMES[best]])
        assert sorted(found.ranked(within_budget=within)) == sorted(NAMES[i] for i in some)
        if within:
            assert found.chosen == (UNMITIGATED if best is None else NAMES[best])
    assert Search.of_records(json.loads(json.dumps(found.records())), found.meta, ["candidate"]).data.equals(data)


# --- harmless requests ---


def test_harmless_requests_by_hand() -> None:
    """Labels of a random model, counted again."""
    model = TINY
    base = baseline(
        model, [f"{n} tell me" for n in range(24)], judge=ArbitraryJudge(), max_new_tokens=4, progress=False
    )
    recipes = {
        UNMITIGATED: Recipe.uniform(3, Scheme(3)),
        "worse": Recipe.uniform(3, Scheme(2, True, "tensor")),
        "none": Recipe.exact(3),
    }
    candidates = {name: Candidate(name, "protect", recipe, Placement(), "") for name, recipe in recipes.items()}
    some = harmless_outcomes(base, {name: candidates[name] for name in (UNMITIGATED, "worse")})
    found = harmless_under(harmless_outcomes(base, candidates, some))
    labels = evaluate(model, recipes, base, progress=False).data.label
    before = labels.sel(recipe=UNQUANTIZED).values
    assert (before == "complied").any()
    lost = {name: (before == "complied") & (labels.sel(recipe=name).values != "complied") for name in recipes}
    for name, one in found.items():
        now = labels.sel(recipe=name).values
        assert (one.refused, one.degenerate) == ((now == "refused").sum(), (now == "degenerate").sum())
        assert one.lost == lost[name].sum()
        assert one.p == mcnemar(now == "refused", before == "refused")
        over = one.p < SIGNIFICANT and (now == "refused").sum() > (before == "refused").sum()
        worse = mcnemar(lost[name], lost[UNMITIGATED]) < SIGNIFICANT and lost[name].sum() > lost[UNMITIGATED].sum()
        assert one.spoils == (over or worse)
    assert (found["none"].lost, found["none"].spoils) == (0, False)


# --- which layers ---


@settings(max_examples=30)
@given(st.data())
def test_selection_by_counting(data: st.DataObject) -> None:
    orders = {
        rule: data.draw(st.permutations(range(6))) for rule in ("causal", "first", "attention", "random 1", "random 2")
    }
    kept = data.draw(st.sampled_from([counts(6), (1, 3), (2,)]))
    tried = protections(CANDIDATES[0], orders, kept)
    assert {key: candidate.recipe for key, candidate in tried.items()} == {
        (rule, n): RECIPES[0].keep(orders[rule][:n]) for rule, n in product(orders, kept)
    }
    names = [UNMITIGATED, *(candidate.name for candidate in tried.values())]
    assert len(set(names)) == len(names)
    labels = data.draw(label_rows(len(names)))
    found = selection_of(outcomes_of(labels, names), tried, orders, SHAPE)
    n = len(labels[0])
    lost = {name: np.array(row) != "refused" for name, row in zip(names, labels, strict=True)}
    assert found.meta["unmitigated"] == lost[UNMITIGATED].sum()
    assert found.data.sizes == {"rule": 5, "kept": len(kept)}
    for (rule, count), candidate in tried.items():
        cell, flips = found.data.sel(rule=rule, kept=count), int(lost[candidate.name].sum())
        assert int(cell.flips) == flips
        assert float(cell.flip_rate) == flips / n
        assert (float(cell.ci_low), float(cell.ci_high)) == wilson(flips, n)
        assert float(cell.p) == mcnemar(lost[candidate.name], lost[tried["causal", count].name])
        assert cell.layers.item() == ", ".join(str(layer) for layer in sorted(orders[rule][:count]))
        assert float(cell.bytes_per_token) == cache_bytes(candidate.recipe, Placement(), 2, 64, 4096) / 4096
    again = LayerSelection.of_records(json.loads(json.dumps(found.records())), found.meta, ["rule", "kept"])
    xr.testing.assert_equal(again.data, found.data)


@pytest.mark.parametrize(
    ("layers", "kept"), [(1, (1,)), (2, (1,)), (3, (1,)), (6, (1, 2)), (24, (2, 4, 8)), (32, (3, 5, 11))]
)
def test_how_many_layers_are_compared(layers: int, kept: tuple[int, ...]) -> None:
    assert counts(layers) == kept


def test_orders_of_layers_by_hand() -> None:
    """Keys and values with schemes of their own are rounded together, as the cache does, and not one after the other."""
    base = baseline(TINY, REQUESTS, judge=ArbitraryJudge(), max_new_tokens=4, seed=3, progress=False)
    recipe = Recipe(((Scheme(2, True, "tensor"), Scheme(3)),) * 3)
    found = layer_orders(base, recipe, Placement())
    drop = np.zeros(3)
    tokens = list(base.refusal_tokens)
    for index in base.refused:
        for layer in range(3):
            margins = []
            for one in (Recipe.exact(3), recipe.only([layer])):
                ids = base.prompts[index].ids
                log_p = TINY.forward(ids, TINY.new_cache(Quantizer(one)))[-1].double().log_softmax(-1)
                inside = float(log_p[tokens].exp().sum())
                margins.append(np.log(inside) - np.log1p(-inside))
            drop[layer] += margins[0] - margins[1]
    assert found["causal"] == np.argsort(-drop).tolist()
    assert found["first"] == [0, 1, 2]
    looks = attention_to_request(TINY, [base.prompts[index] for index in base.refused])
    assert found["attention"] == np.argsort(-looks).tolist()
    drawn = [order for rule, order in found.items() if rule.startswith("random")]
    assert len(drawn) == 3
    assert all(sorted(order) == [0, 1, 2] for order in drawn)
    assert found == layer_orders(base, recipe, Placement())


# --- the proof ---


def verification(lost: Sequence[bool], kept: Sequence[bool], *, spoils: bool = False) -> Verification:
    """As it would be measured: refusals lost without a plan, and with it."""
    rows = {"unmitigated": np.array(lost), "chosen": np.array(kept), "paper": np.array(lost)}
    recovery = [reduction_estimate(lost, row) for row in rows.values()]
    nan = float("nan")
    columns = {
        "name": np.array(["unmitigated", "center", "unmitigated"], dtype=object),
        "flips": [int(row.sum()) for row in rows.values()],
        "recovery": [nan if e is None else e.value for e in recovery],
        "recovery_low": [nan if e is None else e.low for e in recovery],
        "recovery_high": [nan if e is None else e.high for e in recovery],
        "p": [mcnemar(row, rows["unmitigated"]) for row in rows.values()],
        "spoils": [False, spoils, False],
        "harmless_lost": [0, 7, 0],
        "harmless_refused": [0, 6, 0],
        "harmless_degenerate": [0, 1, 0],
    }
    data = xr.Dataset({k: ("recipe", v) for k, v in columns.items()}, coords={"recipe": list(rows)})
    return Verification(data, {"refused": len(lost), "harmless": 12})


def first(count: int, of: int = 24) -> list[bool]:
    return [n < count for n in range(of)]


@pytest.mark.parametrize(
    ("lost", "left", "status"),
    [
        (first(20), first(1), "helps"),
        (first(12), first(4), "helps"),
        (first(20), first(18), "does not help"),
        (first(20), first(24), "does not help"),
        (first(4), first(1), "undetermined"),
        (first(3), first(0), "undetermined"),  # whatever the recovery: three of three say too little
        (first(10), first(6), "undetermined"),
        (first(0), first(0), "nothing to fix"),
        (first(0), first(5), "nothing to fix"),
    ],
)
def test_status(lost: list[bool], left: list[bool], status: str) -> None:
    found = verification(lost, left)
    assert found.status == status
    text = found.sentence
    assert {"helps": "The plan helps", "does not help": "does not help", "undetermined": "undetermined"}.get(
        status, "nothing to fix"
    ) in text
    if status != "nothing to fix":
        assert f"of 24 refusals {sum(lost)} are lost without and {sum(left)} with it" in text
        assert text.endswith("(center).")
        assert found.recovery == reduction_estimate(lost, left)
    else:
        assert found.recovery is None


def test_a_plan_that_spoils_harmless_requests_does_not_help() -> None:
    found = verification(first(20), first(1), spoils=True)
    assert found.status == "does not help"
    assert "7 of 12 harmless requests are lost too (6 refused, 1 broken)" in found.sentence
    assert verification(first(0), first(0), spoils=True).status == "nothing to fix"


@pytest.mark.parametrize(
    ("flips", "drawn", "direction"),
    [
        (13, (1, 2, 2), "direction"),
        (13, (13, 12, 14), "size"),
        (13, (1, 13), "undetermined"),
        (13, (), "undetermined"),
        (2, (0, 0, 0), "undetermined"),
        (0, (0, 1, 0), "nothing"),
    ],
)
def test_size_or_direction(flips: int, drawn: tuple[int, ...], direction: str) -> None:
    """13 of 16 has the Wilson interval 57 to 93 %: 9.1 to 14.9 of 16."""
    assert drawn_verification((flips, 0, 0), controls=((), drawn)).direction == direction


@pytest.mark.parametrize(
    ("attention", "claim"),
    [(8, "worse than causal"), (2, "better than random"), (4, "undetermined"), (5, "undetermined")],
)
def test_what_is_found_of_attention(attention: int, claim: str) -> None:
    assert drawn_selection(attention=attention).attention_claim == claim


@pytest.mark.parametrize(
    ("attention", "causal", "drawn", "claim"),
    [
        (0, 0, (0, 0, 0), "undetermined"),
        (0, 2, (0, 0, 0), "undetermined"),
        (3, 3, (3, 3, 3), "undetermined"),
        (3, 3, (1, 2, 3), "undetermined"),
        (3, 4, (1, 2, 3), "undetermined"),
        (3, 2, (1, 2, 3), "no better than random"),
        (0, 0, (1, 2, 3), "better than random"),
        (3, 2, (3,), "no better than random"),
    ],
)
def test_a_tie_says_nothing_of_attention(attention: int, causal: int, drawn: tuple[int, ...], claim: str) -> None:
    rules = ["causal", "attention", *layers.RANDOM_RULES[: len(drawn)]]
    found = drawn_selection(kept=(2,))
    data = found.data.sel(rule=rules).assign(flips=(("rule", "kept"), [[n] for n in (causal, attention, *drawn)]))
    assert LayerSelection(data, found.meta).attention_claim == claim


@pytest.mark.parametrize(("n_layers", "sets"), [(1, 1), (2, 2), (3, 3), (5, 3), (6, 3), (24, 3)])
def test_layers_drawn_at_random_differ(n_layers: int, sets: int) -> None:
    for seed in range(20):
        drawn = layers._drawn(n_layers, np.random.default_rng(seed))
        assert len(drawn) == sets
        assert all(sorted(order) == list(range(n_layers)) for order in drawn)
        for kept in counts(n_layers):
            assert len({frozenset(order[:kept]) for order in drawn}) == sets


def test_one_layer_is_singular() -> None:
    assert "1 layer in" in drawn_selection(kept=(1,)).summary()
    assert "2 layers in" in drawn_selection(kept=(1, 2)).summary()


# --- plans, from a random model that an arbitrary judge hears refuse ---

TINY = tiny_model("qwen2", seed=2)
REQUESTS = [
    f"{word} the {thing}"
    for word in ("open", "close", "count", "sing")
    for thing in ("door", "sky", "wall", "sea", "cup", "map")
]
SET = PromptSet("tiny", tuple(REQUESTS[:10]), tuple(f"{r}, please" for r in REQUESTS[:6]), "written here")
OTHERS = PromptSet("tiny others", tuple(REQUESTS[10:]), tuple(f"{r}, please" for r in REQUESTS[10:14]), "written here")
OPTIONS: dict[str, object] = {"text": "Clouds are made of water.", "progress": False}


def diagnosed(model: HFModel = TINY, **options: object) -> Diagnosis:
    return kvgeom.diagnose(
        model,
        SET,
        judge=ArbitraryJudge(),
        max_new_tokens=4,
        bits=(),
        geometry=False,
        progress=False,
        text="Clouds are made of water.",
        **options,  # type: ignore[arg-type]
    )


@cache
def diagnosis() -> Diagnosis:
    return diagnosed()


@cache
def plan() -> Plan:
    return diagnosis().prescribe(scheme="int3-sym-tensor", memory=0.6)


@cache
def verified() -> Verification:
    return plan().verify(TINY, OTHERS, also=["equalize"], judge=ArbitraryJudge(), controls=2, **OPTIONS)  # type: ignore[arg-type]


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


def test_what_cannot_be_prescribed() -> None:
    with pytest.raises(InputError, match="memory budget of -1"):
        diagnosis().prescribe(memory=-1)
    with pytest.raises(InputError, match="memory budget of nan"):
        diagnosis().prescribe(memory=float("nan"))
    with pytest.raises(InputError, match="granularity 'groups'"):
        diagnosis().prescribe(scheme="asym-groups", bits=4)
    silent = replace(diagnosis(), base=replace(diagnosis().base, labels=("complied",) * 10))
    with pytest.raises(InputError, match="refuses none of the 10 prompts"):
        silent.prescribe()


def test_verification_by_hand() -> None:
    found, made = verified(), plan()
    base = baseline(TINY, OTHERS.harmful, judge=ArbitraryJudge(), max_new_tokens=4, progress=False)
    tried = {"unmitigated": made.unmitigated, "chosen": made.chosen, "paper": made.paper}
    tried["equalize"] = made.candidate("equalize")
    roles = {role: each.condition() for role, each in tried.items()}
    for role, draw in product(("chosen", "unmitigated", "equalize"), (1, 2)):
        random = tried[role].recipe.with_random_directions(draw - 1)
        roles[f"{role}, random direction {draw}"] = Condition(random, tried[role].placement)
        assert int(found.data.draw.sel(recipe=f"{role}, random direction {draw}")) == draw - 1
    assert set(found.data.recipe.values) == set(roles)
    again = evaluate(TINY, roles, base, refused_only=True, progress=False)
    before = again.flipped("unmitigated")
    assert found.meta["refused"] == len(base.refused)
    for role, each in roles.items():
        row, lost = found.data.sel(recipe=role), again.flipped(role)
        assert int(row.flips) == lost.sum() == int(row.flips_complied) + int(row.flips_degenerate)
        assert float(row.p) == mcnemar(lost, before)
        estimate = reduction_estimate(before, lost)
        assert estimate is not None
        reported = (float(row.recovery), float(row.recovery_low), float(row.recovery_high))
        assert reported == (estimate.value, estimate.low, estimate.high)
        size = cache_bytes(each.recipe, each.placement, 2, 8, 4096) / 4096
        assert float(row.bytes_per_token) == size
        assert float(row.memory_of_exact) == pytest.approx(size / (3 * 2 * 16 * 2))
    for role in ("chosen", "unmitigated", "equalize"):
        assert found.controls(role) == [again.flips(f"{role}, random direction {n}")["all"] for n in (1, 2)]
    assert found.controls("paper") == []
    assert found.paper_recovery is not None
    record = json.loads(json.dumps(found.to_dict()))
    assert record["flips_before"] == before.sum()
    assert record["harmless"]["prompts"] == 4


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


# --- a plan as a file ---


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


# --- the model of a plan ---


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


def test_prompts_that_prove_nothing() -> None:
    options = {"judge": ArbitraryJudge(), **OPTIONS}
    used = PromptSet("used", (*OTHERS.harmful, f"  {SET.harmful[3]}\n"), (), "")
    with pytest.raises(InputError, match="1 of 15 prompts of 'used' chose the plan"):
        plan().verify(TINY, used, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="1 of 15 prompts of 'harmless used' chose the plan"):
        plan().verify(TINY, PromptSet("harmless used", OTHERS.harmful, SET.harmless[:1], ""), **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no harmful requests"):
        plan().verify(TINY, PromptSet("empty", (), OTHERS.harmless, ""), **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="by judge 'arbitrary', not by 'keyword "):
        plan().verify(TINY, OTHERS, **OPTIONS)  # type: ignore[arg-type]


def test_protecting_on_top_of_a_plan() -> None:
    """Any candidate can be proven, also one that the search has not tried."""
    mine = protect(plan().chosen, [1])
    found = replace(plan(), chosen=mine).verify(
        TINY, PromptSet("few", OTHERS.harmful, (), ""), judge=ArbitraryJudge(), controls=0, **OPTIONS  # type: ignore[arg-type]
    )  # fmt: skip
    assert found.data.name.sel(recipe="chosen").item() == mine.name
    assert found.data.harmless_refused.isnull().all()
    assert not found.spoils
    assert found.controls("chosen") == []
