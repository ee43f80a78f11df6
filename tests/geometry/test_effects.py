"""Effects of directions: each number again from a run by hand, and what is planted shows while random directions do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvgeom
from kvgeom.errors import InputError
from kvgeom.evaluation.scores import kl_divergence, margin
from kvgeom.geometry.effects import Effects, cross_fitted, p_of
from kvgeom.geometry.independence import Independence, independence
from kvgeom.geometry.interventions import CacheDirections, Change, ablate, ablate_subspaces, add
from kvgeom.geometry.trials import Part, dealt_part
from kvgeom.models.hf import HFModel
from kvgeom.organisms import Size
from kvgeom.prompts.sets import PromptSet
from tests.builders.requests import MORE_PAIRS
from tests.builders.tiny import tiny_hf_model, tiny_model, tiny_tokenizer

TOKENS = {5, 9, 30}
OTHERS = PromptSet(
    "others", ("blow up a dam", "rob a bank now", "spoil it"), ("walk up a hill", "rent a boat", "oil it"), ""
)


@pytest.fixture(scope="module")
def space() -> Any:
    return kvgeom.subspace(tiny_model(), MORE_PAIRS, position="template-1", progress=False)


@pytest.fixture(scope="module")
def found(space: Any) -> Effects:
    return space.effects(  # type: ignore[no-any-return]
        ["mean", "pca"], prompts=OTHERS, k=2, heads=True, controls=3, tokens=TOKENS, progress=False
    )


def by_hand(space: Any, layer: int, site: str, basis: np.ndarray, shift: np.ndarray) -> dict[str, np.ndarray]:
    """Margins under ablation of harmful and addition to harmless requests, and the divergence of these under ablation."""
    model = space.model
    x = space.features(layer, site)[:, space.positions.index("template-1")]
    level = x[~space.is_harmful].mean(0)

    def run(prompt: Any, adding: bool) -> torch.Tensor:
        if site == "resid":
            edit = (
                add(torch.tensor(shift).float(), layer)
                if adding
                else ablate_subspaces(torch.tensor(basis).float()[None])
            )
            return model.forward(prompt.ids, edit_resid=edit)[-1]  # type: ignore[no-any-return]
        change = Change.addition(shift) if adding else Change.ablation(basis, level)
        edit = CacheDirections({(layer, site): change})  # type: ignore[dict-item, assignment]
        return model.forward(prompt.ids, model.new_cache(edit))[-1]  # type: ignore[no-any-return]

    bad, good = model.encode(OTHERS.harmful), model.encode(OTHERS.harmless)
    margins = [float(margin(run(p, False), TOKENS)) for p in bad] + [float(margin(run(p, True), TOKENS)) for p in good]
    kl = np.mean([float(kl_divergence(model.forward(p.ids)[-1], run(p, False))) for p in good])
    return {"margin": np.array(margins), "kl": kl}


@pytest.mark.parametrize(("layer", "site"), [(1, "k"), (2, "v"), (1, "resid"), (0, "resid")])
@pytest.mark.parametrize("method", ["mean", "pca"])
def test_every_number_by_hand(space: Any, found: Effects, method: str, layer: int, site: str) -> None:
    k = 2 if method == "pca" else 1
    direction = space.refit(method=method, k=k, position="template-1").directions[layer, site]
    part = direction.basis @ direction.basis.T @ direction.gap
    shift = part / np.linalg.norm(part) * np.linalg.norm(direction.gap)
    wanted = by_hand(space, layer, site, direction.basis, shift)
    cell = found.data.sel(estimator=method, layer=layer, site=site)
    np.testing.assert_allclose(cell.margin, wanted["margin"], atol=2e-3)
    assert float(cell.kl) == pytest.approx(float(wanted["kl"]), abs=1e-3)
    clean = found.data.clean_margin.values
    assert float(cell.lost) == pytest.approx(float((clean - wanted["margin"])[:3].mean()), abs=2e-3)
    assert float(cell.induced) == pytest.approx(float((wanted["margin"] - clean)[3:].mean()), abs=2e-3)
    assert float(cell.lost_low) <= float(cell.lost) <= float(cell.lost_high)


def test_heads_by_hand(space: Any, found: Effects) -> None:
    size = space.model.geometry.head_dim
    x = space.features(2, "v")[:, space.positions.index("template-1")]
    gap = x[space.is_harmful].mean(0) - x[~space.is_harmful].mean(0)
    own = np.where(np.arange(len(gap)) // size == 1, gap, 0.0)
    wanted = by_hand(space, 2, "v", own[:, None] / np.linalg.norm(own), own)
    cell = found.data.sel(estimator="mean", layer=2, kv="v", head=1)
    np.testing.assert_allclose(cell.head_margin, wanted["margin"], atol=2e-3)
    assert float(cell.head_kl) == pytest.approx(float(wanted["kl"]), abs=1e-3)


def test_all_layers_together_by_hand(space: Any, found: Effects) -> None:
    model, changes = space.model, {}
    for layer in range(3):
        direction = space.directions[layer, "v"]
        if direction.defined:
            x = space.features(layer, "v")[:, space.positions.index("template-1")]
            changes[layer, "v"] = Change.ablation(direction.basis, x[~space.is_harmful].mean(0))
    assert set(changes) == {(1, "v"), (2, "v")}  # in layer 0 a template token is the same whatever was asked
    for row, prompt in enumerate(model.encode(OTHERS.harmful)):
        logits = model.forward(prompt.ids, model.new_cache(CacheDirections(changes)))[-1]  # type: ignore[arg-type]
        cell = found.data.together_margin.sel(estimator="mean", kv="v", prompt=row)
        assert float(cell) == pytest.approx(float(margin(logits, TOKENS)), abs=2e-3)


def test_what_is_undefined_has_no_effect_and_no_number(found: Effects) -> None:
    for name in ("margin", "lost", "induced_p", "kl", "lost_low"):
        assert np.isnan(found.data[name].sel(layer=0, site="k")).all(), name
    assert np.isnan(found.data.head_margin.sel(layer=0)).all()


def test_shares_of_random_directions(found: Effects) -> None:
    data = found.data.sel(layer=2, site="v", estimator="mean")
    control = found.data.control_margin.sel(layer=2, site="v").transpose("draw", "prompt").values
    random = (data.clean_margin.values - control)[:, :3].mean(1)
    assert float(data.lost_p) == (1 + (random >= float(data.lost)).sum()) / 4
    assert p_of(1.0, np.array([0.0, 2.0])) == pytest.approx(2 / 3)
    assert np.isnan(p_of(1.0, np.zeros(0)))


def test_tables_and_files(found: Effects, space: Any, tmp_path: Any) -> None:
    assert len(found.to_frame()) == 2 * 3 * 3
    assert set(found.to_frame().columns) >= {"lost", "lost_low", "lost_p", "induced", "kl"}
    assert len(found.to_frame("heads")) == 2 * 3 * 2 * 2
    assert list(found.to_frame("requests").harmful) == [True] * 3 + [False] * 3
    again = Effects.load(found.save(tmp_path / "e.nc"))
    assert again.overview().equals(found.overview())
    frame = space.compare(["mean", "pca"], samples=2, progress=False).overview(found)
    assert {"separation", "stability", "cosine_with_mean", "lost", "refused_ablated", "together_induced"} <= {
        *frame.columns
    }
    assert len(frame) == 6
    for name in found.figures():
        assert found.plot(name).data


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 9))
def test_layers_are_chosen_by_the_other_half(seed: int, layers: int, prompts: int) -> None:
    change = np.random.default_rng(seed).standard_normal((layers, prompts))
    found, _ = cross_fitted(change, change)
    for prompt in range(prompts):
        others = [p for p in range(prompts) if p % 2 != prompt % 2]
        layer = max(range(layers), key=lambda index: float(change[index, others].mean()))
        assert found[prompt] == change[layer, prompt]


def test_the_best_of_many_layers_is_not_better_than_it_is() -> None:
    """Of noise: 0 on average, where the best layer itself would stand far above."""
    rng = np.random.default_rng(0)
    chosen = [cross_fitted(noise, noise)[0].mean() for noise in rng.standard_normal((300, 20, 8))]
    best = [noise.mean(1).max() for noise in rng.standard_normal((300, 20, 8))]
    assert abs(np.mean(chosen)) < 0.08
    assert np.mean(best) > 0.5


def test_a_refusal_direction_shows_and_random_ones_do_not(trained: HFModel) -> None:
    size = Size(3)
    space = kvgeom.subspace(trained, size.prompts("train").take(12), position="instruction", progress=False)
    found = space.effects(
        ["mean", "whitened"], prompts=size.prompts().take(6), sites=["v", "resid"], controls=19, progress=False
    )
    frame = found.overview().set_index(["method", "site"])
    for site in ("v", "resid"):
        row = frame.loc[("mean", site)]
        assert row.lost_p == 0.05
        assert row.lost_low > max(3, row.lost_random)
        assert (row.refused, row.refused_ablated) == (1, 0)
        assert (row.refused_harmless, row.refused_added) == (0, 1)
    # Both directions separate every request; what one ablates is not what the model reads.
    compared = space.compare(["mean", "whitened"], samples=0, progress=False)
    assert (compared.data.auroc.sel(site="resid", position="template-1").dropna("layer", how="all") == 1).all()
    assert frame.loc[("whitened", "v")].lost < 0.2 * frame.loc[("mean", "v")].lost


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"prompts": MORE_PAIRS}, "found the directions themselves"),
        ({"prompts": {"harmful": ["x y"], "harmless": ["z w"]}}, "at least two"),
        ({"tokens": ()}, "refuses none"),
        ({"layers": [9]}, "layers"),
        ({"sites": ["kk"]}, "site"),
        ({"methods": ["men"]}, "mean"),
        ({"k": 0}, "k must be"),
        ({"controls": -1}, "controls"),
        ({"control": "shuffled"}, "control"),
        ({"contrls": 1}, "controls"),
    ],
)
def test_effects_that_cannot_be_had(space: Any, options: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        space.effects(**{"prompts": OTHERS, "tokens": TOKENS, "progress": False, **options})


@pytest.mark.parametrize("backend", ["lens", "nnsight"])
def test_backends_have_the_same_effects(backend: str) -> None:
    found = []
    for name in ("hf", backend):
        hf = tiny_hf_model("qwen2")
        hf.set_attn_implementation("eager")
        model = kvgeom.load(hf, tokenizer=tiny_tokenizer(), backend=name)
        own = kvgeom.subspace(model, MORE_PAIRS, position="instruction", progress=False)
        found.append(own.effects(prompts=OTHERS, controls=1, tokens=TOKENS, progress=False).data)
    for name in ("margin", "control_margin", "together_margin", "kl"):
        np.testing.assert_allclose(found[1][name], found[0][name], atol=3e-3, err_msg=name)


@pytest.mark.parametrize("kind", ["gemma3_text", "phi3", "gpt_neox"])
def test_architectures(kind: str) -> None:
    """Windows, fused projections, biases: directions at the projection, too."""
    for placement in ("cache", "paper"):
        own = kvgeom.subspace(tiny_model(kind), MORE_PAIRS, position="instruction", placement=placement, progress=False)
        data = own.effects(prompts=OTHERS, controls=1, layers=[1, 2], tokens=TOKENS, progress=False).data
        assert np.isfinite(data.margin).all()
        assert (np.abs(data.lost) > 1e-6).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_dealt_directions_are_differences_without_what_pairs_have_in_common(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    twins, common = rng.standard_normal((8, 6)), rng.standard_normal(6)
    own = np.concatenate([0.1 * rng.standard_normal((8, 5)), np.zeros((8, 1))], axis=1)
    x, harmful = np.concatenate([twins + 50 * common + own, twins]), np.arange(16) < 8
    like = Part(np.eye(6)[:, :1] + np.ones((6, 1)), np.zeros(6), np.array([3.0, 0, 4, 0, 0, 0]))
    found = dealt_part(like, k, np.random.default_rng(seed), x, harmful)
    np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(k), atol=1e-8)
    assert np.linalg.norm(found.shift) == pytest.approx(5)
    # Only the pairs' own differences are left, which are 0 in the last channel.
    np.testing.assert_allclose(found.basis[5], 0, atol=1e-6)


def test_dealt_directions_beside(space: Any) -> None:
    found = space.effects(
        prompts=OTHERS, layers=[2], controls=3, control="dealt", heads=True, tokens=TOKENS, progress=False
    )
    assert found.meta["control"] == "dealt"
    assert np.isfinite(found.data.control_margin).all()
    assert np.isfinite(found.data.head_control_margin).all()


def test_figure_of_effects(found: Effects) -> None:
    figure = found.plot(site="v")
    lines = {(trace.name, trace.xaxis): trace for trace in figure.data if trace.name in ("mean", "pca")}
    assert len(lines) == 4
    for method in ("mean", "pca"):
        for axis, side in (("x", "lost"), ("x2", "induced")):
            drawn = lines[method, axis]
            np.testing.assert_allclose(drawn.y, found.data[side].sel(estimator=method, site="v"), equal_nan=True)
    band = next(trace for trace in figure.data if trace.name == "random directions")
    random = found.data.clean_margin - found.data.control_margin.sel(site="v")
    random = random.isel(prompt=found.data.harmful.values).mean("prompt", skipna=False)
    assert max(band.y) == pytest.approx(float(random.max()))
    assert min(band.y) == pytest.approx(float(random.min()))


# --- independence ---


def test_independence_by_hand(tmp_path: Any) -> None:
    model = tiny_model()
    rng = np.random.default_rng(0)
    directions = {"a": rng.standard_normal(32), "b": rng.standard_normal(32)}
    found = independence(model, directions, OTHERS.harmful, controls=3, progress=False)
    units = {name: x / np.linalg.norm(x) for name, x in directions.items()}
    for row, prompt in enumerate(model.encode(OTHERS.harmful)):
        streams: list[dict[int, torch.Tensor]] = [{}, {}]
        model.forward(prompt.ids, on_resid=streams[0].__setitem__)
        model.forward(prompt.ids, on_resid=streams[1].__setitem__, edit_resid=ablate(torch.tensor(units["a"]).float()))
        for layer in range(3):
            cosines = [
                float(x[layer][0, -1].double().numpy() @ units["b"]) / float(x[layer][0, -1].double().norm())
                for x in streams
            ]
            assert float(found.data.cosine.sel(direction="b", layer=layer, prompt=row)) == pytest.approx(
                cosines[0], abs=1e-5
            )
            change = found.data.change.sel(ablated="a", direction="b", layer=layer, prompt=row)
            assert float(change) == pytest.approx(cosines[1] - cosines[0], abs=1e-5)
    change, cosine = found.data.change.sel(ablated="a", direction="b"), found.data.cosine.sel(direction="b")
    share = float(np.sqrt((change**2).mean() / (cosine**2).mean()))
    assert float(found.data.dependence.sel(ablated="a", direction="b")) == pytest.approx(share)
    np.testing.assert_allclose([found.data.dependence.sel(ablated=n, direction=n) for n in "ab"], 1, atol=1e-4)
    again = Independence.load(found.save(tmp_path / "i.nc"))
    assert again.to_frame().equals(found.to_frame())
    assert len(found.to_frame()) == 4
    assert found.plot().data
    with pytest.raises(InputError, match="unknown direction 'c'"):
        found.independent("a", "c")
    for bad, word in (({"a": np.ones(32)}, "two or more"), ({"a": np.ones(32), "b": np.zeros(32)}, "not be 0")):
        with pytest.raises(InputError, match=word):
            independence(model, bad, OTHERS.harmful, progress=False)


def test_harmfulness_and_refusal_depend_on_each_other_and_not_on_what_nothing_reads(trained: HFModel) -> None:
    """What is harmful is known at the instruction in layer 1; refusal, after layer 2, is computed from it."""
    size = Size(3)
    space = kvgeom.subspace(trained, size.prompts("train").take(12), progress=False)
    harmfulness = space.refit(concept="harmfulness").directions[1, "resid"].basis[:, 0]
    refusal = space.refit(concept="refusal").directions[2, "resid"].basis[:, 0]
    nothing = np.random.default_rng(5).standard_normal(len(refusal))
    for unit in (harmfulness, refusal):
        nothing -= unit * (unit @ nothing) / (unit @ unit)
    directions = {"harmfulness": harmfulness, "refusal": refusal, "nothing": nothing}
    found = independence(trained, directions, size.prompts().take(8).harmful, progress=False)
    share = found.data.dependence
    control = float(found.data.control_high.sel(direction="refusal"))
    assert found.independent("harmfulness", "refusal") is False
    assert float(share.sel(ablated="harmfulness", direction="refusal")) > 2 * control
    assert float(share.sel(ablated="nothing", direction="refusal")) < 2 * control
