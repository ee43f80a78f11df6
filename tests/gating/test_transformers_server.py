"""transformers as a server with a packed cache: what it answers is what the model and its emulation say."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

import kvgeom
from kvgeom.engines.registry import resolve
from kvgeom.engines.serve import serve
from kvgeom.engines.spec import parse_spec
from kvgeom.errors import InputError
from kvgeom.evaluation.fidelity import Passages
from kvgeom.gating.client import Client
from kvgeom.gating.reading import compared_text, read_text
from kvgeom.gating.transformers_server import PackedServer, cache_config, listening
from kvgeom.models.templates import rendered
from kvgeom.prompts.sets import perplexity_text
from kvgeom.quant.quantizer import Quantizer
from tests.builders.judges import ArbitraryJudge
from tests.builders.reading import read
from tests.builders.tiny import TEMPLATE, tiny_hf_model, tiny_model, tiny_tokenizer

TINY = tiny_model(seed=1)
TEXT = perplexity_text()[:300]
CACHES = ["exact", "int4-asym-token", "kivi", "llamacpp-q8_0"]


@contextmanager
def served(cache: str, context: int = 512) -> Iterator[str]:
    server = listening(PackedServer(TINY, "tiny", cache_config(cache), context))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def chat(url: str, **options: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "Name a river."}], "max_tokens": 6, "temperature": 0, **options}
    return httpx.post(f"{url}/chat/completions", json=body, timeout=60)


def test_what_a_checkpoint_asks_of_generation_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Penalties and processors of its generation_config would make another text of the same cache, as nowhere else in kvgeom."""
    with served("exact") as url:
        plain = chat(url).json()["choices"][0]["message"]["content"]
        config = TINY.hf_model.generation_config
        for name, value in {
            "repetition_penalty": 9.0,
            "no_repeat_ngram_size": 1,
            "min_new_tokens": 6,
            "do_sample": True,
        }.items():
            monkeypatch.setattr(config, name, value)
        assert chat(url).json()["choices"][0]["message"]["content"] == plain
    monkeypatch.undo()
    assert len({*plain}) < len(plain), "a penalty would have been seen"


@pytest.mark.parametrize("cache", ["exact", "int4-asym-token", "int8-sym-tensor"])
def test_a_chat_is_what_the_emulation_decodes(cache: str) -> None:
    prompt = TINY.encode(["Name a river."])[0]
    config = cache_config(cache)
    empty = TINY.new_cache(None if config is None else Quantizer(config.recipe(3), config.placement))
    logits = TINY.forward(prompt.ids, empty)[-1]
    tokens = TINY.generate([empty], [int(logits.argmax())], 6)[0]
    with served(cache) as url:
        found = chat(url, logprobs=True, top_logprobs=5).json()
    choice = found["choices"][0]
    assert found["usage"]["prompt_tokens"] == len(prompt.ids)
    assert choice["message"]["content"] == TINY.decode(tokens)
    first = choice["logprobs"]["content"][0]
    best = logits.log_softmax(-1).topk(5).values
    np.testing.assert_allclose([each["logprob"] for each in first["top_logprobs"]], best, atol=1e-4)


@pytest.mark.parametrize("cache", ["int4-asym-token", "int3-sym-tensor"])
def test_a_text_is_read_as_the_emulation_reads_it(cache: str) -> None:
    config = resolve(cache)
    ids = tuple(TINY.tokens(TEXT))
    text = Passages((ids,), len(ids), len(ids))
    expected = read(TINY, text, config.recipe(3), config.placement).against(read(TINY, text))
    with served("exact") as one, served(cache) as other, Client(one) as before, Client(other) as after:
        found = compared_text(read_text(before, "tiny", TEXT), read_text(after, "tiny", TEXT))
    assert found is not None
    assert found.perplexity_ratio.value == pytest.approx(expected.perplexity_ratio.value, rel=1e-3)
    assert found.top1.value >= expected.top1.value  # bytes that are no text read alike
    assert 0 < found.kl.value <= expected.kl.value * 1.01


def test_a_connection_that_stays_open_keeps_nobody_waiting() -> None:
    """A gate has several at once, each open until it ends."""
    with served("exact") as url, httpx.Client(timeout=20) as one, httpx.Client(timeout=20) as other:
        for client in (one, other, one):
            assert client.get(f"{url}/models").status_code == 200


