"""Figures are found by the kind of a result, and can be added from outside the package."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import plotly.graph_objects as go
import pytest
import xarray as xr

from kvgeom.errors import InputError
from kvgeom.plots import registry
from kvgeom.results import Result
from tests.builders.figures import sensitivity


@dataclass(frozen=True, repr=False)
class Tides(Result):
    kind: ClassVar[str] = "tides"


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.figures("tides")  # the built-in ones are loaded first
    monkeypatch.setattr(registry, "_FIGURES", {kind: dict(known) for kind, known in registry._FIGURES.items()})


def heights(tides: registry.Plottable, scale: float = 1.0) -> go.Figure:
    return go.Figure(go.Scatter(y=scale * tides.data.height.values, name=tides.meta["port"]))


@pytest.fixture
def tides() -> Tides:
    return Tides(xr.Dataset({"height": ("hour", [1.0, 3.0])}), {"port": "Hull"})


def test_a_figure_from_outside(tides: Tides) -> None:
    assert registry.figure("tides", "mine")(heights) is heights
    assert tides.figures() == ["mine"]
    for drawn in (tides.plot(), tides.plot("mine")):
        assert (list(drawn.data[0].y), drawn.data[0].name) == ([1.0, 3.0], "Hull")
    assert list(tides.plot("mine", scale=2.0).data[0].y) == [2.0, 6.0]


def test_the_first_figure_is_the_default(tides: Tides) -> None:
    registry.figure("tides", "mine")(heights)
    registry.figure("tides", "other")(lambda tides: go.Figure())
    assert tides.figures() == ["mine", "other"]
    assert len(tides.plot().data) == 1
    assert len(tides.plot("other").data) == 0


def test_an_unknown_figure_is_an_error_that_names_the_others(tides: Tides) -> None:
    with pytest.raises(InputError, match="tides"):
        tides.plot()
    registry.figure("tides", "mine")(heights)
    for wrong in ("yours", "mien"):
        with pytest.raises(InputError, match=rf"'{wrong}'.*mine"):
            tides.plot(wrong)


def test_options_are_checked(tides: Tides) -> None:
    registry.figure("tides", "mine")(heights)
    with pytest.raises(InputError, match=r"'scael'.*'scale'"):
        tides.plot(scael=2.0)
    registry.figure("tides", "beside")(lambda tides, other: go.Figure())
    with pytest.raises(InputError, match="other="):
        tides.plot("beside")
    with pytest.raises(InputError, match="layer="):
        sensitivity().plot("channel_loading")
    with pytest.raises(InputError, match="'layer'"):
        sensitivity().plot("ratio_map", layer=2)
    registry.figure("tides", "anything")(lambda tides, **options: go.Figure(layout=options))
    assert tides.plot("anything", height=300).layout.height == 300


def test_a_name_is_given_once() -> None:
    registry.figure("tides", "mine")(heights)
    registry.figure("tides", "mine")(heights)  # a cell that is run again
    with pytest.raises(InputError, match="mine"):
        registry.figure("tides", "mine")(lambda tides: go.Figure())
    with pytest.raises(InputError, match="ratio_map"):
        registry.figure("sensitivity", "ratio_map")(heights)


@pytest.mark.parametrize("first", ["kvgeom.plots.channels", "kvgeom.plots.recovery", "kvgeom.plots.causal"])
def test_defaults_do_not_depend_on_what_is_imported_first(first: str) -> None:
    kinds = ("sensitivity", "verification", "first-order")
    code = (
        f"import {first}; from kvgeom.plots.registry import figure, figures\n"
        f"for kind in {kinds}: figure(kind, 'mine')(print)\n"
        f"print(*(figures(kind)[0] for kind in {kinds}), *(figures(kind)[-1] for kind in {kinds}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ratio_map", "recovery_bars", "first_order_channels", *["mine"] * 3]
