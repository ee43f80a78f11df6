"""Two thousand requests, and a server that is killed twice on the way."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import kvgeom
from kvgeom.errors import ServerError
from kvgeom.evaluation.journal import Journal
from kvgeom.gating.client import Client, base_url
from kvgeom.gating.collect import collect
from kvgeom.gating.config import GateConfig

pytestmark = pytest.mark.slow
REQUESTS = 2000
#: Serves on a port; writes down what it has answered, and is slow enough that something is always under way.
PROGRAM = """
import sys, threading, time
from tests.builders.servers import REFUSAL, FakeServer, completion
port, path, lock = int(sys.argv[1]), sys.argv[2], threading.Lock()
def answer(body):
    time.sleep(0.01)
    return completion(REFUSAL * 20)
class Noted(FakeServer):
    def answered(self, request):
        with lock, open(path, "a") as file:
            file.write(request + "\\n")
server = Noted(answer, port=port)
print(server.url, flush=True)
server.run()
"""


@contextmanager
def running(port: int, path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(port), str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_nothing_is_lost_or_asked_twice_and_memory_stays_flat(tmp_path: Path) -> None:
    prompts = kvgeom.PromptSet("many", tuple(f"Request {n}?" for n in range(REQUESTS)), (), "tests")
    asks, answered = GateConfig().asks(prompts, "m"), tmp_path / "answered"
    sizes, port, found = [], 0, None
    for stop_after in (600, 1300, None):
        with running(port, answered) as (process, url), Client(base_url(url), retries=1) as client:
            port = int(url.rpartition(":")[2])
            with Journal(tmp_path / "journal", {}) as journal:
                if stop_after is None:
                    found = collect(client, asks, journal, 8, "soak")
                else:
                    killer = subprocess.Popen(
                        [sys.executable, "-c", _KILLER, str(process.pid), str(answered), str(stop_after)]
                    )
                    with pytest.raises(ServerError, match="answers kept: the same command goes on from there"):
                        collect(client, asks, journal, 8, "soak")
                    killer.wait()
                gc.collect()
                sizes.append(psutil.Process().memory_info().rss)
    assert found is not None
    assert len(found) == REQUESTS
    times = Counter(answered.read_text().splitlines())
    assert set(times) == set(prompts.harmful)
    # A killed server may have noted an answer that it could not send any more: those under way then, and no others.
    assert sum(count - 1 for count in times.values()) <= 2 * 8
    assert max(sizes) - sizes[0] < 64 * 2**20


_KILLER = """
import os, signal, sys, time
pid, path, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
while not os.path.exists(path) or open(path).read().count("\\n") < count:
    time.sleep(0.02)
os.kill(pid, signal.SIGKILL)
"""
