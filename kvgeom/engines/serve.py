"""Running servers: an engine on the loopback interface for as long as a ``with`` block lasts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kvgeom.checks import as_path, suggests, whole
from kvgeom.engines import supervisor
from kvgeom.engines.runner import Launch
from kvgeom.engines.spec import ServerSpec, parse_spec
from kvgeom.errors import ServerError
from kvgeom.paths import not_written

HOST = "127.0.0.1"
#: Lines of the log of a server that died, in the error.
LAST_LINES = 3
#: Characters of a log that are looked at.
_READ = 1 << 20
#: Seconds between two questions whether a server is ready.
_PAUSE = 0.2


@dataclass(frozen=True)
class Server:
    """A server that runs; made by :func:`serve`.

    Attributes
    ----------
    spec : ServerSpec
    url : str
        Base of its OpenAI-compatible interface.
    model : str
        What it calls the model.
    version : str
        Of the engine.
    log : Path
        All that it has printed.
    stated : mapping of str to str
        What it says itself that its cache is, of the options of its spec; empty where it says nothing.
    pid : int
        Of the process that watches over it.
    """

    spec: ServerSpec
    url: str
    model: str
    version: str
    log: Path
    stated: Mapping[str, str]
    pid: int


@contextmanager
@suggests()
def serve(
    spec: str | ServerSpec,
    *,
    python: str | Path | None = None,
    log: str | Path | None = None,
    timeout: int = 600,
) -> Iterator[Server]:
    """Start a server, and stop it at the end of the ``with`` block, or when this process ends, however it does.

    Parameters
    ----------
    spec : str or ServerSpec
        For instance ``"llamacpp:demo?k=q4_0&v=q4_0"``; see :func:`~kvgeom.engines.spec.parse_spec`.
    python : str or Path, optional
        Interpreter that has the engine, as engines disagree about what they need; by default that of the spec, this one, or that of
        the engine's folder in ``$KVGEOM_ENGINES``.
    log : str or Path, optional
        File for what the server prints; one in the system's folder for temporary files by default. It is kept.
    timeout : int
        Seconds until it must be ready.

    Yields
    ------
    Server

    Raises
    ------
    InputError
        If the spec, the model or the interpreter cannot be used, or the engine is not installed.
    ServerError
        If the server ends before it is ready, is not ready in time, or has another cache than it was asked for.

    Examples
    --------
    ::

        with serve("llamacpp:demo?k=q8_0&v=q8_0", python="envs/llamacpp/bin/python") as server:
            print(server.url, server.stated)
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    whole("timeout", timeout, 1)
    runner = spec.runner
    found = runner.find(spec.model)
    interpreter, version = runner.interpreter(spec.engine.name, python or spec.python)
    path = _log_path(spec, log)
    threads = spec.threads or os.cpu_count() or 1
    launch = Launch(
        found, runner.name(spec.model, found), _free_port(), spec.cache, spec.context, spec.parallel, threads
    )
    environment = {**runner.environment(launch), **os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-P", supervisor.__file__, interpreter, *runner.command(launch)]
    url = f"http://{HOST}:{launch.port}/v1"
    try:
        out = path.open("ab")
    except OSError as error:
        raise not_written(path, error, "give another file") from error
    # What the log of another start says is not about this one.
    begin = out.tell()
    with out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            env=environment,
            cwd=tempfile.gettempdir(),
            start_new_session=True,
        )
    try:
        _wait(spec, launch, process, url, path, begin, timeout)
        stated = dict(runner.stated(launch, _text(path, begin)))
        _check(spec, stated)
        server = Server(spec, url, launch.name, version, path, stated, process.pid)
        try:
            yield server
        except ServerError as error:
            if not _ends(process):
                raise
            raise ServerError(f"{error}; {spec} has ended: {_last(_text(path, begin))}; its log is {path}") from error
    finally:
        _stop(process)


def _wait(
    spec: ServerSpec, launch: Launch, process: subprocess.Popen[bytes], url: str, log: Path, begin: int, timeout: int
) -> None:
    """Return when the server answers with its model's name."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if process.poll() is not None:
            said = _text(log, begin)
            hint = next((hint for text, hint in spec.runner.hints.items() if text in said), f"its log is {log}")
            raise ServerError(f"{spec} ended before it was ready: {_last(said) or 'it said nothing'}; {hint}")
        if launch.name in _models(url):
            return
        time.sleep(_PAUSE)
    raise ServerError(
        f"{spec} was not ready within {timeout} s: {_last(_text(log, begin))}; give it more time (timeout), or see its log {log}"
    )


def _models(url: str) -> list[str]:
    """Names of the models that a server has; none while it does not answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback goes through no proxy
    try:
        with opener.open(f"{url}/models", timeout=5) as answer:
            return [str(each["id"]) for each in json.load(answer)["data"]]
    except (OSError, ValueError, KeyError, TypeError, urllib.error.URLError):
        return []


def _check(spec: ServerSpec, stated: Mapping[str, str]) -> None:
    wrong = {name: value for name, value in stated.items() if spec.cache.get(name, value) != value}
    if wrong:
        says = ", ".join(f"{name}={value}" for name, value in wrong.items())
        raise ServerError(f"{spec} was started, and says that its cache is {says}; give a cache that it keeps")


def _ends(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended, or does within a second: a lost connection is noticed first."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
    return process.returncode is not None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the input of the supervisor, which stops the server; kill both if that takes too long."""
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()
    try:
        process.wait(supervisor.GRACE + 5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def _log_path(spec: ServerSpec, log: str | Path | None) -> Path:
    if log is not None:
        return as_path("log", log).absolute()
    handle, name = tempfile.mkstemp(prefix=f"kvgeom-{spec.engine.name}-", suffix=".log")
    os.close(handle)
    return Path(name)


def _text(log: Path, begin: int) -> str:
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - _READ))
        return file.read().decode(errors="replace")
    return ""


def _last(said: str) -> str:
    """The last lines of a log in one."""
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    return " | ".join(line[:200] for line in lines[-LAST_LINES:])
