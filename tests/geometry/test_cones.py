"""Cones: their losses by definition, their gradient, and that they are reached; on a trained model, and on a planted one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import kvgeom
from kvgeom.errors import InputError, ModelError
from kvgeom.evaluation.scores import kl_divergence, margin
from kvgeom.geometry.cones import _Losses, adding_layer, optimize_cone
from kvgeom.geometry.interventions import ablate, add
from kvgeom.geometry.methods.cone import Cone
from kvgeom.geometry.methods.mean import difference_of_means
from kvgeom.geometry.selection import opening_tokens
from kvgeom.models.hf import HFModel
from kvgeom.organisms import Size, plant
from kvgeom.progress import shown
from tests.builders.requests import MORE_PAIRS
from tests.builders.tiny import tiny_hf_model, tiny_model, tiny_tokenizer

TOKENS = frozenset({5, 9, 30})


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with shown(False):
        yield


@pytest.fixture(scope="module")
def trained_space(trained: HFModel) -> Any:
    return kvgeom.subspace(trained, Size(3).prompts("train").take(12), progress=False)


@pytest.fixture(scope="module")
def refusals(trained_space: Any) -> frozenset[int]:
    return opening_tokens(trained_space.model, trained_space.harmful, progress=False)


def units(model: HFModel, k: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(model.geometry.d_model, k, generator=torch.manual_seed(seed)))[0]


def test_losses_by_definition() -> None:
    model = tiny_model()
    harmful, harmless = model.encode(["burn it", "rob him"]), model.encode(["wash it", "help him now"])
    basis, mix = units(model, 2), torch.tensor([[1.0, 0, 0.6], [0, 1, 0.8]])
    found = _Losses(model, TOKENS, 1, 3.0).value(basis, mix, harmful, harmless)
    by_hand = np.zeros(3)
    for u in (basis @ mix).T:
        for bad, good in zip(harmful, harmless, strict=True):
            p = torch.sigmoid(margin(model.forward(bad.ids, edit_resid=ablate(u))[-1].double(), TOKENS))
            by_hand[0] -= float(torch.log(1 - p)) / 6
            p = torch.sigmoid(margin(model.forward(good.ids, edit_resid=add(3 * u, 1))[-1].double(), TOKENS))
            by_hand[1] -= float(torch.log(p)) / 6
            ablated = model.forward(good.ids, edit_resid=ablate(u))[-1]
            by_hand[2] += float(kl_divergence(model.forward(good.ids)[-1], ablated)) / 6
    np.testing.assert_allclose(found, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_gradient_is_a_finite_difference(kind: str) -> None:
    hf = tiny_hf_model(kind).double()
    model: Any = kvgeom.load(hf, tokenizer=tiny_tokenizer())
    harmful, harmless = model.encode(["burn it"]), model.encode(["wash it"])
    weights = np.array([1.0, 0.2, 0.7])
    parts, basis, mix = _Losses(model, TOKENS, 1, 3.0), units(model, 2).double(), torch.eye(2).double()
    losses, gradient = parts.gradient(basis.clone().requires_grad_(), mix, harmful, harmless, weights)
    np.testing.assert_allclose(losses, parts.value(basis, mix, harmful, harmless), rtol=1e-5, atol=1e-6)
    direction = torch.randn(basis.shape, generator=torch.manual_seed(3), dtype=torch.float64)
    step = 1e-3  # the protocol's logits are float32
    above, below = (
        float(parts.value(basis + sign * step * direction, mix, harmful, harmless) @ weights) for sign in (1, -1)
    )
    assert float((gradient * direction).sum()) == pytest.approx((above - below) / 2 / step, rel=2e-3, abs=1e-3)


@pytest.mark.parametrize("backend", ["lens", "nnsight"])
def test_backends_have_the_same_derivatives(backend: str) -> None:
    found = []
    for name in ("hf", backend):
        hf = tiny_hf_model("qwen2")
        hf.set_attn_implementation("eager")
        model: Any = kvgeom.load(hf, tokenizer=tiny_tokenizer(), backend=name)
        harmful, harmless = model.encode(["burn it"]), model.encode(["wash it"])
        basis = units(model, 2).requires_grad_()
        parts = _Losses(model, TOKENS, 1, 3.0)
        found.append(parts.gradient(basis, torch.eye(2), harmful, harmless, np.ones(3)))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)
    if backend == "nnsight":
        model.remote = True
        with pytest.raises(ModelError, match="derivatives"):
            model.derivatives([1, 2], lambda logits: logits.sum(), [basis])


@pytest.mark.slow
@pytest.mark.parametrize("start", ["mean", "random"])
def test_a_cone_reaches_its_losses(trained_space: Any, refusals: frozenset[int], start: Any) -> None:
    """On requests that it has not seen: margin lost, margin induced, and nothing else changed; random directions do not."""
    model = trained_space.model
    found = trained_space.refit(method=Cone(start=start, tokens=tuple(refusals)), position="instruction")
    notes = found.meta["method_notes"]
    assert notes["loss_after"] < min(0.05, 0.2 * notes["loss_before"])  # of a class difference there is little to gain
    basis = found.directions[notes["layer"], "resid"].basis
    np.testing.assert_allclose(basis.T @ basis, np.eye(1), atol=1e-5)
    held = Size(3).prompts().take(8)
    harmful, harmless = model.encode(held.harmful), model.encode(held.harmless)
    rng = np.random.default_rng(0)

    def does(direction: np.ndarray) -> tuple[float, float, float]:
        u = torch.tensor(direction / np.linalg.norm(direction)).float()
        plus = add(notes["length"] * u, notes["layer"])
        clean = [model.forward(p.ids)[-1] for p in harmless]
        after = [model.forward(p.ids, edit_resid=ablate(u))[-1] for p in harmless]
        return (
            float(np.mean([float(margin(model.forward(p.ids, edit_resid=ablate(u))[-1], refusals)) for p in harmful])),
            float(np.mean([float(margin(model.forward(p.ids, edit_resid=plus)[-1], refusals)) for p in harmless])),
            float(np.mean([float(kl_divergence(a, b)) for a, b in zip(clean, after, strict=True)])),
        )

    ablated, added, kl = does(basis[:, 0])
    random = np.array([does(rng.standard_normal(len(basis))) for _ in range(5)])
    clean = np.mean([float(margin(model.forward(p.ids)[-1], refusals)) for p in harmful])
    assert clean > 0 > ablated
    assert ablated < random[:, 0].min() - 3
    assert added > random[:, 1].max()
    assert added > 0
    assert kl < 0.1


@pytest.mark.slow
def test_every_direction_between_the_columns_of_a_cone(trained_space: Any, refusals: frozenset[int]) -> None:
    model = trained_space.model
    found = trained_space.refit(method=Cone(tokens=tuple(refusals), seed=1), k=2, position="instruction")
    basis = found.directions[2, "resid"].basis
    np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-5)
    prompts = model.encode(Size(3).prompts().take(6).harmful)
    clean = np.mean([float(margin(model.forward(p.ids)[-1], refusals)) for p in prompts])
    for angle in np.linspace(0, np.pi / 2, 5):
        u = torch.tensor(basis @ [np.cos(angle), np.sin(angle)]).float()
        ablated = np.mean([float(margin(model.forward(p.ids, edit_resid=ablate(u))[-1], refusals)) for p in prompts])
        assert ablated < clean - 3


def test_the_same_seed_finds_the_same_cone(trained_space: Any, refusals: frozenset[int]) -> None:
    one, again, other = (
        trained_space.refit(method=Cone(steps=4, tokens=tuple(refusals), start="random", seed=seed))
        for seed in (0, 0, 1)
    )
    assert one.data.equals(again.data)
    assert not one.data.equals(other.data)


def test_keys_and_values_of_a_cone_are_what_they_lose(trained_space: Any, refusals: frozenset[int]) -> None:
    """The image of a direction in the values of a layer, from a run of the model by hand."""
    found = trained_space.refit(method=Cone(steps=2, tokens=tuple(refusals)), position="instruction")
    model = trained_space.model
    u = torch.tensor(found.directions[2, "resid"].basis[:, 0]).float()
    lost = []
    for prompt in trained_space.harmful:
        caches = [model.new_cache(), model.new_cache()]
        model.forward(prompt.ids, caches[0])
        model.forward(prompt.ids, caches[1], edit_resid=ablate(u))
        at = [x.layers[1].values[0, :, prompt.instruction].mean(1).flatten().double().numpy() for x in caches]
        lost.append(at[0] - at[1])
    image = np.mean(lost, axis=0)
    direction = found.directions[1, "v"]
    assert direction.defined
    assert float(direction.basis[:, 0] @ image) / np.linalg.norm(image) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_a_planted_direction_is_recovered() -> None:
    """A model in which one known direction is read as refusal, by one row of its head and by nothing else.

    From a random start, at an angle of at least 60 degrees, the cone turns to it. It is added after the last layer, for what a layer
    makes of other directions may be refusal too. So short is what is added that no margin
    saturates: a direction that is half right refuses half as much.
    """
    hf: Any = tiny_hf_model()
    planted = torch.nn.functional.normalize(torch.randn(32, generator=torch.manual_seed(7)), dim=0)
    with torch.no_grad():
        hf.lm_head.weight -= (hf.lm_head.weight @ planted)[:, None] * planted
        hf.lm_head.weight *= 0.01  # or making other tokens unlikely would be another way to refuse
        hf.lm_head.weight[5] = 6 * planted
        for layer in hf.model.layers:  # no layer reads the direction
            for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):  # fmt: skip
                module.weight -= (module.weight @ planted)[:, None] * planted
    model: Any = kvgeom.load(hf, tokenizer=tiny_tokenizer())
    harmful, harmless = model.encode(MORE_PAIRS.harmful), model.encode(MORE_PAIRS.harmless)
    stream: dict[int, torch.Tensor] = {}
    model.forward(harmless[0].ids, on_resid=stream.__setitem__)
    length = 0.05 * float(stream[2][0, -1].norm())
    for seed in (0, 1):
        start = np.random.default_rng(seed).standard_normal((32, 1))
        assert abs(float(start[:, 0] @ planted.double().numpy()) / np.linalg.norm(start)) < 0.5
        found = optimize_cone(
            model, harmful, harmless, {5}, start, 2, length, steps=100, weights=(0.0, 1.0, 0.0), progress=False
        )
        assert float(found.basis[:, 0] @ planted.double().numpy()) > 0.9
        assert found.after < found.before


@pytest.mark.slow
def test_an_organism_keeps_its_refusal_direction(
    trained: HFModel, trained_space: Any, refusals: frozenset[int]
) -> None:
    """Planting changes how values are stored and not what is computed: the same cone, in other values."""
    size = Size(3)
    organism = plant(trained, "outlier-crushes-safety", seed=5, prompts=size.prompts("train").take(24), progress=False)
    method = Cone(steps=20, tokens=tuple(refusals))
    here, there = (
        space.refit(method=method, position="instruction")
        for space in (trained_space, kvgeom.subspace(organism.model, size.prompts("train").take(12), progress=False))
    )
    one, other = (found.directions[1, "resid"].basis[:, 0] for found in (here, there))
    assert float(one @ other) > 0.99
    (layer, *_) = organism.layers
    assert there.directions[layer, "v"].basis.shape == here.directions[layer, "v"].basis.shape
    assert float(np.abs(there.directions[layer, "v"].basis[:, 0] @ here.directions[layer, "v"].basis[:, 0])) < 0.99


def test_the_layer_that_adding_is_most_felt_at(trained_space: Any, refusals: frozenset[int]) -> None:
    model = trained_space.model
    at = trained_space.positions.index("template-1")
    gaps = np.stack(
        [difference_of_means(trained_space.features(i, "resid")[:, at], trained_space.is_harmful) for i in range(3)]
    )
    layer = adding_layer(model, gaps, trained_space.harmless, refusals)
    induced = [
        np.mean(
            [
                float(margin(model.forward(p.ids, edit_resid=add(torch.tensor(gaps[i]).float(), i))[-1], refusals))
                for p in trained_space.harmless[:4]
            ]
        )
        for i in (1, 2)
    ]
    assert layer in (1, 2)
    assert induced[layer - 1] == pytest.approx(max(induced), abs=1.0) or layer == 1
    assert adding_layer(model, np.eye(3)[:, :1] * np.ones((3, gaps.shape[1])), trained_space.harmless, refusals) == 0
    with pytest.raises(InputError, match="coincide"):
        adding_layer(model, 0 * gaps, trained_space.harmless, refusals)


def test_what_cannot_be_optimized() -> None:
    model = tiny_model()
    prompts, start = model.encode(["a", "b"]), np.ones((32, 1))
    works: dict[str, Any] = {"start": start, "layer": 1, "length": 1.0, "tokens": {5}}
    for change, word in (
        ({"start": np.ones(32)}, "start"),
        ({"start": np.full((32, 1), np.nan)}, "start"),
        ({"layer": 3}, "layer"),
        ({"length": 0.0}, "length"),
        ({"tokens": ()}, "tokens"),
        ({"steps": 0}, "steps"),
        ({"rate": -1}, "rate"),
        ({"weights": (1, 1)}, "weights"),
        ({"weights": "abc"}, "weights"),
        ({"sedd": 1}, "seed"),
    ):
        with pytest.raises(InputError, match=word):
            optimize_cone(model, prompts, prompts, **{**works, **change})
    with pytest.raises(InputError, match="refuses none"):
        kvgeom.subspace(model, MORE_PAIRS, method="cone", progress=False)
    space = kvgeom.subspace(model, MORE_PAIRS, method=Cone(steps=1, tokens=(5,)), progress=False)
    assert space.method == "cone"
    # Requests that are not refused have no cone: contrasts are found by the difference of means.
    assert {each.method for each in space.contrasted("held-out").values()} == {"mean"}
    # Nor is a part of the requests left to say how large their signal is.
    cell = space.sensitivity(contrasts=(), progress=False).data.sel(layer=2, site="v")
    assert cell.status.item() == "weak"
    assert "found its directions in all requests" in cell.reason.item()
    assert np.isnan(cell.ratio)
    assert np.isfinite(cell.ratio_plugin)
