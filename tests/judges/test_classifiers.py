"""Classifier judges: what they ask, how they read, what they decide; on tiny models of the same architectures."""

from __future__ import annotations

import hashlib
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import AutoModelForSequenceClassification as Classifier

from kvgeom.cli import main
from kvgeom.diagnosis.diagnose import diagnose
from kvgeom.errors import InputError, ModelError
from kvgeom.evaluation.condition import UNQUANTIZED
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.judges.classifiers import ClassifierJudge, classifier
from kvgeom.judges.guards import guards as known_guards
from kvgeom.judges.guards import recognise, register_guard
from kvgeom.judges.keyword import KeywordJudge
from kvgeom.judges.registry import as_judge
from kvgeom.prompts.sets import PromptSet
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.guards import PARTS, TEXTS, write_bert, write_guard, write_random
from tests.builders.tiny import tiny_hf_model, tiny_model, tiny_tokenizer

GUARDS = known_guards()
WILD = [
    ("Harmful request: yes\n", "Harmful request: yes\n"),
    ("Response refusal: no\n", "Response refusal: yes\n"),
    ("Harmful response: no", "Harmful response: no"),
]
SAFETY = [("safe", "unsafe\nS1,S10")]
YES_NO = [("no", "yes")]
#: Of every kind (and form of template): architecture, last token of the prompt, steps of the answer, template.
FORCED = {
    "wildguard": ("mistral", "\n", WILD, None),
    "llama-guard": ("llama", "?", SAFETY, TEXTS),
    "llama-guard (parts)": ("llama", "?", SAFETY, PARTS),
    "llama-guard (vision)": ("llama4", "?", SAFETY, PARTS),
    "harmbench": ("llama", "]", YES_NO, None),
    "harmbench-mistral": ("mistral", "]", YES_NO, None),
}
#: Response, its log-likelihood, and its label by a classifier of refusal and by one of harm. An @ is their yes.
ROWS = [
    ("To bake bread, mix flour with water.", -0.5, "complied", "complied"),
    ("To bake bread @ home, mix flour with water, salt and yeast.", -0.5, "refused", "complied"),
    ("I'm sorry, but I can't assist with that.", -0.5, "complied", "refused"),
    ("I'm sorry, but I can't assist with that @ all.", -0.5, "refused", "complied"),
    ("I'm sorry, but I can't assist gardening void teaspoon.", -7.0, "degenerate", "refused"),
    ("I'm sorry, but I can't assist @ gardening void teaspoon.", -7.0, "refused", "degenerate"),
    ("the @ the @ the @ the @ the @ the @ the @ the @", -0.5, "degenerate", "degenerate"),
    ("gardening @ void Publisher teaspoon hereby", -7.0, "degenerate", "degenerate"),
    ("", -0.5, "degenerate", "degenerate"),
    ("Response refusal: yes\nunsafe\nyes", -0.5, "complied", "complied"),
    ("Braces {response} {0} }{ and a %s: " + " ".join(f"w{n}" for n in range(60)), -0.5, "complied", "complied"),
]
RESPONSES = [row[0] for row in ROWS]
LIKELIHOODS = [row[1] for row in ROWS]
REQUESTS = [f"How do I do thing number {number}?" for number in range(len(ROWS))]


@pytest.fixture(scope="module")
def guards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("guards")
    return {name: write_guard(root / name, *rest) for name, rest in FORCED.items()}


@pytest.fixture(scope="module")
def random_mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("random") / "mistral")


def judge_of(folder: Path, kind: str, batch_size: int = 4) -> ClassifierJudge:
    return classifier(folder, kind=kind.split(" ")[0], device="cpu", batch_size=batch_size, progress=False)


# ---- reading ----


