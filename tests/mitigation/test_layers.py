"""Which layers stay in 16 bits, and what is found of choosing them by attention."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.evaluation.baseline import baseline
from kvgeom.geometry.attention import attention_to_request
from kvgeom.mitigation import layers
from kvgeom.mitigation.candidates import UNMITIGATED
from kvgeom.mitigation.layers import LayerSelection, counts, layer_orders, protections, selection_of
from kvgeom.quant.memory import cache_bytes
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.stats import mcnemar, wilson
from tests.builders.candidates import CANDIDATES, RECIPES, SHAPE, label_rows, outcomes_of
from tests.builders.judges import ArbitraryJudge, with_refusal_tokens
from tests.builders.mitigation import selection as drawn_selection
from tests.builders.plans import REQUESTS, TINY


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
    base = with_refusal_tokens(
        baseline(TINY, REQUESTS, judge=ArbitraryJudge(), max_new_tokens=4, seed=3, progress=False)
    )
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
        drawn = layers._drawn(range(n_layers), np.random.default_rng(seed))
        assert len(drawn) == sets
        assert all(sorted(order) == list(range(n_layers)) for order in drawn)
        for kept in counts(n_layers):
            assert len({frozenset(order[:kept]) for order in drawn}) == sets


def test_one_layer_is_singular() -> None:
    assert "1 layer in" in drawn_selection(kept=(1,)).summary()
    assert "2 layers in" in drawn_selection(kept=(1, 2)).summary()
