"""Runs that are killed and go on, and journals that are refused."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.errors import InputError, KvgeomWarning
from kvgeom.evaluation.baseline import baseline
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.evaluation.journal import FORMAT, Journal, NoJournal
from tests.builders.judges import CountingJudge
from tests.builders.recipes import recipes
from tests.builders.requests import REQUESTS as ALL_REQUESTS
from tests.builders.tiny import tiny_model

#: Fewer requests, which are evaluated many times.
REQUESTS = ALL_REQUESTS[:6]
TINY = {kind: tiny_model(kind, seed=1) for kind in ("qwen2", "llama")}


def test_nothing_is_done_twice(tmp_path: Path) -> None:
    model, options = tiny_model("qwen2", seed=1), {"judge": CountingJudge(), "max_new_tokens": 6, "progress": False}
    first = evaluate(model, recipes(3), REQUESTS, journal=tmp_path / "j", **options)  # type: ignore[arg-type]

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a pass was run although everything is known")

    model._run = refuse  # type: ignore[assignment,method-assign]
    again = evaluate(model, recipes(3), REQUESTS, journal=tmp_path / "j", **options)  # type: ignore[arg-type]
    assert again.data.identical(first.data)
    assert again.meta == first.meta


#: What is in the journals that are damaged.
ABOUT = {"model": "m", "fingerprint": "0" * 16}
VALUES: list[object] = [None, "déjà", [1, [2, {"a": 0.5}]], {"tokens": [3, 4]}, "x" * 300, '"}\\n{"key"', True]


def written(path: Path) -> bytes:
    """A journal with one record for each of the values."""
    with Journal(path, ABOUT) as journal:
        for number, value in enumerate(VALUES):
            journal[{"prompt": number}] = value
    return path.read_bytes()


damages = st.lists(
    st.tuples(
        st.sampled_from(["change", "cut out", "put in", "end"]), st.floats(0, 1), st.binary(min_size=1, max_size=40)
    ),
    min_size=1,
    max_size=4,
)


def damaged(whole: bytes, how: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, content in how:
        at = int(where * len(whole))
        after = {"change": len(content), "cut out": len(content), "put in": 0, "end": len(whole)}[kind]
        whole = whole[:at] + (b"" if kind in ("cut out", "end") else content) + whole[at + after :]
    return whole


@settings(max_examples=400)
@given(damages)
def test_of_a_damaged_journal_what_is_whole_is_kept(
    tmp_path_factory: pytest.TempPathFactory, how: list[tuple[str, float, bytes]]
) -> None:
    """Nothing that was not written is ever read, every line that is as it was is, and the rest is said and kept."""
    path = tmp_path_factory.mktemp("journal") / "j"
    whole = written(path)
    header, *lines = whole.splitlines(keepends=True)
    content = damaged(whole, how)
    path.write_bytes(content)
    there = io.BytesIO(content).readlines()
    unharmed = {number for number, line in enumerate(lines) if line in there[1:]}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            journal = Journal(path, ABOUT)
        except InputError:
            assert header not in there[:1]
            assert not unharmed
            assert path.read_bytes() == content
            return
    copies = sorted(path.parent.glob("j.damaged*"))
    for number, value in enumerate(VALUES):
        key = {"prompt": number}
        assert (key in journal) >= (number in unharmed)
        if key in journal:
            assert journal[key] == value
        journal.remember(key, lambda value=value: value)  # type: ignore[misc]
    journal.close()
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert [copy.read_bytes() for copy in copies] == ([content] if said else [])
    # Unsaid is only what a killed run leaves: a last line that is not whole; and lines that are gone, or twice there.
    if not said:
        assert there[:1] == [header] or header.startswith(content)
        assert all(line in (*lines, header) for line in there[1:-1])


def test_a_run_that_is_killed_as_it_mends_loses_nothing(tmp_path: Path) -> None:
    path, count = tmp_path / "j", 2000
    with Journal(path, ABOUT) as journal:
        for number in range(count):
            journal[{"prompt": number}] = "x" * (number % 50)
    content = path.read_bytes().replace(b'"prompt": 7}', b'"prompt": 8}')
    for moment in range(10):
        path.write_bytes(content)
        pid = os.fork()
        if pid == 0:
            warnings.simplefilter("ignore")
            Journal(path, ABOUT).close()
            os._exit(0)
        time.sleep(0.01 * moment)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Journal(path, ABOUT) as journal:
                assert journal.known == count - 1
                assert all(journal[{"prompt": n}] == "x" * (n % 50) for n in range(count) if n != 7)


def test_one_holds_a_journal_at_a_time(tmp_path: Path) -> None:
    """Processes that open and close one journal as fast as they can: each marks that it holds it, and finds no mark."""
    path, mark, children = tmp_path / "j", tmp_path / "mark", []
    for child in range(4):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                held = 0
                while held < 60:
                    try:
                        journal = Journal(path, ABOUT)
                    except InputError:
                        continue
                    os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
                    journal[{"child": child, "prompt": held}] = held
                    os.unlink(mark)
                    journal.close()
                    held += 1
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    with Journal(path, ABOUT) as journal:
        assert journal.known == 240


def test_who_holds_a_journal_is_said(tmp_path: Path) -> None:
    """A cell of a notebook that is run again finds the journal of its first run."""
    with Journal(tmp_path / "j", ABOUT), pytest.raises(InputError, match=r"in use by this process: close\(\)"):
        Journal(tmp_path / "j", ABOUT)
    Journal(tmp_path / "j", ABOUT).close()


def test_where_files_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems: that is said, and the work goes on."""

    def locks_nothing(_file: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("kvgeom.evaluation.journal._lock", locks_nothing)
    with (
        pytest.warns(KvgeomWarning, match=r"locks no files .*let no other run use it"),
        Journal(tmp_path / "j", ABOUT) as journal,
    ):
        journal[{"a": 1}] = 2
    assert (tmp_path / "j").stat().st_size


@settings(max_examples=12)
@given(st.data())
def test_cut_off_anywhere(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """However much of the file is left, going on gives the whole result."""
    path = tmp_path_factory.mktemp("journal") / "j"
    model, options = TINY["qwen2"], {"judge": CountingJudge(), "max_new_tokens": 6, "progress": False}
    asked = REQUESTS[:2]
    first = evaluate(model, recipes(3), asked, journal=path, **options)  # type: ignore[arg-type]
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    again = evaluate(model, recipes(3), asked, journal=path, **options)  # type: ignore[arg-type]
    assert again.data.identical(first.data)


def test_killed_and_run_again(tmp_path: Path) -> None:
    """A real process, a real SIGKILL in the middle of the work."""
    path, model = tmp_path / "j", tiny_model("qwen2", seed=1)
    options: dict[str, Any] = {"judge": CountingJudge(), "max_new_tokens": 6, "progress": False}
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the parent's threads are not in the child
        as_it_is = model._run

        def slow(*args: Any, **more: Any) -> Any:
            time.sleep(0.03)
            return as_it_is(*args, **more)

        model._run = slow  # type: ignore[method-assign]
        evaluate(model, recipes(3), REQUESTS, journal=path, **options)
        os._exit(0)
    deadline = time.monotonic() + 120
    while not path.exists() or len(path.read_bytes().splitlines()) < 12:
        assert time.monotonic() < deadline
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    resumed = evaluate(model, recipes(3), REQUESTS, journal=path, **options)
    assert path.read_bytes().startswith(b"".join(lines))
    keys = [json.dumps(json.loads(line)["key"]) for line in path.read_bytes().splitlines()[1:]]
    assert len(keys) == len(set(keys))
    straight = evaluate(model, recipes(3), REQUESTS, **options)
    assert (resumed.data.label.values == straight.data.label.values).all()
    assert (resumed.data.text.values == straight.data.text.values).all()
    np.testing.assert_allclose(resumed.data.margin.values, straight.data.margin.values, atol=1e-4)


def test_another_journal_is_refused(tmp_path: Path) -> None:
    model, path = TINY["qwen2"], tmp_path / "j"
    evaluate(model, recipes(3), REQUESTS[:2], journal=path, max_new_tokens=2, progress=False)
    before = path.read_bytes()
    for other, asked, length, what in (
        (TINY["llama"], REQUESTS[:2], 2, "model"),
        (model, REQUESTS[:3], 2, "prompts"),
        (model, REQUESTS[:2], 3, "max_new_tokens"),
    ):
        with pytest.raises(InputError, match=f"about something else.*{what}"):
            evaluate(other, recipes(3), asked, journal=path, max_new_tokens=length, progress=False)
    with pytest.raises(InputError, match="judge"):
        evaluate(model, recipes(3), REQUESTS[:2], journal=path, judge=CountingJudge(), max_new_tokens=2, progress=False)
    assert path.read_bytes() == before
    header = json.loads(before.splitlines()[0])
    header["versions"]["kvgeom"] = "0.0.0"
    path.write_bytes(json.dumps(header).encode() + b"\n")
    with pytest.raises(InputError, match="versions"):
        evaluate(model, recipes(3), REQUESTS[:2], journal=path, max_new_tokens=2, progress=False)
    for number, text in enumerate(("[" * 100_000, '{"a":' * 100_000, "\x00" * 5000, "[1]\n" * 1000, "{}", "null\n")):
        (tmp_path / f"{number}").write_text(text)
        with pytest.raises(InputError, match=r"(not a journal|about something else)"):
            Journal(tmp_path / f"{number}", {"a": 1})
        assert (tmp_path / f"{number}").read_text() == text
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null"), tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(InputError):
            Journal(path, {"a": 1})
    (tmp_path / "poem").write_text("roses are red\n")
    with pytest.raises(InputError, match="poem is not a journal"):
        baseline(model, ["a"], journal=tmp_path / "poem", progress=False)
    assert (tmp_path / "poem").read_text() == "roses are red\n"
    with Journal(tmp_path / "open", {"a": 1}), pytest.raises(InputError, match="in use"):
        Journal(tmp_path / "open", {"a": 1})


def test_a_journal_of_format_1_is_refused(tmp_path: Path) -> None:
    """Its entries had lists for keys: none of them would be found, and all would be measured again."""
    path = tmp_path / "j"
    lines = [{"kvgeom_journal": 1, "a": 1}, {"key": ["baseline", 0], "value": {"tokens": [1]}}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = path.read_bytes()
    with pytest.raises(InputError, match="format 1"):
        Journal(path, {"a": 1})
    with pytest.raises(InputError, match="format 1"):
        baseline(TINY["qwen2"], REQUESTS[:1], journal=path, progress=False)
    assert path.read_bytes() == before


def test_a_journal_is_taken_up_again(tmp_path: Path) -> None:
    path, about = tmp_path / "j", {"a": 1}
    one, two, three = ({"measure": name, "prompt": n} for n, name in enumerate(("one", "two", "three"), 1))
    journal = Journal(path, about)
    journal[one] = [1]
    journal.reopen()  # it never was closed
    assert journal[{"prompt": 1, "measure": "one"}] == [1]  # a key is its fields, in any order
    journal.close()
    with Journal(path, about) as other:
        other[two] = [2]
        with pytest.raises(InputError, match="in use"):
            journal.reopen()
    journal.reopen()
    assert (journal[one], journal[two]) == ([1], [2])
    journal[three] = [3]
    with pytest.raises(InputError, match="in use"):
        Journal(path, about)
    journal.close()
    with Journal(path, about) as again:
        assert again.known == 3
    path.unlink()
    journal.reopen()
    assert journal.known == 0  # what is no longer in the file is measured again
    assert journal.remember(one, lambda: [4]) == [4]
    journal.close()
    path.write_text(json.dumps({"kvgeom_journal": FORMAT, "a": 2}) + "\n")
    with pytest.raises(InputError, match="about something else"):
        journal.reopen()
    nothing = NoJournal()
    nothing[one] = [1]
    assert one not in nothing
    nothing.close()
    nothing.reopen()
