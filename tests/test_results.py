"""Results as frames and in a notebook, at the shapes of real models."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import kvgeom
from kvgeom.behaviour.over_refusal import over_refusal
from kvgeom.behaviour.widths import at_widths
from kvgeom.errors import InputError
from kvgeom.geometry.attention import attention_error
from kvgeom.geometry.causal import first_order, patch_layers
from kvgeom.geometry.channel_damage import channel_damage
from kvgeom.geometry.decomposition import decompose
from kvgeom.geometry.error_paths import follow_errors
from kvgeom.geometry.independence import independence
from kvgeom.geometry.magnitudes import magnitudes
from kvgeom.geometry.ratios import ratios
from kvgeom.geometry.selection import select
from kvgeom.geometry.steering import steer
from kvgeom.models.hf import HFModel
from kvgeom.prompts.sets import fingerprint
from kvgeom.results import PROVENANCE, SHOWN_ROWS, Result
from tests.builders.judges import ArbitraryJudge
from tests.builders.nasty import MORE, wrong_ends
from tests.builders.requests import REQUESTS
from tests.builders.tiny import tiny_model

#: Builds results with the dimensions of an 8B model, and shows them as a notebook does.
SHAPED = """
import numpy as np, xarray as xr
from kvgeom.geometry.directions import Directions
from kvgeom.geometry.sensitivity import Sensitivity

LAYERS, HEADS, CHANNELS, D_MODEL, CONTRASTS, PROMPTS = 32, 8, 1024, 4096, {contrasts}, 64
sites, kv = ["k", "v", "resid"], ["k", "v"]
rng = np.random.default_rng(0)
data = xr.Dataset(
    {{
        "ratio": (("layer", "site"), rng.random((LAYERS, 3))),
        "head_ratio": (("layer", "kv", "head"), rng.random((LAYERS, 2, HEADS))),
        "channel_ratio": (("layer", "kv", "channel"), rng.random((LAYERS, 2, CHANNELS))),
        "resid_channel_ratio": (("layer", "resid_channel"), rng.random((LAYERS, D_MODEL))),
        "contrast_ratio": (("contrast", "layer", "site"), rng.random((CONTRASTS, LAYERS, 3))),
        "at_ratio": (("layer", "site", "at"), rng.random((LAYERS, 3, 6))),
    }},
    coords={{"layer": range(LAYERS), "site": sites, "kv": kv, "at": list("abcdef"), "contrast": [f"c{{n}}" for n in range(CONTRASTS)]}},
)
found = Sensitivity(data, {{"scheme": "int3-sym-tensor"}})
assert len(found._repr_html_()) < 20_000 and "int3" in repr(found)
rows = {{name: len(found.to_frame(name)) for name in found.tables}}
assert rows == {{
    "layers": 96, "positions": 576, "heads": 512, "channels": 65536, "resid_channels": 131072, "contrasts": CONTRASTS * 96
}}, rows

