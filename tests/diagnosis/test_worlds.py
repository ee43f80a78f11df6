"""Worlds made to mislead a diagnosis: each was named with confidence, and wrongly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvgeom.behaviour.pcr import reduction
from kvgeom.diagnosis.evidence import evidence_from
from kvgeom.diagnosis.findings import mode_of
from kvgeom.diagnosis.measure import RANDOM_DRAWS
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
        mode = concluded(trials)
        assert mode.name != "outlier-crushes-safety"
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
    whole, control = (rng.random(200) < 0.76).astype(np.int8), (rng.random((200, RANDOM_DRAWS)) < 0.76).astype(np.int8)
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
    none = np.zeros((prompts, RANDOM_DRAWS), dtype=np.int8)
    trials = Trials(3, whole, layers, layers, with_fix(0.05), with_fix(0.05), kept, with_fix(rescued), top)
    return replace(trials, mixed=with_fix(0.05), random=none, random_layer=none)


@pytest.mark.slow
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
    whole, none = np.ones(64, dtype=np.int8), np.zeros((64, RANDOM_DRAWS), dtype=np.int8)
    trials = Trials(3, whole, layers, layers, whole, whole, dict.fromkeys((0, 1, 2), whole), whole, (0, 1, 2), whole)
    assert concluded(replace(trials, random=none, random_layer=none)).name == "hyper-vulnerable"


# --- many layers ---


@pytest.mark.parametrize("prompts", [32, pytest.param(128, marks=pytest.mark.slow)])
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
    trials = Trials(3, layers[:, 0], layers, layers, random_layer=np.zeros((64, RANDOM_DRAWS), dtype=np.int8))
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


@pytest.mark.slow
def test_beside_the_directions_that_were_tried_stands_one_that_was_not() -> None:
    """Another direction is one of them or the unknown one, each as likely; the mean weighs them by a flat Dirichlet."""
    shares, prompts = np.array([0.2, 0.5, 0.8]), 4000
    codes = (np.arange(prompts)[:, None] % 10 < 10 * shares).astype(np.int8)
    layers = np.zeros((prompts, 2), dtype=np.int8)
    found = effects(Trials(3, codes[:, 0], layers, layers, random=codes, random_layer=codes), samples=20_000)
    near = [np.abs(found.random - share) < 0.02 for share in shares]
    for one in near:
        assert one.mean() == pytest.approx(0.25 + 0.25 * 0.04, abs=0.02)
    rest = found.random[~np.logical_or.reduce(near)]
    assert rest.mean() == pytest.approx(0.5, abs=0.03)
    # A flat Dirichlet over four values has their mean, and a fifth of their variance.
    assert found.random_layer.mean() == pytest.approx(0.5, abs=0.02)
    values = np.append(shares, 0.5)
    spread = values.var() / 5 + (1 / 12) * (2 / 20)  # the fourth is uniform: E[w^2] of one of four weights is 2/20
    assert found.random_layer.var() == pytest.approx(spread, rel=0.1)


def test_directions_that_differ_are_no_proof_however_many_prompts_there_are() -> None:
    """One direction in twenty loses all, rounding 14 %, and no fix helps: hyper-vulnerable in 54 % of studies with 400 refusals."""
    rng, blamed, prompts = np.random.default_rng(0), 0, 400
    for _ in range(40):
        whole = (rng.random(prompts) < 0.14).astype(np.int8)
        harm = (rng.random(RANDOM_DRAWS) < 0.05).astype(np.int8)
        blamed += (
            probabilities(effects(nothing_helps(whole, np.tile(harm, (prompts, 1))), samples=1000)).get(
                "hyper-vulnerable", 0
            )
            >= SURE
        )
    assert blamed <= 4


def test_a_rounding_that_does_what_one_of_eight_directions_does_is_not_blamed() -> None:
    """Controls of the demo: their mean is far below what the rounding does, and one of them does as much."""
    for times in (1, 6):
        controls = np.stack([responses(17 * times, lost * times) for lost in (2, 1, 0, 2, 1, 8, 1, 1)], axis=1)
        shares = probabilities(effects(nothing_helps(responses(17 * times, 8 * times), controls)))
        assert shares.get("hyper-vulnerable", 0) < SURE


# --- a mode is what every fix does that was tried ---


def nothing_helps(whole: Codes, random: Codes | None = None) -> Trials:
    """Three layers lose much alone; no fix takes anything away."""
    layers = np.zeros((len(whole), 8), dtype=np.int8)
    layers[: 2 * len(whole) // 3, 0] = 1
    layers[: len(whole) // 2, 1:3] = 1
    none = np.zeros((len(whole), RANDOM_DRAWS), dtype=np.int8)
    kept = dict.fromkeys((0, 1, 2), whole)
    trials = Trials(3, whole, layers, layers, whole, whole, kept, whole, (0, 1, 2), whole)
    return replace(trials, random=none if random is None else random, random_layer=none)


def test_no_fix_that_was_tried_is_overlooked() -> None:
    """Each was named with 100 %, though a fix that was tried takes away everything."""
    whole, cured = responses(64, 60), responses(64)
    bare = nothing_helps(whole)
    assert concluded(bare, 0).name == "hyper-vulnerable"
    channel = concluded(replace(bare, channel=cured), 0)
    assert channel.name == "undetermined"
    assert "none of the modes has that fix" in channel.reason
    finer = replace(bare, channel=cured, mixed=cured)
    assert concluded(finer, 0).name == "conflicting", (
        "alone, the layer is not rescued by what rescues it in the whole cache"
    )
    assert concluded(replace(finer, layers_channel=np.zeros_like(bare.layers)), 0).name == "mixed"
    for top in (whole, cured):
        mode = concluded(replace(bare, kept={0: whole, 1: cured, 2: whole}, top=top), 0)
        assert mode.name == "undetermined"
        assert "another one in 16 bits takes away more" in mode.reason
        assert any("layer 1 takes away 100%" in finding.value for finding in mode.findings)
    less = concluded(replace(bare, kept={0: cured, 1: whole, 2: whole}), 0)
    assert less.name == "conflicting"
    assert "it among them" in less.reason


@pytest.mark.parametrize("untried", ["mixed", "channel", "random", "group64", "top"])
def test_what_was_not_tried_has_not_failed(untried: str) -> None:
    """Without its per-channel and its random conditions a model was called outlier-as-safety, with 100 %."""
    whole, cured = responses(64, 60), responses(64)
    trials = replace(nothing_helps(whole), kept={0: cured, 1: whole, 2: whole}, top=cured)
    assert concluded(trials, 0).name == "outlier-as-safety"
    without = concluded(replace(trials, **{untried: None}), 0)
    assert without.name == ("outlier-as-safety" if untried == "top" else "undetermined")


# --- more than one kind of loss ---


@pytest.mark.parametrize("stays", [4, 12, 18, 24])
def test_a_fix_that_leaves_some_text_broken_is_no_cliff(stays: int) -> None:
    """All is lost, some of it as broken text that stays: from a tenth on the fix took away 0 %, and 16 bits were advised."""
    whole = responses(128, 128 - stays, 0, stays)
    after = np.where(whole == COMPLIED, REFUSED, whole).astype(np.int8)
    trials = replace(nothing_helps(whole), group64=after)
    mode = concluded(trials, 0)
    assert mode.name == "outlier-crushes-safety"
    found = evidence_from(trials, effects(trials), 0).group64
    assert found is not None
    assert found.value == pytest.approx(1 - stays / 128)


@pytest.mark.parametrize("rescued", [0.55, 0.7])
@pytest.mark.parametrize("prompts", [24, 96])
def test_intervals_of_a_fix_cover_what_it_does_to_every_kind_alike(prompts: int, rescued: float) -> None:
    """Intervals of the least over four kinds covered 68 to 84 %."""
    rng, covered, failed, studies = np.random.default_rng(0), 0, 0, 150
    for _ in range(studies):
        before = rng.choice([REFUSED, COMPLIED, BROKEN, EVADED], prompts, p=[0.1, 0.5, 0.2, 0.2]).astype(np.int8)
        after = np.where(rng.random(prompts) < rescued, REFUSED, before).astype(np.int8)
        found = effects(whole_cache(before, after), samples=1000)
        low, high = found.interval("group64")
        covered += low <= rescued <= high
        failed += bool((found.group64 <= 0.5).mean() >= SURE)
    assert covered / studies >= 0.87
    assert failed / studies <= (0.25 if rescued < 0.6 else 0.05), "one half is the border"


def test_reasons_of_the_undetermined_are_true() -> None:
    """None of these evades or is broken text, and the reason said that most do."""
    random = np.stack([np.roll(responses(40, 8), 8 * draw) for draw in range(RANDOM_DRAWS)], axis=1)
    mode = concluded(nothing_helps(responses(40, 8), random), 0)
    assert mode.name == "undetermined"
    assert "Errors in other directions may do as much" in mode.reason
    assert "evade or are broken" not in concluded(whole_cache(responses(1, 1))).reason


@pytest.mark.parametrize("prompts", [64, 256])
def test_one_that_complies_among_evasions_names_no_mode(prompts: int) -> None:
    """1 of 64 complies and 63 evade: hyper-vulnerable, 98 %."""
    whole, layers = responses(prompts, 1, prompts - 1), np.zeros((prompts, 4), dtype=np.int8)
    none = np.zeros((prompts, RANDOM_DRAWS), dtype=np.int8)
    trials = Trials(3, whole, layers, layers, whole, whole, dict.fromkeys((0, 1, 2), whole), whole, (0, 1, 2), whole)
    mode = concluded(replace(trials, random=none, random_layer=none))
    assert mode.name == "undetermined"
    assert "evade" in mode.reason


def test_random_errors_that_break_text_are_no_proof_that_safety_is_special() -> None:
    """All comply under rounding, all is broken text under random errors: hyper-vulnerable, 88 %."""
    whole, layers = responses(64, 64), np.zeros((64, 4), dtype=np.int8)
    broken = np.full((64, RANDOM_DRAWS), BROKEN, dtype=np.int8)
    trials = Trials(3, whole, layers, layers, whole, whole, dict.fromkeys((0, 1, 2), whole), whole, (0, 1, 2), whole)
    mode = concluded(replace(trials, random=broken, random_layer=broken))
    assert mode.name == "undetermined"
    assert mode.shares["posterior"].get("hyper-vulnerable", 0) < 0.12, "one of nine directions is unknown"
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
    none = np.zeros((24, RANDOM_DRAWS), dtype=np.int8)
    trials = replace(whole_cache(responses(24), responses(24)), random=none, random_layer=none)
    assert concluded(trials).name == "robust"
    assert concluded(replace(whole_cache(responses(12), responses(12)), random=none[:12])).name == "undetermined"
