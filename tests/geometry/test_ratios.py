"""Ratios of several models side by side: every number is the sensitivity's, and the figure draws every one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kvgeom
from kvgeom.errors import InputError
from kvgeom.geometry.ratios import PUBLISHED, Ratios, ratios
from kvgeom.geometry.sensitivity import Sensitivity
from kvgeom.prompts.sets import concept_contrasts
from tests.builders.requests import MORE_PAIRS
from tests.builders.tiny import tiny_model


@pytest.fixture(scope="module")
def found() -> dict[str, Sensitivity]:
    return {
        kind: kvgeom.subspace(tiny_model(kind), MORE_PAIRS, progress=False).sensitivity(
            contrasts=concept_contrasts()[:2], progress=False
        )
        for kind in ("llama", "qwen2")
    }


def test_every_row_is_what_was_measured(found: dict[str, Sensitivity]) -> None:
    frame = ratios(found).to_frame().set_index(["model", "layer", "site", "way"])
    for model, one in found.items():
        for cell in one.to_frame().itertuples():
            key = (model, cell.layer, cell.site)
            if cell.status == "undefined":
                assert key not in frame.index
                continue
            for way, name in (("cross-fitted", "ratio"), ("plug-in (biased)", "ratio_plugin")):
                np.testing.assert_equal(frame.loc[(*key, way)].ratio, getattr(cell, name))
            np.testing.assert_equal(frame.loc[(*key, "cross-fitted")].low, cell.ratio_low)
            own = frame.loc[(*key, "at instruction")]
            np.testing.assert_equal([own.ratio, own.low, own.high], [cell.ratio, cell.ratio_low, cell.ratio_high])
            contrast = one.data.contrast_ratio.sel(layer=cell.layer, site=cell.site).values
            np.testing.assert_equal([frame.loc[(*key, name)].ratio for name in one.meta["contrasts"]], contrast)


def test_table_counts(found: dict[str, Sensitivity]) -> None:
    together = ratios(found)
    table = together.table()
    for model, one in found.items():
        for site in ("k", "v", "resid"):
            values = one.data.ratio_plugin.sel(site=site).values
            row = table.loc[model, site, "estimator", "plug-in (biased)"]
            assert row["10^2 to 10^3"] == ((values >= PUBLISHED[0]) & (values <= PUBLISHED[1])).sum()
            assert row["above"] == (values > PUBLISHED[1]).sum()
            assert row["median"] == pytest.approx(np.nanmedian(values))


def test_figure_and_file(found: dict[str, Sensitivity], tmp_path: Path) -> None:
    together = ratios(found)
    figure = together.plot()
    drawn = np.concatenate([np.array(trace.x, dtype=float) for trace in figure.data])
    expected = together.data.ratio.values
    assert np.isfinite(drawn).sum() == (expected > 0).sum()
    band = figure.layout.shapes[0]
    assert (band.x0, band.x1) == PUBLISHED
    again = Ratios.load(together.save(tmp_path / "ratios.nc"))
    assert again.data.identical(together.data)
    with pytest.raises(InputError, match="at least one"):
        ratios({})