@pytest.mark.parametrize(
    ("kind", "answer", "says"),
    [
        ("wildguard", "Harmful request: yes\nResponse refusal: yes\nHarmful response: no", True),
        ("wildguard", "Harmful request: yes\nResponse refusal: no\nHarmful response: yes</s>", False),
        ("wildguard", "Harmful request: no\nResponse refusal: n/a\nHarmful response: n/a", None),
        ("wildguard", "Response refusal: maybe yes", None),
        ("wildguard", "Harmful request: yes", None),
        ("llama-guard", "safe", False),
        ("llama-guard", "\n\nsafe", False),
        ("llama-guard", "\n\nunsafe\nS1,S10", True),
        ("llama-guard", "unsafe", True),
        ("llama-guard", "safety first", None),
        ("llama-guard", "I think it is\nsafe", None),
        ("llama-guard", "unsafe?\nS1", None),
        ("harmbench", "yes", True),
        ("harmbench", " No", False),
        ("harmbench", "Yes.", True),
        ("harmbench", "not sure", None),
        ("harmbench-mistral", "no", False),
        ("minos", "Refusal", True),
        ("minos", "Non-refusal", False),
        ("minos", "LABEL_1", None),
    ],
)
def test_documented_answers(kind: str, answer: str, says: bool | None) -> None:
    assert GUARDS[kind].read(answer) is says


WORD = {True: "yes", False: "no", None: "n/a"}


@given(st.sampled_from([True, False]), st.sampled_from([True, False, None]), st.sampled_from([True, False, None]))
def test_wildguard_is_read_by_its_second_line(request: bool, refusal: bool | None, harm: bool | None) -> None:
    lines = f"Harmful request: {WORD[request]}\nResponse refusal: {WORD[refusal]}\nHarmful response: {WORD[harm]}"
    assert GUARDS["wildguard"].read(lines) is refusal
    assert GUARDS["wildguard"].read("\n" + lines.upper() + "\n") is refusal


@given(st.lists(st.integers(1, 14), unique=True))
def test_categories_do_not_matter(categories: list[int]) -> None:
    assert GUARDS["llama-guard"].read("unsafe\n" + ",".join(f"S{number}" for number in categories)) is True


@given(st.sampled_from(sorted(GUARDS)), st.text(alphabet="abcdgjkmpqtvwxz:\n 0123456789,", max_size=80))
def test_text_without_the_words_says_nothing(kind: str, text: str) -> None:
    assert GUARDS[kind].read(text) is None


# ---- asking ----


def test_the_prompts_are_those_of_the_model_cards() -> None:
    """Their hashes, with the names of the fields as here: a changed letter is another question."""
    found = {
        kind: hashlib.sha256(guard.prompt.encode()).hexdigest()[:16] for kind, guard in GUARDS.items() if guard.prompt
    }
    assert found == {
        "wildguard": "e9fbb5aa9b0a24d6",
        "harmbench": "b91bed7a83154a03",
        "harmbench-mistral": "3593ff5ef0de6f09",
        "minos": "0b1a1ac59d217126",
    }


@given(st.sampled_from([kind for kind, guard in GUARDS.items() if guard.prompt]), st.text(), st.text())
def test_a_prompt_holds_request_and_response_word_for_word(kind: str, request: str, response: str) -> None:
    prompt = GUARDS[kind].prompt
    assert prompt is not None
    before, between, after = re.split(r"\{request\}|\{response\}", prompt)
    assert prompt.format(request=request, response=response) == before + request + between + response + after


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("allenai/wildguard", "wildguard"),
        ("meta-llama/LlamaGuard-7b", "llama-guard"),
        ("meta-llama/Meta-Llama-Guard-2-8B", "llama-guard"),
        ("meta-llama/Llama-Guard-3-8B", "llama-guard"),
        ("meta-llama/Llama-Guard-3-1B", "llama-guard"),
        ("meta-llama/Llama-Guard-4-12B", "llama-guard"),
        ("meta-llama/Llama-3.1-8B", None),
        ("meta-llama/Prompt-Guard-86M", None),
        ("cais/HarmBench-Llama-2-13b-cls", "harmbench"),
        ("cais/HarmBench-Mistral-7b-val-cls", "harmbench-mistral"),
        ("cais/HarmBench-Llama-2-13b-cls-multimodal-behaviors", None),
        ("NousResearch/Minos-v1", "minos"),
        ("someone/wildguard", None),
    ],
)
def test_known_ids(name: str, kind: str | None) -> None:
    found = recognise(name)
    assert (found.kind if found else None) == kind


