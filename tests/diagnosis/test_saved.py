"""Diagnoses and their parts, written to a file and read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import kvgeom
from kvgeom.behaviour.pcr import PCR, per_channel_reduction, reduction
from kvgeom.diagnosis.diagnose import Diagnosis
from kvgeom.diagnosis.mode import Finding, Mode, ModeName
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import baseline
from kvgeom.results import Result
from tests.builders.judges import ArbitraryJudge
from tests.builders.requests import REQUESTS
from tests.builders.tiny import tiny_model

TINY = tiny_model("qwen2", seed=2)
PROMPTS = kvgeom.PromptSet("tiny", tuple(REQUESTS), tuple(f"{r} too" for r in REQUESTS), "written here")


def same(one: Result, other: Result) -> None:
    xr.testing.assert_identical(one.data, other.data)
    assert one.meta == other.meta
    assert type(one) is type(other)


@pytest.fixture(
    scope="module", params=[pytest.param(True, marks=pytest.mark.slow), False], ids=["geometry", "behaviour alone"]
)
def found(request: pytest.FixtureRequest) -> Diagnosis:
    return kvgeom.diagnose(
        TINY,
        PROMPTS,
        judge=ArbitraryJudge(),
        bits=(8, 2),
        max_new_tokens=4,
        seed=3,
        geometry=request.param,
        progress=False,
    )


def test_a_diagnosis(found: Diagnosis, tmp_path: Path) -> None:
    """All parts, what they say, and everything that follows from them."""
    again = Diagnosis.load(found.save(tmp_path / "d.nc"))
    assert again.parts().keys() == found.parts().keys()
    assert ("sensitivity" in again.parts()) == (found.sensitivity is not None)
    for name, part in found.parts().items():
        same(again.parts()[name], part)
    assert again.evidence == found.evidence
    assert again.prompts == found.prompts
    assert (again.measured, again.seed) == (found.measured, 3)
    assert again.record() == found.record()
    assert again.to_text() == found.to_text()
    assert again.provenance() == found.provenance()
    assert again.to_frame().equals(found.to_frame())
    assert again.to_frame("outcomes").equals(found.to_frame("outcomes"))
    assert again.plot().to_json() == found.plot().to_json()
    with pytest.raises(InputError, match="it holds diagnosis"):
        Mode.load(tmp_path / "d.nc")


def test_figures_of_every_part(found: Diagnosis) -> None:
    """By the name of the part, or of the figure; the main part comes first."""
    names = found.figures()
    assert names[0] == found.mode.figures()[0]
    assert {"bit_curve", "layer_scan", "ablation_bars", "pcr_interval", "labels_by_recipe"} <= {*names}
    assert ("ratio_against_null" in names) == (found.sensitivity is not None)
    for name in ("bit_curve", "curve"):
        assert found.plot(name).to_json() == found.curve.plot().to_json()
    assert found.plot("ablation_bars").to_json() == found.ablation.plot().to_json()
    if found.sensitivity is not None:
        drawn = found.plot("channel_loading", layer=1, site="v")
        assert drawn.to_json() == found.sensitivity.plot("channel_loading", layer=1, site="v").to_json()
    for wrong, meant in (("cruve", "curve"), ("bit_cruve", "bit_curve"), ("mode_crad", "mode_card")):
        with pytest.raises(InputError, match=f"unknown part or figure of Diagnosis '{wrong}'; did you mean '{meant}'"):
            found.plot(wrong)
    with pytest.raises(InputError, match=r"choose from mode, curve, .*bit_curve"):
        found.plot("zzz")


def test_where_a_diagnosis_comes_from(found: Diagnosis) -> None:
    known = found.provenance()
    assert (known["model"], known["fingerprint"]) == (TINY.name, TINY.fingerprint)
    assert known["weights"] == "float32"
    assert found.to_text().startswith(f"Model: {TINY.name} (weights: float32)")
    assert (known["judge"], known["max_new_tokens"], known["seed"]) == ("arbitrary", 4, 3)
    assert "kvgeom" in known["versions"]


def test_a_diagnosis_without_its_model(found: Diagnosis, tmp_path: Path) -> None:
    """Read from a file it has none; given the one that was diagnosed it has the same baseline, and no other is taken."""
    again = Diagnosis.load(found.save(tmp_path / "d.nc"))
    with pytest.raises(InputError, match="no model"):
        _ = again.baseline
    with_model = again.on(TINY, judge=ArbitraryJudge(), progress=False)
    assert with_model.baseline.labels == found.baseline.labels
    assert with_model.baseline.tokens == found.baseline.tokens
    assert with_model.baseline.max_new_tokens == 4
    other = tiny_model("qwen2", seed=1)
    with pytest.raises(InputError, match="tiny-qwen2"):
        again.on(other, judge=ArbitraryJudge(), progress=False)
    with pytest.raises(InputError, match="judge"):
        again.on(TINY, jduge=ArbitraryJudge())


def test_a_mode(tmp_path: Path) -> None:
    findings = (Finding("PCR", "95 %", ("outlier-crushes-safety", "mixed"), True), Finding("Geometry", "gap 3"))
    shares: dict[str, dict[ModeName, float]] = {
        "posterior": {"mixed": 0.25, "robust": 0.75},
        "thresholds": {"mixed": 1.0},
    }
    sure = Mode.of("mixed", "because.", "or else.", None, findings, "per-channel", shares)
    for mode in (sure, Mode.of("robust", "nothing flips.", "", "concentrated", (), "nothing", shares)):
        again = Mode.load(mode.save(tmp_path / "mode.nc"))
        same(again, mode)
        assert again.findings == mode.findings
        assert again.shares == mode.shares
        assert again.to_dict() == mode.to_dict()
        assert (again.name, again.pattern, again.prescription) == (mode.name, mode.pattern, mode.prescription)
        assert again.otherwise == mode.otherwise
    assert list(sure.shares["posterior"]) == ["robust", "mixed"]
    assert sure.findings == findings
    assert sure.to_frame("shares").set_index(["basis", "mode"]).share["posterior", "robust"] == 0.75
    assert sure.to_frame("findings").decisive.tolist() == [True, False]


def test_a_pcr(tmp_path: Path) -> None:
    rows = np.arange(200)
    base = baseline(TINY, REQUESTS, judge=ArbitraryJudge(), max_new_tokens=4, progress=False)
    for pcr in (
        reduction(rows < 100, rows < 5, layer=2, bits=3),
        reduction(rows < 0, rows < 5, layer=0, bits=4),
        per_channel_reduction(base, 1),
        per_channel_reduction(base, None),
    ):
        again = PCR.load(pcr.save(tmp_path / "pcr.nc"))
        same(again, pcr)
        assert again.to_dict() == pcr.to_dict()
        assert (again.value, again.ci, again.status, again.layer) == (pcr.value, pcr.ci, pcr.status, pcr.layer)
    assert reduction(rows < 100, rows < 5, layer=2, bits=3).to_frame().flips_tensor.tolist() == [100]
    assert per_channel_reduction(base, 1).provenance()["model"] == TINY.name
