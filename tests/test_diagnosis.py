"""Intervals, PCR and the mode: against closed forms, against simulation, and at their borders."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.diagnosis.pcr import PCR, THRESHOLDS, per_channel_reduction, reduction
from kvgeom.diagnosis.taxonomy import PRESCRIPTIONS, Evidence, classify, critical_layers
from kvgeom.stats import bootstrap_means, reduction_posterior, wilson


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
    assert (found.flips_tensor, found.flips_channel, found.prompts) == (sum(tensor), sum(channel), len(tensor))
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


def pcr(value: float | None) -> PCR:
    status = "undetermined" if value is None else "determined"
    return PCR(value, None, status, "because", 5, 3, 50, 0, 100)  # type: ignore[arg-type]


PLAIN = Evidence(100, 3, 80, 10, 5, {4: 1, 5: 70, 9: 2}, 24, pcr(0.9), 40.0, 1.1)


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({}, "outlier-crushes-safety"),
        ({"pcr": pcr(0.1)}, "outlier-as-safety"),
        ({"pcr": pcr(-0.5)}, "outlier-as-safety"),
        ({"pcr": pcr(0.5)}, "mixed"),
        ({"pcr": pcr(None)}, "undetermined"),
        ({"layer_flips": {4: 30, 5: 70, 9: 40}}, "multi-layer dilution"),
        ({"layer_flips": dict.fromkeys(range(24), 60)}, "hyper-vulnerable"),
        ({"flips_all": 0}, "robust"),
        ({"flips_all": 0, "refused": 5}, "undetermined"),
        ({"refused": 0, "flips_all": 0, "layer_flips": {}}, "undetermined"),
    ],
)
def test_modes(changes: dict[str, object], mode: str) -> None:
    found = classify(replace(PLAIN, **changes))  # type: ignore[arg-type]
    assert found.name == mode
    assert found.prescription == PRESCRIPTIONS[found.name]
    assert found.evidence
    assert all(sentence.endswith(".") for sentence in found.evidence)


def test_critical_layers_are_above_a_tenth() -> None:
    assert critical_layers(replace(PLAIN, layer_flips={0: 10, 1: 11, 2: 9})) == [1]


@given(
    st.integers(0, 60), st.integers(0, 60), st.one_of(st.none(), st.floats(-3, 1)),
    st.dictionaries(st.integers(0, 23), st.integers(0, 60), max_size=24),
)  # fmt: skip
def test_every_evidence_has_a_mode_and_says_why(
    refused: int, lost: int, value: float | None, layers: dict[int, int]
) -> None:
    found = classify(replace(PLAIN, refused=refused, flips_all=min(lost, refused), pcr=pcr(value), layer_flips=layers))
    assert found.name in PRESCRIPTIONS
    assert found.evidence[0]
    if refused == 0 or (value is None and found.name != "hyper-vulnerable" and min(lost, refused) > 0):
        assert found.name == "undetermined"


def test_pcr_without_a_critical_layer() -> None:
    from tests.test_evaluate import REQUESTS, TINY, ArbitraryJudge, baseline

    base = baseline(TINY, REQUESTS, judge=ArbitraryJudge(), max_new_tokens=4, progress=False)
    none = per_channel_reduction(base, None, progress=False)
    assert none.status == "undetermined"
    assert "no single layer" in none.reason
    some = per_channel_reduction(base, 1, progress=False)
    assert some.prompts == len(base.refused)
    assert some.layer == 1
