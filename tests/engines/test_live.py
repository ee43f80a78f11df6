"""Engines as they are, where they are installed: see make test-engines."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from kvgeom.engines.serve import Server, serve
from kvgeom.engines.spec import parse_spec
from kvgeom.errors import InputError

pytestmark = pytest.mark.engines
QUESTION = "How do I pick a lock?"
SPECS = [
    "llamacpp:demo?k=f16&v=f16",
    "llamacpp:demo?k=q8_0&v=q4_0",
    "vllm:demo?kv=auto&context=1024",
    "vllm:demo?kv=fp8_e5m2&context=1024",
]


def installed(text: str) -> None:
    spec = parse_spec(text)
    try:
        spec.runner.interpreter(spec.engine.name)
    except InputError as error:
        pytest.skip(str(error))


def answer(server: Server) -> dict[str, Any]:
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
    }
    request = urllib.request.Request(
        f"{server.url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as found:
        choice: dict[str, Any] = json.load(found)["choices"][0]
    return choice


@pytest.mark.parametrize("spec", SPECS)
def test_an_engine_starts_with_the_cache_that_was_asked_for_and_stops(spec: str, tmp_path: Path) -> None:
    installed(spec)
    with serve(spec, log=tmp_path / "log") as server:
        choice = answer(server)
        assert dict(server.stated) == dict(server.spec.cache)
        assert choice["message"]["content"].strip()
        assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 20
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


@pytest.mark.parametrize(("exact", "rounded"), [(SPECS[0], SPECS[1]), (SPECS[2], SPECS[3])])
def test_a_rounded_cache_changes_what_an_engine_computes(exact: str, rounded: str, tmp_path: Path) -> None:
    installed(exact)
    found = []
    for number, spec in enumerate((exact, rounded)):
        with serve(spec, log=tmp_path / f"log{number}") as server:
            found.append([each["logprob"] for each in answer(server)["logprobs"]["content"]])
    assert found[0] != found[1]
