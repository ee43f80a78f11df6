"""Classifiers by name, folder and hub id: what is taken for one, and what is refused."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvgeom.errors import InputError, ModelError
from kvgeom.judges import identity
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
    assert judge.name == f"harmbench (harmbench, {judge.identity}) beside {keyword.name}"


def test_labels_of_different_classifiers_are_told_apart(guards: dict[str, Path], tmp_path: Path) -> None:
    """By weights, tokenizer, template, kind, dtype and options, and not by what a folder is called."""

    def same(*folders: str, **options: Any) -> ClassifierJudge:
        folder = tmp_path.joinpath(*folders, "final")
        if not folder.exists():
            shutil.copytree(guards["wildguard"], folder)
        return classifier(folder, **{"kind": "wildguard", "device": "cpu", **options})

    first, again = same("v1"), same("v2")
    same("v3")
    assert first.name == again.name == same("else", "where").name
    assert first.identity == same("v1").identity
    file = next((tmp_path / "v2" / "final").glob("*.safetensors"))
    turned = bytearray(file.read_bytes())
    turned[-1] ^= 1
    file.write_bytes(turned)
    settings = tmp_path / "v3" / "final" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": "other"}))
    others = [
        same("v2"),
        same("v3"),
        same("v1", kind="harmbench"),
        same("v1", dtype="bfloat16"),
        same("v1", attn_implementation="eager"),
        classifier(write_bert(tmp_path / "bert" / "final", ["Non-refusal", "Refusal"], [0.0, 0.0]), kind="minos"),
    ]
    assert len({first.identity, *(each.identity for each in others)}) == 1 + len(others)
    assert len({first.name, *(each.name for each in others)}) == 1 + len(others)
    assert same("v1", batch_size=3, device_map="cpu").identity == first.identity, "where it lies changes nothing"


@given(st.binary(min_size=5, max_size=200), st.data())
def test_files_are_hashed_whole_or_in_samples(content: bytes, data: st.DataObject) -> None:
    """Also the first and the last byte of a file that is too large to be read as a whole."""
    at = data.draw(st.sampled_from([0, len(content) - 1]))
    other = bytearray(content)
    other[at] ^= data.draw(st.integers(1, 255))
    with pytest.MonkeyPatch.context() as patched, tempfile.TemporaryDirectory() as folder:
        patched.setattr(identity, "WHOLE", data.draw(st.sampled_from([0, 1 << 20])))
        patched.setattr(identity, "PIECE", 2)
        patched.setattr(identity, "PLACES", 3)
        found = []
        for each in (content, bytes(other), content):
            Path(folder, "model.safetensors").write_bytes(each)
            found.append(identity.identity(folder, None, GUARDS["minos"], "float32", {}))
    assert found[0] == found[2] != found[1]


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
        ("", {"kind": "minos"}, "no name"),
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
    assert classifier("allenai/wildguard").name.startswith("allenai/wildguard (wildguard, ")


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
