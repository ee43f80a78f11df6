"""Models whose layers do not all store keys and values of one shape: what is rounded, and that all else stays as it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import kvgeom
from benchmarks import architectures
from kvgeom.behaviour.pcr import per_channel_reduction
from kvgeom.behaviour.scan import single_layer_scan
from kvgeom.engines.registry import resolve
from kvgeom.engines.vllm import export
from kvgeom.errors import InputError, KvgeomWarning, ModelError
from kvgeom.evaluation.baseline import baseline
from kvgeom.mitigation.plan import Plan
from kvgeom.models.hf import HFModel
from kvgeom.models.packed import quantized_cache
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.hybrids import HYBRIDS, hybrid
from tests.builders.judges import ArbitraryJudge
from tests.builders.requests import PAIRS, REQUESTS
from tests.builders.tiny import tiny_tokenizer

IDS = [1, *range(40, 70), 12, 9, 200]  # longer than the windows and than what the index picks
ROUGH = Scheme.parse("int4-sym-token")
PROMPTS = [IDS, IDS[:9], IDS[3:25]]


@pytest.fixture(scope="module", params=HYBRIDS.values(), ids=HYBRIDS)
def model(request: pytest.FixtureRequest) -> HFModel:
    return hybrid(request.param)


#: Layers that store, hold states, and read what another has stored, of four.
LAYERS = {
    "qwen3_next": ((1, 3), (0, 2), ()),
    "jamba": ((1, 3), (0, 2), ()),
    "falcon_h1": ((0, 1, 2, 3), (0, 1, 2, 3), ()),
    "nemotron_h": ((2,), (0,), ()),
    "lfm2": ((1, 3), (0, 2), ()),
    "zamba2": ((1, 3), (0, 1, 2, 3), ()),
    "deepseek_v3": ((0, 1, 2, 3), (), ()),
    "kimi_linear": ((1, 3), (0, 2), ()),
    "deepseek_v32": ((0, 1, 2, 3), (), ()),
    "gemma3n_text": ((0, 1), (), (2, 3)),
    "gemma4_text": ((0, 1), (), (2, 3)),
    "mimo_v2_flash": ((0, 1, 2, 3), (), ()),
}
#: KV heads and channels of keys, and of values, where they are not all alike.
SHAPES = {
    "deepseek_v3": ((1, 16, 1, 4),) * 4,
    "kimi_linear": ((1, 16, 1, 4),) * 2,
    "deepseek_v32": ((1, 16, 1, 4),) * 4,
    "gemma4_text": ((2, 8, 2, 8), (2, 16, 2, 16)),
    "mimo_v2_flash": ((2, 12, 2, 8), *((4, 12, 4, 8),) * 3),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_what_every_layer_stores(kind: str) -> None:
    geometry = hybrid(kind).geometry
    assert geometry.layers == 4
    assert (geometry.stores, geometry.states, geometry.shares) == LAYERS[kind]
    assert geometry.shapes == SHAPES.get(kind, ())
    assert geometry.latent == (kind in ("deepseek_v3", "kimi_linear", "deepseek_v32"))
    assert geometry.alone == (geometry.indexed != ()) == (kind == "deepseek_v32")
    for words, said in (
        ("recurrent states", geometry.states),
        ("read what", geometry.shares),
        ("index", geometry.alone),
    ):
        assert (words in geometry.note) == bool(said)


def test_greedy_decoding_is_transformers_own(model: HFModel) -> None:
    """With an exact recipe, in a batch of several lengths and alone."""
    exact = Recipe.exact(4)
    caches = [model.new_cache(Quantizer(exact)) for _ in PROMPTS]
    first = [int(model.forward(ids, cache)[-1].argmax()) for ids, cache in zip(PROMPTS, caches, strict=True)]
    expected = []
    for ids in PROMPTS:
        theirs = model.hf_model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=6, eos_token_id=sorted(model.stop_tokens)
        )[0, len(ids) :].tolist()
        expected.append([token for token in theirs if token not in model.stop_tokens])
    assert model.generate(caches, first, 6) == expected
    alone = [model.generate([cache], [token], 6)[0] for cache, token in zip(caches, first, strict=True)]
    assert alone == expected


class _Rounded(DynamicCache):  # type: ignore[no-untyped-call]
    """Transformers' own cache of a model, with keys and values rounded as they come: 4 bits, a symmetric scale a token."""

    def __init__(self, config: Any, rounds: set[int]) -> None:
        super().__init__(config=config)  # type: ignore[no-untyped-call]
        self.rounds = rounds

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        pair = (keys, values) if layer_idx not in self.rounds else (_nearest(keys), _nearest(values))
        found: tuple[Tensor, Tensor] = super().update(*pair, layer_idx, *args, **kwargs)
        return found


