"""What tells models apart: any change of what can change an answer makes another model of it, and its journal is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import kvgeom
from kvgeom.errors import InputError, KvgeomWarning, ModelError
from kvgeom.evaluation.baseline import baseline
from kvgeom.geometry.error_paths import follow_errors
from kvgeom.models import identity
from kvgeom.models.hf import HFModel
from kvgeom.models.identity import identify, weights_identity
from tests.builders.judges import ArbitraryJudge
from tests.builders.tiny import tiny_hf_model, tiny_model, tiny_tokenizer

HF, TOKENIZER = tiny_hf_model("gemma3_text"), tiny_tokenizer()
WEIGHTS = dict(HF.named_parameters())
#: All that a configuration says but for what does not change an answer.
SETTINGS = sorted(HF.config.to_dict().keys() & vars(HF.config).keys() - identity._PASSING)


def of(hf: Any = HF, tokenizer: Any = TOKENIZER, template: str = "t", stop: frozenset[int] = frozenset({2})) -> Any:
    found = identify(hf, tokenizer, stop)
    return found.fingerprint(template), found.identity


FIRST = of()


@settings(max_examples=150)
@given(st.data())
def test_every_bit_of_every_weight(data: st.DataObject) -> None:
    """The lowest bit changes the fingerprint; what bfloat16 sees of it, the identity too. Put back, it is the same model."""
    weight = WEIGHTS[data.draw(st.sampled_from(sorted(WEIGHTS)))].detach().view(-1)
    at = data.draw(st.integers(0, len(weight) - 1))
    bit = data.draw(st.integers(0, 30))
    was = weight[at].clone()
    try:
        weight.view(torch.int32)[at] ^= 1 << bit
        fingerprint, same = of()
        assert fingerprint != FIRST[0]

        def seen(x: torch.Tensor) -> float:
            coarse = float(x.to(torch.bfloat16))
            return coarse if abs(coarse) >= 2.0**-14 else 0.0

        if seen(weight[at]) == seen(was):
            assert same == FIRST[1]
        elif not torch.isnan(weight[at]):
            assert same != FIRST[1]
    finally:
        weight[at] = was
    assert of() == FIRST


@given(st.sampled_from(SETTINGS), st.data())
@settings(max_examples=60)
def test_every_setting_of_the_configuration(name: str, data: st.DataObject) -> None:
    value = getattr(HF.config, name)
    others: dict[type, Any] = {bool: st.booleans(), int: st.integers(0, 99), float: st.floats(0.1, 9), str: st.text()}
    other = data.draw(others.get(type(value), st.sampled_from(["x", 7])).filter(lambda each: each != value))
    changed = copy.copy(HF)
    changed.config = copy.deepcopy(HF.config)
    changed.config.__dict__[name] = other
    fingerprint, same = of(changed)
    assert fingerprint != FIRST[0]
    assert same.partition(".")[0] != FIRST[1].partition(".")[0]
    changed.config = copy.deepcopy(HF.config)
    for passing in ("_name_or_path", "transformers_version", "dtype"):
        changed.config.__dict__[passing] = other
    assert of(changed) == FIRST


def retold(change: Callable[[dict[str, Any]], None]) -> PreTrainedTokenizerFast:
    record = json.loads(TOKENIZER.backend_tokenizer.to_str())
    change(record)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(record)),
        **{name: str(token) for name, token in TOKENIZER.special_tokens_map.items()},
    )


@given(st.data())
@settings(max_examples=60)
def test_every_word_of_the_vocabulary(data: st.DataObject) -> None:
    assert of(tokenizer=retold(lambda _: None)) == FIRST
    word = data.draw(st.sampled_from(sorted(TOKENIZER.get_vocab().keys() - {*TOKENIZER.all_special_tokens})))
    new = data.draw(
        st.text(st.characters(codec="utf-8"), min_size=2, max_size=5).filter(lambda w: w not in TOKENIZER.get_vocab())
    )

    def renamed(record: dict[str, Any]) -> None:
        record["model"]["vocab"][new] = record["model"]["vocab"].pop(word)

    fingerprint, same = of(tokenizer=retold(renamed))
    assert fingerprint != FIRST[0]
    assert same != FIRST[1]
    assert same.partition(".")[0] == FIRST[1].partition(".")[0]


def test_merges_normalizers_special_tokens_templates_and_stop_tokens() -> None:
    a, b, c = sorted(TOKENIZER.get_vocab())[5:8]

    def merged(record: dict[str, Any]) -> None:
        record["model"]["vocab"][a + b] = len(record["model"]["vocab"])
        record["model"]["merges"] = [[a, b]]

    lower = tiny_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    other_end = tiny_tokenizer()
    other_end.pad_token = c
    found = [
        of(tokenizer=retold(merged)),
        of(tokenizer=lower),
        of(tokenizer=other_end),
        of(template="u"),
        of(stop=frozenset({2, 3})),
        of(stop=frozenset()),
    ]
    assert len({fingerprint for fingerprint, _ in (*found, FIRST)}) == 7
    assert found[3][1] == FIRST[1]  # a plan holds under another template
    called = tiny_tokenizer()
    called(["a", "bb"], padding=True, truncation=True, max_length=4)  # leaves its settings in the tokenizer
    assert of(tokenizer=called) == FIRST


def test_what_is_stored_beside_parameters() -> None:
    """Integers of quantized weights are buffers; tensors of other libraries are made of several."""
    found = []
    for value in (1, 2):
        model = torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.ones_(model.weight)
        model.register_buffer("packed", torch.full((3,), value, dtype=torch.uint8))
        model.register_buffer("made", torch.full((3,), float(value)), persistent=False)
        found.append(weights_identity(model))
    assert found[0] != found[1]
    found = []
    for value in (1.0, 2.0):
        model = torch.nn.Linear(2, 2, bias=False)
        model.weight = torch.nn.Parameter(TwoTensor(torch.ones(2, 2), torch.full((2, 2), value)))
        found.append(weights_identity(model))
    assert found[0] != found[1]
    with pytest.raises(ModelError, match="weight has no values"):
        weights_identity(torch.nn.Linear(2, 2, bias=False, device="meta"))


def test_pieces_threads_and_strides_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "PIECE", 7)
    assert of() == FIRST
    model = copy.deepcopy(HF)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.data = weight.data.t().contiguous().t()
    assert of(model) == FIRST


def test_a_model_from_its_files_is_the_model(tmp_path: Path) -> None:
    mine = tiny_model("qwen2")
    mine.hf_model.save_pretrained(tmp_path)
    mine.tokenizer.save_pretrained(tmp_path)
    read = kvgeom.load(tmp_path, progress=False)
    # Some families replace parts of the tokenizer as they read it.
    mine = HFModel(mine.hf_model, AutoTokenizer.from_pretrained(tmp_path), name="x")
    assert (read.fingerprint, read.identity) == (mine.fingerprint, mine.identity)


CHANGES: dict[str, Callable[[Path], None]] = {}


def edits(file: str) -> Callable[[Callable[[Any], object]], None]:
    """A change of a JSON file of the checkpoint."""

    def register(change: Callable[[Any], object]) -> None:
        def apply(folder: Path) -> None:
            record = json.loads((folder / file).read_text())
            change(record)
            (folder / file).write_text(json.dumps(record))

        CHANGES[f"{file} {len(CHANGES)}"] = apply

    return register


edits("config.json")(lambda r: r.update(hidden_act="gelu"))
edits("config.json")(lambda r: r.update(rms_norm_eps=1e-4))
edits("config.json")(
    lambda r: r.update(use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention"] * 3)
)
edits("generation_config.json")(lambda r: r.update(eos_token_id=[2, 7]))
edits("tokenizer.json")(lambda r: r["model"]["vocab"].update({"XYZ": r["model"]["vocab"].pop("a")}))


@pytest.mark.filterwarnings("ignore:.*reads text by rules of its own")  # the tokenizer is not of this type of model
def test_a_journal_of_the_model_as_it_was_is_refused(tmp_path: Path) -> None:
    """The same command over the folder of a model that was edited since."""
    mine, folder, journal = tiny_model("qwen2"), tmp_path / "model", tmp_path / "j"
    mine.hf_model.save_pretrained(folder)
    mine.tokenizer.save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def run() -> None:
        base = baseline(folder, ["why?"], journal=journal, judge=ArbitraryJudge(), max_new_tokens=2, progress=False)
        base.journal.close()  # type: ignore[attr-defined]

    run()
    before = journal.read_bytes()
    for change in CHANGES.values():
        change(folder)
        with pytest.raises(InputError, match=r"about something else.*fingerprint"):
            run()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    run()
    assert journal.read_bytes() == before
    hf = tiny_hf_model("qwen2")
    with torch.no_grad():
        hf.model.layers[1].mlp.up_proj.weight[17, 5] += 1e-3
    with pytest.raises(InputError, match="fingerprint"):
        baseline(
            HFModel(hf, tiny_tokenizer(), name=folder.name), ["why?"], journal=journal, judge=ArbitraryJudge(), max_new_tokens=2,
            progress=False,
        )  # fmt: skip


def test_frequencies_that_were_once_in_another_type() -> None:
    """A model that was in bfloat16 keeps coarse frequencies of its rotary embedding, which are stored nowhere."""
    model, coarse = tiny_hf_model(), tiny_hf_model().bfloat16().float()
    coarse.load_state_dict(model.state_dict())
    assert not torch.equal(model.model.rotary_emb.inv_freq, coarse.model.rotary_emb.inv_freq)
    one, other = (kvgeom.load(each, tokenizer=tiny_tokenizer()) for each in (model, coarse))
    assert one.fingerprint != other.fingerprint
    assert one.identity == other.identity


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_what_is_changed_in_place_is_noticed(data: st.DataObject) -> None:
    """By any bit, also through ``.data``, which torch does not count."""
    hf = tiny_hf_model("qwen2")
    model = kvgeom.load(hf, tokenizer=tiny_tokenizer(), name="m")
    first = model.fingerprint
    assert kvgeom.load(model) is model
    assert model.fingerprint == first
    weight = dict(hf.named_parameters())[data.draw(st.sampled_from(sorted(dict(hf.named_parameters()))))]
    at = data.draw(st.integers(0, weight.numel() - 1))
    bits = weight.data.view(torch.int32).reshape(-1)
    bits[at] ^= 1 << data.draw(st.integers(0, 22))
    hf.train()
    with pytest.warns(KvgeomWarning, match="m was changed since it was loaded"):
        kvgeom.load(model)
    assert not hf.training
    assert model.fingerprint == HFModel(hf, tiny_tokenizer(), name="m").fingerprint != first


MOVES: dict[str, Any] = {
    "rows rolled": lambda x: x.roll(1, 0),
    "columns reversed": lambda x: x.flip(-1),
    "halves exchanged": lambda x: torch.cat([x[len(x) // 2 :], x[: len(x) // 2]]),
    "all shuffled": lambda x: x.reshape(-1)[
        torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))
    ].reshape(x.shape),
}


@pytest.mark.parametrize("move", MOVES)
def test_weights_that_only_move_are_noticed(move: str) -> None:
    """The same numbers in other places are another model."""
    hf = tiny_hf_model("qwen2")
    model = kvgeom.load(hf, tokenizer=tiny_tokenizer(), name="m")
    first, weight = model.fingerprint, hf.model.layers[1].self_attn.v_proj.weight.data
    weight.copy_(MOVES[move](weight.clone()))
    with pytest.warns(KvgeomWarning, match="m was changed since it was loaded"):
        kvgeom.load(model)
    assert model.fingerprint != first


@given(
    st.sampled_from([(6,), (4, 8), (5, 3), (3, 4, 8), (2, 3, 5)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64]),
    st.integers(0, 10_000),
)
def test_two_entries_that_are_exchanged_are_noticed(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 100, shape, generator=rng).to(dtype)
    one, other = torch.randperm(x.numel(), generator=rng)[:2].tolist()
    moved = x.clone().reshape(-1)
    moved[[one, other]] = moved[[other, one]]
    assert (identity._sums(moved.reshape(shape)) == identity._sums(x)) == torch.equal(moved.reshape(shape), x)


@pytest.mark.parametrize("backend", ["hf", "lens", "nnsight"])
def test_a_held_model_that_was_changed_is_another(backend: str, tmp_path: Path) -> None:
    hf = tiny_hf_model("qwen2")
    model = kvgeom.load(hf, tokenizer=tiny_tokenizer(), name="m", backend=backend)

    def run(base: Any = None) -> Any:
        how: dict[str, Any] = {"judge": ArbitraryJudge(), "max_new_tokens": 2, "progress": False}
        base = baseline(model, ["why?"], journal=tmp_path / "j", **how) if base is None else base
        kvgeom.evaluate(model, "int4-asym-token", base, progress=False)
        base.journal.close()
        return base

    kept = run()
    run()
    with torch.no_grad():
        next(model.hf_model.parameters())[3] += 1.0  # type: ignore[attr-defined]
    with (
        pytest.warns(KvgeomWarning, match="was changed"),
        pytest.raises(InputError, match=r"about something else.*fingerprint"),
    ):
        run()
    with pytest.raises(InputError, match="was changed after the baseline was made"):
        run(kept)


def test_dropout_of_a_model_in_training_is_left() -> None:
    hf = tiny_hf_model("qwen2")
    for layer in hf.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model = kvgeom.load(hf, tokenizer=tiny_tokenizer(), name="m")
    truth = model.forward([5, 6, 7, 8])
    hf.train()
    assert not torch.equal(model.forward([5, 6, 7, 8]), truth)  # so that the test could fail
    found = (
        follow_errors(model, ["burn it"], progress=False).data,
        follow_errors(model, ["burn it"], progress=False).data,
    )
    assert found[0].identical(found[1])
    assert torch.equal(model.forward([5, 6, 7, 8]), truth)
