"""Plans of kvgeom fix as candidates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import kvgeom
from kvgeom.cli import main
from kvgeom.engines.spec import parse_spec
from kvgeom.errors import InputError, KvgeomWarning
from kvgeom.gating.plans import is_plan, planned
from kvgeom.mitigation.plan import Plan
from tests.builders.plans import plan

LLAMACPP, VLLM = parse_spec("llamacpp:demo?context=512"), parse_spec("vllm:demo")


def stored(scheme: str, *, keep: tuple[int, ...] = ()) -> Plan:
    """A plan whose chosen cache is one scheme, with some layers in 16 bits, for heads of 64 channels."""
    made = plan()
    geometry = replace(made.geometry, head_dim=64)
    recipe = kvgeom.Recipe.uniform(geometry.layers, kvgeom.Scheme.parse(scheme)).keep(keep)
    return replace(made, geometry=geometry, chosen=replace(made.chosen, recipe=recipe, placement=kvgeom.Placement()))


def test_the_candidate_is_the_baselines_server_with_the_cache_of_the_plan() -> None:
    assert str(planned(stored("fp8_e5m2"), VLLM)) == "vllm:demo?kv=fp8_e5m2"


def test_how_an_engine_differs_from_the_plan_is_a_warning() -> None:
    with pytest.warns(KvgeomWarning, match=r"llama\.cpp comes nearest to the plan, and differs: "):
        found = planned(stored("int4-asym-token+center"), LLAMACPP)
    assert str(found) == "llamacpp:demo?k=q4_1&v=q4_1&context=512"


def test_a_flag_that_kvgeom_does_not_start_an_engine_with_is_an_error() -> None:
    with pytest.raises(InputError, match="does not start it with --kv-cache-dtype-skip-layers; start it yourself"):
        planned(stored("fp8_e5m2", keep=(0,)), VLLM)


def test_a_plan_needs_a_server_that_kvgeom_starts() -> None:
    with pytest.raises(InputError, match="give the baseline as an engine and a model"):
        planned(plan(), None)


def test_what_is_a_plan(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan.json")
    assert all(map(is_plan, (plan(), tmp_path, str(tmp_path), tmp_path / "plan.json")))
    assert not any(
        map(is_plan, ("llamacpp:demo", "http://x/v1", "\0", "a" * 5000, 3, None, tmp_path / "other", LLAMACPP))
    )
    with pytest.raises(InputError, match="give the baseline as an engine and a model"):
        kvgeom.gate("http://127.0.0.1:9/v1", str(tmp_path), prompts=["How?"], progress=False)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ([], "give a CANDIDATE, or --from a plan, and not both"),
        (["llamacpp:demo?k=q4_0", "--from", "x"], "give a CANDIDATE, or --from a plan, and not both"),
        (["--from", "nowhere"], "there is no plan at 'nowhere'"),
    ],
)
def test_the_command_wants_one_candidate(line: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", "llamacpp:demo", *line, "--quiet"]) == 2
    assert says in capsys.readouterr().err
