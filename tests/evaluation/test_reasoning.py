"""Models that reason before they answer: the answer is generated, found and judged; all paths of an evaluation agree."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvgeom
from kvgeom.cli import main
from kvgeom.errors import InputError, KvgeomWarning
from kvgeom.evaluation.baseline import Baseline, baseline
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.evaluation.outcomes import NO_MARGIN
from kvgeom.evaluation.speculative import generated, verified
from kvgeom.geometry.selection import opening_tokens
from kvgeom.geometry.steering import steer
from kvgeom.judges.judge import UNENDED, UNENDED_REASON, settles
from kvgeom.judges.reasoning import MARKERS, split
from kvgeom.models import backends
from kvgeom.models.hf import HFModel
from kvgeom.models.load import load
from kvgeom.prompts.sets import PromptSet
from kvgeom.quant.placement import Placement
from tests.builders.judges import ArbitraryJudge, CountingJudge, with_refusal_tokens
from tests.builders.reasoning import CLOSE, OPEN, SWITCHED, reasoning_model, reasoning_tokenizer
from tests.builders.recipes import recipes
from tests.builders.requests import REQUESTS
from tests.builders.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::kvgeom.errors.KvgeomWarning")
KINDS = ("llama", "qwen2")
MAGISTRAL = ("[THINK]", "[/THINK]")
#: Reasoning that the prompt begins or the model, with markers that decoding keeps or drops.
MODELS = {
    (kind, opens, special): reasoning_model(
        kind, opens=opens, special=special, markers=MAGISTRAL if special else ("<think>", "</think>")
    )
    for kind in KINDS
    for opens in (True, False)
    for special in (True, False)
}
RECIPES = {name: recipe for name, recipe in recipes(3).items() if name != "nothing"}


def begin_of(model: HFModel, tokens: tuple[int, ...], opens: bool) -> int | None:
    """Where the answer begins, by the numbers of the markers' tokens."""
    written = [token for token in tokens if model.written([token]).strip()]
    if not opens and (not written or written[0] not in (OPEN, CLOSE)):
        return 0
    return tokens.index(CLOSE) + 1 if CLOSE in tokens else None


def plainly(base: Baseline, index: int, budget: int) -> tuple[list[int], int | None]:
    """A response made token by token, and where its answer begins; it ends where a judge reads no further."""
    model, opens = base.model, base.reader.opened is not None
    cache, response = model.new_cache(), list[int]()
    logits = model.forward(base.prompts[index].ids, cache)[-1]
    while (token := int(logits.argmax())) not in model.stop_tokens:
        response.append(token)
        begin = begin_of(model, tuple(response), opens)
        if begin is None and len(response) == budget:
            break
        if begin is not None and response[begin:]:
            answer = model.decode(response[begin:])
            if len(response) - begin == base.max_new_tokens or settles(base.judge, answer):
                break
        logits = model.forward([token], cache)[-1]
    return response, begin_of(model, tuple(response), opens)


@pytest.mark.parametrize(("kind", "opens", "special"), MODELS, ids=str)
def test_responses_end_with_their_answers(kind: str, opens: bool, special: bool) -> None:
    model = MODELS[kind, opens, special]
    options: dict[str, Any] = {"judge": CountingJudge(6), "max_new_tokens": 5, "progress": False}
    base = baseline(model, REQUESTS, max_reasoning_tokens=40, **options)
    begins = []
    for index, tokens in enumerate(base.tokens):
        expected, begin = plainly(base, index, 40)
        assert list(tokens) == expected
        assert base.reader.begin(tokens) == begin
        begins.append(begin)
        text = base.judged(index, tokens)[0]
        if begin is None:
            assert base.labels[index] == UNENDED
            assert base.reasons[index] == f"{UNENDED_REASON} within {len(tokens)} tokens"
            assert split(text).answer is None
        elif begin:
            # Random models also reason within reasoning and answers, which is taken off too.
            answer = model.decode(tokens[begin:])
            opened = [m.open in f"{split(text).reasoning}\n{answer}" for m in MARKERS]
            assert any(opened) or split(text).answer == answer.strip()
            assert len(tokens) - begin <= 5
        else:
            assert text == model.decode(tokens)
    assert None in begins
    assert base.begins_with_reasoning
    assert not base.refusal_tokens


