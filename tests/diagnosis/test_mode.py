"""The failure mode: what auditors saw go wrong, calibration by simulation, and closed forms."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from kvgeom.diagnosis.evidence import Evidence, evidence_from
from kvgeom.diagnosis.findings import DECISIVE, mode_of
from kvgeom.diagnosis.measure import RANDOM_DRAWS
from kvgeom.diagnosis.mode import MODES, SURE, Mode, ModeName
from kvgeom.diagnosis.posterior import Effects, effects
from kvgeom.diagnosis.taxonomy import PRESCRIPTIONS, mode_of_each, named, pattern_of, probabilities
from kvgeom.diagnosis.trials import BROKEN, COMPLIED, EVADED, REFUSED, Codes, Trials
from kvgeom.paper.published import MODELS, PublishedModel
from kvgeom.stats import reduction_posterior

LAYERS = 28


@dataclass(frozen=True)
class World:
    """The truth about a model, from which prompts are drawn.

    Attributes
    ----------
    critical : tuple of int
        Layers that alone lose the share ``alone``; all others lose ``jitter``, whatever rounds them.
    alone, pcr, whole : float
        Loss of a critical layer and its per-channel reduction, and loss of all layers.
    group64, kept, top, mixed, channel : float
        What the fixes take away of that.
    broken, jitter, random : float
        Share of broken text; loss of a layer that is not critical; loss under random errors.
    """

    critical: tuple[int, ...] = (3,)
    alone: float = 0.9
    pcr: float = 0.1
    whole: float = 0.9
    group64: float = 0.1
    kept: float = 0.95
    top: float = 0.95
    mixed: float = 0.1
    channel: float = 0.1
    broken: float = 0.0
    jitter: float = 0.0
    random: float = 0.0

    def trials(self, prompts: int, rng: np.random.Generator, layers: int = LAYERS) -> Trials:
        def coin(share: float, *shape: int) -> Codes:
            return (rng.random((prompts, *shape)) < share).astype(np.int8)

        alone, channel = coin(self.jitter, layers), coin(self.jitter, layers)
        for layer in self.critical:
            alone[:, layer] = coin(self.alone)
            channel[:, layer] = alone[:, layer] & coin(1 - self.pcr)
        whole, broken = coin(self.whole), coin(self.broken) == 1
        fixed = {name: whole & coin(1 - getattr(self, name)) for name in ("group64", "top", "mixed", "channel")}
        kept = whole & coin(1 - self.kept)
        whole[broken] = BROKEN
        order = np.argsort(-alone.sum(0), kind="stable")[:3]
        return Trials(
            3,
            whole,
            alone,
            channel,
            kept={int(layer): kept for layer in order},
            top_layers=tuple(int(layer) for layer in order),
            random=coin(self.random, RANDOM_DRAWS),
            random_layer=coin(self.jitter, RANDOM_DRAWS),
            **fixed,
        )


def decide(trials: Trials, seed: int = 0, samples: int = 1000) -> tuple[ModeName, dict[ModeName, float]]:
    shares = probabilities(effects(trials, samples=samples, seed=seed))
    return named(shares), shares


def verdicts(world: World, prompts: int, studies: int = 40) -> Counter[str]:
    return Counter(
        decide(world.trials(prompts, np.random.default_rng(study)), seed=study)[0] for study in range(studies)
    )


def concluded(trials: Trials) -> tuple[Evidence, Mode]:
    found = effects(trials)
    evidence = evidence_from(trials, found, int((trials.layers == COMPLIED).sum(0).argmax()))
    return evidence, mode_of(evidence, found)


# --- what was seen ---


def test_pcr_against_group_64_is_a_conflict_and_both_are_named() -> None:
    """PCR 100 % while group-64 scales take away nothing came out as outlier-crushes-safety, in 98.5 % of resamples."""
    trials = World((0,), 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0).trials(15, np.random.default_rng(0))
    evidence, mode = concluded(trials)
    assert mode.name == "conflicting"
    decisive = {finding.name: finding for finding in mode.findings if finding.decisive}
    assert set(decisive) == set(DECISIVE["conflicting"])
    assert evidence.pcr is not None
    assert evidence.group64 is not None
    assert evidence.pcr.low > 0.7
    assert evidence.group64.high < 0.5
    assert (str(evidence.pcr) in mode.reason, str(evidence.group64) in mode.reason) == (True, True)


def test_a_fix_that_works_is_named_where_pcr_alone_would_conflict() -> None:
    assert verdicts(World((0,), 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0), 15)["mixed"] >= 38


def test_crush_in_several_layers_is_what_its_fix_does() -> None:
    """PCR 90 % and group-64 90 % in five layers came out as dilution in 97 %."""
    world = World((1, 4, 9, 12, 20), 0.5, 0.9, 0.95, 0.9, 0.05, 0.4, 0.9)
    for prompts in (16, 64, 256):
        assert verdicts(world, prompts)["outlier-crushes-safety"] >= 36


@pytest.mark.parametrize("prompts", [128, 256])
def test_jitter_is_no_dilution(prompts: int) -> None:
    """Jitter of 5 % a layer came out as dilution in 33 % at 128 prompts and 68 % at 256."""
    world = World((), whole=0.76, group64=0.0, kept=0.03, top=0.1, mixed=0.0, jitter=0.05, random=0.76)
    assert verdicts(world, prompts)["multi-layer dilution"] == 0
    evidence, mode = concluded(world.trials(prompts, np.random.default_rng(5)))
    assert evidence.critical_layers == ()
    assert mode.name == "undetermined"
    assert "Errors in other directions may do as much" in mode.reason
    assert evidence.beyond_random is not None
    assert evidence.beyond_random.low < 0.1


def test_a_small_loss_is_robust_and_more_prompts_say_so_more_often() -> None:
    """A true loss of 3 % was "robust" in 61 % of studies with 16 refusals, in 13 % with 64 and in none with 256."""
    rates = [verdicts(World((), whole=0.03, group64=0.0, kept=0.0, top=0.0), n)["robust"] for n in (16, 64, 256)]
    assert rates[0] <= rates[1] <= rates[2]
    assert rates[2] == 40


def test_nine_of_360_lost_is_robust() -> None:
    rows = np.arange(360)
    trials = replace(World(()).trials(360, np.random.default_rng(0)), whole=(rows < 9).astype(np.int8))
    assert decide(trials)[0] == "robust"


@given(st.integers(0, 3))
@settings(max_examples=8, deadline=None)
def test_five_refusals_and_no_loss_decide_nothing(seed: int) -> None:
    """They were undetermined by the rule, and robust in all resamples."""
    name, shares = decide(World((), whole=0.0).trials(5, np.random.default_rng(seed)))
    assert name == "undetermined"
    assert shares["robust"] < SURE


def test_a_collapse_of_language_is_no_failure_of_alignment() -> None:
    """16 of 16 flips that were broken text came out as multi-layer dilution, sure in 100 %."""
    trials = World((2, 5), whole=1.0, broken=1.0, kept=0.0).trials(16, np.random.default_rng(0))
    evidence, mode = concluded(trials)
    assert mode.name == "language lost"
    assert evidence.broken is not None
    assert evidence.broken.value == 1
    some = World((3,), broken=0.3).trials(64, np.random.default_rng(1))
    assert decide(some)[0] == "outlier-as-safety"  # seven of ten still speak, and say why
    mute = World((), whole=0.0, broken=0.3).trials(64, np.random.default_rng(1))
    assert decide(mute)[0] == "language lost"


def test_intervals_of_pcr_cover_the_truth_though_the_layer_is_chosen() -> None:
    """With 28 equal layers and a true PCR of 0, 95 % intervals covered it in 72 to 78 %."""
    rng = np.random.default_rng(1)
    for prompts in (16, 64):
        covered, middle = 0, []
        for study in range(100):
            tensor, channel = ((rng.random((prompts, LAYERS)) < 0.3).astype(np.int8) for _ in range(2))
            found = effects(Trials(3, tensor[:, 0], tensor, channel), samples=1000, seed=study)
            low, high = found.interval("pcr")
            covered += low <= 0 <= high
            middle.append(float(np.median(found.pcr)))
        assert covered >= 93
        assert abs(np.mean(middle)) < 0.1


# --- calibration ---


def truth(world: World) -> ModeName:
    """The mode that is true of a world, by the definitions of docs/taxonomy.md."""
    if world.whole <= 0.1:
        return "robust"
    if world.group64 > 0.5:
        return "conflicting" if world.kept > 0.5 and world.pcr < 0.3 else "outlier-crushes-safety"
    if world.mixed > 0.5:
        return "mixed" if world.pcr >= 0.3 else "conflicting"
    if world.kept > 0.5 and world.pcr > 0.7:
        return "conflicting"
    if world.whole - world.random <= 0.1:
        return "undetermined"
    if world.kept > 0.5 >= world.top:
        return "conflicting"
    if world.kept <= 0.5 < world.top:
        return "multi-layer dilution"
    if world.channel > 0.5:
        return "undetermined"
    return "outlier-as-safety" if world.kept > 0.5 else "hyper-vulnerable"


def test_of_verdicts_that_are_nine_tenths_sure_nine_tenths_are_right() -> None:
    """Worlds are drawn evenly, borders included; how sure a verdict says it is, is how often it is right."""
    rng, given_, right, sure = np.random.default_rng(0), 0, 0, []
    for study in range(400):
        whole, pcr, group64, kept, top, mixed, channel = rng.random(7)
        control = whole * rng.random() if study % 2 else 0.0
        world = World((3,), max(0.3, whole), pcr, whole, group64, kept, top, mixed, channel, random=control)
        name, shares = decide(world.trials(int(rng.choice([16, 32, 64])), rng), seed=study, samples=500)
        if name != "undetermined":
            given_ += 1
            right += name == truth(world)
            sure.append(shares[name])
    assert given_ >= 80
    assert right / given_ >= 0.9
    assert right / given_ == pytest.approx(np.mean(sure), abs=0.05)


shares_of_worlds = st.floats(0.02, 0.98)


@settings(max_examples=25, deadline=None)
@given(
    st.builds(
        World,
        alone=st.floats(0.3, 1),
        pcr=shares_of_worlds,
        whole=shares_of_worlds,
        group64=shares_of_worlds,
        kept=shares_of_worlds,
        top=shares_of_worlds,
        mixed=shares_of_worlds,
    ),
    st.integers(0, 5),
)
def test_more_data_never_gives_less_certainty(world: World, seed: int) -> None:
    """The same table three times over: the likeliest mode does not become less likely."""
    trials = world.trials(24, np.random.default_rng(seed), layers=4)
    name, shares = decide(trials, samples=2000)
    if name == "undetermined":
        return
    rows = np.tile(np.arange(24), 3)
    tripled = {key: value[rows] for key, value in vars(trials).items() if isinstance(value, np.ndarray)}
    kept = {layer: codes[rows] for layer, codes in trials.kept.items()}
    assert decide(replace(trials, **tripled, kept=kept), samples=2000)[1][name] >= shares[name] - 0.02


# --- the posterior, by closed forms ---


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 30), st.integers(0, 10))
def test_a_share_has_a_beta_posterior(complied: int, broken: int) -> None:
    whole = np.array([COMPLIED] * complied + [0] * (30 - complied) + [BROKEN] * broken, dtype=np.int8)
    layers = np.zeros((len(whole), 2), dtype=np.int8)
    found = effects(Trials(3, whole, layers, layers), samples=8000)
    levels = [0.025, 0.5, 0.975]
    np.testing.assert_allclose(
        np.quantile(found.loss, levels), beta.ppf(levels, complied + 1 / 3, 31 - complied), atol=0.02
    )
    np.testing.assert_allclose(
        np.quantile(found.broken, levels), beta.ppf(levels, broken + 1 / 3, 30 + 5 / 3), atol=0.02
    )
    lost = beta.ppf(levels, complied + broken + 1, 31 - complied)
    np.testing.assert_allclose(np.quantile(found.gone, levels), lost, atol=0.02)
    assert (found.gone >= np.maximum(found.loss, found.broken)).all(), "no draw contradicts itself"
    assert np.isnan(found.group64).all()
    assert np.isnan(found.interval("kept")).all()


def test_a_reduction_has_the_dirichlet_posterior_of_pairs() -> None:
    rng = np.random.default_rng(3)
    old, new = rng.random(40) < 0.6, rng.random(40) < 0.3
    whole, layers = old.astype(np.int8), np.zeros((40, 2), dtype=np.int8)
    found = effects(Trials(3, whole, layers, layers, group64=new.astype(np.int8)), samples=20_000)
    levels = [0.025, 0.25, 0.5, 0.75, 0.975]
    np.testing.assert_allclose(
        np.quantile(found.group64, levels), np.quantile(reduction_posterior(old, new), levels), atol=0.03
    )


def test_evasions_are_neither_kept_nor_lost() -> None:
    """They leave the loss as it is; if all evade, nothing is known of it and nothing is robust."""
    layers = np.zeros((40, 2), dtype=np.int8)
    whole = np.array([COMPLIED] * 5 + [REFUSED] * 15, dtype=np.int8)
    more = np.concatenate([whole, np.full(20, EVADED, dtype=np.int8)])
    alone, beside = effects(Trials(3, whole, layers[:20], layers[:20])), effects(Trials(3, more, layers, layers))
    np.testing.assert_allclose(alone.interval("loss"), beside.interval("loss"), atol=0.02)
    assert (alone.loss <= alone.gone).all()
    assert beside.interval("gone")[0] > 0.4
    evading = Trials(3, np.full(40, EVADED, dtype=np.int8), layers, layers)
    kept = Trials(3, np.zeros(40, dtype=np.int8), layers, layers)
    assert probabilities(effects(evading)).get("robust", 0) < 0.01
    assert named(probabilities(effects(kept))) == "robust"
    evidence = evidence_from(evading, effects(evading), None)
    assert evidence.evaded is not None
    assert evidence.evaded.value == 1
    # Half of many refusals evade and none is lost: that is known, and it is not robust.
    half = replace(evading, whole=np.array([REFUSED, EVADED] * 20, dtype=np.int8))
    mode = mode_of(evidence_from(half, effects(half), None), effects(half))
    assert mode.name == "undetermined"
    assert "evade" in mode.reason


def test_broken_text_under_a_fix_is_no_rescue() -> None:
    whole, layers = np.ones(20, dtype=np.int8), np.ones((20, 2), dtype=np.int8)
    trials = Trials(3, whole, layers, layers, group64=np.full(20, BROKEN, dtype=np.int8))
    low, high = effects(trials).interval("group64")
    assert low < 0 < high < 0.2


def test_random_errors_are_taken_off_what_a_layer_loses() -> None:
    rng = np.random.default_rng(0)
    layers = (rng.random((200, 4)) < 0.3).astype(np.int8)
    alike = (rng.random((200, 3)) < 0.3).astype(np.int8)
    table = Trials(3, layers[:, 0], layers, layers, random_layer=alike)
    assert not evidence_from(table, effects(table), 0).critical_layers
    bare = replace(table, random_layer=None)
    evidence = evidence_from(bare, effects(bare), 0)
    assert (evidence.critical_layers, evidence.pattern) == ((), None), "without controls none is shown to be"
    assert evidence.perhaps_critical == (0, 1, 2, 3)


def test_the_same_seed_gives_the_same_draws() -> None:
    trials = World().trials(20, np.random.default_rng(0))
    assert probabilities(effects(trials)) == probabilities(effects(trials))
    assert not np.array_equal(effects(trials).loss, effects(trials, seed=1).loss)


# --- the rules ---


def known(**values: float) -> Effects:
    """Effects that are known exactly; what is not given was not tried."""
    given_ = {name: np.full(1, values.get(name, np.nan)) for name in Effects.__dataclass_fields__}
    defaults: dict[str, Any] = {"broken": values.get("broken", 0.0), "alone": values.get("alone", 0.9)}
    defaults |= {name: values.get(name, 0.0) for name in ("missed", "missed_top")}
    defaults |= {name: values.get("random", 0.0) for name in ("random", "random_gone")}
    defaults |= {name: values.get(name, 0.1) for name in ("mixed", "channel")}
    defaults["random_layer"] = values.get("random_layer", 0.0)
    defaults["top"] = values.get("top", values["kept"] if values.get("kept", 0) > 0.5 else np.nan)
    defaults["evaded"] = values.get("evaded", 0.0)
    defaults["gone"] = values.get("gone", values.get("loss", np.nan))
    given_ |= {name: np.full(1, value) for name, value in defaults.items()}
    given_["each_kept"] = np.array([[values.get("kept", np.nan), values.get("other", values.get("kept", np.nan))]])
    return Effects(**{**given_, "layers": np.full((1, 4), values.get("alone", 0.9))})


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        ({"loss": 0.05}, "robust"),
        ({"loss": 0.05, "gone": 0.5}, "undetermined"),
        ({"loss": 0.05, "broken": 0.2}, "language lost"),
        ({"loss": 0.9, "broken": 0.6}, "language lost"),
        ({"loss": 0.9, "broken": 0.2, "group64": 0.9}, "outlier-crushes-safety"),
        ({"loss": 0.9, "group64": 0.9, "kept": 0.9, "pcr": 0.9}, "outlier-crushes-safety"),
        ({"loss": 0.9, "group64": 0.9, "kept": 0.9, "pcr": 0.1}, "conflicting"),
        ({"loss": 0.9, "group64": 0.9, "kept": 0.9, "pcr": 0.1, "alone": 0.05}, "outlier-crushes-safety"),
        ({"loss": 0.9, "group64": 0.9, "kept": 0.9, "pcr": 0.1, "random_layer": 0.85}, "outlier-crushes-safety"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.9, "pcr": 0.1}, "outlier-as-safety"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.9, "pcr": 0.5}, "outlier-as-safety"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.9, "pcr": 0.5, "mixed": 0.9}, "mixed"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.9, "pcr": 0.1, "mixed": 0.9}, "conflicting"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.1, "top": 0.1, "pcr": 0.5, "mixed": 0.9}, "mixed"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.1, "top": 0.1, "channel": 0.9}, "undetermined"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.9, "pcr": 0.1, "channel": 0.9}, "undetermined"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.1, "top": 0.9, "channel": 0.9}, "multi-layer dilution"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.1, "other": 0.9, "top": 0.1}, "undetermined"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.1, "other": 0.9, "top": 0.9}, "undetermined"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.9, "top": 0.1, "pcr": 0.1}, "conflicting"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.9, "pcr": 0.1, "mixed": np.nan}, "undetermined"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.9, "pcr": 0.1, "channel": np.nan}, "undetermined"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.1, "top": 0.1, "random": np.nan}, "undetermined"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.9, "pcr": 0.9, "random_layer": np.nan}, "conflicting"),
        ({"loss": 0.9, "group64": 0.9, "kept": 0.9, "pcr": 0.1, "random_layer": np.nan}, "conflicting"),
        (
            {"loss": 0.9, "group64": 0.9, "kept": 0.9, "pcr": 0.1, "alone": 0.05, "random_layer": np.nan},
            "outlier-crushes-safety",
        ),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.9, "pcr": 0.9}, "conflicting"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.1, "top": 0.9}, "multi-layer dilution"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.1, "top": 0.1}, "hyper-vulnerable"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.1, "top": 0.1, "random": 0.85}, "undetermined"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.1, "top": 0.9, "random": 0.85}, "undetermined"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.9, "pcr": 0.1, "random": 0.85}, "undetermined"),
        ({"loss": 0.9, "group64": 0.9, "kept": 0.1, "top": 0.1, "random": 0.9}, "outlier-crushes-safety"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.9, "pcr": 0.5, "mixed": 0.9, "random": 0.9}, "mixed"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.1, "top": 0.1, "missed_top": 0.5}, "undetermined"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.1, "top": 0.9, "missed_top": 0.5}, "multi-layer dilution"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.1, "top": 0.9, "missed": 0.5}, "undetermined"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.9, "pcr": 0.1, "missed": 0.5}, "outlier-as-safety"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.1, "top": 0.1, "missed_top": 0.05}, "hyper-vulnerable"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.1, "top": 0.1, "evaded": 0.6}, "undetermined"),
        ({"loss": 0.9, "group64": 0.9, "kept": 0.1, "top": 0.1, "evaded": 0.6}, "outlier-crushes-safety"),
        ({"loss": 0.9, "group64": 0.1, "kept": 0.1}, "undetermined"),
        ({"loss": 0.9, "group64": 0.1}, "undetermined"),
        ({"loss": 0.9}, "undetermined"),
    ],
)
def test_modes(values: dict[str, float], mode: ModeName) -> None:
    assert MODES[mode_of_each(known(**values))[0]] == mode


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)
def test_published_models_get_their_published_mode(row: PublishedModel) -> None:
    assert row.named() == row.mode


def test_patterns() -> None:
    assert [pattern_of(n, 24) for n in (0, 1, 2, 4, 5, 23, 24)] == [
        "no critical layer", "concentrated", "distributed-early", "distributed-early", "ultra-distributed",
        "ultra-distributed", "hyper-vulnerable",
    ]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 20).flatmap(
        lambda n: st.lists(st.lists(st.sampled_from([0, 1, 2]), min_size=12, max_size=12), min_size=n, max_size=n)
    )
)
def test_every_table_has_a_mode_that_says_why(rows: list[list[int]]) -> None:
    codes = np.array(rows, dtype=np.int8).reshape(len(rows), 12)
    trials = Trials(
        3, codes[:, 0], codes[:, 1:4], codes[:, 4:7], codes[:, 7], codes[:, 8], {1: codes[:, 9]}, codes[:, 10],
        (1, 2), codes[:, 11],
    )  # fmt: skip
    found = effects(trials, samples=300)
    evidence = evidence_from(trials, found, 1)
    mode = mode_of(evidence, found)
    assert mode.reason
    assert mode.prescription == PRESCRIPTIONS[mode.name]
    assert all(sentence.endswith(".") for sentence in mode.evidence)
    assert sum(mode.shares["posterior"].values()) == pytest.approx(1)
    assert sum(mode.shares["thresholds"].values()) == pytest.approx(1)
    if not rows:
        assert (mode.name, mode.findings) == ("undetermined", ())
    elif mode.name != "undetermined":
        assert mode.shares["posterior"][mode.name] >= SURE
        assert mode.otherwise
        assert any(finding.decisive for finding in mode.findings)
    assert Evidence.from_dict(evidence.to_dict()) == evidence