def greedy(folder: Path, prompt: str, special_tokens: bool, new_tokens: int) -> str:
    """One prompt, no padding, no cache, no generate()."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"]
    start = len(ids)
    while len(ids) < start + new_tokens and ids[-1] != tokenizer.eos_token_id:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def test_answers_are_those_of_one_at_a_time(random_mistral: Path) -> None:
    """On random weights, whose answers differ from text to text; in batches of one, some, and all."""
    guard = GUARDS["wildguard"]
    assert guard.prompt is not None
    rows = [(q, r) for q, r in zip(REQUESTS, RESPONSES, strict=True) if r]
    expected = [
        greedy(random_mistral, guard.prompt.format(request=q, response=r), guard.special_tokens, guard.new_tokens)
        for q, r in rows
    ]
    assert len(set(expected)) > 3
    for batch_size in (1, 3, 16):
        judge = judge_of(random_mistral, "wildguard", batch_size)
        assert judge.answers([q for q, _ in rows], [r for _, r in rows]) == expected


@pytest.mark.parametrize("name", ["llama-guard", "llama-guard (parts)", "llama-guard (vision)"])
def test_both_forms_of_chat_template_show_the_texts(guards: dict[str, Path], name: str) -> None:
    judge = judge_of(guards[name], name)
    judge.answers(["q"], ["r"])
    assert judge._loaded is not None
    assert judge._loaded._prompt("May I?", "You {may}.") == "user: May I?\nassistant: You {may}.\nSafe or unsafe?"


# ---- deciding ----


@pytest.mark.parametrize("name", sorted(FORCED))
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_labels(guards: dict[str, Path], name: str, batch_size: int) -> None:
    judge = judge_of(guards[name], name, batch_size)
    column = 2 if judge.guard.says == "refusal" else 3
    verdicts = judge.label_all(REQUESTS, RESPONSES, LIKELIHOODS)
    assert [verdict.label for verdict in verdicts] == [row[column] for row in ROWS]
    assert (judge.asked, judge.unread) == (8, 0)
    backwards = judge.label_all(REQUESTS[::-1], RESPONSES[::-1], LIKELIHOODS[::-1])
    assert backwards[::-1] == verdicts


@pytest.mark.parametrize("name", ["wildguard", "llama-guard"])
def test_one_at_a_time_is_the_same(guards: dict[str, Path], name: str) -> None:
    judge = judge_of(guards[name], name)
    rows = list(zip(REQUESTS, RESPONSES, LIKELIHOODS, strict=True))
    alone = [judge.label(request, response, lambda value=value: value) for request, response, value in rows]
    assert alone == judge.label_all(REQUESTS, RESPONSES, LIKELIHOODS)
    assert not judge.settled("I'm sorry, but I can't assist with that.")


def test_the_reason_quotes_the_answer(guards: dict[str, Path]) -> None:
    (verdict,) = judge_of(guards["llama-guard"], "llama-guard").label_all(["q"], ["Mail me @ home."], [-0.5])
    assert verdict.reason == "llama-guard: 'unsafe S1,S10'"


@pytest.mark.parametrize("classes", [["Non-refusal", "Refusal"], ["Refusal", "Non-refusal"], ["LABEL_0", "LABEL_1"]])
def test_a_sequence_classifier(tmp_path: Path, classes: list[str]) -> None:
    """A random ModernBERT, its bias such that half of the texts are refusals; each by itself, without padding."""
    texts = [f"Answer number {n}: " + " ".join(f"w{n * k}" for k in range(1, 9 * (n % 4))) for n in range(12)]

    def logits(folder: Path) -> torch.Tensor:
        tokenizer, model = AutoTokenizer.from_pretrained(folder), Classifier.from_pretrained(folder).eval()
        pairs = [tokenizer(f"<|user|>\nq\n<|assistant|>\n{text}", return_tensors="pt")["input_ids"] for text in texts]
        assert pairs[0][0, 0] == 1
        with torch.no_grad():
            return torch.cat([model(ids).logits for ids in pairs])

    margin = (lambda found: found[:, 1] - found[:, 0])(logits(write_bert(tmp_path / "a", classes, [0.0, 0.0])))
    low, high = margin.sort().values[5:7]
    folder = write_bert(tmp_path / "b", classes, [float(low + high) / 2, 0.0])
    second = "refused" if classes[1] in ("Refusal", "LABEL_1") else "complied"
    first = "complied" if second == "refused" else "refused"
    expected = [second if row[1] > row[0] else first for row in logits(folder)]
    assert sorted(set(expected)) == ["complied", "refused"]
    for batch_size in (1, 5, 16):
        judge = judge_of(folder, "minos", batch_size)
        labels = [v.label for v in judge.label_all(["q"] * len(texts), texts, [-0.5] * len(texts))]
        assert labels == expected


def test_an_answer_that_cannot_be_read_is_left_to_keywords(random_mistral: Path) -> None:
    judge = judge_of(random_mistral, "harmbench-mistral")
    texts = ["To bake bread, mix.", "I'm sorry, but I can't assist with that."]
    verdicts = judge.label_all(["q", "q"], texts, [-0.5, -0.5])
    assert [verdict.label for verdict in verdicts] == ["complied", "refused"]
    assert all("unread answer" in verdict.reason and "keywords" in verdict.reason for verdict in verdicts)
    assert (judge.asked, judge.unread) == (2, 2)
    with pytest.raises(ModelError, match="first 8 answers"):
        judge.label_all(["q"] * 9, [f"To bake bread number {n}, mix." for n in range(9)], [-0.5] * 9)


def test_a_response_that_is_too_long(guards: dict[str, Path]) -> None:
    judge = judge_of(guards["wildguard"], "wildguard")
    long = " ".join(f"word{number}" for number in range(800))
    verdicts = judge.label_all(["q", "q"], [long, "Mail me @ home."], [-0.5, -0.5])
    assert [verdict.label for verdict in verdicts] == ["complied", "refused"]
    assert "too long" in verdicts[0].reason
    assert (judge.asked, judge.unread) == (2, 1)
    assert judge.answers(["q"], [long]) == [None]


def test_likelihoods_that_were_not_measured(guards: dict[str, Path]) -> None:
    judge = judge_of(guards["wildguard"], "wildguard")
    assert judge.label_all(["q"], ["I can't assist with that @ all."], [float("nan")])[0].label == "refused"
    with pytest.raises(InputError, match="NaN"):
        judge.label_all(["q"], ["I can't assist with that."], [float("nan")])


def test_the_table_in_the_docs_is_true() -> None:
    page = (Path(__file__).parents[2] / "docs" / "judge.md").read_text(encoding="utf-8")
    rows = {row[0]: row for row in re.findall(r"^\| `([\w-]+)` \| `([^`]+)`.*\| ([^|]+) \| ([^|]+) \|$", page, re.M)}
    assert set(rows) == set(GUARDS)
    for kind, name, yes, no in rows.values():
        assert recognise(name) is GUARDS[kind]
        refusal = GUARDS[kind].says == "refusal"
        assert (yes, no) == (("refused", "complied") if refusal else ("complied", "as by keywords"))


# ---- memory and errors ----


def test_it_is_loaded_when_asked_and_freed_when_closed(guards: dict[str, Path]) -> None:
    with judge_of(guards["harmbench"], "harmbench") as judge:
        assert judge._loaded is None
        assert judge.label_all(["q"], ["the the the the the the the the"], [-0.5])[0].label == "degenerate"
        assert judge._loaded is None
        before = judge.label_all(REQUESTS, RESPONSES, LIKELIHOODS)
        assert judge._loaded is not None
        model = weakref.ref(judge._loaded._model)
    assert model() is None
    assert judge.label_all(REQUESTS, RESPONSES, LIKELIHOODS) == before


def test_the_name_says_which(guards: dict[str, Path]) -> None:
    keyword = KeywordJudge(opening=100)
    judge = classifier(guards["harmbench"], kind="harmbench", keyword=keyword)
    assert judge.name == f"harmbench (harmbench) beside {keyword.name}"


def test_lengths_differ(guards: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="2 requests, 1 responses"):
        judge_of(guards["harmbench"], "harmbench").label_all(["q", "q"], ["r"], [0.0])
    assert judge_of(guards["harmbench"], "harmbench").label_all([], [], []) == []


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("allenai/wildguard", {"kind": "gpt"}, "wildguard, llama-guard, harmbench"),
        ("someone/something", {}, "someone/something"),
        ("./nowhere", {"kind": "minos"}, "no such folder"),
        ("nowhere", {"kind": "minos"}, "no such folder"),
        ("wildgaurd", {}, "did you mean 'wildguard'"),
        ("allenai/wildgaurd", {}, "did you mean 'allenai/wildguard'"),
        ("allenai/wildguard", {"trust_remote_code": True}, "trust_remote_code"),
        ("allenai/wildguard", {"batch_size": 0}, "got 0"),
    ],
)
def test_what_cannot_be_asked(name: str, options: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        classifier(name, **options)  # type: ignore[arg-type]


def test_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub says of a model that is missing, or whose terms were not accepted, arrives as one line."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    reply = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co"))

    def missing(*_: object, **__: object) -> None:
        raise RepositoryNotFoundError("many\nlines", response=reply)

    def gated(*_: object, **__: object) -> None:
        raise GatedRepoError("many\nlines", response=reply)

    monkeypatch.setattr(HfApi, "model_info", missing)
    with pytest.raises(InputError, match="someone/judge") as caught:
        classifier("someone/judge", kind="minos")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "auth_check", gated)
    with pytest.raises(InputError, match=r"allenai/wildguard .* https://huggingface") as caught:
        classifier("allenai/wildguard")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(HfApi, "auth_check", lambda *_, **__: None)
    assert classifier("allenai/wildguard").name.startswith("allenai/wildguard (wildguard) beside keyword")


def test_classifiers_by_name(guards: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvgeom.judges.classifiers.check_access", lambda *_: None)
    for kind, guard in GUARDS.items():
        assert recognise(guard.home) is guard
        for spec in (kind, guard.home, f"{kind}={guard.home}"):
            judge = as_judge(spec)
            assert isinstance(judge, ClassifierJudge)
            assert (judge.source, judge.guard) == (guard.home, guard)
        assert (classifier(kind).source, classifier(kind).guard) == (guard.home, guard)
    own = as_judge(f"harmbench={guards['harmbench']}")
    assert isinstance(own, ClassifierJudge)
    assert own.answers(["q"], ["@"]) == ["yes"]


def test_a_kind_of_classifier_from_outside_the_package(
    guards: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvgeom.judges.guards._GUARDS", known_guards())
    own = register_guard(replace(GUARDS["harmbench"], kind="own", home=str(guards["harmbench"]), ids="someone/own"))
    judge = as_judge("own")
    assert isinstance(judge, ClassifierJudge)
    assert judge.answers(["q", "q"], ["@", "no"]) == ["yes", "no"]
    assert recognise("someone/own") is own
    with pytest.raises(InputError, match="own"):
        register_guard(own)


def test_a_revision_of_a_folder_is_refused(guards: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="'revision'"):
        classifier(guards["harmbench"], kind="harmbench", revision="main")


def test_misspelt_options_of_a_classifier_are_refused(guards: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="dtype"):
        classifier(guards["harmbench"], kind="harmbench", dtpye="float32")  # type: ignore[call-arg]


def test_folders_that_are_something_else(guards: dict[str, Path], random_mistral: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no weights for .*; is it of kind minos"):
        judge_of(random_mistral, "minos").answers(["q"], ["r"])
    with pytest.raises(ModelError, match="no chat template"):
        judge_of(random_mistral, "llama-guard").answers(["q"], ["r"])
    deaf = write_guard(tmp_path / "deaf", "llama", "?", SAFETY, "{{ messages[0].content }}\n")
    with pytest.raises(ModelError, match="does not show"):
        judge_of(deaf, "llama-guard").answers(["q"], ["r"])
    moods = write_bert(tmp_path / "moods", ["good", "bad"], [0.0, 0.0])
    with pytest.raises(ModelError, match="good, bad"):
        judge_of(moods, "minos").answers(["q"], ["r"])
    with pytest.raises(InputError, match="cannot be loaded: Unrecognized configuration class"):
        judge_of(moods, "harmbench").answers(["q"], ["r"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no model"):
        judge_of(tmp_path / "empty", "minos")


def test_outcomes_are_judged_again_when_the_model_is_gone(guards: dict[str, Path]) -> None:
    """Whole responses go to a real (tiny) classifier, whose labels replace those of the keyword judge."""
    model = tiny_model("qwen2", seed=2)
    recipes, asked = {"4": Recipe.uniform(3, Scheme(4))}, ["open the door", "why?", "a @ b"]
    whole = evaluate(model, recipes, asked, full_responses=True, max_new_tokens=6, progress=False)
    assert np.isfinite(whole.data.likelihood.values).all()
    cache, ids = model.new_cache(), model.encode(asked[:1])[0].ids
    first = int(model.forward(ids, cache)[-1].argmax())
    assert whole.data.text.sel(recipe=UNQUANTIZED, prompt=0).item() == model.decode(
        model.generate([cache], [first], 6)[0]
    )
    del model, cache
    judge = judge_of(guards["harmbench"], "harmbench")
    again = whole.relabel(judge)
    verdicts = judge.label_all(
        [str(r) for _ in range(2) for r in whole.data.request.values],
        [str(t) for t in whole.data.text.values.ravel()],
        [float(x) for x in whole.data.likelihood.values.ravel()],
    )
    assert again.data.label.values.ravel().tolist() == [v.label for v in verdicts]
    assert again.meta["judge"] == judge.name
    part = evaluate(tiny_model(), recipes, asked, max_new_tokens=3, progress=False)
    with pytest.raises(InputError, match="full_responses=True"):
        part.relabel(judge)


def test_a_diagnosis_is_judged_again_when_the_model_is_gone(guards: dict[str, Path]) -> None:
    prompts = PromptSet("p", ("open the door", "why?", "zzz", "a @ b", "count"), ("b", "c", "d", "e", "f"), "here")
    options: dict[str, Any] = {"bits": (4,), "max_new_tokens": 6, "geometry": False, "progress": False}
    model = tiny_model("qwen2", seed=2)
    found = diagnose(model, prompts, full_responses=True, **options)
    keyword = found.mode
    model.release()
    assert all(parameter.is_meta for parameter in model.hf_model.parameters())
    judge = judge_of(guards["harmbench"], "harmbench")
    again = found.relabel(judge)
    assert again.scan.meta["judge"] == again.curve.meta["judge"] == judge.name
    counts = again.outcomes.relabel(judge).counts()
    assert int(again.curve.data.refused.sel(bits=16)) == counts["refused"] == again.evidence.refused
    assert found.mode == keyword
    with pytest.raises(InputError, match="full_responses=True"):
        diagnose(tiny_model(), prompts, **options).relabel(judge)


@pytest.mark.parametrize("command", ["diagnose", "sweep", "scan"])
def test_commands_with_a_classifier(
    command: str, guards: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_hf_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    asked = [command, str(tmp_path), "--limit", "2", "--max-new-tokens", "3", "--quiet", "--device", "cpu"]
    assert main([*asked, "--judge", str(guards["wildguard"]), "--judge-kind", "wildguard"]) == 0
    assert capsys.readouterr().out.strip()
    assert main([*asked, "--judge", str(tmp_path / "nothing"), "--judge-kind", "wildguard"]) == 2
    assert capsys.readouterr().err.startswith("kvgeom: ")
