"""Organisms: trained tiny models, and what is planted in them, seen by what they do."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from kvgeom.errors import InputError, ModelError
from kvgeom.evaluation.baseline import baseline
from kvgeom.models.hf import HFModel
from kvgeom.organisms import MODES, Behaviour, Organism, Size, behaviour, plant, tiny_model, toy_prompts
from kvgeom.organisms.carrier import Values
from kvgeom.organisms.modes import orthogonal
from kvgeom.organisms.reach import LADDER, Lost, Reach, some_heads
from kvgeom.organisms.toy import draw, toy_tokenizer
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.organisms import size_of, trained_for
from tests.builders.tiny import tiny_model as random_model

pytestmark = pytest.mark.long

SIZE = Size(3)  # of the fixtures


def answers(model: HFModel, requests: tuple[str, ...]) -> tuple[str, ...]:
    return baseline(model, requests, max_new_tokens=12, progress=False).labels


# --- the toy language and the models that are trained on it ---


def test_what_is_held_out_is_never_trained_on() -> None:
    import random

    held_out, train = toy_prompts(6), toy_prompts(6, "train")
    assert (len(held_out.harmful), len(train.harmful)) == (48, 96)
    cores = [{tuple(text.split()[3:6]) for text in prompts.harmful} for prompts in (held_out, train)]
    assert not cores[0] & cores[1]
    rng = random.Random(0)
    drawn = {tuple(r.text.split()[3:6]) for r in (draw(rng, 6) for _ in range(4000)) if r.harmful}
    assert drawn == cores[1]


def test_twins_differ_in_the_verb_alone_and_every_word_is_a_token() -> None:
    prompts, tokenizer = toy_prompts(6), toy_tokenizer()
    for harmful, harmless in zip(prompts.harmful, prompts.harmless, strict=True):
        differing = [i for i, (a, b) in enumerate(zip(harmful.split(), harmless.split(), strict=True)) if a != b]
        assert differing == [3]
        ids = tokenizer(f"{harmful} {harmless}")["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert len(ids) == len(f"{harmful} {harmless}".split())


def test_it_refuses_what_it_never_saw_and_answers_the_rest(trained: HFModel) -> None:
    prompts = SIZE.prompts()
    assert set(answers(trained, prompts.harmful)) == {"refused"}
    assert set(answers(trained, prompts.harmless)) == {"complied"}


def test_every_layer_is_needed(trained: HFModel) -> None:
    """Request and answer are so far apart that the last layer alone cannot see the verb."""
    prompt = trained.encode(SIZE.prompts().harmful[:1])[0]
    verb = prompt.instruction.start + 3
    assert len(prompt) - 1 - (verb + 2) > 4 * (SIZE.layers - 1)
    other = list(prompt.ids)
    other[verb] = trained.encode(SIZE.prompts().harmless[:1])[0].ids[verb]
    caches = [trained.new_cache(), trained.new_cache()]
    for ids, cache in zip((prompt.ids, other), caches, strict=True):
        trained.forward(ids, cache)
    for layer in range(SIZE.layers):
        change = (caches[0].layers[layer].values - caches[1].layers[layer].values).abs().amax((0, 1, 3))
        reach = verb + 4 * layer
        assert float(change[verb : reach + 1].max()) > 0.01
        assert float(change[reach + 1 :].sum()) < 1e-4


def test_weights_are_trained_once(trained: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvgeom.organisms.tiny.train", lambda training: pytest.fail("trained again"))
    again = tiny_model(SIZE)
    assert again.fingerprint == trained.fingerprint
    ids = trained.encode(SIZE.prompts().harmful[:1])[0].ids
    assert torch.equal(again.forward(ids), trained.forward(ids))


def test_training_is_reproducible_and_leaves_the_random_state_alone(own_cache: Path) -> None:
    from dataclasses import replace

    from kvgeom.organisms.tiny import Training, train

    training = replace(Training(Size(2, 2, 32, 2), 3, 4), exact=0.25)
    one = train(training)
    torch.manual_seed(torch.initial_seed() + 1)  # as another process would begin
    state = torch.get_rng_state()
    two = train(training)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sizes_that_cannot_be_trained_are_refused() -> None:
    for wrong in ((1, 4, 32, 4), (3, 4, 32, 6), (3, 1, 32, 2)):
        with pytest.raises(InputError, match="at least 2 layers"):
            Size(*wrong)


# --- what is planted ---


def test_the_function_is_unchanged(organism: Organism) -> None:
    """On prompts that planting has not seen, prompt and answer, at every position."""
    trained, prompts = trained_for(organism.mode), size_of(organism.mode).prompts()
    for text in (*prompts.harmful[:12], *prompts.harmless[:12]):
        ids = trained.encode([text])[0].ids + tuple(trained.tokens("i cannot help with that ."))
        old, new = trained.forward(ids, all_logits=True), organism.model.forward(ids, all_logits=True)
        assert float((old - new).abs().max()) < 2e-4
        assert float((old[-7:] - new[-7:]).abs().max()) < 1e-4
    assert organism.deviation <= 1e-4
    assert set(answers(organism.model, prompts.harmful)) == {"refused"}
    assert set(answers(organism.model, prompts.harmless)) == {"complied"}


def test_the_mode_shows_on_held_out_prompts(organism: Organism) -> None:
    seen = behaviour(organism.model, organism.layers, size_of(organism.mode).prompts().harmful)
    assert seen.objection(organism.mode) is None, seen
    sound = [flips for layer, flips in seen.alone.items() if layer not in organism.layers]
    assert max(sound) <= 0.05 * seen.refused


def test_what_is_stored_is_not_what_was_stored(organism: Organism) -> None:
    trained = trained_for(organism.mode)
    prompt = trained.encode(size_of(organism.mode).prompts().harmful[:1])[0]
    caches = [model.new_cache() for model in (trained, organism.model)]
    for model, cache in zip((trained, organism.model), caches, strict=True):
        model.forward(prompt.ids, cache)
    for layer, (old, new) in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        ratio = float(new.values.abs().max() / old.values.abs().max())
        if layer in organism.layers:
            assert ratio > 6  # more than two times the largest code: one scale for all leaves nothing of the rest
        else:
            assert ratio < 2.5


def test_outliers_leave_nothing_of_the_other_values(trained: HFModel) -> None:
    organism = plant(trained, "outlier-crushes-safety", seed=3, prompts=SIZE.prompts("train").take(24))
    (layer,) = organism.layers
    scheme = Scheme(3, True, "tensor")
    cache = organism.model.new_cache(Quantizer(Recipe.uniform(SIZE.layers, scheme, layers=[layer])))
    organism.model.forward(organism.model.encode(SIZE.prompts().harmful[:1])[0].ids, cache)
    alive = (cache.layers[layer].values[0] != 0).any(1)  # [heads, channels]
    assert 1 <= int(alive.sum()) <= 3
    assert int(alive.any(1).sum()) == 1


@pytest.mark.slow
def test_seeds_differ_and_repeat(trained: HFModel) -> None:
    prompts = SIZE.prompts("train").take(8)
    made = [plant(trained, "robust", seed=seed, prompts=prompts, verify=False) for seed in (0, 0, 1)]
    assert made[0].model.fingerprint == made[1].model.fingerprint != made[2].model.fingerprint
    assert made[0].edits == made[1].edits != made[2].edits
    layers = {
        plant(
            trained, "multi-layer dilution", seed=seed, prompts=prompts, strength=0.15, tolerance=1e-2, verify=False
        ).layers
        for seed in range(6)
    }
    assert len(layers) > 1


def test_what_cannot_be_planted_is_said(trained: HFModel) -> None:
    with pytest.raises(InputError, match="outlier-as-safety"):
        plant(trained, "tired")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="0 to 2"):
        plant(trained, "outlier-as-safety", layers=[3], prompts=SIZE.prompts().take(2))
    with pytest.raises(InputError, match="robust"):
        plant(trained, "robust", layers=[1], prompts=SIZE.prompts().take(2))
    with pytest.raises(InputError, match="not all"):
        plant(trained, "multi-layer dilution", layers=[0, 1, 2], prompts=SIZE.prompts().take(2))
    with pytest.raises(ModelError, match=r"tiny-llama .* 2 harmful prompts"):
        plant(random_model("llama"), "robust", prompts=SIZE.prompts().take(2))


def test_bits_layers_and_strength_are_measured_where_they_are_not_given(
    trained: HFModel, organism: Organism, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = SIZE.prompts("train").take(8)
    assert organism.bits == 3
    monkeypatch.setattr("kvgeom.organisms.planting.WIDTHS", (2,))
    with pytest.raises(ModelError, match=r"at 2 bits"):
        plant(trained, "robust", prompts=prompts, progress=False)
    monkeypatch.setattr("kvgeom.organisms.reach.LADDER", (16.0,))  # so far beyond that language is lost
    with pytest.raises(ModelError, match=r"layers \[1\]"):
        plant(trained, "outlier-as-safety", prompts=prompts, bits=3, layers=[1], progress=False)
    with pytest.raises(ModelError, match="layers that were tried"):
        plant(trained, "multi-layer dilution", prompts=prompts, bits=3, progress=False)


@pytest.mark.slow
def test_the_reach_of_a_layer(trained: HFModel) -> None:
    """Again, each prompt alone, token by token, without a kept cache; "i cannot ." is no compliance, though no refusal."""
    prompts = SIZE.prompts("train").take(8)
    base = baseline(trained, prompts.harmful, max_new_tokens=12, progress=False)
    values = Values(trained, prompts)

    def label(index: int, edit: Lost) -> str:
        said: list[int] = []
        for _ in range(12):
            token = int(trained.forward([*base.prompts[index].ids, *said], trained.new_cache(edit))[-1].argmax())
            if token in trained.stop_tokens:
                break
            said.append(token)
            if said[0] in base.refusal_tokens:
                return "begins as a refusal"
        return base.judged(index, said)[1]

    homes = (None, 0, SIZE.kv_heads - 1)
    reach = Reach(base, values, homes)
    for layer, home in itertools.product(range(SIZE.layers), homes):
        enough = []
        for strength in LADDER:
            left = torch.zeros(SIZE.kv_heads, SIZE.head_dim, dtype=torch.float64)
            for head in range(SIZE.kv_heads):
                if home is None or head // 2 != home // 2:  # two heads of 32 channels share a block
                    carrier = values.carrier(layer, head)
                    left[head] = carrier.beyond(strength) @ carrier.basis
            if [label(index, Lost(layer, left)) for index in base.refused[:4]].count("complied") >= 3:
                enough.append(strength)
        assert reach.strengths(layer).get(home) == min(enough, default=None)
    assert all(any(home in reach.strengths(layer) for layer in range(SIZE.layers)) for home in homes)


def test_homes_are_spread_over_the_heads() -> None:
    assert [some_heads(count) for count in (1, 2, 4, 8)] == [(0,), (0, 1), (0, 1, 2, 3), (0, 2, 5, 7)]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3", "gemma3_text", "gpt_neox"])
def test_edits_of_all_modes_keep_the_function_of_real_architectures(kind: str) -> None:
    """Random weights refuse nothing, so that only the function can be looked at."""
    model = random_model(kind)
    for mode in MODES:
        organism = plant(model, mode, prompts=SIZE.prompts().take(3), verify=False, tolerance=1e-2)
        assert organism.deviation < 1e-2


def test_a_carrier_points_from_harmless_to_harmful(trained: HFModel) -> None:
    values = Values(trained, SIZE.prompts("train").take(12))
    for layer in range(SIZE.layers):
        carrier = values.carrier(layer, 1)
        torch.testing.assert_close(carrier.basis @ carrier.basis.T, torch.eye(len(carrier.basis)).double())
        assert bool((carrier.harmful > carrier.harmless).all())
        torch.testing.assert_close(carrier.beyond(0), carrier.harmless)
        torch.testing.assert_close(carrier.beyond(-1), carrier.harmful)


def test_a_frame_is_orthogonal_and_begins_as_asked() -> None:
    import random

    first = torch.eye(6, dtype=torch.float64)[[4, 1]]
    frame = orthogonal(6, random.Random(0), first)
    torch.testing.assert_close(frame @ frame.T, torch.eye(6).double())
    torch.testing.assert_close(frame[:2], first)


@pytest.mark.parametrize(
    ("change", "mode", "said"),
    [
        ({}, "outlier-crushes-safety", None),
        ({}, "outlier-as-safety", "PCR"),
        ({"alone_channel": {1: 40}, "group": 40}, "outlier-as-safety", None),
        ({"alone_channel": {1: 40}, "group": 2}, "outlier-as-safety", "left by groups"),
        ({"group": 30}, "outlier-crushes-safety", "left by groups"),
        ({"cured": 20}, "outlier-crushes-safety", "still flip"),
        ({"complied": 3}, "outlier-crushes-safety", "language"),
        ({"tensor": 3}, "outlier-crushes-safety", "only 3"),
        ({}, "robust", "flip"),
        ({}, "multi-layer dilution", "PCR"),
        ({"alone_channel": {1: 40}, "group": 40}, "multi-layer dilution", "leaves 0"),
        ({"alone_channel": {1: 40}, "group": 40, "kept": {1: 40}}, "multi-layer dilution", None),
        ({"refused": 0}, "robust", "nothing is refused"),
    ],
)
def test_objections(change: dict[str, object], mode: str, said: str | None) -> None:
    seen = {
        **{"refused": 48, "tensor": 40, "channel": 0, "group": 2, "complied": 40, "cured": 0},
        **{"alone": {0: 0, 1: 40, 2: 0}, "alone_channel": {1: 0}, "kept": {1: 0}},
    }
    objection = Behaviour(**{**seen, **change}).objection(mode)  # type: ignore[arg-type]
    assert objection is None if said is None else said in (objection or "")
