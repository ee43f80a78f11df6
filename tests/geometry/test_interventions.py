"""Directions taken out of and put into keys and values, against the definition in channels without rotary embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvgeom.geometry.activations import at_site, vectors
from kvgeom.geometry.interventions import CacheDirections, Change, ablate, ablate_subspaces
from kvgeom.models.hf import HFModel
from kvgeom.models.reading import read
from kvgeom.models.rotary import TokenRotation
from tests.builders.tiny import KINDS, tiny_model


def stored(model: HFModel, ids: Any, edit: Any, layer: int, site: str) -> np.ndarray:
    """Keys or values ``[tokens, channels]`` of a pass under an edit, keys turned back."""
    cache = model.new_cache(edit)
    rotations: dict[int, TokenRotation] = {}
    model.forward(ids, cache, on_rotation=rotations.__setitem__)
    x = cache.layers[layer].keys if site == "k" else cache.layers[layer].values
    if site == "k":
        x = rotations[layer].unrotate(x)
    return x[0].permute(1, 0, 2).flatten(1).double().numpy()  # type: ignore[no-any-return]


def plane(model: HFModel, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((model.geometry.channels, k)))[0]
    return basis, rng.standard_normal(model.geometry.channels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", ["k", "v"])
def test_ablation_leaves_the_level_along_the_basis_and_all_else(kind: str, site: Any) -> None:
    model = tiny_model(kind)
    (prompt,) = model.encode(["open the door"])
    basis, level = plane(model, 2)
    change = Change.ablation(basis, level)
    # In layer 0, what enters keys and values is the same with the edit and without.
    before = stored(model, prompt.ids, None, 0, site)
    after = stored(model, prompt.ids, CacheDirections({(0, site): change}), 0, site)
    np.testing.assert_allclose(after @ basis, np.broadcast_to(level @ basis, (len(after), 2)), atol=2e-4)
    rest = np.eye(len(basis)) - basis @ basis.T
    np.testing.assert_allclose(after @ rest, before @ rest, atol=2e-4)
    other = "v" if site == "k" else "k"
    np.testing.assert_allclose(
        stored(model, prompt.ids, CacheDirections({(0, site): change}), 0, other),
        stored(model, prompt.ids, None, 0, other),
    )


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_addition_is_the_same_at_every_token(kind: str) -> None:
    model = tiny_model(kind)
    (prompt,) = model.encode(["open the door"])
    _, shift = plane(model, 1)
    for site in ("k", "v"):
        edit = CacheDirections({(0, site): Change.addition(shift)})  # type: ignore[dict-item]
        moved = stored(model, prompt.ids, edit, 0, site) - stored(model, prompt.ids, None, 0, site)
        np.testing.assert_allclose(moved, np.broadcast_to(shift, moved.shape), atol=2e-4)


def test_where_keys_are_projected_they_are_edited_there() -> None:
    model = tiny_model("qwen3")  # norms of keys lie between the two
    (prompt,) = model.encode(["open the door"])
    basis, level = plane(model, 1)
    seen = {}

    class Look(CacheDirections):
        def __call__(self, layer: int, site: Any, x: torch.Tensor) -> torch.Tensor:
            seen[layer, site] = super().__call__(layer, site, x)
            return seen[layer, site]

    edit = Look({(1, "k"): Change.ablation(basis, level)}, where="projection")
    assert not edit.needs_rotation
    model.forward(prompt.ids, model.new_cache(edit))
    x = seen[1, "k"][0].permute(1, 0, 2).flatten(1).double().numpy()
    np.testing.assert_allclose(x @ basis[:, 0], np.full(len(x), level @ basis[:, 0]), atol=1e-4)


def test_rows_of_a_batch_are_each_their_own() -> None:
    """Branches that join at their layers, of one or two dimensions, one edit for all: as each alone."""
    model = tiny_model()
    (prompt,) = model.encode(["open the door"])
    changes = []
    for layer, site, k in ((0, "v", 1), (1, "k", 2), (1, "v", 2), (2, "k", 1)):
        basis, level = plane(model, k, layer)
        changes.append({(layer, site): Change.ablation(basis, level)})
    edit = CacheDirections([{}, *changes])  # type: ignore[list-item]
    together = model.forward_branches(prompt.ids, [edit] * 4, [0, 1, 1, 2], cache=model.new_cache(edit))[:, -1]
    torch.testing.assert_close(together[0], model.forward(prompt.ids)[-1], atol=1e-4, rtol=1e-4)
    for row, change in enumerate(changes, start=1):
        alone = model.forward(prompt.ids, model.new_cache(CacheDirections(change)))[-1]  # type: ignore[arg-type]
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(together[row], together[0], atol=1e-3)
    some = edit.rows(torch.tensor([2, 4]))
    cache = model.new_cache(some)
    pair = model.forward_branches(prompt.ids, [some], [0], cache=cache)[:, -1]
    torch.testing.assert_close(pair, together[[2, 4]], atol=1e-4, rtol=1e-4)


def test_scaled_embeddings() -> None:
    """An embedding that stretches what it turns (YaRN) and leaves other channels: still exactly the level along the basis."""
    rng = np.random.default_rng(0)
    planes = torch.tensor([[0, 2], [1, 3]])  # of 6 channels
    angle = torch.tensor(rng.uniform(0, 6, (5, 2)))
    rotation = TokenRotation(1.7 * angle.cos(), 1.7 * angle.sin(), planes)
    x = torch.tensor(rng.standard_normal((1, 2, 5, 6)))
    basis, level = np.linalg.qr(rng.standard_normal((12, 2)))[0], rng.standard_normal(12)
    edit = CacheDirections({(0, "k"): Change.ablation(basis, level)})
    edit.set_rotation(0, rotation.of_vectors)
    after = rotation.unrotate(edit(0, "k", rotation.rotate(x)))[0].permute(1, 0, 2).flatten(1).numpy()
    flat = x[0].permute(1, 0, 2).flatten(1).numpy()
    np.testing.assert_allclose(after, flat - (flat - level) @ basis @ basis.T, atol=1e-5)


def test_an_edited_answer_is_decoded_as_one_pass_would() -> None:
    """Prompts of different lengths decode together under one edit, each as alone."""
    model = tiny_model()
    prompts = model.encode(["open the door", "a"])
    basis, level = plane(model, 1)
    edit = CacheDirections({(1, "k"): Change.ablation(basis, 3 * level), (2, "v"): Change.ablation(basis, level)})

    def answers(some: Any) -> list[list[int]]:
        caches = [model.new_cache(edit) for _ in some]
        first = [int(model.forward(p.ids, c)[-1].argmax()) for p, c in zip(some, caches, strict=True)]
        return model.generate(caches, first, 6)

    together = answers(prompts)
    assert together == [answers([prompt])[0] for prompt in prompts]
    ids = [*prompts[0].ids, *together[0][:-1]]
    logits = model.forward(ids, model.new_cache(edit), all_logits=True)
    assert logits[len(prompts[0]) - 1 :].argmax(-1).tolist() == together[0]


def test_a_subspace_is_ablated_as_its_directions_one_after_the_other() -> None:
    bases = torch.linalg.qr(torch.randn(3, 8, 2, generator=torch.manual_seed(0)))[0]
    x = torch.randn(3, 5, 8, generator=torch.manual_seed(1))
    both = ablate_subspaces(bases)(0, "post", x)
    first, second = (ablate(bases[:, :, column])(0, "post", x) for column in (0, 1))
    torch.testing.assert_close(both, ablate(bases[:, :, 1])(0, "post", first))
    assert float((both - second).abs().max()) > 0.1
    torch.testing.assert_close(both @ bases, torch.zeros(3, 5, 2), atol=1e-6, rtol=0)


def test_reading_with_an_edit_of_the_stream() -> None:
    model = tiny_model()
    (prompt,) = model.encode(["open the door"])
    unit = torch.nn.functional.normalize(torch.randn(model.geometry.d_model, generator=torch.manual_seed(0)), dim=0)
    for one in read(model, prompt, resid=True, edit_resid=ablate(unit)):
        x = vectors(one, "resid", at_site(one, "resid"))
        torch.testing.assert_close(x @ unit, torch.zeros(len(prompt)), atol=1e-5, rtol=0)
