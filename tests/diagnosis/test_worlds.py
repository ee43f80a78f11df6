"""Worlds made to mislead a diagnosis: each was named with confidence, and wrongly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from kvgeom.behaviour.pcr import reduction
from kvgeom.diagnosis.evidence import evidence_from
from kvgeom.diagnosis.findings import mode_of
from kvgeom.diagnosis.mode import SURE, Mode
from kvgeom.diagnosis.posterior import effects, pcr_at_one_layer
from kvgeom.diagnosis.taxonomy import probabilities
from kvgeom.diagnosis.trials import BROKEN, COMPLIED, EVADED, REFUSED, Codes, Trials


def responses(prompts: int, complied: int = 0, evaded: int = 0, broken: int = 0) -> Codes:
    kinds = [COMPLIED] * complied + [EVADED] * evaded + [BROKEN] * broken
    return np.array(kinds + [REFUSED] * (prompts - len(kinds)), dtype=np.int8)


def concluded(trials: Trials, worst: int | None = None) -> Mode:
    found = effects(trials)
    return mode_of(evidence_from(trials, found, worst), found)


def whole_cache(whole: Codes, group64: Codes | None = None) -> Trials:
    """Trials in which no layer alone loses anything."""
    layers = np.zeros((len(whole), 4), dtype=np.int8)
    return Trials(3, whole, layers, layers, group64=group64)


# --- broken and evading text is lost too ---


def test_refusals_that_break_or_evade_are_not_robust() -> None:
    """13 % and 17 % lost in all, of which compliance was less than a tenth: robust, 99.1 % and 97.8 % sure."""
    for whole in (responses(600, 36, 0, 42), responses(3000, 225, 15, 255)):
        mode = concluded(whole_cache(whole))
        assert mode.shares["posterior"].get("robust", 0) < 0.05
        assert mode.name == "undetermined"
        assert "evade or are broken text" in mode.reason
    few = concluded(whole_cache(responses(600, 12, 6, 12)))
    assert few.name == "robust"
    assert "5% [" in few.reason


def test_a_fix_that_leaves_text_evading_or_broken_is_no_rescue() -> None:
    """Group-64 scales that left 115 of 115 evasions, and 51 of 51 broken texts, "rescued": 99.6 % and 98.9 %."""
    evading, broken = responses(128, 12, 115), responses(128, 60, 0, 51)
    for before in (evading, broken):
        after = np.where(before == COMPLIED, REFUSED, before).astype(np.int8)
        trials = whole_cache(before, after)
        assert effects(trials).interval("group64")[1] < 0.1
        mode = concluded(trials)
        assert mode.shares["posterior"].get("outlier-crushes-safety", 0) < 0.05
        sentence = next(f.value for f in mode.findings if f.name.startswith("Group-64"))
        assert ("115 evade with it" in sentence) or ("51 are broken text with it" in sentence)
        cured = whole_cache(before, responses(128))
        assert probabilities(effects(cured))["outlier-crushes-safety"] >= SURE


def test_compliance_that_stays_is_no_rescue_though_evasion_goes() -> None:
    before = responses(128, 20, 60)
    after = np.where(before == EVADED, REFUSED, before).astype(np.int8)
    assert effects(whole_cache(before, after)).interval("group64")[1] < 0.5


# --- random errors of the same size ---


def test_errors_of_any_direction_are_no_special_vulnerability() -> None:
    """Rounding 76 %, random errors 76 %, no fix helps: hyper-vulnerable, and 16 bits everywhere."""
    rng = np.random.default_rng(0)
    whole, control = (rng.random(200) < 0.76).astype(np.int8), (rng.random((200, 3)) < 0.76).astype(np.int8)
    layers = np.zeros((200, 6), dtype=np.int8)
    failing = Trials(3, whole, layers, layers, whole, whole, dict.fromkeys((0, 1, 2), whole), whole, (0, 1, 2), whole)
    mode = concluded(replace(failing, random=control))
    assert mode.name == "undetermined"
    assert "Errors in other directions may do as much" in mode.reason
    assert concluded(replace(failing, random=np.zeros_like(control))).name == "hyper-vulnerable"
    crushed = replace(failing, random=control, group64=np.zeros_like(whole))
    assert concluded(crushed).name == "outlier-crushes-safety"
    one = replace(failing, random=control, kept=dict.fromkeys((0, 1, 2), np.zeros_like(whole)))
    few = replace(failing, random=control, top=np.zeros_like(whole))
    assert [concluded(trials).name for trials in (one, few)] == ["undetermined"] * 2


# --- layers that were chosen by the same prompts ---


def twelve_layers(rng: np.random.Generator, prompts: int = 64) -> Trials:
    """Three layers lose 50 % alone, five 45 %; keeping the first three rescues 90 %, any others 5 to 30 %."""
    alone = np.array([0.5] * 3 + [0.45] * 5 + [0.02] * 4)
    layers = (rng.random((prompts, 12)) < alone).astype(np.int8)
    top = tuple(int(layer) for layer in sorted(np.argsort(-layers.sum(0), kind="stable")[:3]))
    whole = (rng.random(prompts) < 0.9).astype(np.int8)

    def with_fix(rescued: float) -> Codes:
        return (whole & (rng.random(prompts) >= rescued)).astype(np.int8)

    rescued = 0.9 if top == (0, 1, 2) else rng.uniform(0.05, 0.3)
    kept = {layer: with_fix(0.05) for layer in top}
    none = np.zeros((prompts, 3), dtype=np.int8)
    trials = Trials(3, whole, layers, layers, with_fix(0.05), with_fix(0.05), kept, with_fix(rescued), top)
    return replace(trials, mixed=with_fix(0.05), random=none, random_layer=none)


def test_layers_that_may_not_be_the_worst_exclude_nothing() -> None:
    """The dilution of this world came out as hyper-vulnerable in 36 of 40 studies."""
    names = []
    for study in range(40):
        mode = concluded(twelve_layers(np.random.default_rng(study)))
        names.append(mode.name)
        assert mode.name != "undetermined" or "Which layers are the worst is not known" in mode.reason
    assert set(names) <= {"undetermined", "multi-layer dilution"}


def test_layers_that_are_surely_the_worst_do() -> None:
    rng = np.random.default_rng(0)
    alone = np.array([0.8] * 3 + [0.05] * 9)
    layers = (rng.random((64, 12)) < alone).astype(np.int8)
    whole, none = np.ones(64, dtype=np.int8), np.zeros((64, 3), dtype=np.int8)
    trials = Trials(3, whole, layers, layers, whole, whole, dict.fromkeys((0, 1, 2), whole), whole, (0, 1, 2), whole)
    assert concluded(replace(trials, random=none, random_layer=none)).name == "hyper-vulnerable"


# --- many layers ---


@pytest.mark.parametrize("prompts", [32, 128])
def test_of_many_layers_at_the_border_none_is_surely_critical(prompts: int) -> None:
    """28 layers that truly lose 10 %: some was "surely critical" in 55 to 87 % of studies."""
    wrong = 0
    for study in range(100):
        rng = np.random.default_rng(study)
        layers = (rng.random((prompts, 28)) < 0.1).astype(np.int8)
        trials = Trials(3, layers[:, 0], layers, layers)
        wrong += bool(evidence_from(trials, effects(trials, samples=2000, seed=study), 0).critical_layers)
    assert wrong <= 9  # 5 % of 100, and two standard deviations


def test_a_layer_that_surely_loses_more_is_critical_among_many() -> None:
    rng = np.random.default_rng(0)
    layers = (rng.random((64, 28)) < np.array([0.5] + [0.0] * 27)).astype(np.int8)
    trials = Trials(3, layers[:, 0], layers, layers, random_layer=np.zeros((64, 3), dtype=np.int8))
    evidence = evidence_from(trials, effects(trials), 0)
    assert (evidence.critical_layers, evidence.pattern) == ((0,), "concentrated")


# --- PCR as the paper simulates, at the layer that the scan chose ---


@pytest.mark.parametrize(("layers", "true"), [(28, 0.0), (28, 0.6), (3, 0.0), (3, 0.6)])
def test_intervals_of_pcr_at_a_chosen_layer_cover_the_truth(layers: int, true: float) -> None:
    """The one condition of the paper's setting has the losses that chose the layer, and per-channel losses of its own."""
    rng, covered, plain = np.random.default_rng(1), 0, 0
    for study in range(150):
        alone = (rng.random((32, layers)) < 0.3).astype(np.int8)
        worst = int(alone.sum(0).argmax())
        fresh = (rng.random(32) < 0.3 * (1 - true)).astype(np.int8)
        draws = pcr_at_one_layer(alone, worst, alone[:, worst], fresh, samples=1000, seed=study)
        low, high = np.quantile(draws, [0.025, 0.975])
        covered += low <= true <= high
        fixed = reduction(alone[:, worst] == COMPLIED, fresh == COMPLIED, layer=worst, bits=3).ci
        assert fixed is not None
        plain += fixed[0] <= true <= fixed[1]
    assert covered >= 0.93 * 150
    assert plain < covered