def _nearest(x: Tensor) -> Tensor:
    rounded = x.clone()
    for row in range(x.shape[0]):
        for token in range(x.shape[2]):
            step = x[row, :, token].abs().max() / 7
            rounded[row, :, token] = torch.round(x[row, :, token] / step) * step
    return rounded


@torch.inference_mode()
@pytest.mark.parametrize("chosen", ["all", "last"])
def test_rounding_is_that_of_transformers_own_cache(model: HFModel, chosen: str) -> None:
    layers = model.geometry.stores if chosen == "all" else model.geometry.stores[-1:]
    theirs, ours = (
        _Rounded(model.hf_model.config, {*layers}),
        model.new_cache(Quantizer(Recipe.uniform(4, ROUGH, layers=layers))),
    )
    exact = model.new_cache()
    moved = 0.0
    for begin, ids in ((0, IDS[:20]), *((at, [IDS[at]]) for at in range(20, 24))):
        own = model.hf_model(
            torch.tensor([ids]),
            position_ids=torch.arange(begin, begin + len(ids))[None],
            past_key_values=theirs,
            use_cache=True,
        ).logits[0, -1]
        found = model.forward(ids, ours)[-1]
        allowed = 1e-5 * float(own.abs().max())
        torch.testing.assert_close(found, own.float(), atol=allowed, rtol=1e-5)
        moved = max(moved, float((found - model.forward(ids, exact)[-1]).abs().max()) / allowed)
    assert moved > 100


def test_every_site_passes_the_edit_once(model: HFModel) -> None:
    """Layers that share a cache are rounded by the one that stores, and no layer without keys and values is."""
    seen: list[tuple[int, str, tuple[int, ...]]] = []

    class Seen(Quantizer):
        def __call__(self, layer: int, site: Any, x: Tensor) -> Tensor:
            seen.append((layer, site, tuple(x.shape)))
            return super().__call__(layer, site, x)

    model.forward(IDS[:5], model.new_cache(Seen(Recipe.uniform(4, ROUGH))))
    sites: tuple[Any, ...] = ("k", "v")
    expected = [
        (layer, site, (1, heads, 5, size))
        for layer in model.geometry.stores
        for site in sites
        for heads, size in [model.geometry.shape(layer, site)]
    ]
    assert seen == expected


def test_a_copy_and_a_row_have_states_of_their_own(model: HFModel) -> None:
    cache = model.new_cache()
    model.forward(IDS[:9], cache)
    fork = cache.copy()
    expected = model.forward([7], cache.copy())
    model.forward([30, 31], fork)
    assert torch.equal(model.forward([7], cache.copy()), expected)
    both = type(cache).stack([cache, cache.copy()])
    one = both.row(1, 9)
    model.forward([30, 31], one)
    assert torch.equal(model.forward([7], both.row(0, 9)), expected)
    both.keep(torch.tensor([1]))
    assert torch.equal(model.forward([7], both), expected)


def test_tokens_after_a_prompt_are_read_one_by_one(model: HFModel) -> None:
    together, stepwise = model.new_cache(), model.new_cache()
    model.forward(IDS[:20], together)
    model.forward(IDS[:20], stepwise)
    steps = torch.cat([model.forward([token], stepwise) for token in IDS[20:]])
    at_once = model.forward(IDS[20:], together, all_logits=True)
    torch.testing.assert_close(at_once, steps, atol=1e-3 * float(steps.abs().max()), rtol=1e-3)


