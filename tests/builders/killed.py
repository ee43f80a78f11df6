"""Commands in processes that can be killed at any moment, and go on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

#: Imports once what every run needs; each run is a fork of it, as a start takes seconds.
_SERVER = """
import importlib, json, os, pkgutil, sys, traceback
import h5netcdf, plotly.graph_objects, scipy.stats, torch, transformers, xarray
import kvgeom
from kvgeom.cli import main
torch.set_num_threads(1)
for found in pkgutil.walk_packages(kvgeom.__path__, "kvgeom."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
for line in sys.stdin:
    asked = json.loads(line)
    pid = os.fork()
    if pid == 0:
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            status = main(asked["command"])
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stderr.flush()
        os._exit(status)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Runs:
    """Runs of commands, one after the other, from a process that has imported all."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.started: list[int] = []
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()  # type: ignore[union-attr]
        self._server.wait(60)
        self._server.stdout.close()  # type: ignore[union-attr]

    def start(self, command: Sequence[str]) -> int:
        """Its process."""
        self._server.stdin.write(json.dumps({"command": [*command], "log": str(self.log)}) + "\n")  # type: ignore[union-attr]
        self._server.stdin.flush()  # type: ignore[union-attr]
        self.started.append(int(self._server.stdout.readline()))  # type: ignore[union-attr]
        return self.started[-1]

    def ended(self) -> int:
        """How the run has ended, as ``waitpid`` says."""
        return int(self._server.stdout.readline())  # type: ignore[union-attr]


def sent(process: int, number: int) -> bool:
    """Send a signal to a process, if it has not ended; 0 sends none."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return False
    return True


def size_of(folder: Path) -> int:
    """Bytes in the journals of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.jsonl"))


def killed_and_run(runs: Runs, command: Sequence[str], out: Path, whole: int, kills: int, seed: int) -> int:
    """Run a command, killed so many times at moments spread over its journals and the time after, until it has ended.

    Parameters
    ----------
    runs : Runs
    command : sequence of str
    out : Path
        Its folder.
    whole : int
        Bytes of the journals at the end.
    kills, seed : int

    Returns
    -------
    int
        How many times it was killed before it had ended.
    """
    draw, done = random.Random(seed), 0
    for at in sorted(draw.random() * 1.15 for _ in range(kills)):
        process = runs.start(command)
        # Later moments are in what follows the last record: the reports.
        deadline = time.monotonic() + 300
        while size_of(out) < min(at, 1.0) * whole and sent(process, 0):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(draw.random() * (0.05 if at < 1 else 0.6))
        sent(process, signal.SIGKILL)
        done += runs.ended() == signal.SIGKILL
    runs.start(command)
    assert runs.ended() == 0, runs.log.read_text()[-3000:]
    return done
