"""The tour: what was planted is told apart, and what a named mode prescribes works on requests that nothing has seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kvgeom
from kvgeom.cli import main
from kvgeom.errors import InputError
from kvgeom.report.tour import AS_IT_IS, STOPS, Tour

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=[2, pytest.param(len(STOPS), marks=pytest.mark.slow)])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tour, Path]:
    """The first of the models, and all of them."""
    out = tmp_path_factory.mktemp("tour")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvgeom.report.tour.STOPS", STOPS[: request.param])
        return kvgeom.tour(out, progress=False), out


def shown(found: Tour) -> list[str]:
    return [*map(str, found.data.model.values)]


def test_what_is_named_was_planted_and_what_it_prescribes_works(made: tuple[Tour, Path]) -> None:
    data = made[0].data
    named = [str(name) for name in data.model.values if str(data.named.sel(model=name).item()) != "undetermined"]
    assert named == made[0].right()
    assert {*shown(made[0])} - {*named} <= {"multi-layer dilution"}
    plain = data.lost.sel(cache=AS_IT_IS)
    assert int(plain.sel(model="robust")) == 0
    for name in shown(made[0])[1:]:
        assert float(plain.sel(model=name)) >= 0.5 * float(data.asked.sel(model=name))
    for name in named:
        (cache,) = data.cache.values[data.prescribed.sel(model=name).values]
        assert float(data.lost.sel(model=name, cache=cache)) <= 0.1 * float(data.asked.sel(model=name))
    assert (data.memory_overhead.sel(cache=AS_IT_IS) == 0).all()
    assert (data.memory_overhead.sel(cache="layer kept") > 0.5).all()


def test_shares_are_of_the_diagnosis(made: tuple[Tour, Path]) -> None:
    frame = made[0].to_frame("models").set_index("model")
    assert np.isnan(frame.group64["robust"])
    assert frame.group64["outlier-crushes-safety"] > 0.5
    if len(frame) > 2:
        assert frame.group64["outlier-as-safety"] < 0.5 < frame.kept["outlier-as-safety"]
        assert frame.kept["multi-layer dilution"] < 0.5
    for name in ("group64", "kept"):
        known = frame.dropna(subset=[name])
        assert (known[f"{name}_low"] <= known[name]).all()
        assert (known[name] <= known[f"{name}_high"]).all()


def test_it_is_a_result_with_a_page(made: tuple[Tour, Path]) -> None:
    found, out = made
    back = Tour.load(out / "tour.nc")
    assert back.data.identical(found.data)
    assert back.to_text() == found.to_text()
    assert max(map(len, found.to_text().splitlines())) <= 100
    page = (out / "report.html").read_text()
    for name in shown(found):
        assert f"planted: {name}" in page
    assert page.count("plotly-graph-div") == 2 + len(shown(found)) - 1
    assert "http://" not in page.split("<body>")[1].replace("http://www.w3.org", "")
    for figure in found.figures():
        assert found.plot(figure).layout.height


def test_a_model_without_a_loss_has_no_place_on_the_plane(made: tuple[Tour, Path]) -> None:
    drawn = [str(trace.name) for trace in made[0].plot("taxonomy_plane").data]
    assert drawn == shown(made[0])[1:]


@pytest.mark.parametrize("seed", [-1, 1.5, "one"])
def test_seeds_that_are_none(seed: object) -> None:
    with pytest.raises(InputError, match="seed"):
        kvgeom.tour(seed=seed)  # type: ignore[arg-type]


def test_a_folder_of_another_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "audit.json").write_text("{}")
    assert main(["tour", "--out", str(tmp_path)]) == 2
    assert "holds the results of kvgeom audit" in capsys.readouterr().err
