"""Intervals, PCR and the mode: against closed forms, against simulation, and at their borders."""

from __future__ import annotations

from dataclasses import replace
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.behaviour.curve import locate
from kvgeom.behaviour.pcr import THRESHOLDS, margin_reduction, per_channel_reduction, reduction
from kvgeom.diagnosis.evidence import FlipTable, evidence_from, shares
from kvgeom.diagnosis.taxonomy import PRESCRIPTIONS, Evidence, classify, pattern_of
from kvgeom.evaluation.baseline import baseline
from kvgeom.paper.published import MODELS, PublishedModel
from kvgeom.stats import Estimate, bootstrap_means, bootstrap_reduction, mcnemar, reduction_posterior, wilson
from tests.builders.judges import ArbitraryJudge
from tests.builders.requests import REQUESTS
from tests.builders.tiny import tiny_model

TINY = tiny_model("qwen2", seed=2)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_the_textbook_formula(counts: tuple[int, int]) -> None:
    k, n = counts
    z, p = 1.959963984540054, k / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert wilson(k, n) == pytest.approx((max(0, middle - half), min(1, middle + half)), abs=1e-9)
    assert np.isnan(wilson(0, 0)).all()


def test_bootstrap_of_means_covers_like_the_normal_interval() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(3.0, 2.0, size=(400, 3))
    low, high = bootstrap_means(rows)
    half = 1.96 * rows.std(0) / np.sqrt(len(rows))
    np.testing.assert_allclose(low, rows.mean(0) - half, atol=0.03)
    np.testing.assert_allclose(high, rows.mean(0) + half, atol=0.03)


@pytest.mark.parametrize(("prompts", "rate", "kept"), [(120, 0.5, 0.4), (30, 0.6, 0.1), (20, 0.3, 0.9)])
def test_intervals_of_pcr_cover_the_truth(prompts: int, rate: float, kept: float) -> None:
    """95 % intervals contain the true PCR in about 95 % of simulated studies, small ones too."""
    rng = np.random.default_rng(1)
    covered = 0
    for study in range(300):
        old = rng.random(prompts) < rate
        new = old & (rng.random(prompts) < kept)
        low, high = np.quantile(reduction_posterior(old, new, samples=2000, seed=study), [0.025, 0.975])
        covered += low <= 1 - kept <= high
    assert covered >= 273


flips = st.integers(1, 60).flatmap(
    lambda n: st.tuples(
        st.lists(st.booleans(), min_size=n, max_size=n), st.lists(st.booleans(), min_size=n, max_size=n)
    )
)


@settings(max_examples=60)
@given(flips)
def test_pcr(both: tuple[list[bool], list[bool]]) -> None:
    tensor, channel = both
    found = reduction(tensor, channel, layer=3, bits=3)
    counts = tuple(int(found.data[name]) for name in ("flips_tensor", "flips_channel", "prompts"))
    assert counts == (sum(tensor), sum(channel), len(tensor))
    if not any(tensor):
        assert (found.value, found.ci, found.status) == (None, None, "undetermined")
        return
    assert found.value == pytest.approx(1 - sum(channel) / sum(tensor))
    assert found.ci is not None
    low, high = found.ci
    assert low <= found.value + 1e-9
    assert found.value <= high + 1e-9
    assert high <= 1
    if found.status == "determined":
        assert sum(low > t for t in THRESHOLDS) == sum(high > t for t in THRESHOLDS)
    else:
        assert "would settle it" in found.reason or "border" in found.reason


@pytest.mark.parametrize(
    ("tensor", "channel", "status"),
    [
        (100, 5, "determined"),  # 95 %: outlier crushes safety
        (100, 95, "determined"),  # 5 %: outlier as safety
        (100, 50, "determined"),  # mixed
        (100, 30, "undetermined"),  # on the border
        (3, 0, "undetermined"),  # three flips of 200 say too little, whatever they say
        (0, 0, "undetermined"),
    ],
)
def test_pcr_decides_only_what_the_data_decides(tensor: int, channel: int, status: str) -> None:
    rows = np.arange(200)
    assert reduction(rows < tensor, rows < channel, layer=0, bits=3).status == status


def test_as_many_prompts_as_it_asks_for_settle_it() -> None:
    rows = np.arange(60)
    first = reduction(rows < 20, rows < 4, layer=0, bits=3)
    assert first.status == "undetermined"
    more = int(first.reason.split("about ")[1].split()[0])
    grown = round((60 + more) / 60 * 1.2)  # the estimate is "about"
    again = reduction(np.repeat(rows < 20, grown), np.repeat(rows < 4, grown), layer=0, bits=3)
    assert again.status == "determined"


# --- the mode ---


def sure(value: float | None) -> Estimate | None:
    return None if value is None else Estimate(value, value, value)


