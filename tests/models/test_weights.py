"""How weights are stored, as reports say it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AwqConfig, GPTQConfig, Mxfp4Config, QuantoConfig

import kvgeom
from kvgeom.models.gguf import gguf_stored
from kvgeom.models.weights import weights_stored
from tests.builders.tiny import tiny_hf_model, tiny_model, tiny_tokenizer, write_tiny_gguf


def test_what_is_not_quantized_is_its_number_format(checkpoint: Path) -> None:
    assert kvgeom.load(checkpoint, progress=False).weights == tiny_model().weights == "float32"
    assert kvgeom.load(checkpoint, dtype="bfloat16", progress=False).weights == "bfloat16"


@pytest.mark.parametrize(
    ("kind", "file_type", "stored", "loaded"),
    [
        ("F32", None, "float32 (GGUF)", "float32 (GGUF)"),
        ("F16", None, "float16 (GGUF)", "float16 (GGUF), converted to float32"),
        ("Q8_0", None, "Q8_0 (GGUF)", "Q8_0 (GGUF), dequantized to float32"),
        ("Q8_0", int(gguf.LlamaFileType.MOSTLY_Q4_K_M), "Q4_K_M (GGUF)", "Q4_K_M (GGUF), dequantized to float32"),
        ("Q8_0", 999, "Q8_0 (GGUF)", "Q8_0 (GGUF), dequantized to float32"),  # newer than the reader
        ("F32", int(gguf.LlamaFileType.ALL_F32), "float32 (GGUF)", "float32 (GGUF)"),
    ],
)
def test_a_gguf_file(
    kind: str, file_type: int | None, stored: str, loaded: str, tmp_path: Path, own_cache: Path
) -> None:
    """Said by its header, else by the type of most weights; also the second time, when it is not converted any more."""
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, kind, file_type)
    assert gguf_stored(path) == stored
    for _ in range(2):
        assert kvgeom.load(path, progress=False).weights == loaded


def test_the_header_of_a_converted_file_is_read_once(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a large vocabulary that takes as long as all else of a load."""
    write_tiny_gguf(tmp_path / "tiny.gguf", "Q8_0")
    first = kvgeom.load(tmp_path / "tiny.gguf", progress=False).weights

    def never(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(gguf, "GGUFReader", never)
    assert kvgeom.load(tmp_path / "tiny.gguf", progress=False).weights == first


def test_a_gguf_file_in_another_number_format(tmp_path: Path, own_cache: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", "Q8_0")
    model = kvgeom.load(tmp_path / "tiny.gguf", dtype="bfloat16", progress=False)
    assert model.weights == "Q8_0 (GGUF), dequantized to bfloat16"
    assert weights_stored(copy.deepcopy(model.hf_model)) == model.weights


def test_a_model_that_transformers_has_read_from_gguf(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", "Q8_0")
    from transformers import AutoModelForCausalLM

    held = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype="float32")
    assert kvgeom.load(held, tokenizer=tiny_tokenizer()).weights == "GGUF, dequantized to float32"


def test_a_model_that_is_quantized_while_it_is_loaded(checkpoint: Path, tmp_path: Path, own_cache: Path) -> None:
    """By quanto, which runs on any processor."""
    config = QuantoConfig(weights="int8")
    quantized = kvgeom.load(checkpoint, quantization_config=config, progress=False)
    assert quantized.weights == "quanto int8"
    found = kvgeom.evaluate(quantized, "int4-asym-token", ["open the door"], max_new_tokens=2, progress=False)
    assert found.provenance()["weights"] == "quanto int8"
    write_tiny_gguf(tmp_path / "tiny.gguf", "Q8_0")
    twice = kvgeom.load(tmp_path / "tiny.gguf", quantization_config=QuantoConfig(weights="int8"), progress=False)
    assert twice.weights == "quanto int8, made of Q8_0 (GGUF)"


def test_released_weights_are_out_of_memory(checkpoint: Path) -> None:
    """Those of quantized modules too; what a model says of itself stays."""
    for options in ({}, {"quantization_config": QuantoConfig(weights="int8")}):
        model: Any = kvgeom.load(checkpoint, progress=False, **options)
        model.forward([5, 6, 7])
        told, shapes = model.weights, [weight.shape for weight in model.hf_model.parameters()]
        model.release()
        held = [*model.hf_model.parameters(), *model.hf_model.buffers()]
        assert all(each.is_meta for each in held)
        assert [weight.shape for weight in model.hf_model.parameters()] == shapes
        assert (model.weights, model.decode([40])) == (told, tiny_model().decode([40]))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes 4-bit (nf4)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes 8-bit"),
        (AwqConfig(bits=4), "AWQ 4-bit"),
        (GPTQConfig(bits=3), "GPTQ 3-bit"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 2}}}, "HQQ 2-bit"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "a": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 16}},
                    "b": {"weights": {"num_bits": 4}},
                },
                "kv_cache_scheme": {"num_bits": 8},
            },
            "compressed-tensors 4/8-bit",
        ),
        ({"quant_method": "fp8", "dequantize": False}, "FP8"),
        (Mxfp4Config(dequantize=True), "MXFP4, dequantized to float32"),
        ({"quant_method": "torchao"}, "torchao"),
    ],
)  # fmt: skip
def test_what_checkpoints_say_of_themselves(config: Any, says: str) -> None:
    """As configs on the hub do, and as transformers' objects."""
    model = tiny_hf_model()
    model.config.quantization_config = config
    assert weights_stored(model) == says
