"""Figures of the paper's tables: every number that a table has is drawn where it belongs."""

from __future__ import annotations

import numpy as np
import pytest

from kvgeom.errors import InputError
from kvgeom.paper.registry import tables
from kvgeom.paper.study import Study
from kvgeom.paper.table import PaperTable, Row
from tests.builders.paper import study


@pytest.fixture(scope="module")
def shared() -> Study:
    return study()


def made(rows: list[Row], **meta: object) -> PaperTable:
    about = {
        "table": "t",
        "title": "t",
        "mode": "faithful",
        "zoo": None,
        "model": "m",
        "labels": [],
        "remarks": [],
        **meta,
    }
    return PaperTable.of(rows, about)


QUICK = ("advbench_main", "cumulative", "kv_asymmetric", "protection_sweep", "divergence", "pcr_framework", "geometry")


@pytest.mark.parametrize("name", QUICK)
def test_all_numbers_of_a_quantity_are_drawn(shared: Study, name: str) -> None:
    table = tables()[name].function(shared)
    frame = table.to_frame()
    for quantity, rows in frame[[isinstance(value, float) for value in frame.measured]].groupby("quantity"):
        figure = table.plot(quantity=str(quantity))
        scale = 100 if rows.unit.iloc[0].startswith("share") else 1
        drawn = np.concatenate([np.asarray(trace.y, dtype=float) for trace in figure.data if trace.name != "published"])
        wanted = scale * rows.measured.astype(float)
        np.testing.assert_allclose(np.sort(drawn[np.isfinite(drawn)]), np.sort(wanted[np.isfinite(wanted)]))
        places = [str(x) for x in figure.layout.xaxis.categoryarray]
        assert len(places) == len({*places})
        assert {str(x) for trace in figure.data for x in trace.x} <= {*places}


def test_widths_fall_and_published_values_stand_beside() -> None:
    rows = [Row({"bits": bits}, "conditional flip", 0.1, 0.0, 0.3, 20) for bits in (2, 8, 4)]
    figure = made(rows, table="advbench_main", zoo="mistral7b").plot()
    assert list(figure.layout.xaxis.categoryarray) == ["8", "4", "2"]
    (published,) = [trace for trace in figure.data if trace.name == "published"]
    assert (list(published.x), list(published.y)) == (["4"], [pytest.approx(15.2)])


def test_settings_have_a_trace_each(shared: Study) -> None:
    figure = tables()["kv_asymmetric"].function(shared).plot(quantity="flip")
    assert [trace.name for trace in figure.data] == ["rounded keys", "rounded values", "rounded both"]


def test_recovery_against_memory(shared: Study) -> None:
    table = tables()["protection_sweep"].function(shared)
    (points,) = table.plot("recovery_by_memory").data
    named = [
        (x, y, name) for x, y, names in zip(points.x, points.y, points.text, strict=True) for name in names.split(" / ")
    ]
    assert len(named) == sum(np.isfinite(table.to_frame().query("quantity == 'recovery'").measured.astype(float)))
    for x, y, name in named:
        assert y == pytest.approx(100 * table.cell("recovery", protected=name)["measured"])
        assert x == pytest.approx(100 * table.cell("more bytes", protected=name)["measured"])
    with pytest.raises(InputError, match="of tables of mitigations"):
        tables()["cumulative"].function(shared).plot("recovery_by_memory")


def test_what_cannot_be_drawn_is_said(shared: Study) -> None:
    with pytest.raises(InputError, match="no numbers to draw"):
        tables()["decision_tree"].function(shared).plot()
    with pytest.raises(InputError, match="unknown quantity 'flips'; did you mean 'flip'"):
        tables()["cumulative"].function(shared).plot(quantity="flips")


def test_names_are_escaped() -> None:
    rows = [Row({"cache": "<img src=x onerror=alert(1)>"}, "flip", 0.5, 0.2, 0.8, 4)]
    assert "<img" not in made(rows).plot().to_json().replace("\\u003c", "<")


def test_tables_name_the_figures_that_they_have(shared: Study) -> None:
    found = {
        name: tables()[name].function(shared).figures() for name in ("cumulative", "decision_tree", "protection_sweep")
    }
    assert found == {"cumulative": ["cells"], "decision_tree": [], "protection_sweep": ["cells", "recovery_by_memory"]}
