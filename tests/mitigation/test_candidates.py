"""Caches that a plan can choose from: all are usable, all differ, and each is what its name says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from kvgeom.behaviour.scan import Scan
from kvgeom.diagnosis.mode import ModeName
from kvgeom.diagnosis.taxonomy import PRESCRIPTIONS
from kvgeom.engines.engine import CacheConfig
from kvgeom.engines.registry import presets, resolve
from kvgeom.errors import InputError
from kvgeom.mitigation.candidates import UNMITIGATED, Candidate, protect
from kvgeom.mitigation.decision_tree import advised
from kvgeom.mitigation.methods.registry import Method, Setting, candidates_of, method, methods, register_method
from kvgeom.models.hf import HFModel
from kvgeom.models.model import KVGeometry
from kvgeom.models.statistics import Constants, channel_statistics, constants
from kvgeom.quant.memory import cache_bytes
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from tests.builders.tiny import tiny_model, wide_model

PROMPTS = ["open the door", "Explain how clouds form, please"]
SCHEMES = [
    *(
        f"int{bits}-{sign}-{rest}"
        for bits, sign in ((4, "asym"), (3, "sym"))
        for rest in ("tensor", "token", "channel")
    ),
    *("int4-asym-head", "int4-asym-token-head", "int2-asym-group64", "int4-asym-group32", "int4-asym-group128"),
    *("int4-asym-channel-group32/f16", "int8-sym-group16/bf16", "int4-asym-token+center", "int4-sym-tensor+equalize"),
    *("q4_0", "q8_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "mxfp4", "nvfp4", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3-tensor"),
    *("mlx4-group64", "hqq4-group64", "vllm8-token-head", "vllm4-token-head+rht", "q4_0+hadamard"),
    *("turboquant3+rotation", "turboquant_prod4+rotation", "exllama4+hadamard32", "fp4_e2m1", "nvfp4_4over6"),
]
ENGINES = {
    **{text: resolve(text) for text in SCHEMES},
    **{
        f"{preset.name} {width}": resolve(preset.name, bits=width)
        for preset in presets()
        for width in preset.widths[:1]
    },
}


@cache
def wide() -> tuple[HFModel, Constants]:
    model = wide_model()
    return model, constants(model, PROMPTS)


def whole_cache(config: CacheConfig, geometry: KVGeometry, known: Constants) -> list[Candidate]:
    """The cache itself, and all candidates that treat every layer alike."""
    setting = Setting(config, geometry, known, {})
    return [setting.unmitigated, *candidates_of(setting, "cache", [setting.unmitigated])]


def stored(model: HFModel, recipe: Recipe, placement: Placement) -> list[torch.Tensor]:
    """Keys and values of all layers after prompt and two tokens."""
    cache = model.new_cache(Quantizer(recipe, placement))
    ids = model.encode(PROMPTS[1:])[0].ids
    for part in (ids, [40], [50]):
        model.forward(part, cache)
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_every_candidate_can_be_used_and_differs(name: str) -> None:
    model, known = wide()
    engine = ENGINES[name]
    found = whole_cache(engine, model.geometry, known)
    assert found[0].name == UNMITIGATED
    assert found[0].recipe.layers == engine.recipe(3).layers
    assert len({candidate.name for candidate in found}) == len(found)
    assert len({candidate.recipe for candidate in found}) == len(found)
    # A window that this prompt fills, so that engines that let tokens wait round as well.
    placement = replace(engine.placement, residual=min(engine.placement.residual, 32))
    seen = {candidate.name: stored(model, candidate.recipe, placement) for candidate in found}
    exact = stored(model, Recipe.exact(3), placement)
    for candidate in found:
        assert candidate.description
        assert all(bool(torch.isfinite(x).all()) for x in seen[candidate.name])
        assert any(not torch.equal(a, b) for a, b in zip(seen[candidate.name], exact, strict=True))
    for n, one in enumerate(found):
        for other in found[:n]:
            assert any(not torch.equal(a, b) for a, b in zip(seen[one.name], seen[other.name], strict=True)), (
                one.name,
                other.name,
            )


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_finer_scales_are_no_fewer(name: str) -> None:
    model, known = wide()
    g = model.geometry
    found = whole_cache(ENGINES[name], g, known)
    size = {candidate.name: replace(candidate, placement=Placement()).bytes_per_token(g) for candidate in found}
    for candidate in found:
        if candidate.family == "refine":
            # Scales of channels are shared by all tokens, and so take no more room than one of each token.
            assert size[candidate.name] > size[UNMITIGATED] or "channel" in candidate.name
        if candidate.family in ("center", "equalize", "hadamard"):
            assert size[candidate.name] == size[UNMITIGATED]
        for (k, v), base in zip(candidate.recipe, found[0].recipe, strict=True):
            for one, other in zip((k, v), base, strict=True):
                assert (one is None) == (other is None)  # layers that the engine leaves alone stay so
                if one is None or other is None:
                    continue
                assert one.bits == other.bits
                if candidate.family != "turboquant":  # which is a format of its own
                    assert (one.format, one.scales, one.symmetric) == (other.format, other.scales, other.symmetric)


def test_turboquant_keeps_the_width_and_stores_a_norm() -> None:
    model, known = wide()
    found = {c.name: c for c in whole_cache(resolve("int3-asym-token"), model.geometry, known)}
    for name, keys in (("turboquant", "turboquant3"), ("turboquant, residual signs of keys", "turboquant_prod3")):
        assert str(found[name].recipe) == (
            "turboquant3+rotation" if keys == "turboquant3" else f"k {keys}+rotation, v turboquant3+rotation"
        )
        norms = 3 if keys == "turboquant3" else 4.5  # of keys and values of two heads, or two of the keys
        assert found[name].bytes_per_token(model.geometry) == 3 * (2 * 2 * 64 * 3 / 8 + norms / 3 * 2 * 2 * 2)
    assert not {n for n in (c.name for c in whole_cache(resolve("fp8_e5m2"), model.geometry, known)) if "turbo" in n}


def test_center_at_the_mean_key() -> None:
    """A model with a bias is offered both offsets; they take out what they say, and no memory."""
    model = tiny_model("qwen2")
    torch.manual_seed(0)
    for name, weight in model.hf_model.named_parameters():
        if name.endswith("k_proj.bias"):
            torch.nn.init.normal_(weight)
    known = constants(model, PROMPTS)
    found = {c.name: c for c in whole_cache(resolve("int4-asym-token"), model.geometry, known)}
    bias, mean = (found[name].recipe.offsets for name in ("center", "center at the mean key"))
    assert known.mean_keys is mean
    assert bias is known.keys
    seen = channel_statistics(model, PROMPTS)
    for layer in range(model.geometry.layers):
        assert torch.equal(mean.vectors[layer, "k"], seen.mean[layer, "k"])
        assert torch.equal(bias.vectors[layer, "k"], model.key_biases()[layer, "k"])
        assert not torch.allclose(mean.vectors[layer, "k"], bias.vectors[layer, "k"])
    plain = tiny_model("llama")
    known = constants(plain, PROMPTS)
    assert known.mean_keys is None
    assert "center at the mean key" not in {
        c.name for c in whole_cache(resolve("int4-asym-token"), plain.geometry, known)
    }


def test_scales_that_are_there_already_are_not_offered() -> None:
    """16 channels in all: a scale for 64 of them is a scale for a token."""
    model = tiny_model("llama")
    known = constants(model, PROMPTS)
    names = {c.name for c in whole_cache(resolve("int4-asym-token"), model.geometry, known)}
    assert not {name for name in names if "group" in name}
    assert "per-channel keys" in names
    wide_known = wide()
    for text in ("int4-asym-group32", "kivi"):
        assert not {c.name for c in whole_cache(resolve(text), wide_known[0].geometry, wide_known[1])} & {
            "group-64", "group-32", "per-channel keys, group-64 values",
        }  # fmt: skip


def test_constants_are_those_of_the_model() -> None:
    model, known = wide()
    assert known.keys.name == "key bias"
    bias = dict(model.hf_model.named_parameters())["model.layers.1.self_attn.k_proj.bias"]
    torch.testing.assert_close(known.keys.vectors[1, "k"].flatten(), bias)
    values, largest = [], []
    for prompt in model.encode(PROMPTS):
        cache = model.new_cache()
        model.forward(prompt.ids, cache)
        values.append(cache.layers[2].values[0])
        largest.append(values[-1].abs().amax(1))
    torch.testing.assert_close(known.both.vectors[2, "v"], torch.cat(values, 1).mean(1))
    factors = torch.maximum(*largest)
    torch.testing.assert_close(known.factors.vectors[2, "v"], factors / factors.log().mean(1, keepdim=True).exp())
    keys = known.factors.vectors[0, "k"]
    torch.testing.assert_close(keys[:, :32], keys[:, 32:])
    without = constants(tiny_model("llama"), PROMPTS)
    assert without.keys.name == "mean key"
    with pytest.raises(InputError, match="prompts"):
        constants(model, [])


# --- layers in 16 bits ---


@given(
    st.sampled_from(["int4-asym-token", "kivi", "fp8_e5m2"]),
    st.sets(st.integers(0, 4), min_size=1),
    st.sets(st.sampled_from(["k", "v"]), min_size=1),
)
def test_protect(name: str, layers: set[int], sites: set[str]) -> None:
    engine = resolve(name)
    base = Candidate(UNMITIGATED, "unmitigated", engine.recipe(5), engine.placement, name)
    found = protect(base, layers, sites, how="first")  # type: ignore[arg-type]
    for layer, pair in enumerate(found.recipe):
        for site, scheme, before in zip("kv", pair, (engine.k, engine.v), strict=True):
            assert scheme == (None if layer in layers and site in sites else before)
    for site, word in (("k", "keys"), ("v", "values")):
        assert (word in found.description) == (site in sites)
    assert ("keys" in found.name, "values" in found.name) == ((sites == {"k"}), (sites == {"v"}))
    assert all(str(layer) in found.name for layer in layers)
    shape, p = (2, 64), engine.placement
    whole = cache_bytes(found.recipe, p, *shape, 4096)
    by_site = sum(
        cache_bytes(Recipe(((s if site == "k" else None, s if site == "v" else None),)), p, *shape, 4096)
        - cache_bytes(Recipe.exact(1), p, *shape, 4096) // 2
        for pair in found.recipe
        for site, s in zip("kv", pair, strict=True)
    )
    assert whole == by_site
    geometry = replace(wide()[0].geometry, layers=5, stores=())
    assert found.bytes_per_token(geometry) == whole / 4096


def test_protect_keeps_what_it_is_put_on() -> None:
    model, known = wide()
    center = next(c for c in whole_cache(resolve("int4-asym-token"), model.geometry, known) if c.name == "center")
    found = protect(center, [2, 0])
    assert (found.name, found.family) == ("center; layers 0, 2 in 16 bits", "combined")
    assert (found.recipe.offsets, found.recipe.touched) == (known.keys, (1,))
    assert center.description in found.description


@pytest.mark.parametrize(
    ("layers", "sites", "named"),
    [([], "kv", "0 to 2"), ([3], "kv", "0 to 2"), ([-1], "kv", "0 to 2"), ([0], "", "must be k, v"),
     ([0], ["q"], "must be k, v")],
)  # fmt: skip
def test_what_cannot_be_protected(layers: list[int], sites: str, named: str) -> None:
    base = Candidate(UNMITIGATED, "unmitigated", resolve("int4-asym-token").recipe(3), Placement(), "")
    with pytest.raises(InputError, match=named):
        protect(base, layers, sites)  # type: ignore[arg-type]


# --- what the paper advises ---


def scan(flips: list[int], drop: list[float], refused: int = 20) -> Scan:
    columns = {"flips_complied": flips, "margin_drop": drop}
    coords = {"layer": np.arange(len(flips))}
    return Scan(xr.Dataset({name: ("layer", values) for name, values in columns.items()}, coords), {"prompts": refused})


ADVICE: dict[ModeName, tuple[str, list[tuple[str | None, str | None]]]] = {
    "outlier-crushes-safety": ("group-64 everywhere", [("int3-sym-group64",) * 2] * 5),
    "outlier-as-safety": ("critical layer 3 in 16 bits", [("int3-sym-tensor",) * 2] * 3 + [(None, None)] + [("int3-sym-tensor",) * 2]),
    "multi-layer dilution": (
        "critical layers 0, 1, 3 in 16 bits",
        [(None, None), (None, None), ("int3-sym-tensor",) * 2, (None, None), ("int3-sym-tensor",) * 2],
    ),
    "mixed": (
        "per-channel in layer 3, group-64 elsewhere",
        [("int3-sym-group64",) * 2] * 3 + [("int3-sym-channel",) * 2] + [("int3-sym-group64",) * 2],
    ),
    "hyper-vulnerable": ("whole cache in 16 bits", [(None, None)] * 5),
    "robust": (UNMITIGATED, [("int3-sym-tensor",) * 2] * 5),
    "undetermined": (UNMITIGATED, [("int3-sym-tensor",) * 2] * 5),
    "conflicting": (UNMITIGATED, [("int3-sym-tensor",) * 2] * 5),
    "language lost": (UNMITIGATED, [("int3-sym-tensor",) * 2] * 5),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PRESCRIPTIONS))
def test_advice_of_every_mode(name: ModeName) -> None:
    unmitigated = Candidate(UNMITIGATED, "unmitigated", resolve("int3-sym-tensor").recipe(5), Placement(), "")
    # Layers 0, 1 and 3 flip a tenth; 2 loses more margin than 0 and 1 and flips less.
    found = advised(name, scan([3, 2, 1, 9, 0], [1.0, 0.5, 2.0, 4.0, 0.0]), unmitigated)
    called, layers = ADVICE[name]
    assert found.name == called
    assert [tuple(None if s is None else str(s) for s in pair) for pair in found.recipe] == layers
    assert found.description == PRESCRIPTIONS[name]


@given(st.sampled_from(sorted(ENGINES)), st.sampled_from(list(PRESCRIPTIONS)))
def test_advice_for_every_engine(name: str, mode: ModeName) -> None:
    """An engine's own format is replaced by integers of its width, which can hold all that the advice asks for."""
    engine: CacheConfig = ENGINES[name]
    unmitigated = Candidate(UNMITIGATED, "unmitigated", engine.recipe(5), engine.placement, "")
    found = advised(mode, scan([0] * 5, [1.0, np.nan, 0.5, 3.0, 2.0]), unmitigated)
    for pair, base in zip(found.recipe, unmitigated.recipe, strict=True):
        for one, other in zip(pair, base, strict=True):
            assert one is None or other is not None
            if one is not None and other is not None and one != other:
                assert (one.bits, one.format, one.transform) == (other.bits, "int", "none")
    quantizer = Quantizer(found.recipe, engine.placement)
    if not {s.transform for pair in found.recipe for s in pair if s is not None} & {"center", "equalize"}:
        assert torch.isfinite(quantizer(0, "k", torch.randn(1, 2, 5, 64))).all()


