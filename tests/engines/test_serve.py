"""Servers that kvgeom starts: they always stop, and what goes wrong is said."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvgeom.engines.registry import engines
from kvgeom.engines.serve import serve
from kvgeom.engines.spec import is_spec, parse_spec
from kvgeom.errors import InputError, KvgeomError, ServerError
from tests.builders.servers import OWNER, eventually, tiny_engine

STARTED = [engine for engine in engines() if engine.runner is not None]


def child_of(log: Path) -> int:
    return int(re.findall(r"child (\d+)", log.read_text())[-1])


def test_a_server_runs_as_long_as_its_block_and_its_children_end_with_it(tmp_path: Path) -> None:
    with serve(tiny_engine(), log=tmp_path / "log") as server:
        assert server.model == "tiny"
        assert psutil.pid_exists(child_of(server.log))
    assert not psutil.pid_exists(server.pid)
    assert eventually(lambda: not psutil.pid_exists(child_of(server.log)))
    assert "starting runs" in server.log.read_text()


def test_it_stops_where_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), serve(tiny_engine(), log=tmp_path / "log") as server:
        1 / 0  # noqa: B018
    assert not psutil.pid_exists(server.pid)
    assert eventually(lambda: not psutil.pid_exists(child_of(server.log)))


def test_it_stops_where_its_owner_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(log)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    child = child_of(log)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert eventually(lambda: not psutil.pid_exists(child))


def use_and_kill(log: Path) -> None:
    with serve(tiny_engine(), log=log) as server:
        (engine,) = psutil.Process(server.pid).children()
        engine.kill()
        raise ServerError("no answer")


def test_one_that_dies_while_it_is_used_is_said_to(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"no answer; tiny:tiny\?kv=auto has ended: .+; its log is .*log"):
        use_and_kill(tmp_path / "log")


def test_two_servers_have_two_ports() -> None:
    with serve(tiny_engine()) as one, serve(tiny_engine()) as other:
        assert one.url != other.url
        assert one.log != other.log


def test_one_that_dies_says_its_last_words_and_what_to_do(tmp_path: Path) -> None:
    begin = time.monotonic()
    with (
        pytest.raises(ServerError, match=r"ended before it was ready: .*the weights are gone; fetch them again"),
        serve(tiny_engine("dies"), log=tmp_path / "log"),
    ):
        pass
    assert time.monotonic() - begin < 30


def test_one_that_is_not_ready_in_time_is_stopped(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match="was not ready within 1 s: starting hangs; give it more time"),
        serve(tiny_engine("hangs"), log=tmp_path / "log", timeout=1),
    ):
        pass
    assert not [each for each in psutil.process_iter(["cmdline"]) if "hangs" in (each.info["cmdline"] or [])]


def test_one_that_has_another_cache_is_refused() -> None:
    with (
        pytest.raises(ServerError, match="says that its cache is kv=small"),
        serve(tiny_engine(stated={"kv": "small"})),
    ):
        pass


def test_an_engine_that_is_not_installed_names_what_installs_it() -> None:
    with (
        pytest.raises(InputError, match=r"has no nothing_of_the_kind; pip install nothing_of_the_kind==1.0"),
        serve(tiny_engine(module="nothing_of_the_kind")),
    ):
        pass


def test_an_interpreter_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no Python that runs"), serve(tiny_engine(), python=tmp_path / "python"):
        pass


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("demo", "is no server; give a URL, or an engine and a model such as llamacpp:demo"),
        ("vlm:demo", "unknown engine that kvgeom starts 'vlm'; did you mean 'vllm'"),
        ("kivi:demo", "unknown engine that kvgeom starts 'kivi'"),
        ("vllm:", "names no model; write vllm:MODEL"),
        ("vllm:demo?kv=fp8", "unknown kv of vllm 'fp8'; choose from auto, fp8_e4m3"),
        ("vllm:demo?vk=auto", "unknown option of vllm 'vk'; choose from kv, context"),
        ("llamacpp:demo?k", "cannot be read; write them as name=value, joined by &"),
        ("llamacpp:demo?k=q4_0&k=q8_0", "has an option twice"),
        ("llamacpp:demo?context=0", "context must be a whole number, 1 or more"),
        ("llamacpp:demo?context=-5", "context must be a whole number, 1 or more, got '-5'"),
        ("llamacpp:demo?threads=two", "threads must be a whole number"),
    ],
)
def test_a_spec_that_is_none_is_refused(text: str, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        parse_spec(text)


@given(st.data())
def test_a_spec_reads_back_as_it_is_written(data: st.DataObject) -> None:
    engine = data.draw(st.sampled_from(STARTED))
    caches = engine.runner.caches if engine.runner else {}
    cache = {name: data.draw(st.sampled_from(values)) for name, values in caches.items()}
    text = f"{engine.name}:some/model?{'&'.join(f'{name}={value}' for name, value in cache.items())}"
    assert str(parse_spec(text)) == text
    assert parse_spec(text).cache == cache


@given(st.text(max_size=60))
def test_whatever_is_written_is_a_spec_or_an_error(text: str) -> None:
    found = said = ""
    try:
        found = parse_spec(text).model
    except KvgeomError as error:
        said = str(error)
    assert bool(found) != bool(said)
    assert "\n" not in said


def test_urls_are_no_specs() -> None:
    assert not any(map(is_spec, ("http://a:1/v1", "HTTPS://b", "ftp://x")))
    assert is_spec("llamacpp:demo")


def test_a_model_that_an_engine_cannot_load_is_refused(tmp_path: Path) -> None:
    spec = parse_spec(f"llamacpp:{tmp_path}")
    with pytest.raises(InputError, match=r"loads a \.gguf file"), serve(spec):
        pass


def test_unquantized_is_the_first_of_every_cache() -> None:
    firsts = {
        engine.name: {values[0] for values in engine.runner.caches.values()} for engine in STARTED if engine.runner
    }
    assert firsts == {"llamacpp": {"f16"}, "vllm": {"auto"}, "mlx": {"16", "64"}, "transformers": {"exact"}}
