"""Keywords and values that cannot be used are reported in one line, wherever they are given."""

from __future__ import annotations

import inspect
import pickle
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvgeom
from kvgeom.behaviour.ablation import ablate, channel_magnitudes, channel_subsets, whole_cache
from kvgeom.behaviour.over_refusal import over_refusal
from kvgeom.behaviour.widths import at_widths
from kvgeom.checks import as_names, as_path, as_seed, at_coordinates, one_of, suggests, whole, whole_numbers
from kvgeom.diagnosis.diagnose import Diagnosis
from kvgeom.engines.registry import resolve
from kvgeom.errors import InputError
from kvgeom.geometry.attention import attention_error, attention_to_request
from kvgeom.geometry.causal import first_order, patch_layers
from kvgeom.geometry.channels import channel_view, outlier_share, stored
from kvgeom.geometry.decomposition import decompose
from kvgeom.geometry.directions import compare
from kvgeom.geometry.error_paths import follow_errors
from kvgeom.geometry.selection import opening_tokens, select, select_direction
from kvgeom.geometry.sensitivity import measure
from kvgeom.geometry.steering import steer
from kvgeom.geometry.subspace import Subspace
from tests.builders.figures import sensitivity

MISSPELT: list[tuple[Callable[..., object], str, str]] = [
    (kvgeom.evaluate, "refused_onyl", "refused_only"),
    (kvgeom.evaluate, "placment", "placement"),
    (kvgeom.evaluate, "jugde", "judge"),
    (kvgeom.baseline, "max_new_token", "max_new_tokens"),
    (kvgeom.diagnose, "schme", "scheme"),
    (kvgeom.diagnose, "scan_bit", "scan_bits"),
    (kvgeom.audit, "prompt", "prompts"),
    (kvgeom.audit, "dtpye", "dtype"),
    (kvgeom.fix, "control", "controls"),
    (kvgeom.Plan.verify, "control", "controls"),
    (Diagnosis.on, "jugde", "judge"),
    (Diagnosis.prescribe, "memry", "memory"),
    (Diagnosis.relabel, "jugde", "judge"),
    (kvgeom.load_prompts, "promts", "prompts"),
    (kvgeom.PromptSet, "harmfull", "harmful"),
    (kvgeom.Scheme, "granlarity", "granularity"),
    (kvgeom.KeywordJudge, "opning", "opening"),
    (kvgeom.subspace, "methd", "method"),
    (kvgeom.subspace, "tokeniser", "tokenizer"),
    (Subspace.sensitivity, "schem", "scheme"),
    (Subspace.sensitivity, "null_subspace", "null_subspaces"),
    (Subspace.compare, "sample", "samples"),
    (Subspace.refit, "metod", "method"),
    (Subspace.select, "validatoin", "validation"),
    (measure, "contrast", "contrasts"),
    (compare, "sample", "samples"),
    (select, "max_kll", "max_kl"),
    (select_direction, "max_kll", "max_kl"),
    (opening_tokens, "jugde", "judge"),
    (steer, "scal", "scale"),
    (patch_layers, "layer", "layers"),
    (first_order, "placment", "placement"),
    (attention_error, "placment", "placement"),
    (decompose, "tolerence", "tolerance"),
    (follow_errors, "direction", "directions"),
    (attention_to_request, "tokeniser", "tokenizer"),
    (channel_view, "sit", "site"),
    (stored, "layr", "layer"),
    (outlier_share, "sit", "site"),
    (at_widths, "bit", "bits"),
    (resolve, "placment", "placement"),
    (ablate, "refrence", "reference"),
    (whole_cache, "placment", "placement"),
    (channel_magnitudes, "placment", "placement"),
    (channel_subsets, "repeat", "repeats"),
    (over_refusal, "seris", "series"),
]


@pytest.mark.parametrize(
    ("function", "wrong", "right"), MISSPELT, ids=[f"{f.__qualname__}-{wrong}" for f, wrong, _ in MISSPELT]
)
def test_a_misspelt_keyword_is_named_with_the_right_one(
    function: Callable[..., object], wrong: str, right: str
) -> None:
    """Before the function is entered, so that not even its arguments matter."""
    with pytest.raises(InputError, match=f"unknown option '{wrong}'; did you mean '{right}'") as raised:
        function(**{wrong: 1})
    assert "\n" not in str(raised.value)


