"""The three backends are one model: same weights, same kernel, same numbers. And each does to it what it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from einops import repeat

import kvgeom
from kvgeom.errors import InputError, ModelError
from kvgeom.models.hf import HFModel
from kvgeom.models.rotary import TokenRotation
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.tiny import KINDS, tiny_hf_model, tiny_tokenizer

IDS = list(range(5, 40))  # longer than the sliding windows of the tiny models
OTHERS = ({"backend": "lens"}, {"backend": "nnsight"}, {"backend": "nnsight", "remote": "local"})
INT4 = Recipe.uniform(3, Scheme(4))


def on_backend(kind: str, **options: Any) -> HFModel:
    hf = tiny_hf_model(kind)
    hf.set_attn_implementation("eager")  # what TransformerLens runs
    model = kvgeom.load(hf, tokenizer=tiny_tokenizer(), **options)
    assert isinstance(model, HFModel)
    return model


def score(logits: torch.Tensor) -> torch.Tensor:
    return logits[3] - logits.logsumexp(-1)


def numbers(model: HFModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that the protocol gives, under a name each."""
    resid: dict[int, torch.Tensor] = {}
    angles: dict[int, TokenRotation] = {}
    queries: dict[int, torch.Tensor] = {}
    cache = model.new_cache(Quantizer(INT4))
    yield (
        "logits",
        model.forward(
            IDS,
            cache,
            all_logits=True,
            on_resid=resid.__setitem__,
            on_rotation=angles.__setitem__,
            on_query=queries.__setitem__,
        ),
    )
    for layer in range(3):
        yield f"resid {layer}", resid[layer]
        yield f"keys {layer}", cache.layers[layer].keys
        yield f"values {layer}", cache.layers[layer].values
        yield f"queries {layer}", queries[layer]
        yield f"cos {layer}", angles[layer].cos
        yield f"sin {layer}", angles[layer].sin
    yield "rounded at the projection", model.forward(IDS, model.new_cache(Quantizer(INT4, Placement.paper())))
    yield "residual edited", model.forward(IDS, edit_resid=lambda layer, point, x: x * (0.9 if point == "attn" else 1))
    quantizers = [Quantizer(INT4), Quantizer(INT4.keep([1]))]
    yield "variants", model.forward_variants(IDS, 2, edits=quantizers, start=(1, resid[0]))
    for where in ("cache", "projection"):
        found = model.gradients(IDS, score, where=where)
        yield f"score {where}", torch.tensor(found.score)
        for (layer, site), gradient in found.grad.items():
            yield f"gradient {where} {layer} {site}", gradient
    added = {(1, "k"): 0.1 * torch.ones_like(found.x[1, "k"])}
    moved = model.gradients(IDS, score, added=added, heads=True, directions=torch.arange(32.0) / 32)
    yield "score of what is added", torch.tensor(moved.score)
    for layer, heads in moved.heads.items():
        assert heads.along is not None
        yield f"heads {layer}", heads.output
        yield f"gradient of heads {layer}", heads.grad
        yield f"heads along {layer}", heads.along


def cases(*backends: dict[str, Any]) -> list[Any]:
    """Each kind with each backend. nnsight takes up to ten seconds for one: all but the first kinds, and its server on this machine, are for make test-all."""

    def marks(kind: str, options: dict[str, Any]) -> Any:
        first = () if "remote" in options else KINDS[:2]
        return pytest.mark.slow if options.get("backend") == "nnsight" and kind not in first else ()

    return [
        pytest.param(
            kind,
            options,
            id="-".join([kind, *map(str, options.values())] if options else [kind, "hf"]),
            marks=marks(kind, options),
        )
        for kind in KINDS
        for options in backends
    ]


@pytest.mark.parametrize(("kind", "options"), cases(*OTHERS))
def test_parity(kind: str, options: dict[str, Any]) -> None:
    reference, other = on_backend(kind), on_backend(kind, **options)
    assert other.backend == options["backend"]
    assert (other.geometry, other.fingerprint) == (reference.geometry, reference.fingerprint)
    assert other.identity == reference.identity
    assert [other.attention(layer) for layer in range(3)] == [reference.attention(layer) for layer in range(3)]
    for (name, ours), (same, theirs) in zip(numbers(reference), numbers(other), strict=True):
        assert name == same
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["lens", "nnsight"])
def test_parity_on_the_demo(demo: HFModel, backend: str) -> None:
    """The same kernel and, prompts of different lengths decoded together, the same tokens."""
    demo.hf_model.set_attn_implementation("eager")
    try:
        prompts = demo.encode(kvgeom.calibration().harmful[:2])
        recipe = Recipe.uniform(demo.geometry.layers, Scheme(8))
        # A model of its own: TransformerLens replaces the modules of what it wraps.
        own = kvgeom.load("demo", progress=False, attn_implementation="eager")
        other = kvgeom.load(own.hf_model, tokenizer=own.tokenizer, backend=backend)
        seen: list[Any] = []
        for model in (demo, other):
            assert isinstance(model, HFModel)
            resid: dict[int, torch.Tensor] = {}
            caches = [model.new_cache(Quantizer(recipe)) for _ in prompts]
            logits = [model.forward(p.ids, c)[-1] for p, c in zip(prompts, caches, strict=True)]
            model.forward(prompts[0].ids, on_resid=resid.__setitem__)
            tokens = model.generate(caches, [int(x.argmax()) for x in logits], 5)
            keys = [layer.keys for layer in caches[1].layers]
            seen.append((torch.stack(logits), torch.stack(list(resid.values())), torch.stack(keys), tokens))
        for ours, theirs in zip(*seen, strict=True):
            if isinstance(ours, torch.Tensor):
                torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
            else:
                assert ours == theirs
    finally:
        demo.hf_model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(("kind", "options"), cases({}, *OTHERS))