def test_all_kinds_of_responses_are_seen() -> None:
    """The tests here would mean less if no response reasoned to an end, or none left reasoning out."""
    options: dict[str, Any] = {"judge": CountingJudge(6), "max_new_tokens": 5, "progress": False}
    for opens in (True, False):
        found = [
            base.reader.begin(tokens)
            for kind in KINDS
            for base in [baseline(MODELS[kind, opens, False], REQUESTS, max_reasoning_tokens=40, **options)]
            for tokens in base.tokens
        ]
        assert None in found
        assert any(begin is not None and begin > 4 for begin in found)
        assert (0 in found) != opens


@settings(max_examples=5)
@given(
    st.sampled_from(sorted(MODELS)),
    st.integers(1, 8),
    st.integers(1, 7),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sets(st.integers(0, len(REQUESTS) - 1), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_drafts_give_what_generation_gives(
    key: tuple[str, bool, bool], reads: int, length: int, budget: int, rows: int, chosen: set[int], piece: int
) -> None:
    """Token for token, whatever piece of the draft a recipe leaves it in."""
    model, asked = MODELS[key], [REQUESTS[i] for i in sorted(chosen)]
    base = baseline(
        model,
        asked,
        judge=CountingJudge(reads),
        max_new_tokens=length,
        max_reasoning_tokens=budget,
        batch_size=rows,
        progress=False,
    )
    work = {index: list(RECIPES) for index in range(len(asked))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvgeom.evaluation.speculative.PIECE", piece)
        fast = {(each.recipe, each.prompt): each for each in verified(base, work, RECIPES, Placement())}
    plain = {(each.recipe, each.prompt): each for each in generated(base, work, RECIPES, Placement(), full=False)}
    whole = {(each.recipe, each.prompt): each for each in generated(base, work, RECIPES, Placement(), full=True)}
    assert fast.keys() == plain.keys() == whole.keys()
    for at, answer in fast.items():
        assert answer.tokens == plain[at].tokens
        assert answer.divergence == plain[at].divergence
        assert whole[at].tokens[: len(answer.tokens)] == answer.tokens
        assert base.judged(at[1], answer.tokens)[1:] == base.judged(at[1], whole[at].tokens)[1:]
        assert len(whole[at].tokens) <= budget + length
        assert np.isnan(answer.margin) or not base.begins_with_reasoning


def test_outcomes_say_what_was_reasoned() -> None:
    model = MODELS["qwen2", True, True]
    options: dict[str, Any] = {"judge": ArbitraryJudge(), "max_new_tokens": 4, "max_reasoning_tokens": 20}
    fast = evaluate(model, RECIPES, REQUESTS, progress=False, **options)
    full = evaluate(model, RECIPES, REQUESTS, progress=False, full_responses=True, **options)
    assert (fast.data.label.values == full.data.label.values).all()
    assert np.isnan(fast.data.margin.values).all()
    assert fast.unended() > 0
    reasons = fast.data.reason.values.ravel()
    assert fast.unended() + sum(fast.unended(name) for name in RECIPES) == sum(
        UNENDED_REASON in each for each in reasons
    )
    assert "ended inside the reasoning" in fast.summary()
    assert "no margins" in fast.summary()
    assert fast.provenance()["max_reasoning_tokens"] == 20
    measured = np.isfinite(full.data.likelihood.values)
    ended = np.array([split(str(text)).answer is not None for text in full.data.text.values.ravel()])
    assert not measured.ravel()[~ended].any()
    assert measured.any()


def test_likelihood_is_that_of_the_answer() -> None:
    model = MODELS["llama", True, False]
    base = baseline(model, REQUESTS, max_new_tokens=5, max_reasoning_tokens=60, progress=False)
    index, begin = next((i, b) for i, t in enumerate(base.tokens) if (b := base.reader.begin(t)) is not None and t[b:])
    tokens, prompt = base.tokens[index], base.prompts[index].ids
    log_p = model.forward([*prompt, *tokens[:-1]], all_logits=True).double().log_softmax(-1)
    own = [float(log_p[len(prompt) - 1 + at, token]) for at, token in enumerate(tokens) if at >= begin]
    assert base.log_likelihood(index, tokens) == pytest.approx(sum(own) / len(own), abs=1e-4)


def test_nothing_changes_for_models_that_do_not_reason() -> None:
    """Whatever reasoning may have, and with as many passes."""
    model, found = tiny_model("qwen2", seed=1), []
    passes: list[int] = []
    assert model.branches_late  # found out by a pass of its own, once
    model._layers[-1].register_forward_hook(lambda *_: passes.append(1))
    for budget in (1, 1000):
        passes.clear()
        base = with_refusal_tokens(
            baseline(
                model, REQUESTS, judge=CountingJudge(6), max_new_tokens=8, max_reasoning_tokens=budget, progress=False
            )
        )
        outcomes = evaluate(model, recipes(3), base, full_responses=True, progress=False)
        found.append((base.tokens, base.labels, base.refusal_tokens, outcomes.data, len(passes), base.batch_rows))
        assert not base.begins_with_reasoning
        assert base.refusal_tokens
        assert max(map(len, base.tokens)) <= 8
        assert base.longest(0) == 8
    assert found[0][:3] == found[1][:3]
    assert found[0][3].equals(found[1][3])
    assert found[0][4:] == found[1][4:]


def test_reasoning_has_what_the_context_leaves() -> None:
    model = MODELS["llama", True, False]
    request = "why " * 105
    base = baseline(model, [request.strip(), "why?"], max_new_tokens=5, progress=False)
    for prompt, tokens, reason in zip(base.prompts, base.tokens, base.reasons, strict=True):
        budget = min(1024, model.max_context - len(prompt) - 5)
        assert base.reader.budget(prompt) == budget
        assert len(prompt) + len(tokens) <= model.max_context
        if base.reader.begin(tokens) is None and len(tokens) == budget:
            assert reason == f"{UNENDED_REASON} within {budget} tokens"
    with pytest.raises(InputError, match="more than the context"):
        baseline(model, ["why " * 110], max_new_tokens=50, progress=False)


def test_rows_are_sized_for_reasoning(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        "kvgeom.evaluation.baseline.rows_per_batch", lambda model, tokens, *_: asked.append(tokens) or 4
    )
    for model, more in ((MODELS["llama", True, False], 100), (tiny_model(), 0)):
        base = baseline(model, REQUESTS, max_new_tokens=5, max_reasoning_tokens=100, progress=False)
        asked.clear()
        assert base.batch_rows == 4
        assert asked == [max(map(len, base.prompts)) + 5 + more]


def warned(model: HFModel, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        baseline(model, ["why?"], max_new_tokens=3, max_reasoning_tokens=10, progress=False, **options)
    return [str(each.message) for each in seen if issubclass(each.category, KvgeomWarning)]


def test_a_template_that_opens_reasoning_is_named() -> None:
    (said,) = warned(MODELS["llama", True, True])
    assert "the chat template of reasoning-llama opens reasoning ([THINK])" in said
    assert "10 tokens" in said
    assert "switches" not in said
    assert not warned(tiny_model())


def test_a_switch_is_named_and_works() -> None:
    own = reasoning_model(opens=False, template=SWITCHED)
    (said,) = warned(own)
    assert "load(template_options={'enable_thinking': False})" in said
    off = load(own.hf_model, tokenizer=own.tokenizer, template_options={"enable_thinking": False})
    on = load(own.hf_model, tokenizer=own.tokenizer, template_options={"enable_thinking": True})
    assert off.prompt_end.endswith("<think>\n\n</think>\n\n")  # type: ignore[attr-defined]
    assert not warned(off)
    assert len({each.fingerprint for each in (own, off, on)}) == 3
    assert len({each.identity for each in (own, off, on)}) == 1
    found = evaluate(off, ["int4-asym-token"], ["why?"], max_new_tokens=3, progress=False)
    assert found.provenance()["template_options"] == {"enable_thinking": False}


def test_all_backends_tell_the_template() -> None:
    own = reasoning_model(opens=False, template=SWITCHED)
    told: dict[str, Any] = {"template_options": {"enable_thinking": False}, "name": "x"}
    plain = load(own.hf_model, tokenizer=own.tokenizer, **told)
    for backend in ("lens", "nnsight"):
        pytest.importorskip({"lens": "transformer_lens"}.get(backend, backend))
        again = reasoning_model(opens=False, template=SWITCHED)
        other = load(again.hf_model, tokenizer=again.tokenizer, backend=backend, **told)
        assert other.encode(["why?"]) == plain.encode(["why?"])
        assert other.fingerprint == plain.fingerprint

    def make(model: Any, tokenizer: Any, *, name: str | None, template: str | None) -> HFModel:
        return HFModel(model, tokenizer, name=name or "x", template=template)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_BACKENDS", dict(backends.backends()))
        backends.register_backend("deaf", wraps=lambda model: False, make=make)
        assert load(own.hf_model, tokenizer=own.tokenizer, backend="deaf").name
        with pytest.raises(InputError, match="backend 'deaf' takes no template_options"):
            load(own.hf_model, tokenizer=own.tokenizer, backend="deaf", **told)


def test_responses_that_reason_unasked_are_named() -> None:
    model = MODELS["qwen2", False, True]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        base = baseline(model, REQUESTS, max_new_tokens=3, max_reasoning_tokens=10, progress=False)
    assert base.begins_with_reasoning
    assert ["begin with reasoning" in str(each.message) for each in seen if each.category is KvgeomWarning] == [True]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"enable_thinkng": False}, r"does not use the template option 'enable_thinkng'; it uses enable_thinking"),
        ({"messages": []}, "does not use the template option 'messages'"),
        ("no", "template_options must be a mapping"),
        ({"enable_thinking": {1, 2}}, "template_options must be a mapping"),
    ],
)
def test_template_options_that_do_nothing_are_refused(options: Any, match: str) -> None:
    own = reasoning_model(opens=False, template=SWITCHED)
    with pytest.raises(InputError, match=match):
        load(own.hf_model, tokenizer=own.tokenizer, template_options=options)
    with pytest.raises(InputError, match="it uses none"):
        load(tiny_model().hf_model, tokenizer=reasoning_tokenizer(special=False), template_options={"thinking": True})
    with pytest.raises(InputError, match="'template_options' does not apply to a HFModel"):
        load(own, template_options={"enable_thinking": False})


