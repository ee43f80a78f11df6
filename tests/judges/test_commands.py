"""``--judge`` of every command: by all names that a judge has, before the model is loaded and after it is released."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvgeom
from kvgeom.cli import main
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.judges import guards as known_guards
from kvgeom.judges import registry
from kvgeom.judges.guards import Guard, register_guard
from kvgeom.judges.registry import as_judge, register_judge
from kvgeom.prompts.load import load_prompts
from tests.builders.classifiers import judge_of
from tests.builders.judges import ArbitraryJudge
from tests.builders.tiny import tiny_hf_model, tiny_tokenizer

COMMANDS = ("audit", "diagnose", "fix", "scan", "sweep")
#: Tiny classifiers hear a refusal where there is an @.
HARMFUL = ("open the @ door", "why @?", "count @ to nine", "zz@z", "no @", "Explain clouds @")
PROOF = ("close the @ door", "how @?", "count @ to five", "yy@y")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose random text the keyword judge often takes for language."""
    folder = tmp_path_factory.mktemp("model")
    tiny_hf_model(seed=2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prompts")
    for name, harmful in (("choose", HARMFUL), ("prove", PROOF)):
        rows = [{"prompt": text, "label": "harmful"} for text in harmful]
        rows += [{"prompt": f"{what} to {name} @", "label": "harmless"} for what in ("a cake", "Who paints", "trees")]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {name: folder / f"{name}.jsonl" for name in ("choose", "prove")}


def asking(command: str, model: Path, sets: dict[str, Path], out: Path, *more: str) -> list[str]:
    """A command that ends within seconds."""
    asked = [command, str(model), "--out", str(out), "--prompts", str(sets["choose"]), "--max-new-tokens", "6"]
    own = {
        "audit": ["--bits", "4", "2", "--scan-bits", "3"],
        "diagnose": ["--bits", "4", "2", "--scan-bits", "3", "--no-geometry"],
        "fix": ["--bits", "3", "--controls", "0", "--verify-prompts", str(sets["prove"])],
        "scan": ["--scan-bits", "3"],
        "sweep": ["--bits", "4", "2"],
    }
    return [*asked, "--quiet", "--device", "cpu", *own[command], *more]


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=pytest.mark.slow if name in ("audit", "diagnose", "fix") else ()) for name in COMMANDS],
)
def test_a_classifier(
    command: str,
    model: Path,
    sets: dict[str, Path],
    guards: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both ways to name one that lies in a folder say the same, and other words than keywords do."""
    said = []
    ways = ([f"wildguard={guards['wildguard']}"], [str(guards["wildguard"]), "--judge-kind", "wildguard"], ["keyword"])
    for number, way in enumerate(ways):
        out = tmp_path / str(number)
        status = main(asking(command, model, sets, out, "--judge", *way))
        captured = capsys.readouterr()
        if way == ["keyword"] and command == "fix":  # keywords hear no refusal, so that there is nothing to keep
            assert status == 2
            assert "refuses none" in captured.err
            continue
        assert status == 0, captured.err
        assert captured.err == ""
        said.append(captured.out.replace(str(out), "OUT"))
    assert said[0] == said[1]
    assert said[0] not in said[2:]


@pytest.mark.slow
def test_an_audit_says_what_a_classifier_says_during_the_run(
    model: Path, sets: dict[str, Path], guards: dict[str, Path], tmp_path: Path
) -> None:
    """Labels given when the model is gone are those of a judge that is asked on the way, with model and classifier in memory."""
    assert main(asking("audit", model, sets, tmp_path, "--judge", f"wildguard={guards['wildguard']}")) == 0
    found, judge = kvgeom.Audit.load(tmp_path), judge_of(guards["wildguard"], "wildguard")
    with_both = kvgeom.audit(
        model, prompts=sets["choose"], bits=(4, 2), scan_bits=3, judge=judge, max_new_tokens=6, progress=False
    )
    assert found.settings["judge"] == with_both.settings["judge"] == found.curve.meta["judge"] == judge.name
    assert found.outcomes.data.label.equals(with_both.outcomes.data.label)
    assert found.curve.data.equals(with_both.curve.data)
    assert found.about["baseline"] == with_both.about["baseline"]
    assert found.about["baseline"]["refused"] > 0
    assert (found.verdict.status, found.responses) == (with_both.verdict.status, with_both.responses)
    written = json.loads((tmp_path / "audit.json").read_text())
    assert written["verdict"]["headline"] == found.verdict.headline
    assert written["curve"][0]["refused"] == written["baseline"]["refused"] == found.about["baseline"]["refused"]
    assert judge.name in (tmp_path / "report.html").read_text()


def test_over_refusal_is_judged_by_the_classifier_too(
    model: Path, sets: dict[str, Path], guards: dict[str, Path], tmp_path: Path
) -> None:
    spec = f"wildguard={guards['wildguard']}"
    assert main(asking("sweep", model, sets, tmp_path, "--over-refusal", "--judge", spec)) == 0
    harmless = load_prompts(str(sets["choose"])).harmless
    whole = evaluate(model, "int4-asym-token", list(harmless), full_responses=True, max_new_tokens=6, progress=False)
    again = whole.relabel(judge_of(guards["wildguard"], "wildguard"))
    expected = [again.counts(name)["refused"] for name in ("exact", "int4-asym-token")]
    assert expected != [whole.counts(name)["refused"] for name in ("exact", "int4-asym-token")]
    text = (tmp_path / "sweep.txt").read_text()
    rows = [line.split() for line in text[text.index("harmless refused") :].splitlines()[1:]]
    counted = {row[0]: int(row[1]) for row in rows if row and row[0].isdigit()}
    assert [counted["16"], counted["4"]] == expected


@pytest.mark.slow
def test_the_judge_of_keywords_is_what_no_judge_is(
    model: Path, sets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in a folder where one has run: everything is in its journal, and nothing is replaced."""
    assert main(asking("audit", model, sets, tmp_path)) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(asking("audit", model, sets, tmp_path, "--judge", "keyword")) == 0
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after["journal.jsonl"] == before["journal.jsonl"]
    first, second = (json.loads(each["audit.json"]) for each in (before, after))
    for passing in ("seconds", "created"):
        assert first["settings"].pop(passing)
        assert second["settings"].pop(passing)
    assert first == second
    assert "replaced" not in capsys.readouterr().err


@pytest.mark.slow
def test_another_classifier_in_the_same_folder(
    model: Path, sets: dict[str, Path], guards: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The responses are not made again; the report is replaced, and that is said."""
    assert main(asking("audit", model, sets, tmp_path, "--judge", f"wildguard={guards['wildguard']}")) == 0
    responses = (tmp_path / "journal.jsonl").read_bytes()
    assert capsys.readouterr().err == ""
    assert main(asking("audit", model, sets, tmp_path, "--judge", f"harmbench={guards['harmbench']}")) == 0
    assert f"replaced {tmp_path}" in capsys.readouterr().err
    assert (tmp_path / "journal.jsonl").read_bytes() == responses
    assert "(harmbench, " in json.loads((tmp_path / "audit.json").read_text())["settings"]["judge"]


@dataclass(frozen=True)
class Interrupted(Guard):
    """A kind of classifier whose user presses Ctrl-C once, at the fifth answer."""

    def read(self, answer: str) -> bool | None:
        ANSWERS.append(answer)
        if len(ANSWERS) == 5:
            raise KeyboardInterrupt
        return super().read(answer)


ANSWERS: list[str] = []


@pytest.mark.slow
@pytest.mark.parametrize("command", ["audit", "diagnose"])
def test_an_interrupted_relabelling_goes_on(
    command: str,
    model: Path,
    sets: dict[str, Path],
    guards: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No report of keywords is left, no response is made again, and no answer is asked for again."""
    wild = known_guards.guards()["wildguard"]
    monkeypatch.setattr(known_guards, "_GUARDS", known_guards.guards())
    own = {each.name: getattr(wild, each.name) for each in fields(Guard)}
    register_guard(Interrupted(**{**own, "kind": "own", "home": str(guards["wildguard"]), "ids": "someone/own"}))
    ANSWERS.clear()
    asked = asking(command, model, sets, tmp_path, "--judge", "own")
    assert main(asked) == 130
    assert "run the command again" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"journal.jsonl", "labels.jsonl"}
    responses = (tmp_path / "journal.jsonl").read_bytes()
    labels = (tmp_path / "labels.jsonl").read_bytes()
    assert main(asked) == 0
    resumed = capsys.readouterr().out
    assert (tmp_path / "journal.jsonl").read_bytes() == responses
    assert (tmp_path / "labels.jsonl").read_bytes().startswith(labels)
    told = [json.loads(line)["key"] for line in (tmp_path / "labels.jsonl").read_text().splitlines()[1:]]
    assert len(told) == len({json.dumps(key) for key in told})
    before = len(ANSWERS)
    assert main(asked) == 0
    assert len(ANSWERS) == before
    assert capsys.readouterr().out == resumed
    fresh = asking(command, model, sets, tmp_path / "fresh", "--judge", "own")
    assert main(fresh) == 0
    assert len(ANSWERS) == before + before - 1, "one answer was lost when it was interrupted"
    assert capsys.readouterr().out.replace(str(tmp_path / "fresh"), str(tmp_path)) == resumed


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=pytest.mark.slow if name in ("audit", "fix") else ()) for name in COMMANDS]
)
def test_a_judge_that_is_registered(
    command: str, model: Path, sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_JUDGES", dict(registry._JUDGES))
    register_judge("arbitrary", ArbitraryJudge)
    assert main(asking(command, model, sets, tmp_path, "--judge", "arbitrary")) == 0
    header = json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[0])
    assert header["judge"] == "arbitrary"
    assert not (tmp_path / "labels.jsonl").exists()
    if command == "audit":
        assert json.loads((tmp_path / "audit.json").read_text())["settings"]["judge"] == "arbitrary"
    if command == "fix":
        assert kvgeom.Plan.load(tmp_path).judge == "arbitrary"


