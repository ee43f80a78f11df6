"""What is read from a model, how requests become tokens, and what is refused with which words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import kvgeom
from kvgeom.errors import InputError, KvgeomError, ModelError
from kvgeom.models.gguf import CONVERSION
from kvgeom.models.hf import HFModel
from kvgeom.models.model import KVGeometry
from tests.builders.disk import room_for
from tests.builders.tiny import KINDS, tiny_hf_model, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_geometry_is_read_from_the_model(kind: str) -> None:
    geometry = tiny_model(kind).geometry
    assert geometry == KVGeometry(
        layers=3,
        query_heads=4,
        kv_heads=4 if kind == "gpt_neox" else 2,
        head_dim=8,
        d_model=32,
        key_bias=kind in ("qwen2", "gpt_neox"),
        rope="default",
        sliding_window=12 if kind in ("gemma3_text", "mistral") else None,
    )
    assert geometry.channels == geometry.kv_heads * 8


def test_encoding_marks_the_instruction() -> None:
    model = tiny_model()
    for prompt in model.encode(["Say hi", "  Ünïcode 漢字, please.  ", "<|end|> in the middle"]):
        template = model.decode(prompt.ids)
        assert model.tokenizer.decode(list(prompt.ids[prompt.instruction])) == prompt.text
        assert template.startswith("system")
        assert prompt.ids[-1] == model.tokens("\n")[0]
    with pytest.raises(InputError, match="empty"):
        model.encode(["  \n"])
    with pytest.raises(InputError, match="context of 512"):
        model.encode(["x" * 600])


def test_fingerprints_tell_models_apart() -> None:
    assert tiny_model(seed=0).fingerprint == tiny_model(seed=0).fingerprint
    assert tiny_model(seed=0).fingerprint != tiny_model(seed=1).fingerprint
    other = HFModel(tiny_hf_model(), tiny_tokenizer(), name="x", template="{{ messages[0].content }}")
    assert other.fingerprint != tiny_model().fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_one_identity_in_all_floating_point_types(kind: str) -> None:
    """Weights that were trained in bfloat16, some too small for float16's normal numbers, wherever they are loaded."""

    def held(dtype: torch.dtype, change: float = 1.0, template: str | None = None) -> HFModel:
        model = tiny_hf_model(kind)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter[..., ::3] *= 1e-5
                parameter.copy_(parameter.to(torch.bfloat16))
            next(model.parameters()).mul_(change)
        return HFModel(model.to(dtype), tiny_tokenizer(), name="x", template=template)

    first = held(torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        other = held(dtype)
        assert other.identity == first.identity
        assert other.fingerprint != first.fingerprint
    assert held(torch.float32, template="{{ messages[0].content }}").identity == first.identity
    assert held(torch.float32, change=2.0).identity != first.identity
    assert tiny_model(kind, seed=1).identity != tiny_model(kind, seed=0).identity
    trained_in_float32 = [tiny_hf_model(kind).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    assert len({HFModel(model, tiny_tokenizer(), name="x").identity for model in trained_in_float32}) == 1


def test_a_loaded_model_is_taken_as_it_is() -> None:
    hf, tokenizer = tiny_hf_model(), tiny_tokenizer()
    model = kvgeom.load(hf, tokenizer=tokenizer)
    assert model.hf_model is hf
    assert kvgeom.load(model) is model
    with pytest.raises(InputError, match="tokenizer="):
        kvgeom.load(hf)
    with pytest.raises(InputError, match="dict"):
        kvgeom.load({})
    with pytest.raises(InputError, match="jax"):
        kvgeom.load(hf, tokenizer=tokenizer, backend="jax")


def test_templates() -> None:
    hf, tokenizer = tiny_hf_model(), tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="--template"):
        kvgeom.load(hf, tokenizer=tokenizer)
    assert kvgeom.load(hf, tokenizer=tokenizer, template="Q: {{ messages[0].content }} A:").encode(["hi"])
    with pytest.raises(ModelError, match="0 times"):
        kvgeom.load(hf, tokenizer=tokenizer, template="{{ 'nothing' }}")
    with pytest.raises(ModelError, match="fails on a plain request"):
        kvgeom.load(hf, tokenizer=tokenizer, template="{{ raise_exception('no users here') }}")
    with pytest.raises(InputError, match=r"missing\.jinja"):
        kvgeom.load(hf, tokenizer=tokenizer, template="missing.jinja")


def test_projection_rounding_needs_known_projections() -> None:
    from kvgeom.quant.placement import Placement
    from kvgeom.quant.quantizer import Quantizer
    from kvgeom.quant.recipe import Recipe
    from kvgeom.quant.scheme import Scheme

    model = tiny_model()
    for layer in model.hf_model.model.layers:
        layer.self_attn.to_keys = layer.self_attn.k_proj
        del layer.self_attn.k_proj
    with pytest.raises(ModelError, match="use the cache placement"):
        model.forward([5, 6], model.new_cache(Quantizer(Recipe.uniform(3, Scheme(4)), Placement.paper())))


def test_a_folder(checkpoint: Path) -> None:
    model = kvgeom.load(checkpoint)
    assert model.name == checkpoint.name
    torch.testing.assert_close(model.forward([5, 6, 7]), tiny_model().forward([5, 6, 7]), atol=1e-5, rtol=1e-5)
    assert kvgeom.load(str(checkpoint), dtype="bfloat16").dtype == torch.bfloat16


def test_a_gguf_file_is_converted_once(gguf_file: Path, own_cache: Path) -> None:
    model = kvgeom.load(gguf_file, progress=False)
    torch.testing.assert_close(model.forward([5, 6, 7]), tiny_model().forward([5, 6, 7]), atol=1e-5, rtol=1e-5)
    weights = next(own_cache.rglob("*.safetensors"))
    written = weights.stat().st_mtime_ns
    kvgeom.load(gguf_file, progress=False)
    assert weights.stat().st_mtime_ns == written
    assert not list(own_cache.rglob("*.partial"))


def test_a_conversion_on_a_full_disk(gguf_file: Path, own_cache: Path) -> None:
    """One line that says so; and what a killed conversion has left is no model, and makes way."""
    kept = own_cache / f"gguf-{CONVERSION}"
    with room_for(20_000), pytest.raises(InputError, match=r"cannot be written.*free some space"):
        kvgeom.load(gguf_file, progress=False)
    assert not [path for path in kept.iterdir() if path.suffix != ".lock"]
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()[:32]
    (kept / f"{digest}.partial").mkdir()
    (kept / f"{digest}.partial" / "model.safetensors").write_bytes(b"half")
    assert kvgeom.load(gguf_file, progress=False).name == gguf_file.name
    assert not list(kept.glob("*.partial"))


def truncated(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def header_only(data: bytes) -> bytes:
    return data[:60]


def not_gguf(data: bytes) -> bytes:
    return b"PK\x03\x04" + data[4:]


def altered_header(data: bytes) -> bytes:
    return data[:24] + bytes(255 - b for b in data[24:400]) + data[400:]


def altered_weights(data: bytes) -> bytes:
    huge = np.full(16, 1e30, dtype=np.float32).tobytes()
    return data[: -len(huge)] + huge


@pytest.mark.parametrize("damage", [truncated, header_only, not_gguf, altered_header, altered_weights])
def test_damaged_gguf_files(damage: Callable[[bytes], bytes], gguf_file: Path, tmp_path: Path, own_cache: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(damage(gguf_file.read_bytes()))
    with pytest.raises(InputError, match=r"bad\.gguf"):
        kvgeom.load(bad, progress=False)
    assert not [path for path in own_cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def empty(folder: Path) -> str:
    return str(folder)


def with_gguf(folder: Path) -> str:
    (folder / "model.gguf").write_bytes(b"GGUF")
    return str(folder)


def without_weights(folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(folder)


def unknown_architecture(folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    return str(folder)


def another_file(folder: Path) -> str:
    (folder / "weights.bin").write_bytes(b"")
    return str(folder / "weights.bin")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (empty, r"config\.json"),
        (with_gguf, r"model\.gguf"),
        (without_weights, "safetensors"),
        (unknown_architecture, "cannot be loaded"),
        (another_file, r"\.gguf"),
        (lambda folder: str(folder / "missing"), "missing"),
        (lambda folder: "./missing.gguf", r"missing\.gguf"),
        (lambda folder: "nobody-at-all/no-such-model-as-this", "no-such-model-as-this"),
        (lambda folder: "demo2", "demo-no-refusal"),
    ],
)
def test_no_model_there(make: Callable[[Path], str], says: str, tmp_path: Path) -> None:
    with pytest.raises(KvgeomError, match=says):
        kvgeom.load(make(tmp_path), progress=False)
