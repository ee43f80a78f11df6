"""Classifiers by name, folder and hub id: what is taken for one, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvgeom.errors import InputError, ModelError
from kvgeom.judges.classifiers import ClassifierJudge, classifier
from kvgeom.judges.guards import guards as known_guards
from kvgeom.judges.guards import recognise, register_guard
from kvgeom.judges.keyword import KeywordJudge
from kvgeom.judges.registry import as_judge
from tests.builders.classifiers import GUARDS, SAFETY, judge_of
from tests.builders.guards import write_bert, write_guard


def test_the_name_says_which(guards: dict[str, Path]) -> None:
    keyword = KeywordJudge(opening=100)
    judge = classifier(guards["harmbench"], kind="harmbench", keyword=keyword)
    assert judge.name == f"harmbench (harmbench) beside {keyword.name}"


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