def test_the_worst_layers_are_few_and_in_order() -> None:
    assert scan([2, 9, 4, 4, 1], [0, 0, 1, 2, 0]).worst() == [1, 3, 2]
    assert scan([1, 0, 0, 0, 0], [0, 1, 5, np.nan, 2]).worst() == [0, 2, 4]
    assert scan([0, 0], [0, 1]).worst() == [1]
    assert scan([0], [0]).worst() == [0]


def test_dilution_keeps_the_layers_that_were_tried_together() -> None:
    """Also those that alone lose less than a tenth: that one of them is not enough is what the mode says."""
    unmitigated = Candidate(UNMITIGATED, "unmitigated", resolve("int3-sym-tensor").recipe(5), Placement(), "")
    found = advised("multi-layer dilution", scan([20, 1, 1, 0, 0], [4.0, 2.0, 1.0, 0.5, 0.0], 64), unmitigated)
    assert found.name == "critical layers 0, 1, 2 in 16 bits"
    assert found.recipe.touched == (3, 4)


# --- mitigations by name ---


def test_windows_keep_tokens_and_are_counted() -> None:
    model, known = wide()

    def offered(text: str) -> dict[str, Placement]:
        setting = Setting(resolve(text), model.geometry, known, {})
        return {each.name: each.placement for each in candidates_of(setting, "placement")}

    assert [(p.sinks, p.residual) for p in offered("int4-asym-token").values()] == [(4, 0), (0, 32), (0, 128)]
    kept = offered("kivi")
    assert [(p.sinks, p.residual) for p in kept.values()] == [(4, resolve("kivi").placement.residual)]
    assert not offered("paper")
    setting = Setting(resolve("int4-asym-token"), model.geometry, known, {})
    base = setting.unmitigated
    for each in candidates_of(setting, "placement", [base]):
        assert each.recipe == base.recipe
        exact = each.placement.sinks + each.placement.residual
        g = model.geometry
        per_token = cache_bytes(Recipe.exact(3), Placement(), g.kv_heads, g.head_dim, 4096) / 4096
        expected = (exact * per_token + (4096 - exact) * base.bytes_per_token(g)) / 4096
        assert each.bytes_per_token(g) == pytest.approx(expected)
        assert each.condition().placement == each.placement
        assert each.rounded_share(200) == pytest.approx(1 - exact / 200)
    assert base.rounded_share(7) == 1


def test_mitigations_are_registered_once() -> None:
    names = [each.name for each in methods()]
    assert names == ["center", "equalize", "hadamard", "refine", "turboquant", "protect", "window"]
    with pytest.raises(InputError, match="'center'"):
        method("center")(lambda setting: ())
    with pytest.raises(InputError, match="'later'"):
        register_method(Method("mine", lambda setting: (), "later"))  # type: ignore[arg-type]
    assert [each.name for each in methods()] == names


def test_a_name_belongs_to_one_cache() -> None:
    model, known = wide()
    setting = Setting(resolve("int4-asym-token"), model.geometry, known, {})
    taken = replace(setting.unmitigated, name="center")
    with pytest.raises(InputError, match="'center'"):
        candidates_of(setting, "cache", [setting.unmitigated, taken, replace(taken, recipe=Recipe.exact(3))])
