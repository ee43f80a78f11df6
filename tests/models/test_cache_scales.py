"""Scales out of checkpoints: found under the names that tools give them, and applied as an engine does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvgeom.errors import InputError
from kvgeom.models.cache_scales import checkpoint_scales
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.tensors import keys
from tests.builders.tiny import wide_model

GEOMETRY = wide_model().geometry
X = keys(9)


def stored(folder: Path, scheme: str, layer: int, site: str) -> torch.Tensor:
    recipe = Recipe.uniform(3, Scheme.parse(scheme)).with_statics(factors=checkpoint_scales(folder, GEOMETRY))
    return Quantizer(recipe)(layer, site, X)  # type: ignore[arg-type]


def cast(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As vLLM's kernel has it: divide, saturate, cast; multiply when it is read."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize(
    "name",
    ["self_attn.{}_proj.{}_scale", "self_attn.{1}_scale", "self_attn.attn.{1}_scale", "self_attn.qkv_proj.{1}_scale",
     "self_attn.{}_cache.scale"],
)  # fmt: skip
def test_one_scale_for_a_tensor(tmp_path: Path, name: str) -> None:
    given = {(n, site): torch.tensor(0.013 * (n + 1) + (site == "v")) for n in range(2) for site in "kv"}
    named = {f"model.layers.{n}.{name.format(site, site)}": scale for (n, site), scale in given.items()}
    split = dict(list(named.items())[:1]), dict(list(named.items())[1:])
    for number, part in enumerate(split):
        save_file({**part, f"other{number}.weight": torch.zeros(2)}, tmp_path / f"model-{number}.safetensors")
    for (n, site), scale in given.items():
        assert torch.equal(stored(tmp_path, "fp8_e4m3+equalize", n, site), cast(X, scale))
    # A layer without scales is cast as it is.
    assert torch.equal(stored(tmp_path, "fp8_e4m3+equalize", 2, "k"), cast(X, torch.tensor(1.0)))


def test_one_scale_for_a_head(tmp_path: Path) -> None:
    scales = torch.tensor([0.01, 0.3]).view(2, 1, 1)
    save_file(
        {"model.layers.1.self_attn.k_scale": scales, "model.layers.1.self_attn.v_scale": 2 * scales},
        tmp_path / "a.safetensors",
    )
    assert torch.equal(stored(tmp_path, "fp8_e4m3+equalize", 1, "k"), cast(X, scales))
    assert torch.equal(stored(tmp_path, "fp8_e4m3+equalize", 1, "v"), cast(X, 2 * scales))


@pytest.mark.parametrize("name", ["kv_scale", "k_scale"])
def test_one_scale_for_keys_and_values(tmp_path: Path, name: str) -> None:
    scale = torch.tensor([0.02])
    save_file({f"model.layers.0.self_attn.{name}": scale}, tmp_path / "a.safetensors")
    for site in "kv":
        assert torch.equal(stored(tmp_path, "fp8_e4m3+equalize", 0, site), cast(X, scale))


def test_two_levels_of_nvfp4(tmp_path: Path) -> None:
    """A scale of the tensor brings scales of blocks into the range of E4M3 that they would leave."""
    save_file({"model.layers.0.self_attn.k_scale": torch.tensor(2.0**-14)}, tmp_path / "a.safetensors")
    small = X * 2.0**-14
    recipe = Recipe.uniform(3, Scheme.parse("nvfp4+equalize")).with_statics(
        factors=checkpoint_scales(tmp_path, GEOMETRY)
    )
    with_scale, without = (
        (Quantizer(each)(0, "k", small) - small).norm() for each in (recipe, Recipe.uniform(3, Scheme.parse("nvfp4")))
    )
    assert torch.equal(Quantizer(recipe)(0, "k", small) * 2.0**14, Quantizer(Recipe.uniform(3, "nvfp4"))(0, "k", X))
    assert with_scale < without / 5


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.layers.0.self_attn.k_proj.weight": torch.ones(1)}, "no scales"),
        ({"model.layers.0.self_attn.v_scale": torch.ones(1)}, "none of keys"),
        ({"model.layers.0.self_attn.k_scale": torch.ones(3)}, "1 or 2"),
        ({"model.layers.7.self_attn.k_scale": torch.ones(1)}, "3 layers"),
        ({"model.layers.0.self_attn.k_scale": torch.tensor(-1.0)}, "positive"),
        ({"model.layers.0.self_attn.k_scale": torch.tensor(float("inf"))}, "positive"),
    ],
)
def test_scales_that_cannot_be_used(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=message):
        checkpoint_scales(tmp_path, GEOMETRY)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no scales"):
        checkpoint_scales(tmp_path / "none", GEOMETRY)
