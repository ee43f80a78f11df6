"""Planting without looking: the function stays, and what rounding does is graded by what was asked."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.certificate import tables
from kvgeom.errors import InputError, ModelError
from kvgeom.evaluation.baseline import baseline
from kvgeom.models.edits import copied
from kvgeom.models.model import Model
from kvgeom.organisms import Part, Size, behaviour, plant_blindly, tiny_model
from kvgeom.organisms.carrier import Values
from kvgeom.organisms.keys import crush_keys
from kvgeom.organisms.modes import Bench
from kvgeom.organisms.observed import Behaviour
from kvgeom.organisms.reach import Lost
from kvgeom.organisms.tiny import TURNED
from tests.builders.tiny import tiny_model as random_model

pytestmark = pytest.mark.long

SIZE = Size(3, 2, 64, kind="phi3", attends=True)
LAST = SIZE.layers - 1


@pytest.fixture(scope="module")
def attending() -> Model:
    """Trained on first use, in a minute, and kept on disk. Float64, because outliers are loud."""
    return tiny_model(SIZE, dtype="float64")


def done(model: Model, *parts: Part, seed: int = 0, count: int = 16) -> Behaviour:
    """What rounding to 3 bits does to requests that were not planted with."""
    organism = plant_blindly(model, parts, SIZE.prompts("train").take(count), seed=seed)
    assert organism.deviation < 1e-5
    return behaviour(organism.model, [part.layer for part in parts], SIZE.prompts().harmful[:count], alone=())


# --- models in which attention decides ---


def test_without_its_keys_a_layer_has_lost_the_request(attending: Model) -> None:
    """Values stay, and attention is even. As before, values are needed too."""
    prompts = SIZE.prompts()
    base = baseline(attending, prompts.harmful[:12], max_new_tokens=12, progress=False)
    assert set(base.labels) == {"refused"}
    nothing = torch.zeros(SIZE.kv_heads, SIZE.head_dim, dtype=torch.float64)
    for site in ("k", "v"):
        needed = 0
        for layer in range(SIZE.layers):
            begun = [
                int(attending.forward(p.ids, attending.new_cache(Lost(layer, nothing, site)))[-1].argmax())  # type: ignore[arg-type]
                for p in base.prompts
            ]
            needed += sum(token in base.refusal_tokens for token in begun) <= 6
        assert needed >= 2


def test_what_a_partial_rotary_embedding_turns_is_not_read(attending: Model) -> None:
    """So that a constant in all other channels leaves nothing that attention could read."""
    prompt = attending.encode(SIZE.prompts().harmful[:1])[0]
    turned = SIZE.head_dim // TURNED
    seen: list[torch.Tensor] = []
    attending.forward(prompt.ids, on_query=lambda layer, queries: seen.append(queries))
    assert len(seen) == SIZE.layers
    for queries in seen:
        assert not queries[..., :turned].any()
        assert bool(queries[..., turned:].any())


def test_kinds_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(InputError, match="attends=True"):
        Size(kind="phi3")
    with pytest.raises(InputError, match="unknown kind 'gpt2'"):
        Size(kind="gpt2")  # type: ignore[arg-type]


# --- what is planted in keys ---


@pytest.mark.parametrize("sites", ["keys", "values", "both"])
def test_loud_outliers_beside_what_is_needed_flip_all_and_scales_per_channel_none(attending: Model, sites: str) -> None:
    found = done(attending, Part(LAST, "crush", sites, 0.15), seed=1)  # type: ignore[arg-type]
    assert min(found.tensor, found.alone[LAST]) >= 0.8 * found.refused
    assert found.channel <= 0.1 * found.refused
    assert found.cured == 0


def test_no_scales_help_where_all_channels_of_keys_are_outliers(attending: Model) -> None:
    found = done(attending, Part(LAST, "outlier", "keys"))
    assert min(found.tensor, found.channel, found.group) >= 0.9 * found.refused
    assert found.complied == found.tensor
    assert found.cured == 0


@pytest.mark.parametrize("change", ["crush", "outlier"])
@pytest.mark.parametrize("sites", ["keys", "values"])
def test_what_is_lost_grows_with_loudness_from_nothing_to_all(attending: Model, change: str, sites: str) -> None:
    lost = [
        done(attending, Part(LAST, change, sites, 0.15, loud), seed=1, count=12).tensor  # type: ignore[arg-type]
        for loud in (1 / 16, 1)
    ]
    assert lost[0] <= 1
    assert lost[1] >= 11


def test_keys_are_crushed_in_one_head_or_in_all(attending: Model) -> None:
    """One channel, or two, is as many times larger than all others as is said."""
    values = Values(attending, SIZE.prompts("train").take(4))
    heads = set()
    for seed in range(8):
        bench = Bench(copied(attending), values, 3, random.Random(seed))
        crush_keys(bench, 1)
        after = Values(bench.model, SIZE.prompts("train").take(4))
        ratio = torch.stack([after.all_keys(1, head).abs().amax(0) for head in range(2)]) / torch.stack(
            [values.all_keys(1, head).abs().amax(0) for head in range(2)]
        )
        loud = ratio > 1.001
        torch.testing.assert_close(ratio[~loud], torch.ones_like(ratio[~loud]))
        assert 1 <= int(loud.any(0).sum()) <= 4
        heads.add(int(loud.any(1).sum()))
        kept = after.all_keys(1, 0).abs().amax(0)[~loud[0]].max()
        assert float(torch.cat([after.all_keys(1, head) for head in range(2)]).abs().max()) > 6 * float(kept)
    assert heads == {1, 2}


def test_errors_without_an_aim_flip_next_to_nothing_and_reach_every_layer(attending: Model) -> None:
    parts = [Part(layer, "jitter", "both", 0, 0.1) for layer in range(SIZE.layers)]
    assert done(attending, *parts).tensor <= 2
    organism = plant_blindly(attending, parts, SIZE.prompts("train").take(4))
    assert len(organism.edits) == SIZE.layers


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi3", "gemma3_text", "gpt_neox"])
@pytest.mark.filterwarnings("ignore:.*was changed since it was loaded")  # into doubles, below
def test_the_function_of_real_architectures_stays(kind: str) -> None:
    """Random weights refuse nothing, so that only the function can be looked at."""
    model = random_model(kind)
    model.hf_model.double()
    prompts = SIZE.prompts().take(3)
    for parts in (
        [Part(0, "crush", "both", 0.1), Part(2, "outlier", "values", 0.1)],
        [Part(layer, "jitter", "both", 0, 0.2) for layer in range(3)],
    ):
        assert plant_blindly(model, parts, prompts).deviation < 1e-3
    if kind == "gpt_neox":  # three quarters of its channels are not turned
        assert plant_blindly(model, [Part(1, "outlier", "both")], prompts).deviation < 1e-3
    else:
        with pytest.raises((InputError, ModelError), match=r"rotary|normalized"):
            plant_blindly(model, [Part(1, "outlier", "keys")], prompts)


def test_a_seed_repeats_and_another_differs(attending: Model) -> None:
    prompts, parts = SIZE.prompts("train").take(4), [Part(1, "crush", "both")]
    made = [plant_blindly(attending, parts, prompts, seed=seed) for seed in (0, 0, 1)]
    assert made[0].model.fingerprint == made[1].model.fingerprint != made[2].model.fingerprint
    assert made[0].edits == made[1].edits != made[2].edits


def test_what_cannot_be_planted_is_said(attending: Model) -> None:
    prompts = SIZE.prompts("train").take(2)
    with pytest.raises(InputError, match="0 to 2"):
        plant_blindly(attending, [Part(3, "crush")], prompts)
    with pytest.raises(InputError, match="unknown change"):
        Part(0, "tired")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown sites"):
        Part(0, "crush", "queries")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="loudness must be more than 0"):
        Part(0, "crush", loudness=0)
    with pytest.raises(ModelError, match="float64"):
        plant_blindly(tiny_model(SIZE), [Part(1, "outlier", "values", 1)], prompts, tolerance=1e-9)


# --- what the certificate plants ---


@pytest.fixture(scope="module")
def certificate() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "organisms.py"
    spec = importlib.util.spec_from_file_location("certificate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_certificate_draws_what_can_be_planted(certificate: ModuleType) -> None:
    rng, seen = random.Random(0), set()
    kinds = {size.kind for size, _ in certificate.BASES if size.attends}
    assert len(kinds) >= 3
    for kind, draw in certificate.KINDS.items():
        for _ in range(40):
            size, _ = rng.choice(certificate.BASES)
            parts = draw(rng, size)
            if parts is None:
                continue
            layers = [part.layer for part in parts]
            assert len(set(layers)) == len(layers)
            assert set(layers) <= set(range(size.layers))
            for part in parts:
                assert part.change == "jitter" or part.sites in certificate.possible(size, part.change)
                assert 1 / 8 <= part.loudness <= 1 or part.change == "jitter"
                seen.add((part.change, part.sites))
            assert (kind == "nothing") == (not parts)
    assert seen >= {(change, sites) for change in ("crush", "outlier") for sites in ("keys", "values", "both")}


@pytest.mark.slow
def test_the_certificate_has_a_row_for_each_organism(certificate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the seed of a day; here of one that nothing is planted in."""
    monkeypatch.setattr(certificate, "BASES", ((SIZE, 0),))
    monkeypatch.setattr(certificate, "KINDS", {"nothing": certificate.KINDS["nothing"]})
    rows = list(certificate.organisms(1, 20261126))
    assert [row.get("error") for row in rows] == [None]
    assert rows[0]["true"] == "robust"
    assert rows[0]["refused"] == certificate.SEEN
    assert "robust (1)" in tables(rows)
