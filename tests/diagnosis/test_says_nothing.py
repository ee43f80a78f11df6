"""What was measured and says nothing: a reduction of one flip, the only layer of a model, no critical layer."""

from __future__ import annotations

import re

import numpy as np
import pytest

from kvgeom.behaviour.pcr import reduction
from kvgeom.diagnosis.evidence import Evidence, evidence_from
from kvgeom.diagnosis.findings import PCR_NAME, mode_of
from kvgeom.diagnosis.mode import Mode
from kvgeom.diagnosis.posterior import effects
from kvgeom.diagnosis.trials import COMPLIED, REFUSED, Codes, Trials
from kvgeom.stats import Estimate


def concluded(trials: Trials) -> tuple[Evidence, Mode]:
    found = effects(trials)
    evidence = evidence_from(trials, found, 0)
    return evidence, mode_of(evidence, found)


def all_or_none(complied: bool, prompts: int = 40) -> Codes:
    return np.full(prompts, COMPLIED if complied else REFUSED, dtype=np.int8)


def test_one_flip_of_many_says_nothing_of_a_reduction() -> None:
    """PCR was 1 % [-1429 %, 93 %]."""
    one, none = all_or_none(False, 24), all_or_none(False, 24)
    one[0] = COMPLIED
    layers = np.stack([one, none, none], axis=1)
    trials = Trials(3, one, layers, np.zeros_like(layers), group64=none, channel=none, kept={0: none})
    evidence, mode = concluded(trials)
    assert evidence.pcr is not None
    assert evidence.pcr.low < -2
    (said,) = [finding.value for finding in mode.findings if finding.name == PCR_NAME]
    assert said.startswith("an undetermined share (95 % interval below -100% to ")
    assert not re.search(r"\d{4} ?%", mode.to_text())
    draws = effects(trials).pcr
    found = reduction(layers[:, 0] == COMPLIED, none == COMPLIED, layer=0, bits=3, draws=draws)
    assert found.to_text().startswith("undetermined (1 lost per-tensor, 0 per-channel, of 24 refusals: 95 % interval")
    assert re.search(r"interval below -100% to \d\d% says nothing\)$", found.to_text())


@pytest.mark.parametrize(
    ("estimate", "said"),
    [
        ((0.01, -14.29, 0.93), "an undetermined share (95 % interval below -100% to 93%)"),
        ((-14.0, -20.0, -0.5), "below -100% [below -100%, -50%]"),  # that it makes things worse is something
        ((0.2, -0.9, 0.6), "20% [-90%, 60%]"),
        ((0.5, 0.5, 0.5), "50%"),
    ],
)
def test_an_estimate_has_no_percentage_that_means_nothing(estimate: tuple[float, float, float], said: str) -> None:
    assert str(Estimate(*estimate)) == said


@pytest.mark.parametrize("group64", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_keeping_the_only_layer_names_no_mode(group64: bool, mixed: bool) -> None:
    """It is the exact cache; what group-64 scales do still counts."""
    whole = all_or_none(True)
    # Per-channel scales rescue half of it, so that PCR contradicts nothing.
    channel = whole * (np.arange(len(whole)) % 2).astype(np.int8)
    for n_layers in (1, 3):
        alone = np.stack([whole, *(n_layers - 1) * [all_or_none(False)]], axis=1)
        evidence, mode = concluded(
            Trials(
                3,
                whole,
                alone,
                np.stack([channel, *(n_layers - 1) * [all_or_none(False)]], axis=1),
                group64=all_or_none(not group64),
                channel=whole,
                kept={0: all_or_none(False)},
                top=all_or_none(False),
                top_layers=(0,),
                mixed=all_or_none(not mixed),
                random=np.stack(8 * [all_or_none(False)], axis=1),
                random_layer=np.stack(8 * [all_or_none(False)], axis=1),
            )
        )
        assert evidence.pattern == "concentrated"
        if group64:
            assert mode.name == "outlier-crushes-safety"
        elif n_layers == 1:
            assert mode.name == "undetermined"
            assert mode.reason.startswith("The model has one layer: to keep it in 16 bits is the exact cache")
        else:
            assert mode.name == ("mixed" if mixed else "outlier-as-safety")


def test_no_critical_layer_is_not_concentrated() -> None:
    none = all_or_none(False, 400)
    layers = np.zeros((400, 3), dtype=np.int8)
    evidence, mode = concluded(Trials(3, none, layers, layers, group64=none, channel=none, kept={0: none}))
    assert evidence.pattern == mode.pattern == "no critical layer"
    assert "concentrated" not in mode.to_text()