PLAIN = Evidence(
    100,
    3,
    sure(0.8),
    sure(0.1),
    "concentrated",
    (5,),
    5,
    sure(0.9),
    sure(0.8),
    sure(0.95),
    sure(0.9),
    sure(0.1),
    sure(0.7),
    40,
    1.1,
)
EARLY = {"pattern": "distributed-early", "critical_layers": (4, 5, 9)}
EVERY = {"pattern": "hyper-vulnerable", "critical_layers": tuple(range(24))}


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({}, "outlier-crushes-safety"),
        ({"pcr": sure(0.1), "group64": sure(0.1)}, "outlier-as-safety"),
        ({"pcr": sure(-0.5), "group64": None}, "outlier-as-safety"),
        ({"pcr": sure(0.5), "group64": None}, "mixed"),
        ({"pcr": sure(0.5), "group64": sure(0.2)}, "outlier-as-safety"),
        ({"pcr": sure(0.5), "group64": sure(0.9)}, "outlier-crushes-safety"),
        ({"pcr": Estimate(0.5, 0.1, 0.9), "group64": None}, "undetermined"),
        ({"pcr": Estimate(0.5, 0.1, 0.9), "group64": Estimate(0.5, 0.4, 0.6)}, "undetermined"),
        ({"pcr": None}, "undetermined"),
        ({**EARLY, "worst_kept": sure(0.1)}, "multi-layer dilution"),
        ({**EARLY, "worst_kept": sure(0.9)}, "outlier-crushes-safety"),
        ({**EARLY, "worst_kept": Estimate(0.5, 0.3, 0.7)}, "undetermined"),
        ({"worst_kept": sure(0.1)}, "multi-layer dilution"),
        ({"critical_layers": (), "worst_kept": sure(0.0), "pcr": None}, "multi-layer dilution"),
        ({**EVERY, "worst_kept": sure(0.0)}, "multi-layer dilution"),
        ({**EVERY, "worst_kept": sure(0.0), "pcr": sure(0.1), "group64": sure(0.0)}, "hyper-vulnerable"),
        ({"loss": Estimate(0, 0, 0.04)}, "robust"),
        ({"loss": Estimate(0, 0, 0.4), "refused": 5}, "undetermined"),
        ({"loss": Estimate(0.1, 0.02, 0.3)}, "undetermined"),
        ({"refused": 0}, "undetermined"),
    ],
)
def test_modes(changes: dict[str, object], mode: str) -> None:
    found = classify(replace(PLAIN, **changes))  # type: ignore[arg-type]
    assert found.name == mode
    assert found.prescription == PRESCRIPTIONS[found.name]
    assert all(sentence.endswith(".") for sentence in found.evidence)


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)
def test_published_models_get_their_published_mode(row: PublishedModel) -> None:
    assert classify(row.evidence()).name == row.mode


def test_patterns() -> None:
    assert [pattern_of(n, 24) for n in (0, 1, 2, 4, 5, 23, 24)] == [
        "concentrated", "concentrated", "distributed-early", "distributed-early", "ultra-distributed",
        "ultra-distributed", "hyper-vulnerable",
    ]  # fmt: skip


def test_it_says_how_many_refusals_would_settle_it() -> None:
    reason = classify(replace(PLAIN, loss=Estimate(0, 0, wilson(0, 5)[1]), refused=5)).reason
    needed = int(reason.split("about ")[1].split()[0])
    assert wilson(0, needed)[1] <= 0.2 < wilson(0, needed - 1)[1]


estimates = st.one_of(
    st.none(), st.tuples(*[st.floats(-2, 1)] * 3).map(lambda t: Estimate(sorted(t)[1], sorted(t)[0], sorted(t)[2]))
)
rates = st.tuples(*[st.floats(0, 1)] * 3).map(lambda t: Estimate(sorted(t)[1], sorted(t)[0], sorted(t)[2]))


@given(st.integers(0, 60), rates, st.sets(st.integers(0, 7)), estimates, estimates, estimates)
def test_every_evidence_has_a_mode_and_says_why(
    refused: int,
    loss: Estimate,
    critical: set[int],
    value: Estimate | None,
    group64: Estimate | None,
    worst_kept: Estimate | None,
) -> None:
    pattern, layers = pattern_of(len(critical), 8), tuple(sorted(critical))
    evidence = Evidence(
        refused, 3, loss, None, pattern, layers, min(layers, default=None), value, group64, None, worst_kept
    )
    found = classify(evidence)
    assert found.reason
    if refused == 0:
        assert found.name == "undetermined"
    if found.name in ("outlier-crushes-safety", "outlier-as-safety", "mixed"):
        assert value is not None
    if found.name == "multi-layer dilution":
        assert worst_kept is None or worst_kept.high < 0.5
    decisive = [f for f in found.findings if f.decisive]
    assert refused == 0 or decisive or value is None


def table(
    n: int = 60,
    whole: int = 50,
    group: int = 5,
    alone: int = 45,
    channel: int = 2,
    worst_kept: int = 3,
    others: int = 40,
) -> FlipTable:
    rows = np.arange(n)
    layers = np.zeros((n, 6), dtype=bool)
    layers[:, 2] = rows < alone
    return FlipTable(
        3,
        2,
        rows < whole,
        rows < 1,
        rows < group,
        layers,
        rows < 2,
        rows < channel,
        rows < worst_kept,
        rows < 1,
        rows < others,
    )


