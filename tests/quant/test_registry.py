"""Formats and transforms from outside the package: known wherever a built-in one is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvgeom.engines.registry import resolve, scheme_rows
from kvgeom.errors import InputError
from kvgeom.models.packed import PackedCache
from kvgeom.models.statistics import missing_constants
from kvgeom.quant import transforms
from kvgeom.quant.fake_quantize import fake_quantize
from kvgeom.quant.formats import base
from kvgeom.quant.formats.base import Axes, Format, Scales, formats, get_format, register_format
from kvgeom.quant.memory import bits_per_element, cache_bytes
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.transforms import Statics, Transform, register_transform
from tests.builders.tensors import keys
from tests.builders.tiny import wide_model


class Ternary(Format):
    """-1, 0 or 1 times the mean magnitude."""

    def fit(self, scheme: Scheme, blocks: Tensor, axes: Axes) -> Scales:
        step = blocks.abs().mean(axes, keepdim=True).half().to(blocks.dtype)
        return Scales(step, torch.zeros_like(step))

    def encode(self, scheme: Scheme, blocks: Tensor, scales: Scales) -> Tensor:
        return (blocks / scales.step.clamp_min(1e-8)).round().clamp(-1, 1)

    def lowest(self, scheme: Scheme) -> int:
        return -1


TERNARY = Ternary(
    name="ternary",
    widths=(2,),
    granularities=("group", "token-head", "channel"),
    symmetric_widths=(2,),
    examples={"ternary-group64": "BitNet's levels"},
)


@pytest.fixture
def ternary() -> Iterator[Format]:
    yield register_format(TERNARY)
    del base._FORMATS["ternary"]


@pytest.mark.parametrize("text", ["ternary-group32", "ternary-token-head+hadamard", "ternary-channel@0-3"])
def test_a_format_from_outside_is_spelled(ternary: Format, text: str) -> None:
    scheme = Scheme.parse(text)
    assert str(scheme) == text
    assert (scheme.format, scheme.bits, scheme.symmetric) == ("ternary", 2, True)
    assert resolve(text).k == scheme


def test_a_format_from_outside_quantizes(ternary: Format) -> None:
    x = keys()
    found = fake_quantize(x, Scheme.parse("ternary-group64"))
    step = x.abs().mean(-1, keepdim=True).half().float()
    assert torch.equal(found, (x / step).round().clamp(-1, 1) * step)


@pytest.mark.parametrize("text", ["ternary-group64", "ternary-channel", "ternary-token-head+hadamard"])
@pytest.mark.parametrize("placement", [Placement(), Placement(residual=4)], ids=str)
def test_a_format_from_outside_is_packed_and_counted(ternary: Format, text: str, placement: Placement) -> None:
    model, recipe = wide_model(), Recipe.uniform(3, Scheme.parse(text))
    simulated, packed = model.new_cache(Quantizer(recipe, placement)), PackedCache(3, Quantizer(recipe, placement))
    for ids in ([1, *range(40, 52)], [52], [53]):
        assert torch.equal(model.forward(ids, packed), model.forward(ids, simulated))
    assert packed.nbytes == cache_bytes(recipe, placement, 2, 64, 13, 2, exact_bytes=4)


def test_a_format_from_outside_is_listed(ternary: Format) -> None:
    row = next(row for row in scheme_rows(2, 64, 100) if row["name"] == "ternary-group64")
    assert (row["kind"], row["bits"], row["note"]) == ("format", 2, "BitNet's levels")
    assert row["bits_per_element"] == 2 + 16 / 64
    assert bits_per_element(Recipe.uniform(1, Scheme.parse("ternary-group64")), kv_heads=2, head_dim=64) == 2.25


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("ternary-token", "'token'"),
        ("ternary-group", "group_size"),
        ("ternary4-group64", "ternary4-group64"),
        ("ternary-group64/f16", "'f16'"),
    ],
)
def test_what_a_format_does_not_have_is_refused(ternary: Format, text: str, word: str) -> None:
    with pytest.raises(InputError, match=word):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"name": "q4_0", "examples": {"q4_0": ""}}, "q4_0"),
        ({"name": "Ternary!"}, "Ternary!"),
        ({"name": "trits"}, "trits"),
        ({"examples": {}}, "example"),
        ({"name": "int4", "symmetric_widths": None, "examples": {"int4-sym-channel": ""}}, "int, int4"),
    ],
)
def test_registration_refuses(change: dict[str, object], word: str) -> None:
    before = formats()
    with pytest.raises(InputError, match=word):
        register_format(replace(TERNARY, **change))  # type: ignore[arg-type]
    assert formats() == before


def test_an_unknown_format_names_those_that_are() -> None:
    assert formats()[0] is get_format("int")
    with pytest.raises(InputError, match="mxfp4"):
        get_format("gptq")


@pytest.mark.parametrize("known", formats(), ids=lambda known: known.name)
def test_examples_are_written_as_they_are_read(known: Format) -> None:
    for text in known.examples:
        assert str(Scheme.parse(text)) == text
        assert Scheme.parse(text).format == known.name


class Reverse(Transform):
    """Channels in reverse order, for groups of other neighbours."""

    def enter(self, x: Tensor, constant: Tensor | None) -> Tensor:
        return x.flip(-1)

    def leave(self, y: Tensor, constant: Tensor | None) -> Tensor:
        return y.flip(-1)


class Shift(Transform):
    """As ``center``, with a sign of its own."""

    def enter(self, x: Tensor, constant: Tensor) -> Tensor:
        return x + constant

    def leave(self, y: Tensor, constant: Tensor) -> Tensor:
        return y - constant


@pytest.fixture
def extra() -> Iterator[None]:
    register_transform(Reverse(name="reverse"))
    register_transform(Shift(name="shift2", constants="offsets"))
    yield
    del transforms._TRANSFORMS["reverse"], transforms._TRANSFORMS["shift2"]


@pytest.mark.parametrize("text", ["q4_0+reverse", "int3-sym-tensor+shift2", "int4-asym-group64/f16+reverse@0-3"])
def test_a_transform_from_outside_is_spelled(extra: None, text: str) -> None:
    assert str(Scheme.parse(text)) == text
    assert Scheme.parse(text).constants == ("offsets" if "shift2" in text else None)


def test_a_transform_from_outside_is_applied(extra: None) -> None:
    x = keys()
    expected = fake_quantize(x.flip(-1), Scheme.parse("int4-asym-group48")).flip(-1)
    assert torch.equal(fake_quantize(x, Scheme.parse("int4-asym-group48+reverse")), expected)
    assert torch.equal(Quantizer(Recipe.uniform(1, Scheme.parse("int4-asym-group48+reverse")))(0, "k", x), expected)


def test_constants_reach_a_transform_from_outside(extra: None) -> None:
    x = keys()
    offset = torch.arange(x.shape[1] * x.shape[3]).view(x.shape[1], x.shape[3]).float()
    recipe = Recipe.uniform(1, Scheme.parse("int4-asym-token+shift2"))
    found = Quantizer(recipe.with_statics(offsets=Statics.of("ramp", {(0, "v"): offset})))(0, "v", x)
    moved = offset[None, :, None]
    assert torch.equal(found, fake_quantize(x + moved, Scheme.parse("int4-asym-token")) - moved)
    with pytest.raises(InputError, match="offsets"):
        Quantizer(recipe)(0, "v", x)
    with pytest.raises(InputError, match="shift2"):
        fake_quantize(x, Scheme.parse("int4-asym-token+shift2"))


@pytest.mark.parametrize("name", ["none", "hadamard", "Mine", "two-words"])
def test_transform_names_that_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=name):
        register_transform(Reverse(name=name))


def test_an_unknown_transform_names_those_that_are() -> None:
    with pytest.raises(InputError, match="hadamard64"):
        Scheme.parse("int4-asym-token+whiten")


def test_memories_are_bounded_and_keep_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "_KEPT", 3)
    made: list[int] = []
    cache: dict[int, int] = {}

    def square(key: int) -> int:
        made.append(key)
        return key * key

    for key in (1, 2, 3, 3, 4, 4, 1):
        assert transforms.remembered(cache, key, square) == key * key
    assert made == [1, 2, 3, 4, 1]
    assert sorted(cache) == [1, 3, 4]


def test_placements_by_name() -> None:
    given = Placement(sinks=2)
    assert Placement.parse("cache") == Placement()
    assert Placement.parse("paper") == Placement(where="projection", scales="call")
    assert Placement.parse(given) is given
    with pytest.raises(InputError, match="choose from cache, paper"):
        Placement.parse("attic")
    with pytest.raises(InputError, match="did you mean 'cache'"):
        Placement.parse("cahce")


def test_a_transform_from_outside_gets_what_it_needs(extra: None) -> None:
    recipe = Recipe.uniform(2, Scheme.parse("int3-sym-tensor+shift2"), sites="k")
    assert recipe.sites_with("offsets") == {"k"}
    assert recipe.sites_with("factors") == set()
    assert missing_constants(recipe) == ({"k"}, set())