def test_memory_counts_what_is_stored(model: HFModel) -> None:
    """16-bit elements of all that a cache holds of one token, states aside; rounded, 4 bytes for 8 channels of a head, and a scale."""
    cache = model.new_cache()
    model.forward(IDS[:1], cache)
    sites = [x for _, layer in cache.storing if layer.is_initialized for x in (layer.keys, layer.values)]
    exact, rounded = (model.geometry.bytes_per_token(Recipe.uniform(4, scheme)) for scheme in (None, ROUGH))
    assert exact == sum(2 * x.numel() for x in sites)
    assert rounded == sum(4 * x.shape[1] * math.ceil(x.shape[3] / 8) + 4 for x in sites)


def test_responses_under_recipes(model: HFModel) -> None:
    """What evaluate answers is what plain decoding under the recipe answers, in every layer's own number."""
    base = baseline(model, REQUESTS[:3], judge=ArbitraryJudge(), max_new_tokens=5, progress=False)
    last = model.geometry.stores[-1]
    recipes = {"all": Recipe.uniform(4, ROUGH), "last": Recipe.uniform(4, ROUGH, layers=[last])}
    for placement in (Placement(), Placement(residual=4)):
        found = kvgeom.evaluate(None, recipes, base, placement=placement)
        for name, recipe in recipes.items():
            for index, prompt in enumerate(base.prompts):
                cache = model.new_cache(Quantizer(recipe, placement))
                token = int(model.forward(prompt.ids, cache)[-1].argmax())
                response = model.generate([cache], [token], 5)[0]
                own = str(found.data.text.sel(recipe=name, prompt=index).item())
                text = base.reader.text(tuple(response))
                assert own == text[: len(own)]  # as far as the judge reads
    stored = ",".join(map(str, model.geometry.stores))
    assert found.meta["recipes"]["last"].endswith(f"in layers {last}")
    if len(model.geometry.stores) == 2:
        assert stored.replace(",", "-") in found.meta["recipes"]["all"] or stored in found.meta["recipes"]["all"]


def test_a_scan_names_the_layers_of_the_model() -> None:
    model = hybrid("lfm2")
    base = baseline(model, REQUESTS, judge=ArbitraryJudge(), max_new_tokens=3, progress=False)
    scan, outcomes = single_layer_scan(base, "int2-sym-tensor")
    assert scan.data.layer.values.tolist() == [1, 3]
    assert {*outcomes.data.layer.values.tolist()} == {-1, 1, 3}
    assert scan.worst_layer in (None, 1, 3)
    assert scan.plot().layout.xaxis.range[1] > 3
    with pytest.raises(InputError, match=r"keys and values in tiny-lfm2 are layers 1, 3, got 2"):
        per_channel_reduction(base, 2)


def test_recipes_that_would_round_nothing() -> None:
    model = hybrid("jamba")
    with pytest.raises(InputError, match=r"stores no keys and values in layer 0, 2, .*choose from layers 1, 3"):
        kvgeom.evaluate(model, {"states": Recipe.uniform(4, ROUGH, layers=[0, 2])}, REQUESTS[:1], progress=False)
    kept = kvgeom.evaluate(
        model, {"kept": Recipe.uniform(4, ROUGH).keep([1])}, REQUESTS[:1], max_new_tokens=2, progress=False
    )
    assert kept.meta["recipes"]["kept"] == "int4-sym-token in layers 3"


@pytest.mark.parametrize("kind", ["lfm2", "gemma4_text", pytest.param("kimi_linear", marks=pytest.mark.slow)])
def test_diagnosis_and_fix(kind: str, tmp_path: Any) -> None:
    """From scan to plan on a model with layers that store nothing: its own layer numbers everywhere."""
    model = hybrid(kind)
    stores = {*model.geometry.stores}
    options: dict[str, Any] = {"judge": ArbitraryJudge(), "max_new_tokens": 3, "progress": False}
    alike = not model.geometry.shapes
    if alike:
        found = kvgeom.diagnose(model, PAIRS, bits=[3], scan_bits=3, **options)
        assert found.sensitivity is not None
        assert {*found.sensitivity.data.layer.values.tolist()} == stores
    else:
        with pytest.warns(KvgeomWarning, match="responses, perplexity, scans, diagnosis and fixes work"):
            found = kvgeom.diagnose(model, PAIRS, bits=[3], scan_bits=3, **options)
        assert found.sensitivity is None
        assert "differ" in found.curve.meta["no_geometry"] or "latent" in found.curve.meta["no_geometry"]
    assert "stay exact" in found.to_text() or "read what" in found.to_text()
    assert {*found.scan.data.layer.values.tolist()} == stores
    assert {*found.evidence.top_layers} <= stores
    plan = found.prescribe()
    for candidate in plan.candidates:
        assert {*candidate.recipe.touched} <= stores
    if plan.selection is not None:
        assert all({*order} == stores for order in plan.selection.meta["order"].values())
    plan.save(tmp_path / "plan")
    read = Plan.load(tmp_path / "plan")
    assert read.geometry == model.geometry
    assert [each.recipe for each in read.candidates] == [each.recipe for each in plan.candidates]


