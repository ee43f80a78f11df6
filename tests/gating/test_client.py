"""Whatever a server does, the client answers, or ends in one line; nothing that was answered is asked again or lost."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.errors import InputError, KvgeomError, ServerError
from kvgeom.evaluation.journal import Journal, NoJournal
from kvgeom.gating import client as module
from kvgeom.gating.client import Client, base_url
from kvgeom.gating.collect import Ask, collect
from tests.builders.servers import REFUSAL, completion, fake_server

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(module, "_LONGEST_PAUSE", 0.05)


def asks(count: int) -> list[Ask]:
    return [Ask({"prompt": n}, {"model": "m", "messages": [{"role": "user", "content": str(n)}]}) for n in range(count)]


def asked_once(url: str, **options: Any) -> Any:
    with Client(base_url(url), **options) as client:
        return client.answer(asks(1)[0].body)


def test_an_answer_is_read_in_full() -> None:
    with fake_server(lambda body: completion(REFUSAL)) as server:
        found = asked_once(server.url)
    assert found.text == REFUSAL
    assert "".join(found.tokens) == REFUSAL
    assert found.prompt_tokens == 12
    assert found.top == {"I'm": -0.1, "Sure": -3.0}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}), "refuses the API key .*--api-key-env"),
        ((403, b"no"), "refuses the API key"),
        ((404, {"error": {"message": "The model `x` does not exist."}}), "no such model or path .*does not exist"),
        ((400, {"error": {"message": "logprobs are off"}}), "refuses the request .*logprobs are off"),
        ((400, {"error": f"bad header {KEY}"}), r"refuses the request .*bad header \*\*\*"),
        ((302, b""), "sends elsewhere"),
        (b"<html>Welcome to nginx</html>", "does not speak OpenAI's protocol: it answers .*nginx"),
        ({"choices": []}, "is no chat completion"),
        (
            {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"token": 1}]}}]},
            "is no chat completion",
        ),
        ([1, 2], "is no chat completion"),
        ((200, b'"text"'), "is no chat completion"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line_without_the_key(answer: Any, says: str) -> None:
    with fake_server(lambda body: answer) as server, pytest.raises(InputError, match=says) as caught:
        asked_once(server.url, key=KEY)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sum(server.asked.values()) == 1  # asking again would not help


NAMES = st.sampled_from(["choices", "message", "content", "logprobs", "usage", "token", "top_logprobs"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(NAMES, each, max_size=4),
    max_leaves=8,
)


@settings(max_examples=60)
@given(st.binary(max_size=80) | VALUES)
def test_no_answer_breaks_the_client(found: Any) -> None:
    body = found if isinstance(found, bytes) else json.dumps(found).encode()
    client = Client("http://x/v1", KEY, retries=0)
    client._http = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(200, content=body)))
    try:
        client.answer({})
    except KvgeomError as error:
        said = str(error)
    else:
        said = ""
    assert "\n" not in said
    assert KEY not in said


@pytest.mark.parametrize("fails", [(500, b"oops"), (503, {}), (429, {}), ConnectionError])
def test_a_server_that_fails_twice_is_asked_a_third_time(fails: Any) -> None:
    left = [fails, fails]

    def answer(body: dict[str, Any]) -> Any:
        if not left:
            return completion(REFUSAL)
        found = left.pop()
        if isinstance(found, type):
            raise found
        return found

    with fake_server(answer) as server:
        assert asked_once(server.url).text == REFUSAL
    assert sum(server.asked.values()) == 3


def test_one_that_always_fails_is_given_up() -> None:
    with fake_server(lambda body: (500, {"error": "out of memory"})) as server:
        with pytest.raises(ServerError, match=r"failed \(status 500: out of memory\)"):
            asked_once(server.url, retries=2)
        assert sum(server.asked.values()) == 3


def test_one_that_hangs_is_given_up() -> None:
    wait = threading.Event()
    with fake_server(lambda body: wait.wait(5) and {}) as server:
        with pytest.raises(ServerError, match=r"did not answer within 0\.2 s"):
            asked_once(server.url, retries=1, timeout=0.2)
        wait.set()


def test_where_nobody_listens_it_says_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.raises(ServerError, match=r"does not answer: .*refused"):
        asked_once(f"http://127.0.0.1:{port}", retries=0)


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "http://", "ftp://x/v1", "http://user:pw@x/v1", "http://x/v1?key=1"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InputError) as caught:
        base_url(url)
    assert "pw" not in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_a_url_or_an_error(text: str) -> None:
    try:
        found = base_url(text)
    except KvgeomError:
        found = "/v1"
    assert found.endswith("/v1")


def test_the_key_is_sent_and_shown_nowhere() -> None:
    with fake_server(lambda body: completion(REFUSAL)) as server, Client(base_url(server.url), KEY) as client:
        client.answer(asks(1)[0].body)
        assert KEY not in repr(client)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "schl\u00fcssel", "\x00"])
def test_a_key_that_is_none_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(InputError) as caught:
        Client("http://x/v1", key)
    assert not key or key not in str(caught.value)


def test_no_more_requests_than_asked_for_are_under_way() -> None:
    def answer(body: dict[str, Any]) -> Any:
        time.sleep(0.02)
        return completion(REFUSAL)

    with fake_server(answer) as server, Client(base_url(server.url)) as client:
        found = collect(client, asks(24), NoJournal(), 3, "t")
    assert [each.text for each in found] == [REFUSAL] * 24
    assert server.most_at_once == 3


def test_an_interrupted_run_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    """A server that dies half-way, twice."""
    count, served = 60, 0
    lock, limit = threading.Lock(), 20

    def answer(body: dict[str, Any]) -> Any:
        nonlocal served
        with lock:
            if served >= limit:
                raise ConnectionError
            served += 1
        return completion(body["messages"][-1]["content"])

    for stage in range(3):
        limit = 20 * (stage + 1)
        with (
            fake_server(answer) as server,
            Client(base_url(server.url), retries=1) as client,
            Journal(tmp_path / "j.jsonl", {"about": "this"}) as journal,
        ):
            if stage < 2:
                with pytest.raises(ServerError, match=rf"{limit} of 60 answers kept: the same command goes on"):
                    collect(client, asks(count), journal, 4, "t")
            else:
                found = collect(client, asks(count), journal, 4, "t")
            assert journal.known == limit
    assert [each.text for each in found] == [str(n) for n in range(count)]
    assert served == count  # none was answered twice


def test_answers_that_are_under_way_are_kept_where_another_fails(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Any:
        if body["messages"][-1]["content"] == "0":
            return 400, {}
        time.sleep(0.1)
        return completion("late")

    with (
        fake_server(answer) as server,
        Client(base_url(server.url)) as client,
        Journal(tmp_path / "j.jsonl", {}) as journal,
    ):
        with pytest.raises(InputError, match="refuses the request"):
            collect(client, asks(40), journal, 4, "t")
        assert journal.known == 3
    assert sum(server.asked.values()) == 4


@pytest.mark.parametrize("order", [1, -1])
def test_tokens_that_do_not_spell_the_text_are_the_likeliest(order: int) -> None:
    """MLX-LM lists alternatives in no order, and names the first of them as the token."""
    places = [[("I", -0.5), ("In", -2.0)], [(" am", -0.1), (" was", -3.0)]]
    content = []
    for place in places:
        top = [{"token": token, "logprob": value} for token, value in place[::order]]
        content.append({**top[0], "top_logprobs": top})
    body = {
        "choices": [{"message": {"content": "I am"}, "finish_reason": "length", "logprobs": {"content": content}}],
        "usage": {"prompt_tokens": 3},
    }
    with fake_server(lambda _: body) as server, Client(server.url + "/v1") as client:
        found = client.answer({"messages": [{"role": "user", "content": "x"}]})
    assert found.tokens == ["I", " am"]
    assert found.logprobs == [-0.5, -0.1]
    assert found.top == {"I": -0.5, "In": -2.0}