def test_left_padding(kind: str, options: dict[str, Any]) -> None:
    """Prompts of different lengths decode together, padded on the left, as each does alone."""
    model = on_backend(kind, **options)
    prompts = [IDS, IDS[:9], IDS[3:20]]
    caches = [model.new_cache(Quantizer(INT4)) for _ in prompts]
    first = [int(model.forward(ids, cache)[-1].argmax()) for ids, cache in zip(prompts, caches, strict=True)]
    together = model.generate(caches, first, 5)
    assert together == [model.generate([c], [t], 5)[0] for c, t in zip(caches, first, strict=True)]
    longest, ids = max(map(len, prompts)), prompts[1]
    padding = longest - len(ids)
    tokens = torch.tensor([IDS, [0] * padding + ids])
    mask = torch.tensor([[1] * longest, [0] * padding + [1] * len(ids)])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.inference_mode():
        padded = model._run(tokens, model.new_cache(), positions, mask, 1)[:, -1]
    torch.testing.assert_close(padded[0], model.forward(IDS)[-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[1], model.forward(ids)[-1], atol=1e-5, rtol=1e-5)


def test_objects_that_are_already_one() -> None:
    from nnsight.modeling.transformers import TransformersModel
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs["name_or_path"] = "tiny"
    bridge = TransformerBridge.boot_transformers("tiny", hf_model=tiny_hf_model("qwen2"), tokenizer=tokenizer)
    wrapped = TransformersModel(tiny_hf_model("qwen2"), tokenizer=tiny_tokenizer(), task="text-generation")
    ratios = []
    for given, backend in ((bridge, "lens"), (wrapped, "nnsight")):
        space = kvgeom.subspace(given, kvgeom.calibration().take(4), progress=False)
        assert space.model.backend == backend
        ratios.append(torch.tensor(space.sensitivity(progress=False).data.ratio_low.values))
        with pytest.raises(InputError, match="'hf'"):
            kvgeom.load(given, backend="hf")
    torch.testing.assert_close(*ratios, rtol=1e-2, atol=1e-3, equal_nan=True)


def test_a_users_own_hook_on_a_bridge_stays() -> None:
    model: Any = on_backend("qwen2", backend="lens")
    plain = model.forward(IDS)
    model.bridge.add_hook("blocks.1.hook_out", lambda x, hook: x * 2)
    assert not torch.allclose(model.forward(IDS), plain)
    model.bridge.reset_hooks()
    torch.testing.assert_close(model.forward(IDS), plain, atol=0, rtol=0)


def test_what_cannot_be_remote_is_refused() -> None:
    model: Any = on_backend("llama", backend="nnsight")
    model.remote = True  # no pass is made: NDIF needs a key
    with pytest.raises(ModelError, match="derivatives"):
        model.gradients(IDS, score)
    with pytest.raises(ModelError, match="residual edits"):
        model.forward(IDS, edit_resid=lambda layer, point, x: x)
    with pytest.raises(ModelError, match="projection"):
        model.forward(IDS, model.new_cache(Quantizer(INT4, Placement.paper())))
    with pytest.raises(InputError, match="nnsight"):
        kvgeom.load(tiny_hf_model(), tokenizer=tiny_tokenizer(), remote=True)


@pytest.mark.parametrize("where", ["cache", "projection"])
def test_gradients_beside_the_exact_cache_are_those_of_another(where: str) -> None:
    """What is added is there when score and derivative are taken, as if the cache had been edited so."""
    model = on_backend("qwen2")
    added = {
        place: 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(place[0]))
        for place, x in model.gradients(IDS, score, where=where).x.items()  # type: ignore[arg-type]
        if place[1] == "v"
    }

    class Added:
        prefill_reads_exact = False

        def __init__(self, more: float) -> None:
            self.where, self.more = where, more

        def __call__(self, layer: int, site: str, x: torch.Tensor) -> torch.Tensor:
            own = added.get((layer, site), torch.zeros(()))
            return x + own * (1 + self.more * (layer == 1))

    found = model.gradients(IDS, score, where=where, added=added)  # type: ignore[arg-type]
    here, above, below = (
        float(score(model.forward(IDS, model.new_cache(Added(more)))[-1])) for more in (0, 0.01, -0.01)
    )
    assert found.score == pytest.approx(here, abs=1e-4)
    slope = float((found.grad[1, "v"] * added[1, "v"]).sum())
    assert (above - below) / 0.02 == pytest.approx(slope, rel=0.05, abs=0.02)
    with pytest.raises(InputError, match="directions"):
        model.gradients(IDS, score, directions=torch.ones(3, 31))