def test_a_checked_function_stays_what_it_is() -> None:
    def half(x: float, *, of: int = 2) -> float:
        """Half of it."""
        return x / of

    checked = suggests()(half)
    assert (checked.__name__, checked.__doc__) == ("half", "Half of it.")
    assert inspect.signature(checked) == inspect.signature(half)
    assert typing.get_type_hints(checked) == {"x": float, "of": int, "return": float}
    assert (checked(1.0), checked(x=1.0, of=4)) == (0.5, 0.25)
    with pytest.raises(TypeError, match="'x'"):  # what is missing is Python's to say
        checked()
    scheme = kvgeom.Scheme(bits=4, granularity="channel")
    assert list(inspect.signature(kvgeom.Scheme).parameters)[:2] == ["bits", "symmetric"]
    assert pickle.loads(pickle.dumps(scheme)) == scheme
    assert inspect.isfunction(kvgeom.evaluate)


def test_flags_are_taken_as_flags() -> None:
    @suggests()
    def shown(x: object, *, loud: bool = False) -> object:
        return loud

    assert shown(0) is False
    assert shown(0, loud=np.True_) is True  # type: ignore[arg-type]
    assert shown(0, loud=1) is True
    with pytest.raises(InputError, match="loud must be True or False, got 'no'"):
        shown(0, loud="no")  # type: ignore[arg-type]


def test_options_of_others_are_let_through() -> None:
    @suggests(("deep",))
    def outer(flat: int = 0, **options: int) -> dict[str, int]:
        return {"flat": flat, **options}

    assert outer(flat=1, deep=2) == {"flat": 1, "deep": 2}
    with pytest.raises(InputError, match="'dep'; did you mean 'deep'"):
        outer(dep=2)
    with pytest.raises(InputError, match="choose from flat, deep"):
        outer(zzz=2)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers_are_taken(value: Any) -> None:
    assert type(whole("n", value, 1, 3)) is int
    assert whole_numbers("n", [value, 1]) == [3, 1]
    assert whole_numbers("n", value) == [3]


@pytest.mark.parametrize("value", [0, 4, 1.5, 3.0, float("nan"), "3", None, [], True, np.float64(3)])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match="n must be a whole number, 1 to 3, got"):
        whole("n", value, 1, 3)


@pytest.mark.parametrize("value", [-1, float("nan"), [], "3", None, 2**32])
def test_seeds(value: Any) -> None:
    with pytest.raises(InputError, match="seed must be a whole number, 0 to 4294967295"):
        as_seed(value)
    assert as_seed(np.int64(7)) == 7


def test_names() -> None:
    assert as_names("method", "mean", ("mean", "pca")) == ["mean"]
    assert as_names("method", ("pca", "mean"), ("mean", "pca")) == ["pca", "mean"]
    for wrong, told in (
        ("men", "did you mean 'mean'"),
        ([], "choose from mean, pca"),
        (0, "method 0"),
        ([[]], "method"),
    ):
        with pytest.raises(InputError, match=told):
            as_names("method", wrong, ("mean", "pca"))
    for value in (9, -1, "0", None, 0.5, [0], np.arange(2)):
        with pytest.raises(InputError, match=r"unknown layer .*choose from 0 to 7"):
            one_of("layer", value, range(8))
    with pytest.raises(InputError, match="choose from 1, 3"):
        one_of("layer", 2, [1, 3])


def test_coordinates() -> None:
    data = sensitivity().data
    at_coordinates(data, layer=np.int64(1), site="k", nothing="here")
    for wrong in ({"site": "kk"}, {"layer": 10**6}):
        with pytest.raises(InputError, match=f"unknown {next(iter(wrong))}"):
            at_coordinates(data, **wrong)


def test_paths(tmp_path: Path) -> None:
    assert as_path("out", str(tmp_path)) == as_path("out", tmp_path) == tmp_path
    assert as_path("out", "~/x").is_absolute()
    for value in (0, None, b"x", []):
        with pytest.raises(InputError, match="out must be a path, got"):
            as_path("out", value)
