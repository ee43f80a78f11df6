"""Files of a checkpoint are whole, or the line that refuses them names the one that is not."""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import kvgeom
from benchmarks import architectures
from kvgeom.errors import InputError, KvgeomError, KvgeomWarning
from kvgeom.models.files import check_folder
from tests.builders.damage import anything, places
from tests.builders.tiny import TEMPLATE, tiny_config, tiny_hf_model, tiny_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def header(data: bytes) -> tuple[int, dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return size, json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def damaged(data: bytes) -> bytes:
        _, found, rest = header(data)
        change(found)
        written = json.dumps(found).encode()
        return len(written).to_bytes(8, "little") + written + rest

    return damaged


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def sharded(copied: Path) -> Path:
    (copied / "model.safetensors").unlink()
    tiny_hf_model().save_pretrained(copied, max_shard_size="20KB")
    return copied


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[: len(data) // 2], r"truncated or altered \.safetensors"),
        (lambda data: data + b"more", "truncated or altered"),
        (lambda data: b"", "is empty"),
        (lambda data: POINTER, "Git LFS pointer"),
        (lambda data: data[:7], "truncated or altered"),
        (lambda data: (2**62).to_bytes(8, "little") + data[8:], "truncated or altered"),
        (lambda data: (10**8).to_bytes(8, "little") + data[8:], "truncated or altered"),
        (with_header(lambda found: found[NORM].update(shape=[2**40])), "truncated or altered"),
        (with_header(lambda found: found[NORM].update(data_offsets=[0, 2**40])), "truncated or altered"),
        (with_header(lambda found: found[NORM].update(data_offsets=[128, 0])), "truncated or altered"),
        (with_header(lambda found: found[NORM].update(dtype="F99")), "truncated or altered"),
        (with_header(lambda found: found.pop(NORM)), "truncated or altered"),
    ],
)
def test_damaged_weights(damage: Callable[[bytes], bytes], says: str, copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(InputError, match=says):
        kvgeom.load(copied, progress=False)


def test_shards(sharded: Path) -> None:
    assert kvgeom.load(sharded, progress=False).weights == "float32"
    index = sharded / "model.safetensors.index.json"
    whole = index.read_text()
    written = json.loads(whole)
    for change, says in (
        ({**written, "weight_map": [1]}, "weight_map"),
        ({**written, "weight_map": {"x": "../model.safetensors"}}, r"'\.\./model\.safetensors', which is no"),
        ({**written, "weight_map": {**written["weight_map"], "x": "model-9.safetensors"}}, "lacks 1 of the 8 files"),
    ):
        index.write_text(json.dumps(change))
        with pytest.raises(InputError, match=says):
            kvgeom.load(sharded, progress=False)
    index.write_text(whole)
    second = sorted(sharded.glob("model-*"))[1]
    second.write_bytes(POINTER)
    with pytest.raises(InputError, match=rf"{second.name} is a Git LFS pointer"):
        kvgeom.load(sharded, progress=False)
    second.unlink()
    with pytest.raises(InputError, match=rf"lacks 1 of the 7 files .*{second.name}"):
        kvgeom.load(sharded, progress=False)
    index.unlink()
    with pytest.raises(InputError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        kvgeom.load(sharded, progress=False)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", "{", r"config\.json is no JSON"),
        ("config.json", "[1]", "must hold a JSON object"),
        ("config.json", "", "is empty"),
        ("config.json", "[" * 100_000, "is no JSON"),
        ("config.json", POINTER.decode(), "Git LFS pointer"),
        ("generation_config.json", "{", r"generation_config\.json is no JSON"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is no JSON"),
        ("tokenizer.json", POINTER.decode(), r"tokenizer\.json is a Git LFS pointer"),
        ("tokenizer.json", "{", "cannot be loaded"),
    ],
)
def test_other_files(name: str, content: str, says: str, copied: Path) -> None:
    (copied / name).write_text(content)
    with pytest.raises(InputError, match=says):
        kvgeom.load(copied, progress=False)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("num_attention_heads", 0),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", "3"),
        ("num_hidden_layers", True),
        ("hidden_size", 32.0),
        ("vocab_size", -1),
        ("num_key_value_heads", [2, "2"]),
        ("text_config", {"num_hidden_layers": "3"}),
    ],
)
def test_sizes_that_are_none(entry: str, value: Any, copied: Path) -> None:
    written = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(written | {entry: value}))
    with pytest.raises(InputError, match="must be a whole number above 0"):
        check_folder(copied)


def test_more_layers_than_tensors(copied: Path) -> None:
    """Before anything is built: a layer takes a millisecond."""
    written = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(written | {"num_hidden_layers": 10**9}))
    with pytest.raises(InputError, match=r"describes 1,000,000,000 layers, and the weights are 30 tensors"):
        kvgeom.load(copied, progress=False)


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_layer")
    config = AutoConfig.for_model("llama", **tiny_config("llama", 1))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def loads_or_is_refused(folder: Path) -> None:
    with warnings.catch_warnings(), suppress(KvgeomError):
        warnings.simplefilter("ignore")
        model = kvgeom.load(folder, progress=False)
        assert model.forward(model.encode(["hi"])[0].ids).shape == (1, model.vocabulary)


def fuzz(path: Path, damaged: Callable[[st.DataObject, bytes], bytes], inputs: int) -> None:
    """Try a checkpoint with one file damaged in many ways."""
    whole = path.read_bytes()

    @settings(max_examples=inputs)
    @given(data=st.data())
    def one(data: st.DataObject) -> None:
        try:
            path.write_bytes(damaged(data, whole))
            loads_or_is_refused(path.parent)
        finally:
            path.write_bytes(whole)

    one()