shape = (4, 2, LAYERS)
directions = Directions(
    xr.Dataset(
        {{
            "stability": (("estimator", "position", "layer", "site"), rng.random((*shape, 3))),
            "direction_kv": (("estimator", "position", "layer", "kv", "channel"), np.ones((*shape, 2, CHANNELS), "f4")),
            "direction_resid": (("estimator", "position", "layer", "resid_channel"), np.ones((*shape, D_MODEL), "f4")),
            "score": (("estimator", "position", "layer", "site", "prompt"), np.ones((*shape, 3, PROMPTS), "f4")),
            "harmful": ("prompt", np.arange(PROMPTS) < 32),
        }},
        coords={{"estimator": list("abcd"), "position": ["x", "y"], "layer": range(LAYERS), "site": sites, "kv": kv}},
    ),
    {{}},
)
assert len(directions._repr_html_()) < 20_000
assert len(directions.to_frame()) == 4 * 2 * LAYERS * 3 and "harmful" in directions.to_frame("scores")
"""


@pytest.mark.parametrize("contrasts", [19, pytest.param(0, marks=pytest.mark.slow)])
def test_results_of_a_real_model_fit_into_memory(contrasts: int) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))

    code = textwrap.dedent(SHAPED).format(contrasts=contrasts)
    done = subprocess.run(  # the product of all dimensions would take hundreds of gigabytes
        [sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def tiny() -> HFModel:
    return tiny_model("qwen2")


def test_tables_hold_what_the_dataset_holds(tiny: HFModel) -> None:
    space = kvgeom.subspace(tiny, kvgeom.calibration().take(4), progress=False)
    for found in (space.sensitivity(progress=False), space.sensitivity(contrasts=(), progress=False)):
        assert list(found.to_frame().columns[:2]) == ["layer", "site"]
        assert len(found.to_frame()) == 3 * 3
        held = set()
        for table, dims in found.tables.items():
            frame = found.to_frame(table)
            held |= {*frame.columns}
            assert list(frame.columns[: len(dims)]) == list(dims)
            indexed = frame.set_index(list(dims))
            for variable in {*frame.columns} & {*map(str, found.data.data_vars)}:
                values = found.data[variable].transpose(*dims)
                assert (indexed[variable].to_xarray().transpose(*dims).shape == values.shape) or values.size == 0
                for index in np.ndindex(*values.shape[:2]):
                    cell = values[index].values.ravel()[0]
                    at = [values[dim].values[i] for dim, i in zip(dims, index, strict=False)]
                    row = indexed.loc[tuple(at)] if len(at) == len(dims) else indexed.loc[tuple(at)].iloc[0]
                    assert row[variable] == cell or (cell != cell and row[variable] != row[variable])
        assert {*map(str, found.data.data_vars)} <= held
        with pytest.raises(InputError, match="unknown table 'nonsense'; choose from layers, positions"):
            found.to_frame("nonsense")


SETUP = """
import kvgeom
from kvgeom.behaviour.over_refusal import over_refusal
from kvgeom.behaviour.widths import at_widths
from kvgeom.geometry.attention import attention_error
from kvgeom.geometry.causal import first_order, patch_layers
from kvgeom.geometry.channel_damage import channel_damage
from kvgeom.geometry.independence import independence
from kvgeom.geometry.decomposition import decompose
from kvgeom.geometry.error_paths import follow_errors
from kvgeom.geometry.magnitudes import magnitudes
from kvgeom.geometry.ratios import ratios
from kvgeom.geometry.selection import opening_tokens
from kvgeom.organisms import Size, plant, tiny_model
from kvgeom.geometry.steering import steer
from kvgeom.report.audit import Audit

