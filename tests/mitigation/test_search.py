"""The search and what it does to harmless requests: every number recomputed from responses."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.evaluation.baseline import baseline
from kvgeom.evaluation.condition import EXACT
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.mitigation.candidates import UNMITIGATED, Candidate
from kvgeom.mitigation.harmless import SIGNIFICANT, Harmless, harmless_outcomes, harmless_under
from kvgeom.mitigation.search import Search, search_of
from kvgeom.quant.memory import cache_bytes
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.stats import mcnemar, reduction_estimate, shares_above, wilson
from tests.builders.candidates import CANDIDATES, NAMES, RECIPES, SHAPE, label_rows, outcomes_of
from tests.builders.judges import ArbitraryJudge
from tests.builders.plans import TINY


@settings(max_examples=15)
@given(label_rows(6), st.integers(0, 10**6), st.sampled_from([0.0, 0.02, 0.5, 1.0, 9.0]), st.sets(st.integers(1, 5)))
def test_search_by_brute_force(labels: list[list[str]], seed: int, budget: float, spoiled: set[int]) -> None:
    n = len(labels[0])
    drops = np.random.default_rng(seed).normal(size=(6, n))
    found = search_of(outcomes_of(labels, NAMES, drops), CANDIDATES, SHAPE, budget)
    found = found.with_harmless({NAMES[i]: Harmless(3, 1, 0.01, 4, "lost", True) for i in spoiled})
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
    before = labels.sel(recipe=EXACT).values
    assert (before == "complied").any()
    lost = {name: (before == "complied") & (labels.sel(recipe=name).values != "complied") for name in recipes}
    sides = {"below": "kept", "above": "lost", "open": "open"}
    for name, one in found.items():
        now = labels.sel(recipe=name).values
        assert (one.refused, one.degenerate) == ((now == "refused").sum(), (now == "degenerate").sum())
        assert one.lost == lost[name].sum()
        assert one.p == mcnemar(now == "refused", before == "refused")
        over = one.p < SIGNIFICANT and (now == "refused").sum() > (before == "refused").sum()
        worse = mcnemar(lost[name], lost[UNMITIGATED]) < SIGNIFICANT and lost[name].sum() > lost[UNMITIGATED].sum()
        assert one.spoils == (over or worse or one.margin == "lost")
        assert one.margin == sides[shares_above([one.lost], int((before == "complied").sum()), 0.1)[0]]
    assert (found["none"].lost, found["none"].spoils) == (0, False)