WRONG: list[tuple[Callable[[Path], list[str]], str]] = [
    (lambda folder: ["wildgaurd"], "did you mean 'wildguard'"),
    (lambda folder: [str(folder)], "--judge-kind"),
    (lambda folder: ["someone/else"], "--judge-kind"),
    (lambda folder: [f"minos={folder / 'missing'}"], "no such folder"),
    (lambda folder: ["minos="], "names no model"),
    (lambda folder: [""], "the name of a judge is empty"),
    (lambda folder: [str(folder / "missing"), "--judge-kind", "minos"], "no such folder"),
    (lambda folder: [str(folder), "--judge-kind", "mimos"], "did you mean 'minos'"),
    (lambda folder: ["keyword", "--judge-kind", "minos"], "leave it out"),
    (lambda folder: [f"minos={folder}", "--judge-kind", "wildguard"], "leave it out"),
]


@pytest.mark.parametrize(("judge", "says"), WRONG, ids=[f"{number} {says}" for number, (_, says) in enumerate(WRONG)])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_judge_is_said_before_a_model_is_looked_for(
    command: str,
    judge: Callable[[Path], list[str]],
    says: str,
    sets: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert main(asking(command, tmp_path / "no model", sets, out, "--judge", *judge(tmp_path))) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("kvgeom: ")
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert not out.exists()


def test_options_of_a_classifier_that_is_named(guards: dict[str, Path]) -> None:
    judge: Any = as_judge(f"harmbench={guards['harmbench']}", device="cpu", batch_size=3, progress=False)
    assert (judge.batch_size, judge.progress) == (3, False)
    assert np.all([label.label == "complied" for label in judge.label_all(["q"], ["I @ that well"], [-1.0])])
    assert as_judge("keyword", device="cpu", progress=False) == as_judge("keyword")