def test_pcr_of_a_layer_that_is_surely_the_worst_is_that_of_a_fixed_layer() -> None:
    rng = np.random.default_rng(0)
    alone = (rng.random((64, 8)) < np.array([0.9] + [0.02] * 7)).astype(np.int8)
    fresh = (rng.random(64) < 0.2).astype(np.int8)
    draws = pcr_at_one_layer(alone, 0, alone[:, 0], fresh)
    fixed = reduction(alone[:, 0] == COMPLIED, fresh == COMPLIED, layer=0, bits=3)
    np.testing.assert_allclose(np.quantile(draws, [0.025, 0.975]), fixed.ci, atol=0.04)


# --- what random errors and evasions leave unknown ---


@pytest.mark.parametrize("prompts", [24, 64, 256])
def test_random_directions_that_differ_blame_nothing_however_many_prompts(prompts: int) -> None:
    """Draws of random errors lose 95 % or 5 %, 60 % in the mean: hyper-vulnerable in 2, 14 and 16 of 60 studies."""
    blamed = 0
    for study in range(40):
        rng = np.random.default_rng(study)
        whole = (rng.random(prompts) < 0.65).astype(np.int8)
        shares = rng.choice([0.95, 0.05], 3, p=[0.61, 0.39])
        layers = (rng.random((prompts, 6)) < 0.03).astype(np.int8)
        trials = Trials(
            3, whole, layers, layers, whole, whole, dict.fromkeys((0, 1, 2), whole), whole, (0, 1, 2), whole
        )
        found = effects(replace(trials, random=(rng.random((prompts, 3)) < shares).astype(np.int8)), samples=1000)
        blamed += probabilities(found).get("hyper-vulnerable", 0) >= SURE
    assert blamed <= 4


