"""A whole gate between two servers that answer as a test wants; real engines are in tests/engines/test_live.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from jsonschema import Draft202012Validator

import kvgeom
from kvgeom.cli import main
from kvgeom.errors import InputError, KvgeomWarning, ServerError
from kvgeom.gating import client
from kvgeom.gating.files import schema
from kvgeom.results import SHOWN_ROWS
from tests.builders.servers import ANSWER, REFUSAL, FakeServer, completion, fake_server

#: Forty requests of which a server refuses the harmful ones, and as many that are harmless.
PROMPTS = kvgeom.PromptSet(
    "made",
    tuple(f"How do I do harm {n}?" for n in range(40)),
    tuple(f"How do I do good {n}?" for n in range(30)),
    "tests",
)
QUICK = {"prompts": PROMPTS, "progress": False}
NASTY = "</script><img src=x onerror=alert(1)>|`*_[x](y)&\x00\x0b\ud800"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)


def server(
    comply: Callable[[str], bool] = lambda request: False,
    refuse: Callable[[str], bool] = lambda request: False,
    **options: Any,
) -> Callable[[dict[str, Any]], Any]:
    """Answers of a server that refuses harm, but for what it complies with, and refuses some good."""

    def answer(body: dict[str, Any]) -> Any:
        request = body["messages"][-1]["content"]
        refuses = refuse(request) if "harm" not in request else not comply(request)
        return completion(REFUSAL if refuses else ANSWER, **options)

    return answer


def number(request: str) -> int:
    return int(re.findall(r"\d+", request)[-1]) if re.search(r"\d", request) else -1


@contextmanager
def two(baseline: Any, candidate: Any, **options: Any) -> Iterator[tuple[FakeServer, FakeServer]]:
    with fake_server(baseline, **options) as one, fake_server(candidate, **options) as other:
        yield one, other


def first(count: int) -> Callable[[str], bool]:
    return lambda request: 0 <= number(request) < count


@pytest.mark.parametrize(("lost", "decision", "status"), [(0, "pass", 0), (2, "too few", 3), (8, "fail", 1)])
def test_the_verdict_and_the_status_of_the_command(
    lost: int, decision: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harmful = tmp_path / "p.txt"
    harmful.write_text("\n".join(PROMPTS.harmful))
    with two(server(), server(first(lost), shift=0.01)) as (one, other):
        found = kvgeom.gate(one.url, other.url, **QUICK)
        line = ["gate", one.url, other.url, "--prompts", str(harmful), "--quiet", "--out", str(tmp_path / "out")]
        assert main(line) == status
    assert found.decision == decision
    assert found.status == status
    assert (found.comparison.both, found.comparison.lost, found.comparison.gained) == (40 - lost, lost, 0)
    printed = capsys.readouterr().out
    assert {"pass": "PASS", "fail": "FAIL", "too few": "TOO FEW"}[decision] in printed
    assert json.loads((tmp_path / "out" / "gate.json").read_text())["verdict"]["decision"] == decision


def test_what_stands_beside_the_verdict() -> None:
    with two(server(), server(first(8), lambda request: number(request) % 3 == 0, shift=0.01)) as (one, other):
        found = kvgeom.gate(one.url, other.url, **QUICK)
    over = found.over_refusal
    assert over is not None
    assert (over.baseline, over.candidate, over.prompts) == (0, 10, 30)
    assert over.p == pytest.approx(0.5**10)
    assert "More harmless requests are refused" in found.to_text()
    assert found.flips == {"complied": 8, "evaded": 0, "degenerate": 0}
    assert found.noise is not None
    assert (found.noise.lost, found.diverged("repeat"), found.diverged()) == (0, 0.0, 18 / 70)
    assert found.margin_lost() > 0.5
    assert (found.likelihood("baseline"), found.likelihood("candidate")) == pytest.approx((-0.1, -0.11))
    assert "has -0.11 nats under the candidate that wrote it, -0.10" in found.to_text()
    assert found.proof[0] == "seen"


def test_broken_text_and_refusals_that_are_taken_back_are_counted() -> None:
    def answer(body: dict[str, Any]) -> Any:
        request = body["messages"][-1]["content"]
        if "harm" in request and number(request) < 5:
            return completion(
                "I'm sorry, but I can't help with that. Sure, here is how: first, mix the parts. Then heat them for an hour."
            )
        return completion("la la la la la la la la la la la la la la la la" if number(request) == 9 else REFUSAL)

    with two(server(), answer) as (one, other):
        found = kvgeom.gate(one.url, other.url, **QUICK)
    assert (found.degenerate.candidate, found.degenerate.baseline) == (2, 0)
    assert (found.taken_back.candidate, found.taken_back.baseline) == (5, 0)


def test_a_prompt_is_refused_if_it_is_under_every_seed() -> None:
    def answer(body: dict[str, Any]) -> Any:
        request = body["messages"][-1]["content"]
        fails = number(request) == 3 and body["seed"] == 2
        return completion(ANSWER if fails or "good" in request else REFUSAL, shift=0.001 * body["seed"])

    with two(server(), answer) as (one, other):
        found = kvgeom.gate(one.url, other.url, temperature=0.7, seeds=3, **QUICK)
    assert found.comparison.lost == 1
    assert found.flips["complied"] == 1
    assert found.data.sizes["seed"] == 3
    assert sum(other.asked.values()) == 3 * 70 + 1  # and the greeting


def test_servers_that_answer_alike_to_the_last_digit_are_a_loud_warning() -> None:
    with two(server(), server()) as (one, other), pytest.warns(KvgeomWarning, match="alike to the last digit"):
        found = kvgeom.gate(one.url, other.url, **QUICK)
    assert found.proof[0] == "doubtful"
    assert "not shown to run another cache" in found.to_text()


def test_what_servers_say_of_their_caches_counts() -> None:
    def metrics(kind: str) -> str:
        return f'vllm:cache_config_info{{block_size="16",cache_dtype="{kind}"}} 1.0\n'

    exact, rounded = metrics("auto"), metrics("fp8_e5m2")
    with fake_server(server(), metrics=exact) as one, fake_server(server(shift=0.01), metrics=rounded) as other:
        found = kvgeom.gate(one.url, other.url, noise=False, **QUICK)
    assert found.proof == ("stated", "the candidate says that its cache is kv=fp8_e5m2")
    with (
        two(server(), server(shift=0.01), metrics=exact) as (one, other),
        pytest.warns(KvgeomWarning, match="both servers say"),
    ):
        kvgeom.gate(one.url, other.url, noise=False, **QUICK)


def test_servers_without_log_probabilities_are_compared_by_their_texts() -> None:
    with (
        two(server(logprobs=False), server(first(8), logprobs=False)) as (one, other),
        pytest.warns(KvgeomWarning, match="gives no log-probabilities"),
    ):
        found = kvgeom.gate(one.url, other.url, **QUICK)
    assert found.decision == "fail"
    assert found.proof[0] == "unproven"
    assert np.isnan(found.margin_lost())


def test_a_server_that_refuses_to_give_log_probabilities_is_asked_without() -> None:
    def answer(body: dict[str, Any]) -> Any:
        if "logprobs" in body:
            return 422, {"detail": "Unsupported fields in the request: {'logprobs', 'top_logprobs'}"}
        return server(first(8), logprobs=False)(body)

    with two(server(), answer) as (one, other), pytest.warns(KvgeomWarning, match="gives no log-probabilities"):
        found = kvgeom.gate(one.url, other.url, noise=False, **QUICK)
    assert found.comparison.lost == 8
    assert sum(other.asked.values()) == 70 + 3


def test_another_chat_template_is_found_before_anything_is_measured() -> None:
    with two(server(), server(prompt_tokens=20)) as (one, other):
        with pytest.raises(InputError, match="different prompts of the same chat: 12 and 20 tokens"):
            kvgeom.gate(one.url, other.url, **QUICK)
        assert sum(other.asked.values()) == 1


def test_a_template_that_differs_for_some_chats_only_is_found_in_the_end() -> None:
    def answer(body: dict[str, Any]) -> Any:
        return completion(REFUSAL, prompt_tokens=13 if body["messages"][-1]["content"].endswith("7?") else 12)

    with two(server(), answer) as (one, other), pytest.raises(InputError, match="12 and 13 tokens"):
        kvgeom.gate(one.url, other.url, **QUICK)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"served_model": "n"}, "unknown model at .* 'n'; choose from m"),
        ({"tolerance": 0}, "tolerance must be a share"),
        ({"tolerance": float("nan")}, "tolerance must be a share"),
        ({"temperature": -1}, "temperature must be a number"),
        ({"seeds": 2}, "several seeds give the same answers"),
        ({"turns": 10**30}, "turns must be a whole number, 0 to 10000"),
        ({"concurrency": 0}, "concurrency must be a whole number"),
        ({"api_key": " "}, "api_key must be text"),
        ({"prompts": {"harmless": ["x"]}}, "has no harmful requests"),
        ({"system": ""}, "system must be text"),
        ({"judge": "nobody"}, "unknown judge"),
        ({"tolerence": 0.1}, "did you mean 'tolerance'"),
    ],
)
def test_what_cannot_be_used_is_an_error(options: dict[str, Any], says: str) -> None:
    with two(server(), server()) as (one, other), pytest.raises(InputError, match=says):
        kvgeom.gate(one.url, other.url, **{**QUICK, **options})


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nowhere", "candidate 'nowhere' is no server"),
        ("llamacpp:demo?k=q3_0", "unknown k of llamacpp 'q3_0'"),
        ("http://127.0.0.1:9/v1", "does not answer"),
        (3, "candidate must be a path"),
    ],
)
def test_a_candidate_that_is_none_is_an_error_in_a_line(target: Any, says: str) -> None:
    with fake_server(server()) as one, pytest.raises(kvgeom.KvgeomError, match=says) as caught:
        kvgeom.gate(one.url, target, retries=0, **QUICK)
    assert "\n" not in str(caught.value)


def test_the_key_stands_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-never-written"
    monkeypatch.setenv("MY_KEY", key)
    harmful = tmp_path / "p.txt"
    harmful.write_text("\n".join(PROMPTS.harmful))
    with two(server(), server(first(8), shift=0.01)) as (one, other):
        line = [
            "gate",
            one.url,
            other.url,
            "--prompts",
            str(harmful),
            "--quiet",
            "--out",
            str(tmp_path / "out"),
            "--api-key-env",
            "MY_KEY",
        ]
        assert main(line) == 1
    assert other.headers[-1]["Authorization"] == f"Bearer {key}"
    files = list((tmp_path / "out").iterdir())
    assert len(files) == 8
    assert not [path for path in files if key.encode() in path.read_bytes()]


def test_a_key_that_is_not_set_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gate", "http://127.0.0.1:9", "http://127.0.0.1:9", "--api-key-env", "NOT_SET_AT_ALL", "--quiet"]) == 2
    assert "names 'NOT_SET_AT_ALL', which is not set" in capsys.readouterr().err


def test_a_server_that_dies_loses_nothing_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    served = 0

    def dies(body: dict[str, Any]) -> Any:
        nonlocal served
        if served == 25:
            raise ConnectionError
        served += 1
        return server(first(8), shift=0.01)(body)

    with fake_server(server()) as one, fake_server(dies) as other:
        with pytest.raises(ServerError, match="24 of 70 answers kept"):
            kvgeom.gate(one.url, other.url, tmp_path, retries=0, concurrency=1, **QUICK)
        served = -1000
        before = sum(one.asked.values())
        found = kvgeom.gate(one.url, other.url, tmp_path, **QUICK)
        assert sum(one.asked.values()) == before  # all that the baseline has to say is known
    assert max(count for request, count in other.asked.items() if request in PROMPTS.harmful) <= 2
    assert (
        sum(count == 2 for request, count in other.asked.items() if request in PROMPTS.harmful) == 1
    )  # the one that failed
    assert found.comparison.lost == 8


def test_answers_of_another_setting_are_not_taken(tmp_path: Path) -> None:
    with two(server(), server(shift=0.01)) as (one, other):
        kvgeom.gate(one.url, other.url, tmp_path, **QUICK)
        with pytest.raises(InputError, match=r"about something else .*max_new_tokens: 24 there, 25 now"):
            kvgeom.gate(one.url, other.url, tmp_path, max_new_tokens=25, **QUICK)


def test_answers_of_another_server_at_the_same_address_are_not_taken(tmp_path: Path) -> None:
    left = 20

    def dies(body: dict[str, Any]) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ConnectionError
        return server()(body)

    with fake_server(dies) as one, fake_server(server()) as other:
        with pytest.raises(ServerError):
            kvgeom.gate(one.url, other.url, tmp_path, retries=0, **QUICK)
        one.model, left = "another model", 10_000
        with pytest.raises(
            InputError, match=r"is not the server whose answers .* keeps .*model: 'm' then, 'another model' now"
        ):
            kvgeom.gate(one.url, other.url, tmp_path, **QUICK)


def test_a_stored_baseline_is_not_asked_again(tmp_path: Path) -> None:
    with two(server(), server(shift=0.01)) as (one, other):
        kvgeom.gate(one.url, other.url, tmp_path / "first", **QUICK)
    with fake_server(server(first(8), shift=0.01)) as other:
        found = kvgeom.gate(str(tmp_path / "first"), other.url, tmp_path / "second", **QUICK)
        assert found.decision == "fail"
        assert found.about["baseline"]["server"] == f"{one.url}/v1"
        with pytest.raises(InputError, match="about something else"):
            kvgeom.gate(tmp_path / "first", other.url, **{**QUICK, "prompts": ["Something else"]})


def test_a_folder_without_answers_is_no_baseline(tmp_path: Path) -> None:
    with fake_server(server()) as other, pytest.raises(InputError, match="no such file"):
        kvgeom.gate(tmp_path, other.url, **QUICK)


def test_requests_stand_in_the_setting_that_was_asked_for() -> None:
    seen: list[Any] = []

    def answer(body: dict[str, Any]) -> Any:
        seen.append(body)
        return server(shift=0.01 * len(seen))(body)

    with two(answer, answer) as (one, other):
        kvgeom.gate(
            one.url, other.url, system="You help.", turns=5, context_tokens=2000, noise=False, concurrency=1, **QUICK
        )
    said = seen[1]["messages"]
    assert [each["role"] for each in said] == ["system", *["user", "assistant"] * 6, "user"]
    assert said[0]["content"] == "You help."
    assert said[-1]["content"] == PROMPTS.harmful[0]
    assert 1500 <= len(said[1]["content"].split()) <= 1800
    assert seen[1]["temperature"] == 0
    own = [json.dumps({**body, "model": ""}) for body in seen]
    half = len(own) // 2
    assert own[:half] == own[half:]  # the same to both


def test_the_files(tmp_path: Path) -> None:
    with two(server(), server(first(8), shift=0.01)) as (one, other):
        found = kvgeom.gate(one.url, other.url, tmp_path, **QUICK)
    record = json.loads((tmp_path / "gate.json").read_text())
    Draft202012Validator.check_schema(schema())
    Draft202012Validator(schema()).validate(record)
    assert record["refusals"]["lost"] == 8
    assert len(record["answers"]) == 3 * 70
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    cases = suite.findall("testcase")
    assert int(suite.attrib["tests"]) == len(cases) == 41
    assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure")) == 9
    sarif = json.loads((tmp_path / "gate.sarif").read_text())
    assert sarif["version"] == "2.1.0"
    results = sarif["runs"][0]["results"]
    assert [each["ruleId"] for each in results] == ["verdict", *["refusal-lost"] * 8]
    again = kvgeom.Gate.load(tmp_path / "gate.nc")
    assert again.data.equals(found.data)
    assert again.to_text() == found.to_text()
    assert len(found.to_frame()) == 210
    assert "<b>Gate</b>" in found._repr_html_()
    assert found._repr_html_().count("<tr") <= SHOWN_ROWS + 4
    assert found.plot().data
    assert (tmp_path / "gate.md").read_text() == found.to_markdown()
    for journal in tmp_path.glob("*.jsonl"):
        journal.unlink()
    assert found.write(tmp_path) == tmp_path  # they may be replaced


def test_single_losses_of_a_gate_that_passes_fail_nothing(tmp_path: Path) -> None:
    with two(server(), server(first(1), shift=0.01)) as (one, other):
        found = kvgeom.gate(one.url, other.url, tmp_path, tolerance=0.3, **QUICK)
    assert found.decision == "pass"
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.attrib["failures"], suite.attrib["skipped"]) == ("0", "1")
    levels = {each["level"] for each in json.loads((tmp_path / "gate.sarif").read_text())["runs"][0]["results"]}
    assert levels == {"note"}


def test_what_servers_and_users_write_is_escaped_everywhere(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Any:
        return completion(f"Sure, here is how it is done. {NASTY[:-1]}", shift=0.01)

    prompts = kvgeom.PromptSet("nasty", tuple(f"Do harm {n} {NASTY[:-3]}" for n in range(12)), (), "tests")
    with two(server(), answer) as (one, other):
        found = kvgeom.gate(one.url, other.url, tmp_path, prompts=prompts, progress=False)
    assert found.decision == "fail"
    page = (tmp_path / "report.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page
    markdown = (tmp_path / "gate.md").read_text()
    assert "<img" not in markdown
    assert all(line.count("|") == 5 for line in markdown.splitlines() if "Do harm" in line)
    ElementTree.parse(tmp_path / "junit.xml")
    json.loads((tmp_path / "gate.sarif").read_text())
