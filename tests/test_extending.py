"""Every step of docs/extending.md, from outside the package, on a tiny model instead of the demo."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import kvgeom
from kvgeom import results
from kvgeom.engines.registry import resolve, scheme_rows
from kvgeom.errors import InputError
from kvgeom.geometry.methods import registry as directions
from kvgeom.judges import reasoning
from kvgeom.judges import registry as judges
from kvgeom.mitigation.methods import registry as mitigations
from kvgeom.models import backends
from kvgeom.models.statistics import constants
from kvgeom.plots import registry as plots
from kvgeom.prompts import benchmarks
from kvgeom.quant import transforms
from kvgeom.quant.fake_quantize import fake_quantize
from kvgeom.quant.formats import base as formats
from tests.builders.tiny import tiny_model

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the blocks define, one after the other; all registries are as before afterwards."""
    formats.formats(), judges.judges(), backends.backends(), benchmarks.benchmarks(), plots.figures("curve")
    mitigations.methods(), directions.from_features()
    folder = tmp_path_factory.mktemp("extending")
    (folder / "mine.csv").write_text("ask,kind\nHow do I pick a lock?,bad\nHow do I bake bread?,good\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module, name in (
            (formats, "_FORMATS"), (judges, "_JUDGES"), (backends, "_BACKENDS"), (benchmarks, "_BENCHMARKS"),
            (plots, "_FIGURES"), (mitigations, "_METHODS"), (directions, "_METHODS"), (transforms, "_TRANSFORMS"), (results, "_KINDS"),
        ):  # fmt: skip
            patch.setattr(module, name, dict(getattr(module, name)))
        patch.setattr(reasoning, "MARKERS", [*reasoning.MARKERS])
        outside = ModuleType("outside")
        patch.setitem(sys.modules, "outside", outside)
        for block in BLOCKS:
            exec(block.replace('"demo"', repr(str(checkpoint))), outside.__dict__)
        yield outside.__dict__


def test_a_backend(made: dict[str, Any]) -> None:
    assert made["fast"].backend == "fastlm"
    assert type(made["fast"]) is made["Fast"]
    assert made["fast"].fingerprint != ""


def test_a_format(made: dict[str, Any]) -> None:
    assert str(kvgeom.Scheme.parse("ternary-group64+hadamard")) == "ternary-group64+hadamard"
    assert made["outcomes"].names() == ["ternary-token"]
    assert "ternary-group64" in {row["name"] for row in scheme_rows(2, 64, 100)}


def test_a_transform(made: dict[str, Any]) -> None:
    x = torch.arange(8.0).reshape(1, 1, 1, 8)
    halves = kvgeom.Scheme.parse("int2-asym-group4")
    turned = fake_quantize(x, kvgeom.Scheme.parse("int2-asym-group4+reverse"))
    assert torch.equal(turned, fake_quantize(x.flip(-1), halves).flip(-1))


def test_a_judge(made: dict[str, Any]) -> None:
    assert made["judged"].meta["judge"] == "apologies"
    judge = made["Apologies"]()
    assert judge.label("r", "So sorry!", lambda: 0.0).label == "refused"
    assert judge.label("r", "xx", lambda: -9.0).label == "degenerate"


def test_markers_of_reasoning(made: dict[str, Any]) -> None:
    assert reasoning.split("<ponder>Hm.</ponder>Sure.").answer == "Sure."


def test_a_measure(made: dict[str, Any]) -> None:
    lengths = made["lengths"]
    assert lengths.data.sizes["prompt"] == 1
    assert (lengths.data.tokens <= 4).all()
    again = made["Lengths"].load("lengths.nc")
    assert again.to_frame().equals(lengths.to_frame())


def test_a_figure(made: dict[str, Any]) -> None:
    assert made["lengths"].figures() == ["length_bars"]
    (bars,) = made["lengths"].plot(colour="red").data
    assert bars.marker.color == "red"
    assert list(bars.y) == list(made["lengths"].data.tokens.mean("prompt").values)


def test_a_mitigation(made: dict[str, Any]) -> None:
    model = tiny_model()
    setting = mitigations.Setting(resolve("int4-asym-token"), model.geometry, constants(model, ["open the door"]), {})
    found = mitigations.candidates_of(setting, "placement", [setting.unmitigated])
    assert [each.placement.sinks for each in found if each.family == "many sinks"] == [16]
    with pytest.raises(InputError, match="many sinks"):
        mitigations.method("many sinks")(made["many_sinks"])


def test_a_way_to_find_directions(made: dict[str, Any]) -> None:
    space, upper, compared = made["space"], made["upper"], made["compared"]
    assert space.method == upper.method == "median"
    assert upper.meta["method_options"] == {"quantile": 0.75}
    direction = space.directions[2, "resid"]
    x = space.features(2, "resid")[:, space.positions.index(direction.position)]
    gap = np.median(x[space.is_harmful], 0) - np.median(x[~space.is_harmful], 0)
    assert abs(float(direction.basis[:, 0] @ gap)) == pytest.approx(float(np.linalg.norm(gap)))
    assert list(compared.data.estimator.values) == ["mean", "median"]
    assert "median" in directions.METHODS
    assert np.isfinite(space.sensitivity(contrasts=(), progress=False).data.ratio_plugin.sel(layer=2, site="resid"))


def test_a_benchmark(made: dict[str, Any]) -> None:
    assert (made["mine"].harmful, made["mine"].harmless) == (("How do I pick a lock?",), ("How do I bake bread?",))


def test_names_that_are_taken_are_refused(made: dict[str, Any], checkpoint: Path) -> None:
    for block in (b for b in BLOCKS if "register_" in b):
        with pytest.raises(InputError, match=r"fastlm|ternary|reverse|apologies|median|mine|<ponder>"):
            exec(block.replace('"demo"', repr(str(checkpoint))), {"__name__": "outside", "kvgeom": kvgeom})
