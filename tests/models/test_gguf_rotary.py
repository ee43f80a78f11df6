"""What a GGUF file says of its rotary frequencies is what the model rotates with, or the file is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import kvgeom
from kvgeom.errors import InputError
from kvgeom.models.hf import HFModel
from tests.builders.tiny import write_tiny_gguf

#: Of heads of 8 channels with base 10,000.
PLAIN = 10000.0 ** (-torch.arange(4) / 4)


def llama3(writer: gguf.GGUFWriter) -> None:
    """The table that llama.cpp's converter writes for Llama 3.1: 8 times slower, but for what turns fast."""
    lengths = 2 * np.pi / PLAIN.numpy()
    smooth = np.clip((8192 / lengths - 1.0) / (4.0 - 1.0), 0, 1)
    writer.add_tensor("rope_freqs.weight", (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32))


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)


def other_table(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.array([1, 1, 3, 2], dtype=np.float32))


def short_table(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.array([1, 8], dtype=np.float32))


def long_factors(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_factors_long.weight", np.ones(4, dtype=np.float32))
    writer.add_tensor("rope_factors_short.weight", np.ones(4, dtype=np.float32))


def frequencies(path: Path) -> torch.Tensor:
    model = kvgeom.load(path, progress=False)
    assert isinstance(model, HFModel)
    found: torch.Tensor = model.hf_model.model.rotary_emb.inv_freq
    return found


def test_a_table_of_llama_3_is_found_in_the_model(tmp_path: Path, own_cache: Path) -> None:
    """Transformers leaves it out, and all angles far from the beginning were others."""
    write_tiny_gguf(tmp_path / "m.gguf", more=llama3)
    expected = torch.tensor([1.0, 0.1, 0.01, PLAIN[3] * ((1 - 0.10128) / 8 + 0.10128)])
    torch.testing.assert_close(frequencies(tmp_path / "m.gguf"), expected, rtol=1e-3, atol=0)


def test_linear_scaling_is_found_in_the_model(tmp_path: Path, own_cache: Path) -> None:
    write_tiny_gguf(tmp_path / "m.gguf", more=linear)
    torch.testing.assert_close(frequencies(tmp_path / "m.gguf"), PLAIN / 4)


@pytest.mark.parametrize("more", [yarn, other_table, short_table, long_factors])
def test_what_no_setting_does_is_refused(
    more: Callable[[gguf.GGUFWriter], None], tmp_path: Path, own_cache: Path
) -> None:
    write_tiny_gguf(tmp_path / "m.gguf", more=more)
    with pytest.raises(InputError, match=r"m\.gguf has .*rot|m\.gguf has rope\.scaling"):
        kvgeom.load(tmp_path / "m.gguf", progress=False)


def test_a_weight_that_the_file_lacks_is_named(tmp_path: Path, own_cache: Path) -> None:
    write_tiny_gguf(tmp_path / "m.gguf", without="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(InputError, match=r"lacks 1 weight .*model\.layers\.1\.mlp\.up_proj\.weight"):
        kvgeom.load(tmp_path / "m.gguf", progress=False)


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer")]
)
def test_what_is_no_file_at_all(content: bytes, says: str, tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(InputError, match=says):
        kvgeom.load(tmp_path / "m.gguf", progress=False)


def test_a_head_that_is_the_embedding_is_not_missed(tmp_path: Path, own_cache: Path) -> None:
    write_tiny_gguf(tmp_path / "m.gguf", without="lm_head.weight")
    model = kvgeom.load(tmp_path / "m.gguf", progress=False)
    assert isinstance(model, HFModel)
    assert torch.equal(model.hf_model.lm_head.weight, model.hf_model.model.embed_tokens.weight)