def test_geometry_of_layers_that_store() -> None:
    """The same numbers as from the cache of a plain pass."""
    model = hybrid("bamba")
    space = kvgeom.subspace(model, PAIRS, progress=False)
    assert space.data.layer.values.tolist() == [1, 3]
    assert space.sensitivity("int4-asym-token", progress=False, contrasts=()).data.layer.values.tolist() == [1, 3]
    prompt = space.activations.prompts[0]
    cache = model.new_cache()
    model.forward(prompt.ids, cache)
    for activations in space.activations.layers(0):
        assert torch.equal(activations.k, cache.layers[activations.layer].keys)
        assert activations.resid is not None


def test_figures_and_methods_go_by_the_number_of_a_layer() -> None:
    model = hybrid("bamba")
    space = kvgeom.subspace(model, PAIRS, progress=False)
    figure = space.sensitivity("int4-asym-token", progress=False, contrasts=()).plot()
    low, high = figure.layout.xaxis.range
    shown = {int(x) for trace in figure.data if trace.x is not None for x in trace.x if x is not None}
    assert {1, 3} <= shown
    assert all(low < x < high for x in shown)
    compared = space.compare(["mean", "whitened"], progress=False, samples=2)
    for row, layer in enumerate((1, 3)):
        one, other = (compared.vectors("k", name)[row] for name in ("mean", "whitened"))
        expected = float(one @ other) if one.any() and other.any() else float("nan")  # undefined where classes coincide
        found = float(compared.cosines_of_methods("k", layer)[0, 1])
        assert found == pytest.approx(expected, nan_ok=True)


def test_where_geometry_is_not_measured() -> None:
    for kind, why in (("mimo_v2_flash", "shapes that differ"), ("deepseek_v3", "a latent of keys and values")):
        with pytest.raises(ModelError, match=f"{why}.*responses, perplexity, scans, diagnosis and fixes work"):
            kvgeom.subspace(hybrid(kind), PAIRS, progress=False)


def test_exports_leave_layers_without_keys_alone() -> None:
    model = hybrid("qwen3_next")
    whole = export(model.geometry.stored(resolve("fp8_e4m3-tensor").recipe(4), model.name), Placement(), model.geometry)
    assert whole.text == "--kv-cache-dtype fp8_e4m3"
    assert whole.recipe.touched == (1, 3)
    kept = export(whole.recipe.keep([3]), Placement(), model.geometry)
    assert kept.text == "--kv-cache-dtype fp8_e4m3 --kv-cache-dtype-skip-layers 3"


def test_packed_caches_hold_states_too() -> None:
    """Where a layer has either; a layer with both is refused."""
    model = hybrid("lfm2")
    recipe = Recipe.uniform(4, ROUGH)
    packed = quantized_cache(model, recipe)
    simulated = model.new_cache(Quantizer(recipe))
    for ids in (IDS[:12], [5], [6]):
        assert torch.equal(model.forward(ids, packed), model.forward(ids, simulated))
    with pytest.raises(ModelError, match=r"use kvgeom\.evaluate"):
        quantized_cache(hybrid("falcon_h1"), recipe)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("recurrent_gemma", "keeps states of a sequence in its modules"),
        ("deepseek_v4", "compresses them as they come"),
        ("mamba", "no layer of mamba stores keys and values"),
        ("minimax", "cache of its own"),
    ],
)
def test_what_cannot_be_rounded_is_refused_at_load(kind: str, why: str) -> None:
    with pytest.raises(ModelError, match=why) as refused:
        HFModel(architectures.tiny(kind), tiny_tokenizer(), name=kind)
    assert "\n" not in str(refused.value)