@pytest.mark.parametrize("where", ["cache", "projection"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(kind: str, where: str) -> None:
    """Along a random direction in one layer's keys or values, in float64."""
    hf = tiny_hf_model(kind).double()
    model: Any = kvgeom.load(hf, tokenizer=tiny_tokenizer())
    model._call = lambda tokens, **inputs: hf(input_ids=tokens, **inputs).logits
    found = model.gradients(IDS, score, where=where)
    generator = torch.Generator().manual_seed(0)

    class Nudge:
        prefill_reads_exact = False

        def __init__(self, layer: int, site: str, by: torch.Tensor) -> None:
            self.where, self.layer, self.site, self.by = where, layer, site, by

        def __call__(self, layer: int, site: str, x: torch.Tensor) -> torch.Tensor:
            return x + self.by if (layer, site) == (self.layer, self.site) else x

    for (layer, site), gradient in found.grad.items():
        direction = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
        step = 1e-3  # the protocol's logits are float32
        above, below = (
            float(score(model.forward(IDS, model.new_cache(Nudge(layer, site, sign * step * direction)))[-1]))
            for sign in (1, -1)
        )
        slope = float((gradient * direction).sum())
        assert (above - below) / (2 * step) == pytest.approx(slope, rel=0.02, abs=5e-3), (layer, site)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_and_keys_are_what_attention_uses(kind: str) -> None:
    """Attention weights from our queries, keys and rules are those of the model's own eager attention."""
    model = on_backend(kind)
    queries: dict[int, torch.Tensor] = {}
    angles: dict[int, TokenRotation] = {}
    cache = model.new_cache()
    model.forward(
        IDS,
        cache,
        on_query=queries.__setitem__,
        on_rotation=angles.__setitem__,
    )
    theirs = model.hf_model(input_ids=torch.tensor([IDS]), output_attentions=True).attentions
    at = torch.arange(len(IDS))
    for layer in range(3):
        rule = model.attention(layer)
        q = angles[layer].rotate(queries[layer])
        k = repeat(cache.layers[layer].keys, "b h t d -> b (h g) t d", g=q.shape[1] // model.geometry.kv_heads)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * rule.scale
        seen = at[None] <= at[:, None]
        if rule.window is not None:
            seen &= at[None] > at[:, None] - rule.window
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        torch.testing.assert_close(weights, theirs[layer], atol=1e-5, rtol=1e-4)


def test_variants_are_single_runs() -> None:
    model = on_backend("gemma3_text")
    resid: dict[int, torch.Tensor] = {}
    model.forward(IDS, on_resid=resid.__setitem__)
    recipes = [INT4, INT4.keep([0, 1]), Recipe.uniform(3, Scheme(3, True, "channel"), layers=[1])]
    together = model.forward_variants(IDS, 3, edits=[Quantizer(recipe) for recipe in recipes])
    for row, recipe in zip(together, recipes, strict=True):
        torch.testing.assert_close(
            row, model.forward(IDS, model.new_cache(Quantizer(recipe)))[-1], atol=1e-4, rtol=1e-4
        )
    later = model.forward_variants(IDS, 1, edits=[Quantizer(recipes[2])], start=(1, resid[0]))
    torch.testing.assert_close(later[0], together[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_residual_stream_is_edited_everywhere(kind: str) -> None:
    """Ablating a direction at all points leaves none of it after any layer."""
    model = on_backend(kind)
    direction = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(1)), dim=0)
    seen: dict[int, torch.Tensor] = {}

    def ablate(layer: int, point: str, x: torch.Tensor) -> torch.Tensor:
        return x - torch.einsum("btd,d->bt", x, direction)[..., None] * direction

    # Hooks that look are set after hooks that edit, so they see what the next layer gets.
    changed = model.forward(IDS, edit_resid=ablate, on_resid=seen.__setitem__)
    assert not torch.allclose(changed, model.forward(IDS), atol=1e-3)
    for x in seen.values():
        assert float((x @ direction).abs().max()) < 1e-4 * float(x.norm(dim=-1).max())