def with_bytes(data: st.DataObject, whole: bytes, within: int) -> bytes:
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, within - 1))] = data.draw(st.integers(0, 255))
    return bytes(damaged)


def with_entry(data: st.DataObject, found: Any) -> bytes:
    changed = copy.deepcopy(found)
    entry, key = data.draw(st.sampled_from(list(places(changed))))
    entry[key] = data.draw(anything)
    return json.dumps(changed).encode("utf-8", "surrogatepass")


def damaged_weights(data: st.DataObject, whole: bytes) -> bytes:
    """Bytes of the header or anywhere, other lengths, entries of the header."""
    size, found, rest = header(whole)
    kind = data.draw(st.sampled_from(["header", "anywhere", "length", "entry"]))
    if kind == "length":
        return whole[: data.draw(st.integers(0, len(whole)))] + data.draw(st.binary(max_size=8))
    if kind == "entry":
        written = with_entry(data, found)
        return len(written).to_bytes(8, "little") + written + rest
    return with_bytes(data, whole, size + 8 if kind == "header" else len(whole))


def damaged_configuration(data: st.DataObject, whole: bytes) -> bytes:
    return with_bytes(data, whole, len(whole)) if data.draw(st.booleans()) else with_entry(data, json.loads(whole))


#: 2,000 inputs each in all; a normal run tries a tenth.
INPUTS = pytest.mark.parametrize("inputs", [200, pytest.param(2000, marks=pytest.mark.slow)])


@INPUTS
def test_any_damage_to_weights(inputs: int, one_layer: Path) -> None:
    fuzz(one_layer / "model.safetensors", damaged_weights, inputs)


@INPUTS
def test_any_damage_to_the_configuration(inputs: int, one_layer: Path) -> None:
    fuzz(one_layer / "config.json", damaged_configuration, inputs)


@pytest.mark.parametrize("value", [-(2**63) - 1, 10**400])
def test_numbers_that_no_processor_holds_are_refused(value: int, one_layer: Path, tmp_path: Path) -> None:
    """Fuzzing found an OverflowError."""
    folder = shutil.copytree(one_layer, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": value}))
    with pytest.raises(KvgeomError, match=r"does not run|rms_norm_eps"):
        kvgeom.load(folder, progress=False)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"])
def test_pipes_are_not_waited_for(name: str, copied: Path) -> None:
    (copied / name).unlink(missing_ok=True)
    os.mkfifo(copied / name)
    with pytest.raises(InputError, match=rf"{name} is no regular file"):
        kvgeom.load(copied, progress=False)


def test_weights_in_a_pipe(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    os.mkfifo(copied / "model.safetensors")
    with pytest.raises(InputError, match="is no regular file"):
        kvgeom.load(copied, progress=False)


@pytest.mark.parametrize("name", ["tokenizer.json", "added_tokens.json", "chat_template.jinja"])
def test_texts_without_end_are_not_read(name: str, copied: Path) -> None:
    with (copied / name).open("ab") as file:
        file.truncate(3 << 30)
    with pytest.raises(InputError, match=r"has 3,221,225,472 bytes, and no file of its kind has more"):
        kvgeom.load(copied, progress=False)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_other_encodings_are_not_dropped(name: str, encoding: str, copied: Path) -> None:
    text = "{{ messages[0].content }}" if name.endswith(".jinja") else (copied / name).read_text()
    (copied / name).write_text(text, encoding=encoding)
    with pytest.raises(InputError, match=rf"{name} is not in plain UTF-8"):
        kvgeom.load(copied, progress=False)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    architectures.tiny("qwen3_moe").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def renamed(folder: Path, to: Path, change: Callable[[str], str | None]) -> Path:
    """The same checkpoint with tensors under other names, or without them."""
    made = Path(shutil.copytree(folder, to))
    weights = {change(name): x for name, x in load_file(made / "model.safetensors").items()}
    save_file({name: x for name, x in weights.items() if name}, made / "model.safetensors", {"format": "pt"})
    return made


@pytest.mark.parametrize(("lost", "instead"), [(1, "9"), (0, "4"), (2, None)])
def test_experts_have_their_places(lost: int, instead: str | None, experts: Path, tmp_path: Path) -> None:
    """Stacked by number, an expert of another number would push all others along."""

    def change(name: str) -> str | None:
        here = "layers.1." in name and f".experts.{lost}." in name
        if here and instead is None:
            return None
        return name.replace(f".experts.{lost}.", f".experts.{instead}.") if here else name

    kvgeom.load(experts, progress=False)
    with pytest.raises(InputError, match=rf"lacks expert {lost} of model\.layers\.1\.mlp"):
        kvgeom.load(renamed(experts, tmp_path / "m", change), progress=False)


@pytest.mark.parametrize("extra", ["layers.0.self_attn.k_proj.weight", "model.model.norm.weight"])
def test_one_tensor_has_one_name(extra: str, copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    own = next(name for name in weights if name.endswith(extra.removeprefix("model.model.")))
    save_file({**weights, extra: weights[own] + 1}, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="two names of one tensor"):
        kvgeom.load(copied, progress=False)


def test_what_lies_beside_and_says_something_else_is_noted(copied: Path) -> None:
    config = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE + "x"}))
    (copied / "chat_template.jinja").write_text(TEMPLATE)
    (copied / "pytorch_model.bin").write_bytes(b"x")
    with pytest.warns(KvgeomWarning):
        notes = kvgeom.load(copied, progress=False).notes
    assert any("chat_template.jinja" in note and "is used" in note for note in notes)
    assert any("pytorch_model.bin too, which is not read" in note for note in notes)
