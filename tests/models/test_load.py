"""What ``load`` takes: names and options, backends by name, and models from outside the package."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from transformers import pipeline

import kvgeom
from kvgeom.errors import InputError
from kvgeom.models import backends
from kvgeom.models.hf import HFModel
from kvgeom.models.load import PretrainedOptions, load, load_option_names
from kvgeom.models.model import Model, missing_members
from tests.builders.tiny import tiny_hf_model, tiny_model, tiny_tokenizer


class Outside:
    """A backend that is no subclass of anything of ours: it counts passes, and leaves the rest to a model inside."""

    backend = "outside"

    def __init__(self, inner: Model) -> None:
        self.inner, self.passes = inner, 0

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.passes += 1
        return self.inner.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Runner:
    """A model of some other library."""

    def __init__(self, hf_model: Any, tokenizer: Any) -> None:
        self.hf_model, self.tokenizer = hf_model, tokenizer


@pytest.fixture
def runner_backend(monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend for :class:`Runner`, in one file."""

    def make(model: Any, tokenizer: Any, *, name: str | None, template: str | None) -> Model:
        runner = model if isinstance(model, Runner) else Runner(model, tokenizer)
        inner = HFModel(runner.hf_model, tokenizer or runner.tokenizer, name=name or "runner", template=template)
        found = Outside(inner)
        found.backend = "runner"
        return found

    monkeypatch.setattr(backends, "_BACKENDS", backends.backends())
    backends.register_backend("runner", wraps=lambda model: isinstance(model, Runner), make=make)
    return "runner"


def test_a_model_from_outside_the_package() -> None:
    """An object with the members of the protocol goes through the whole pipeline, and gives the numbers of ours."""
    ours = tiny_model("qwen2")
    theirs = Outside(tiny_model("qwen2"))
    assert load(theirs) is theirs
    prompts = kvgeom.calibration().take(4)
    both = [kvgeom.subspace(model, prompts, progress=False).sensitivity(progress=False) for model in (ours, theirs)]
    assert theirs.passes > 0
    xarray.testing.assert_allclose(both[0].data, both[1].data)
    outcomes = kvgeom.evaluate(
        theirs, {"int4": kvgeom.Recipe.uniform(3, kvgeom.Scheme(4))}, list(prompts.harmful), max_new_tokens=4
    )
    assert outcomes.data.sizes["prompt"] == 4


def test_what_a_model_lacks_is_named() -> None:
    class Half:
        geometry = tiny_model().geometry

    assert missing_members(tiny_model()) == []
    with pytest.raises(InputError, match=r"Half .* forward"):
        load(Half())


def test_a_backend_from_outside_the_package(runner_backend: str, checkpoint: Path) -> None:
    held = Runner(tiny_hf_model(), tiny_tokenizer())
    for model in (load(held), load(checkpoint, backend=runner_backend)):
        assert model.backend == runner_backend
        torch.testing.assert_close(model.forward([5, 6, 7]), tiny_model().forward([5, 6, 7]))
    assert load(held, name="mine").name == "mine"
    with pytest.raises(InputError, match="'runner'"):
        load(held, backend="hf")
    with pytest.raises(InputError, match="remote"):
        load(held, remote=True)
    with pytest.raises(InputError, match="registered already"):
        backends.register_backend(runner_backend, wraps=lambda model: False, make=lambda model: model)


def test_option_names_are_those_of_the_function() -> None:
    named = {*inspect.signature(load).parameters} - {"model", "progress", "options"}
    assert load_option_names() == named | {*PretrainedOptions.__annotations__}