def test_journals_do_not_mix(tmp_path: Path) -> None:
    own = reasoning_model(opens=False, template=SWITCHED)
    options: dict[str, Any] = {"max_new_tokens": 3, "max_reasoning_tokens": 10, "progress": False}
    path = tmp_path / "journal.jsonl"
    first = baseline(own, ["why?"], journal=path, **options)
    first.journal.close()  # type: ignore[attr-defined]
    assert json.loads(path.read_text().splitlines()[0])["max_reasoning_tokens"] == 10
    again = baseline(own, ["why?"], journal=path, **options)
    assert again.tokens == first.tokens
    again.journal.close()  # type: ignore[attr-defined]
    off = load(own.hf_model, tokenizer=own.tokenizer, name=own.name, template_options={"enable_thinking": False})
    with pytest.raises(InputError, match="other fingerprint"):
        baseline(off, ["why?"], journal=path, **options)
    with pytest.raises(InputError, match="max_reasoning_tokens: 10 there, 11 now"):
        baseline(own, ["why?"], journal=path, **{**options, "max_reasoning_tokens": 11})


@pytest.mark.slow
def test_an_audit_of_a_model_that_reasons(tmp_path: Path) -> None:
    """Whole, and it says what could not be measured."""
    asked = [f"{request} {n}" for request in REQUESTS for n in range(2)]
    prompts = PromptSet("p", tuple(asked), tuple(f"{r}, please" for r in REQUESTS), "here")
    model = MODELS["qwen2", True, False]
    found = kvgeom.diagnose(
        model,
        prompts,
        judge=ArbitraryJudge(),
        bits=(4, 2),
        max_new_tokens=4,
        max_reasoning_tokens=30,
        geometry=False,
        progress=False,
    )
    assert NO_MARGIN in found.curve.to_text()
    assert NO_MARGIN in found.scan.to_text()
    assert "ended inside their reasoning" in found.curve.caveat
    assert np.isnan(found.scan.data.margin_drop.values).all()
    plan = found.prescribe(scheme="int3-sym-tensor", memory=0.6)
    assert (plan.max_new_tokens, plan.max_reasoning_tokens) == (4, 30)
    with pytest.raises(InputError, match="with the max_reasoning_tokens it was made with, 30"):
        plan.verify(model, max_reasoning_tokens=40)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = reasoning_model(opens=False, template=SWITCHED)
    folder = tmp_path / "model"
    own.hf_model.save_pretrained(folder)
    own.tokenizer.save_pretrained(folder)
    out = tmp_path / "out"
    sweep = ["sweep", str(folder), "--limit", "2", "--bits", "4", "--max-new-tokens", "3", "--quiet", "--out", str(out)]
    with warnings.catch_warnings():
        warnings.simplefilter("always", KvgeomWarning)
        assert main([*sweep, "--max-reasoning-tokens", "12"]) == 0
    header = json.loads((out / "journal.jsonl").read_text().splitlines()[0])
    assert header["max_reasoning_tokens"] == 12
    assert capsys.readouterr().err.count("kvgeom: the chat template of model knows enable_thinking") == 1
    assert main([*sweep, "--no-thinking"]) == 2
    assert "other fingerprint" in capsys.readouterr().err
    for arguments in (["--no-thinking"], ["--template-options", '{"enable_thinking": false}']):
        assert main([*sweep[:-1], str(tmp_path / "off"), *arguments]) == 0
        assert "knows enable_thinking" not in capsys.readouterr().err
    for arguments, said in (
        (["--template-options", "no"], "must be a JSON object"),
        (["--template-options", '{"thinking": true}'], "it uses enable_thinking"),
        (["--max-reasoning-tokens", "0"], "--max-reasoning-tokens must be a positive integer"),
    ):
        assert main([*sweep, *arguments]) == 2
        assert said in capsys.readouterr().err


def test_steering_judges_answers_and_openings_are_refused() -> None:
    """The reasoning has its own budget; a set R of first tokens would be that of reasoning."""
    model = MODELS["qwen2", True, False]
    direction = np.ones(model.geometry.d_model)
    found = steer(
        model,
        direction,
        1,
        REQUESTS,
        REQUESTS,
        judge=ArbitraryJudge(),
        max_new_tokens=4,
        max_reasoning_tokens=25,
        progress=False,
    )
    base = baseline(model, REQUESTS, judge=ArbitraryJudge(), max_new_tokens=4, max_reasoning_tokens=25, progress=False)
    plain = found.data.sel(intervention="none")
    assert plain.label.values[: len(REQUESTS)].tolist() == list(base.labels)
    assert plain.text.values[: len(REQUESTS)].tolist() == [base.judged(i, t)[0] for i, t in enumerate(base.tokens)]
    with pytest.raises(InputError, match="begin with reasoning, whose first token says nothing of refusal"):
        opening_tokens(model, REQUESTS, progress=False)