size = Size(3)
model = plant(tiny_model(size), "outlier-crushes-safety", seed=5, prompts=size.prompts("train").take(24)).model
asked, quiet = size.prompts().take(8), {"progress": False}
fixed = kvgeom.fix(
    model, bits=3, scheme="sym-tensor", prompts=asked, verify_prompts=size.prompts("train").take(4), max_new_tokens=12,
    memory=0.2, controls=1, **quiet,
)
space, int3 = kvgeom.subspace(model, asked, **quiet), kvgeom.Scheme(3)
openings = opening_tokens(model, space.harmful, **quiet)
selection = space.select(validation=2, tokens=openings, max_kl=1e6, min_induce=-1e6, **quiet)
"""
#: The last line of a cell, for every kind of result.
SHOWN = {
    "Ablation": "fixed.diagnosis.ablation",
    "AttentionError": "attention_error(model, space.harmful[:2], int3, **quiet)",
    "ChannelDamage": "channel_damage(model, space.harmful[:2], 0, int3, openings, **quiet)",
    "Curve": "fixed.diagnosis.curve",
    "Decomposition": "decompose(model, space.harmful[:2], int3, openings, **quiet)",
    "Directions": "space.compare(samples=2, **quiet)",
    "Effects": "space.effects(prompts=size.prompts('train').take(4), controls=2, tokens=openings, **quiet)",
    "ErrorPaths": "follow_errors(model, space.harmful[:2], int3, openings, **quiet)",
    "FirstOrder": "first_order(model, space.harmful[:2], int3, openings, **quiet)",
    "Independence": "independence(model, {'one': selection.direction, 'other': space.directions[2, 'resid'].gap}, asked, **quiet)",
    "LayerSelection": "fixed.plan.selection",
    "Magnitudes": "magnitudes(model, space.harmful[:2], int3, **quiet)",
    "Mode": "fixed.diagnosis.mode",
    "Outcomes": "fixed.diagnosis.outcomes",
    "OverRefusal": "over_refusal(fixed.diagnosis.baseline, at_widths(bits=[4]))",
    "PCR": "fixed.diagnosis.pcr",
    "Patching": "patch_layers(model, space.harmful[:2], [int3], openings, **quiet)",
    "Ratios": "ratios({'tiny': space.sensitivity(contrasts=(), **quiet)})",
    "Scan": "fixed.diagnosis.scan",
    "Screen": "kvgeom.screen(model, asked, scheme='sym-tensor', max_new_tokens=12, **quiet)",
    "Search": "fixed.plan.search",
    "Selection": "selection",
    "Sensitivity": "space.sensitivity(**quiet)",
    "Steering": "steer(model, selection.direction, selection.layer, space.harmful[:2], space.harmless[:2], **quiet)",
    "Subspace": "space",
    "Verification": "fixed.verification",
}
#: Those that need more than a model, and show themselves in tests of their own.
SHOWN_ELSEWHERE = {"Gate", "PaperTable", "Tour"}
#: Those that look at prompts that the model refuses, and at no response.
CAUSAL = (
    "Patching", "FirstOrder", "AttentionError", "Decomposition", "ErrorPaths", "ChannelDamage", "Magnitudes",
)  # fmt: skip
#: Others that a cell may end with.
ALSO = (
    "fixed",
    "fixed.diagnosis",
    "Audit.of(fixed.diagnosis, {})",
    "fixed.plan",
    "kvgeom.subspace(model, asked, **quiet).sensitivity(**quiet)",
)


def kinds(parent: type[Result]) -> Iterator[type[Result]]:
    """The results that are no base of others."""
    for kind in parent.__subclasses__():
        yield from kinds(kind) if kind.__subclasses__() else (kind,)


def test_every_kind_of_result_is_shown_somewhere() -> None:
    for found in pkgutil.walk_packages(kvgeom.__path__, "kvgeom."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    assert {kind.__name__ for kind in kinds(Result) if kind.__module__.startswith("kvgeom.")} == {
        *SHOWN
    } | SHOWN_ELSEWHERE


@pytest.mark.real
def test_every_result_shows_itself_in_a_notebook(trained: HFModel, tmp_path: Path) -> None:
    lines = [*SHOWN.values(), *ALSO]
    # A bar and figures too, which need packages of the notebook's side.
    lines += ["space.sensitivity(contrasts=(), **quiet).plot().show()", "kvgeom.subspace(model, asked).k"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in (SETUP, *lines)])
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(tmp_path))
    cells = dict(zip(lines, notebook.cells[1:], strict=True))
    for name, line in SHOWN.items():
        (shown,) = [output for output in cells[line].outputs if output.output_type == "execute_result"]
        assert f"<b>{name}</b>" in shown.data["text/html"]
        assert shown.data["text/html"].count("<tr") <= SHOWN_ROWS + 4
    for line in ALSO:
        assert [output for output in cells[line].outputs if output.output_type == "execute_result"]
    drawn, bars = (cells[line].outputs for line in lines[-2:])
    assert any("application/vnd.plotly.v1+json" in output.get("data", {}) for output in drawn)
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in bars)
    assert not any("TqdmWarning" in str(output) for cell in notebook.cells for output in cell.outputs)


@pytest.fixture(scope="module")
def made(tiny: HFModel) -> dict[str, Result]:
    """One result of every kind, of one model."""
    how: dict[str, Any] = {"judge": ArbitraryJudge(), "max_new_tokens": 4, "seed": 3, "progress": False}
    quiet: dict[str, Any] = {"progress": False}
    prompts = kvgeom.PromptSet("tiny", tuple(REQUESTS), tuple(f"{text} too" for text in REQUESTS), "written here")
    others = kvgeom.PromptSet("more", *(tuple(f"{t} again" for t in x) for x in (REQUESTS, prompts.harmless)), "here")
    found = kvgeom.diagnose(tiny, prompts, bits=4, **how)
    plan = found.prescribe(memory=1.0)
    settings = {name: value for name, value in how.items() if name != "max_new_tokens"}
    proof = plan.verify(tiny, others, controls=0, **settings)
    assert plan.selection is not None
    space = kvgeom.subspace(tiny, prompts, **quiet)
    candidates = np.random.default_rng(0).standard_normal((3, 1, 32))
    asked = (prompts.harmful, prompts.harmless)
    results: list[Result] = [
        *found.parts().values(),
        plan.search,
        plan.selection,
        proof,
        over_refusal(found.baseline, at_widths(bits=4)),
        kvgeom.screen(tiny, prompts, bits=[8, 4], **how),
        space,
        space.compare("mean", samples=0, **quiet),
        space.effects(prompts=others, controls=1, tokens={5}, seed=3, **quiet),
        independence(tiny, {"a": np.ones(32), "b": np.arange(32)}, prompts, controls=1, seed=3, **quiet),
        select(tiny, candidates, ["x"], *asked, {5}, **quiet),
        steer(tiny, candidates[0, 0], 1, *asked, judge=how["judge"], max_new_tokens=4, **quiet),
        patch_layers(tiny, prompts, {"a": "int4-asym-token"}, {5}, **quiet),
        first_order(tiny, prompts, "int4-asym-token", {5}, **quiet),
        attention_error(tiny, prompts, "int4-asym-token", **quiet),
        decompose(tiny, prompts, "int4-asym-token", {5}, points=3, **quiet),
        follow_errors(tiny, prompts, "int4-asym-token", {5}, **quiet),
        magnitudes(tiny, prompts, "int4-asym-token", **quiet),
        channel_damage(tiny, prompts, 1, "int4-asym-token", {5}, **quiet),
        ratios({"tiny": space.sensitivity(contrasts=(), **quiet)}),
    ]
    return {"Diagnosis": found, **{type(result).__name__: result for result in results}}  # type: ignore[dict-item]


def test_every_result_says_alike_where_it_comes_from(made: dict[str, Result], tiny: HFModel) -> None:
    """The same keys, each with one meaning; None where it does not apply."""
    assert {*SHOWN} <= {*made}
    said = {name: result.provenance() for name, result in made.items()}
    harmful = fingerprint(REQUESTS)
    both = fingerprint(REQUESTS, [f"{text} too" for text in REQUESTS])
    again = fingerprint([f"{text} again" for text in REQUESTS])
    prompts = {
        **dict.fromkeys((*CAUSAL, "Independence"), harmful),
        "Effects": fingerprint(*([f"{text} again" for text in x] for x in (REQUESTS, [f"{t} too" for t in REQUESTS]))),
        **dict.fromkeys(("Subspace", "Directions", "Sensitivity", "Selection", "Steering", "Ratios", "Screen"), both),
        "Verification": again,
    }
    for name, found in said.items():
        assert list(found) == list(PROVENANCE)
        assert json.loads(json.dumps(found)) == found
        if name in ("Mode", "Diagnosis"):
            continue
        assert (found["model"], found["fingerprint"]) == (tiny.name, tiny.fingerprint)
        assert found["weights"] == "float32"
        assert {"kvgeom", "torch", "transformers"} <= {*found["versions"]}
        assert found["prompts"] == prompts.get(name, harmful)
        unjudged = ("Subspace", "Directions", "Sensitivity", "Selection", "Effects", "Independence", "Ratios")
        judged = name not in (*CAUSAL, *unjudged)
        assert (found["judge"], found["max_new_tokens"]) == (("arbitrary", 4) if judged else (None, None))
    assert {*said["Mode"].values()} == {None}  # it follows from numbers alone
    assert said["FirstOrder"]["scheme"] == said["AttentionError"]["scheme"] == "int4-asym-token"
    assert said["Patching"]["scheme"] == {"a": "int4-asym-token"}
    assert said["Scan"]["scheme"] in {f"int{bits}-sym-tensor" for bits in range(2, 9)}  # it is searched
    assert said["Curve"]["scheme"] == said["OverRefusal"]["scheme"] == said["Screen"]["scheme"] == "asym-token"
    assert said["Ablation"]["scheme"]["every channel"].startswith(said["Scan"]["scheme"])
    assert said["Outcomes"]["scheme"] == made["Outcomes"].meta["recipes"]
    assert said["Steering"]["scheme"] is said["Steering"]["placement"] is said["Subspace"]["scheme"] is None
    for name in (
        "Outcomes",
        "Scan",
        "Curve",
        "Patching",
        "FirstOrder",
        "AttentionError",
        "Subspace",
        "Sensitivity",
        "Effects",
    ):
        assert {"cache", "projection"} & {*said[name]["placement"].replace(",", "").split()}
    assert (said["Outcomes"]["seed"], said["Directions"]["seed"], said["Patching"]["seed"]) == (3, 0, None)
    assert said["Effects"]["seed"] == said["Independence"]["seed"] == 3


def test_a_whole_says_what_its_parts_agree_in(made: dict[str, Result]) -> None:
    found = made["Diagnosis"].provenance()
    for key in ("model", "fingerprint", "judge", "max_new_tokens", "seed", "versions"):
        assert found[key] == made["Curve"].provenance()[key]
    assert found["prompts"]["curve"] == made["Curve"].provenance()["prompts"]
    assert found["prompts"]["sensitivity"] == made["Sensitivity"].provenance()["prompts"]
    assert found["scheme"]["curve"] == "asym-token"
    assert "mode" not in found["scheme"]


#: What methods of results take, where it is not what nobody has: by the name of the parameter.
TAKEN: dict[str, Any] = {
    **{"recipe": "exact", "recipes": ["exact"], "names": ["exact"], "prompts": [0], "role": "chosen"},
    **{"site": "k", "layer": 1, "pairs": 2, "one": "a", "other": "b", "part": "all", "queries": "all"},
    "cache": "as it is",
    **{"intervention": "none", "harmful": True, "within_budget": True, "contrasts": ()},
}
#: They take models, files or other results, and are asked elsewhere; or make results of what a file holds.
ELSEWHERE = {
    *(
        "on",
        "prescribe",
        "relabel",
        "save",
        "load",
        "plot",
        "provenance",
        "compare",
        "effects",
        "select",
        "sensitivity",
    ),
    *("fit", "of", "of_records", "of_parts", "with_harmless"),
}


def test_methods_take_what_a_result_has_or_end_in_one_short_line(made: dict[str, Result]) -> None:
    """Names of recipes, layers and numbers that are none, whatever the result."""
    asked, wrong = set(), []
    for kind, result in made.items():
        for name in dir(type(result)):
            method = getattr(result, name, None)
            if name.startswith("_") or name in ELSEWHERE or not callable(method):
                continue
            parameters = inspect.signature(method).parameters.values()
            own = {**TAKEN, "prompts": [int(result.data.prompt[0])], "other": result} if kind == "Outcomes" else TAKEN
            works = {
                p.name: own.get(p.name, "x") for p in parameters if p.default is p.empty and p.kind != p.VAR_KEYWORD
            }
            taken = [p.name for p in parameters if p.kind != p.VAR_KEYWORD]
            more = ["family", "layer", "famly"] if len(taken) < len(parameters) else []
            asked |= {f"{kind}.{name}"} if parameters else set()
            wrong += [(kind, name, *each) for each in wrong_ends(method, works, [*taken, *more], MORE)]
    assert not wrong
    assert {"Outcomes.flips", "Outcomes.joined", "Subspace.features", "Steering.refusals", "Scan.worst"} <= asked


def test_tables_that_do_not_exist(made: dict[str, Result]) -> None:
    for name, wrong in (("Sensitivity", []), ("Sensitivity", 3), ("Diagnosis", [])):
        with pytest.raises(InputError, match=re.escape(f"{wrong!r}; choose from")):
            made[name].to_frame(wrong)  # type: ignore[arg-type]
    for name in ("Sensitivity", "Diagnosis"):
        with pytest.raises(InputError, match="did you mean 'table'"):
            made[name].to_frame(tabel="heads")  # type: ignore[call-arg]