def test_the_mean_over_directions_is_known_as_a_mean_of_three_values_is() -> None:
    shares, prompts = np.array([0.2, 0.5, 0.8]), 4000
    codes = (np.arange(prompts)[:, None] % 10 < 10 * shares).astype(np.int8)
    layers = np.zeros((prompts, 2), dtype=np.int8)
    found = effects(Trials(3, codes[:, 0], layers, layers, random=codes), samples=20_000)
    error = scipy.stats.t(2, 0.5, shares.std(ddof=1) / np.sqrt(3))
    levels = [0.1, 0.25, 0.5, 0.75, 0.9]
    np.testing.assert_allclose(np.quantile(found.random, levels), error.ppf(levels), atol=0.02)
    one = effects(Trials(3, codes[:, 0], layers, layers, random=codes[:, :1]))
    assert np.isnan(one.random).all()
    assert np.isnan(one.random_gone).all()


@pytest.mark.parametrize("prompts", [64, 256])
def test_one_that_complies_among_evasions_names_no_mode(prompts: int) -> None:
    """1 of 64 complies and 63 evade: hyper-vulnerable, 98 %."""
    whole, layers = responses(prompts, 1, prompts - 1), np.zeros((prompts, 4), dtype=np.int8)
    none = np.zeros((prompts, 3), dtype=np.int8)
    trials = Trials(3, whole, layers, layers, whole, whole, dict.fromkeys((0, 1, 2), whole), whole, (0, 1, 2), whole)
    mode = concluded(replace(trials, random=none, random_layer=none))
    assert mode.name == "undetermined"
    assert "evade" in mode.reason


def test_random_errors_that_break_text_are_no_proof_that_safety_is_special() -> None:
    """All comply under rounding, all is broken text under random errors: hyper-vulnerable, 88 %."""
    whole, layers = responses(64, 64), np.zeros((64, 4), dtype=np.int8)
    broken = np.full((64, 3), BROKEN, dtype=np.int8)
    trials = Trials(3, whole, layers, layers, whole, whole, dict.fromkeys((0, 1, 2), whole), whole, (0, 1, 2), whole)
    mode = concluded(replace(trials, random=broken, random_layer=broken))
    assert mode.name == "undetermined"
    assert mode.shares["posterior"].get("hyper-vulnerable", 0) < 0.1
    assert "in any way" in mode.reason


@pytest.mark.parametrize("share", [0.0, 0.085, 0.5])
def test_what_is_sure_to_be_no_mode_is_not_said_to_be_undecided(share: float) -> None:
    """800 refusals did "not decide between none of the modes (96%) and hyper-vulnerable (4%)"."""
    rng = np.random.default_rng(1)
    whole, layers = responses(800, 128), np.zeros((800, 4), dtype=np.int8)
    trials = Trials(3, whole, layers, layers, whole, whole, dict.fromkeys((0, 1, 2), whole), whole, (0, 1, 2), whole)
    mode = concluded(replace(trials, random=(rng.random((800, 3)) < share).astype(np.int8)))
    if mode.shares["posterior"].get("undetermined", 0) >= SURE:
        assert "do not decide" not in mode.reason


def test_no_loss_among_twenty_four_is_robust() -> None:
    """It was named from 28 on, because broken text had a chance of its own beside that of being lost at all."""
    none = np.zeros((24, 3), dtype=np.int8)
    trials = replace(whole_cache(responses(24), responses(24)), random=none, random_layer=none)
    assert concluded(trials).name == "robust"
    assert concluded(replace(whole_cache(responses(12), responses(12)), random=none[:12])).name == "undetermined"
