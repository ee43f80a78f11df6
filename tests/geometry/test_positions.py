"""Where the classes are compared."""

from __future__ import annotations

import numpy as np
import pytest

import kvgeom
from tests.builders.requests import MORE_PAIRS
from tests.builders.tiny import tiny_model


def test_the_position_is_fixed_in_advance_unless_the_best_is_asked_for() -> None:
    """The rule looks at one position; the best of all is paid for by as many times the p-value."""
    model = tiny_model()
    rule, best = (kvgeom.subspace(model, MORE_PAIRS, position=p, progress=False) for p in (None, "best"))
    assert rule.position == "instruction"
    assert set(rule.data.position.values.ravel()) == {"instruction"} == set(rule.tried)
    assert best.tried == rule.positions
    assert len(set(best.data.position.values.ravel())) > 1
    assert (best.data.separation >= rule.data.separation).all()
    chosen, fixed = (space.sensitivity(contrasts=(), progress=False).data for space in (best, rule))
    for layer in (1, 2):
        for site in ("k", "v", "resid"):
            name = str(chosen.position.sel(layer=layer, site=site).values)
            alone = float(fixed.at_signal_p.sel(layer=layer, site=site, at=name))
            corrected = float(chosen.signal_p.sel(layer=layer, site=site))
            assert corrected == pytest.approx(min(1.0, alone * len(best.tried)))
    np.testing.assert_array_equal(fixed.at_ratio_low.sel(at="instruction"), fixed.ratio_low)
    assert rule.refit(position="template-1").position == "template-1"
    assert rule.refit().position == "instruction"