def test_seeds_and_temperatures_are_sampled() -> None:
    with served("exact") as url:
        texts = [
            chat(url, temperature=2.0, seed=seed).json()["choices"][0]["message"]["content"] for seed in (0, 0, 1, 2)
        ]
    assert texts[0] == texts[1]
    assert len({*texts}) > 1


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("chat/completions", {}, 400, "messages"),
        ("chat/completions", {"messages": 3}, 400, ""),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * 600}]}, 400, "the context is 512"),
        ("completions", {"prompt": "a" * 600}, 400, "the context is 512"),
        ("completions", {"prompt": "a" * 600, "echo": True}, 400, "600 tokens"),
        ("nothing", {}, 404, ""),
    ],
)
def test_what_it_cannot_answer(path: str, body: dict[str, Any], status: int, said: str) -> None:
    with served("exact") as url:
        found = httpx.post(f"{url}/{path}", json=body, timeout=60)
        assert found.status_code == status
        assert said in found.json()["error"]["message"]
        assert chat(url).status_code == 200


def test_a_machine_that_fails_is_said_and_the_server_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: PackedServer, body: dict[str, Any]) -> dict[str, Any]:
        raise torch.OutOfMemoryError("no memory for this")

    with served("exact") as url:
        with monkeypatch.context() as patch:
            patch.setattr(PackedServer, "chat", no_memory)
            answer = chat(url)
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "no memory for this")
        assert chat(url).status_code == 200


def test_specs_take_presets_schemes_and_plans_and_nothing_else(tmp_path: Path) -> None:
    assert parse_spec("transformers:demo").cache == {"cache": "exact"}
    assert parse_spec("transformers:demo?cache=kivi").cache == {"cache": "kivi"}
    for wrong, said in (("kvii", "kivi"), ("int3", "int3"), ("none.json", "none.json")):
        with pytest.raises(InputError, match=said):
            parse_spec(f"transformers:demo?cache={wrong}")


def test_it_is_started_and_says_what_its_cache_is(tmp_path: Path) -> None:
    tiny_hf_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    spec = f"transformers:{tmp_path / 'model'}?cache=int8-asym-token&context=256&threads=1"
    with serve(spec, log=tmp_path / "log") as server:
        assert server.stated == {"cache": "int8-asym-token"}
        assert chat(server.url).status_code == 200
    assert torch.get_num_threads() >= 1


@pytest.mark.slow
def test_a_gate_starts_both(tmp_path: Path) -> None:
    tiny_hf_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    spec = f"transformers:{tmp_path / 'model'}?cache=int8-asym-token&context=256&threads=1"
    prompts = kvgeom.PromptSet("some", ("Name a river.", "Name a town."), (), "tests")
    found = kvgeom.gate(
        spec.replace("int8-asym-token", "exact"), spec, prompts=prompts, text=TEXT, max_new_tokens=3, progress=False
    )
    assert found.proof[0] == "stated"
    assert found.text_fidelity() is not None


# --- plain completions ---


@pytest.mark.parametrize("cache", ["exact", "int4-asym-token"])
def test_a_completion_of_the_same_prompt_says_what_the_chat_says(cache: str) -> None:
    """Text, tokens and log-probabilities, in the old format of completions."""
    shown = {"model": "tiny", "temperature": 0, "max_tokens": 6}
    chats = {"messages": [{"role": "user", "content": "Name a river."}], "logprobs": True, "top_logprobs": 5}
    with served(cache) as url, Client(url) as client:
        one = client.answer({**shown, **chats})
        other = client.answer({**shown, "prompt": rendered(TEMPLATE, chats["messages"]), "logprobs": 5})  # type: ignore[arg-type]
    assert one.tokens == other.tokens
    assert (one.text, one.finish, one.prompt_tokens) == (other.text, other.finish, other.prompt_tokens)
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert one.top == pytest.approx(other.top, abs=1e-5)
    assert 0 < len(one.top) <= 5  # parts of characters read alike


def test_a_gate_of_completions(tmp_path: Path) -> None:
    """The same decision as of chats, where the servers' template is the one that is given."""
    prompts = {"harmful": ["Name a river.", "Name a lake."], "harmless": ["Name a hill."]}
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    options: dict[str, Any] = {
        "prompts": prompts,
        "max_new_tokens": 4,
        "noise": False,
        "progress": False,
        "judge": ArbitraryJudge(),
    }
    with served("exact") as one, served("int2-sym-tensor") as other:
        chats = kvgeom.gate(one, other, tmp_path / "chats", **options)
        plain = kvgeom.gate(one, other, tmp_path / "plain", template=tmp_path / "t.jinja", **options)
    assert plain.data.text.values.tolist() == chats.data.text.values.tolist()
    assert plain.comparison == chats.comparison
    assert json.loads((tmp_path / "plain" / "gate.json").read_text())["settings"]["template"] == TEMPLATE
    assert "plain completions" in (tmp_path / "plain" / "report.html").read_text()


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("nowhere.jinja", "no such file"),
        ("{{ messages[0].content }", "fails on a chat"),
        ("{{ 'hello' }}", "leaves out 'Hello'"),
        ("{{ raise_exception('no') }}", "fails on a chat: no"),
    ],
)
def test_templates_that_show_no_chat(template: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        kvgeom.gate("http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1", template=template, progress=False)
