"""Runs that are killed and go on, and journals that are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import baseline
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.evaluation.journal import FORMAT, Journal, NoJournal
from kvgeom.evaluation.outcomes import Outcomes
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


@settings(max_examples=25)
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
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\n"
        "from kvgeom.evaluation.evaluate import evaluate\n"
        "from tests.builders.judges import CountingJudge\n"
        "from tests.builders.recipes import recipes\n"
        "from tests.builders.requests import REQUESTS\n"
        "from tests.builders.tiny import tiny_model\n"
        "model = tiny_model('qwen2', seed=1)\n"
        "slow = model._run\n"
        "def run(*a, **k):\n"
        "    time.sleep(0.03)\n"
        "    return slow(*a, **k)\n"
        "model._run = run\n"
        "out = evaluate(model, recipes(3), REQUESTS[:6], judge=CountingJudge(), max_new_tokens=6, progress=False,"
        " journal=sys.argv[1])\n"
        "out.save(sys.argv[2])\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(script), str(tmp_path / "j"), str(tmp_path / "out.nc")]
    process = subprocess.Popen(command, env=environment, cwd=root)
    deadline = time.monotonic() + 120
    while not (tmp_path / "j").exists() or len((tmp_path / "j").read_bytes().splitlines()) < 12:
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = [line for line in (tmp_path / "j").read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    subprocess.run(command, env=environment, cwd=root, check=True)
    assert (tmp_path / "j").read_bytes().startswith(b"".join(lines))
    keys = [json.dumps(json.loads(line)["key"]) for line in (tmp_path / "j").read_bytes().splitlines()[1:]]
    assert len(keys) == len(set(keys))
    straight = evaluate(TINY["qwen2"], recipes(3), REQUESTS, judge=CountingJudge(), max_new_tokens=6, progress=False)
    resumed = Outcomes.load(tmp_path / "out.nc")
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
    assert not (tmp_path / ".j.lock").exists()


def test_a_journal_is_taken_up_again(tmp_path: Path) -> None:
    path, about = tmp_path / "j", {"a": 1}
    one, two, three = ({"measure": name, "prompt": n} for n, name in enumerate(("one", "two", "three"), 1))
    journal = Journal(path, about)
    journal[one] = [1]
    journal.reopen()  # it never was closed
    assert journal[{"prompt": 1, "measure": "one"}] == [1]  # a key is its fields, in any order
    journal.close()
    assert not (tmp_path / ".j.lock").exists()
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
    assert not (tmp_path / ".j.lock").exists()
    nothing = NoJournal()
    nothing[one] = [1]
    assert one not in nothing
    nothing.close()
    nothing.reopen()