@pytest.mark.parametrize(
    ("option", "instead"), [("dtpye", "dtype"), ("torch_dtype", "dtype"), ("device_mpa", "device_map")]
)
def test_misspelt_options_are_refused(option: str, instead: str, checkpoint: Path) -> None:
    for model in (checkpoint, tiny_model(), "no-such-model"):
        with pytest.raises(InputError, match=f"{option}.*{instead}"):
            load(model, **{option: "float32"})


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"device": "cpu"},
        {"revision": "main"},
        {"trust_remote_code": True},
        {"device_map": "auto"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_come_too_late_are_refused(options: dict[str, Any]) -> None:
    for model, own in ((tiny_hf_model(), {"tokenizer": tiny_tokenizer()}), (tiny_model(), {})):
        with pytest.raises(InputError, match=next(iter(options))):
            load(model, **own, **options)


def test_options_of_from_pretrained_reach_it(checkpoint: Path) -> None:
    model = load(checkpoint, attn_implementation="eager", local_files_only=True, name="mine")
    assert (model.attention_kernel, model.name) == ("eager", "mine")
    for option in ({"template": "{{ messages[0].content }}"}, {"tokenizer": tiny_tokenizer()}, {"name": "other"}):
        with pytest.raises(InputError, match=next(iter(option))):
            load(model, **option)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"device": "meta"}, r"device 'meta' .* cpu"),
        ({"device": "cuad"}, r"device 'cuad' .* cpu"),
        ({"device": "cuda:99"}, r"device 'cuda:99' .* cpu"),
        ({"device": "cppu"}, r"did you mean 'cpu'"),
        ({"device": ""}, r"device '' .* cpu"),
        ({"dtype": "float23"}, r"did you mean 'float32'"),
        ({"dtype": torch.int8}, r"torch.int8"),
    ],
    ids=str,
)
def test_a_machine_without_the_device(option: dict[str, Any], says: str, checkpoint: Path) -> None:
    """Known before weights are looked for, let alone read; of a judge as of a model."""
    for load_it in (load, partial(kvgeom.classifier, kind="minos")):
        for source in (checkpoint, "no/such-model"):
            with pytest.raises(InputError, match=says) as caught:
                load_it(source, **option)
            assert "\n" not in str(caught.value)


def test_a_tokenizer_and_a_template_of_other_kinds() -> None:
    for wrong in ("Qwen/Qwen2.5-7B-Instruct", 3):
        with pytest.raises(InputError, match="must be one of transformers, got"):
            kvgeom.load(tiny_hf_model(), tokenizer=wrong)
    with pytest.raises(InputError, match="template must be a path, got 3"):
        kvgeom.load(tiny_hf_model(), tokenizer=tiny_tokenizer(), template=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("around", "says"),
    [
        (torch.compile, r"OptimizedModule is no model, .* load\(it\._orig_mod, tokenizer=\.\.\.\)"),
        (torch.nn.DataParallel, r"load\(it\.module, tokenizer=\.\.\.\)"),
        (
            lambda model: pipeline("text-generation", model=model, tokenizer=tiny_tokenizer()),
            r"load\(it\.model, tokenizer=it\.tokenizer\)",
        ),
    ],
)
def test_what_holds_a_model(around: Callable[[Any], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load(around(tiny_hf_model()), tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    "options",
    [
        {"subfolder": 3},
        {"variant": b"x"},
        {"cache_dir": 0},
        {"max_memory": 3},
        {"token": 3},
        {"local_files_only": "yes"},
        {"use_kernels": 1},
        {"dtype": "float8_e4m3fn"},
        {"dtype": torch.float8_e5m2},
        {"dtype": "int8"},
        {"dtype": 3},
    ],
)
def test_options_of_a_wrong_type(options: dict[str, Any], checkpoint: Path) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))}.*(input should be|float)"):
        load(checkpoint, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"device": 10**5000},
        {"device": 1.5},
        {"dtype": np.zeros(3)},
        {"dtype": object()},
        {"variant": "a" * 300},
        {"subfolder": "b" * 300},
        {"subfolder": "c/" * 4000},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_name_nothing_are_one_short_line(options: dict[str, Any], checkpoint: Path) -> None:
    with pytest.raises(InputError, match=next(iter(options))) as found:
        load(checkpoint, **options)
    assert len(str(found.value)) < 400


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"quantization_config": {"quant_method": "zzz"}}, "the method 'zzz', which transformers does not know"),
        ({"quantization_config": {"bits": 4}}, "the method None"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}}, "an entry of its configuration"),
    ],
)
def test_configurations_that_make_no_sense(
    entries: dict[str, Any], says: str, checkpoint: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copied"))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | entries))
    with pytest.raises(InputError, match=says):
        load(copied)
