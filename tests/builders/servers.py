"""A tiny HTTP server that speaks the protocol of OpenAI, and fails in every way that is asked for. It measures nothing."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kvgeom.engines.engine import Engine
from kvgeom.engines.runner import Launch, Runner
from kvgeom.engines.spec import ServerSpec

#: What a server answers by default: refuses what is harmful, with two tokens and their log-probabilities.
REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Sure, here is how it is done."


def completion(text: str, *, prompt_tokens: int = 12, shift: float = 0.0, logprobs: bool = True) -> dict[str, Any]:
    """A chat completion of one token a word."""
    words = [word if not n else f" {word}" for n, word in enumerate(text.split(" "))]
    content = [
        {
            "token": word,
            "logprob": -0.1 - shift,
            "top_logprobs": [{"token": word, "logprob": -0.1 - shift}, {"token": "Sure", "logprob": -3.0 + shift}],
        }
        for word in words
    ]
    return {
        "choices": [
            {
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
                "logprobs": {"content": content} if logprobs else None,
            }
        ],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(words)},
    }


class FakeServer:
    """What a server answers, and what it was asked.

    ``reads`` gets the body of a plain completion; without it there is no such path. ``answer`` gets the request's body and returns a body, a status with a body, or raises ``ConnectionError`` to hang up.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], Any],
        model: str = "m",
        metrics: str = "",
        port: int = 0,
        reads: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self.answer, self.model, self.metrics, self.reads = answer, model, metrics, reads
        self.asked: Counter[str] = Counter()
        self.at_once = self.most_at_once = 0
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # headers and body in one packet, or each answer waits 40 ms for an acknowledgement

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self.send(200, owner.metrics.encode(), "text/plain")
                elif self.path == "/v1/models":
                    self.send(200, json.dumps({"data": [{"id": owner.model}]}).encode())
                else:
                    self.send(404, b"{}")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/v1/completions":
                    found = (404, {}) if owner.reads is None else owner.reads(body)
                    status, found = found if isinstance(found, tuple) else (200, found)
                    self.send(status, json.dumps(found).encode())
                    return
                with owner.lock:
                    owner.asked[body["messages"][-1]["content"]] += 1
                    owner.headers.append(dict(self.headers))
                    owner.at_once += 1
                    owner.most_at_once = max(owner.most_at_once, owner.at_once)
                try:
                    found = owner.answer(body)
                except ConnectionError:
                    self.close_connection = True
                    return
                finally:
                    with owner.lock:
                        owner.at_once -= 1
                status, found = found if isinstance(found, tuple) else (200, found)
                self.send(status, found if isinstance(found, bytes) else json.dumps(found).encode())
                owner.answered(body["messages"][-1]["content"])

            def send(self, status: int, body: bytes, kind: str = "application/json") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def answered(self, request: str) -> None:
        """Called once an answer is sent."""

    def run(self) -> None:
        self._server.serve_forever(poll_interval=0.02)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def fake_server(answer: Callable[[dict[str, Any]], Any], **options: Any) -> Iterator[FakeServer]:
    server = FakeServer(answer, **options)
    threading.Thread(target=server.run, daemon=True).start()
    try:
        yield server
    finally:
        server.close()


#: A server of its own process: the standard library's, with the model list that readiness asks for.
_PROGRAM = """
import http.server, json, os, subprocess, sys, time
port, how = int(sys.argv[1]), sys.argv[2]
print("starting", how, flush=True)
if how == "dies":
    sys.exit("the weights are gone")
if how == "hangs":
    time.sleep(60)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "tiny"}]}).encode())
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def tiny_engine(how: str = "runs", *, module: str = "json", stated: dict[str, str] | None = None) -> ServerSpec:
    """A spec whose server is a program of the standard library."""

    def command(launch: Launch) -> list[str]:
        return ["-c", _PROGRAM, str(launch.port), how]

    runner = Runner(
        module=module,
        packages=("none",),
        install=f"pip install {module}==1.0",
        caches={"kv": ("auto", "small")},
        find=lambda model: model,
        command=command,
        stated=lambda launch, log: stated or {},
        hints={"weights are gone": "fetch them again"},
    )
    engine = Engine("tiny", "Tiny", "1", "tests", "not", "tiny.md", runner=runner)
    return ServerSpec(engine, "tiny", {"kv": "auto"})


#: A process that owns a server and waits to be killed.
OWNER = """
import sys, time
from kvgeom.engines.serve import serve
from tests.builders.servers import tiny_engine
with serve(tiny_engine(), log=sys.argv[1]) as server:
    print("ready", flush=True)
    time.sleep(60)
"""


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether something comes to hold."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.05)
    return holds()


__all__ = ["ANSWER", "OWNER", "REFUSAL", "FakeServer", "completion", "eventually", "fake_server", "tiny_engine"]