def test_evidence_of_a_table_by_hand() -> None:
    found = evidence_from(table())
    assert (found.refused, found.pattern, found.critical_layers) == (60, "concentrated", (2,))
    assert found.loss == Estimate(50 / 60, *wilson(50, 60))
    assert found.broken == Estimate(1 / 50, *wilson(1, 50))
    assert found.pcr is not None
    assert found.pcr.value == pytest.approx(1 - 2 / 45)
    assert found.group64 is not None
    assert found.group64.value == pytest.approx(1 - 5 / 50)
    assert found.worst_kept is not None
    assert found.worst_kept.value == pytest.approx(1 - 3 / 50)
    assert found.channel is not None
    assert found.channel.value == pytest.approx(1 - 2 / 50)
    assert classify(found).name == "outlier-crushes-safety"


def test_shares_say_how_firm_a_mode_is() -> None:
    firm = shares(table(), samples=200)
    assert firm["prompts"] == {"outlier-crushes-safety": 1.0}
    assert firm["thresholds"] == {"outlier-crushes-safety": 1.0}
    torn = shares(table(channel=14, group=25, others=20), samples=400)  # PCR just below 70 %, group-64 at one half
    assert len(torn["prompts"]) > 1
    assert sum(torn["prompts"].values()) == pytest.approx(1)
    assert shares(table(n=0))["prompts"] == {"undetermined": 1.0}
    dilute = table(alone=20, worst_kept=48)
    assert classify(evidence_from(dilute)).name == "multi-layer dilution"
    assert max(shares(dilute, samples=100)["prompts"]) == "multi-layer dilution"


# --- other statistics ---


@given(flips)
def test_mcnemar_is_the_binomial_test_of_what_differs(both: tuple[list[bool], list[bool]]) -> None:
    one, other = both
    b, c = (
        sum(x and not y for x, y in zip(one, other, strict=True)),
        sum(y and not x for x, y in zip(one, other, strict=True)),
    )
    tail = sum(comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert mcnemar(one, other) == pytest.approx(min(1.0, 2 * tail) if b + c else 1.0)
    assert mcnemar(one, other) == pytest.approx(mcnemar(other, one))


def test_bootstrap_of_a_reduction_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for study in range(200):
        before = rng.exponential(2.0, size=60)
        after = before * rng.uniform(0, 0.6, size=60)  # truth: 1 - 0.3
        (low, high), usable = bootstrap_reduction(before, after, samples=500, seed=study)
        covered += low <= 0.7 <= high
        assert usable == 1.0
    assert covered >= 178
    assert np.isnan(bootstrap_reduction([0, 0], [0, 1])[0]).all()


def test_pcr_by_margin() -> None:
    rng = np.random.default_rng(0)
    lost = rng.normal(3, 1, 40)
    found = margin_reduction(lost, lost / 4)
    assert found["margin_value"] == pytest.approx(0.75)
    assert found["margin_low"] <= 0.75 + 1e-9
    assert np.isnan(margin_reduction(-lost, lost)["margin_value"])
    hardly = margin_reduction(np.tile([5.0, -4.9], 20), lost)  # hardly any damage to reduce
    assert np.isfinite(hardly["margin_value"])
    assert np.isnan([hardly["margin_low"], hardly["margin_high"]]).all()
    assert np.isnan(margin_reduction([], [])["margin_value"])


# --- the transition ---


@pytest.mark.parametrize(
    ("flips", "of", "safe", "onset", "collapse"),
    [
        ((0, 0, 1, 40, 80, 100), 100, (8, 6, 5), (4, 4), (3, 3)),
        ((0, 0, 0, 0, 0, 0), 100, (8, 6, 5, 4, 3, 2), (None, None), (None, None)),
        ((0, 0, 0, 0, 0, 0), 10, (), (8, None), (None, None)),
        ((3, 16, 3, 13, 16, 16), 16, (), (8, 6), (6, 6)),
        ((0, 50, 0, 100, 100, 100), 100, (8,), (6, 6), (6, 4)),
    ],
)
def test_transition(
    flips: tuple[int, ...], of: int, safe: tuple[int, ...], onset: tuple[int, ...], collapse: tuple[int, ...]
) -> None:
    found = locate((8, 6, 5, 4, 3, 2), [wilson(f, of) for f in flips])
    assert (found.safe, found.onset, found.collapse) == (safe, onset, collapse)
    assert "onset" in str(found)


def test_nothing_refused_has_no_transition() -> None:
    nothing = locate((8, 2), [(float("nan"), float("nan"))] * 2)
    assert (nothing.safe, nothing.onset, nothing.collapse) == ((), (8, None), (8, None))


def test_pcr_without_a_critical_layer() -> None:
    base = baseline(TINY, REQUESTS, judge=ArbitraryJudge(), max_new_tokens=4, progress=False)
    none = per_channel_reduction(base, None)
    assert none.status == "undetermined"
    assert "no single layer" in none.reason
    some = per_channel_reduction(base, 1)
    assert int(some.data.prompts) == len(base.refused)
    assert some.layer == 1
