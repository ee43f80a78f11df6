"""What kvgeom keeps: who may read it, what damaged or full disks do to it, and what a killed run leaves."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import kvgeom
from kvgeom.cli import main
from kvgeom.diagnosis.diagnose import Diagnosis
from kvgeom.errors import InputError
from kvgeom.evaluation.journal import Journal
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.models.edits import copied, transform_values
from kvgeom.paths import write_whole
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.serialization import load_recipe, save_recipe
from kvgeom.report.fix import Fix
from kvgeom.report.folder import settings_in
from kvgeom.results import Result
from kvgeom.sealed import write_sealed
from tests.builders.damage import anything, places
from tests.builders.killed import Runs, killed_and_run, size_of
from tests.builders.tiny import tiny_model


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class Table(Result):
    kind = "table of what is kept"


def table() -> Table:
    text = np.array(["a", "déjà", ""], dtype=object)
    data = xr.Dataset({"x": ("n", np.arange(3.0)), "t": ("n", text)}, coords={"n": [1, 2, 3]})
    return Table(data, {"model": "m", "nested": [1, {"a": None}]})


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o022])
def test_files_are_no_wider_than_the_umask(mask: int, tmp_path: Path) -> None:
    with umask(mask):
        write_whole(tmp_path / "report", "x")
        table().save(tmp_path / "t.nc")
        save_recipe(tmp_path / "r.json", Recipe.uniform(2, "int4-asym-token"))
        with Journal(tmp_path / "j", {"a": 1}) as journal:
            journal[{"b": 1}] = 2
        (tmp_path / "j").write_bytes((tmp_path / "j").read_bytes().replace(b'"b"', b'"c"'))
        with pytest.warns(UserWarning, match="damaged"):
            Journal(tmp_path / "j", {"a": 1}).close()
    assert {path.name: mode(path) for path in tmp_path.iterdir()} == dict.fromkeys(
        ("report", "t.nc", "r.json", "j", "j.damaged"), 0o666 & ~mask
    )
    with umask(0o022):
        (tmp_path / "report").chmod(0o600)
        write_whole(tmp_path / "report", "y")
    assert mode(tmp_path / "report") == 0o600 & 0o666


# --- results ---


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    table().save(tmp_path / "whole.nc")
    (tmp_path / "link.nc").symlink_to(tmp_path / "whole.nc")
    other = Table(table().data.assign(x=("n", np.arange(3.0) + 1)), {})
    assert other.save(tmp_path / "link.nc") == tmp_path / "link.nc"
    assert (tmp_path / "link.nc").is_symlink()
    assert Table.load(tmp_path / "whole.nc").data.identical(other.data)
    (tmp_path / "loop.nc").symlink_to(tmp_path / "loop.nc")
    with pytest.raises(InputError, match=r"loop\.nc"):
        other.save(tmp_path / "loop.nc")


damages = st.tuples(
    st.sampled_from(["change", "cut", "put in", "add"]), st.floats(0, 1), st.binary(min_size=1, max_size=64)
)


@settings(max_examples=250)
@given(st.lists(damages, min_size=1, max_size=3))
def test_a_damaged_result_is_refused(tmp_path_factory: pytest.TempPathFactory, how: list[Any]) -> None:
    path = tmp_path_factory.mktemp("result") / "t.nc"
    whole = table().save(path).read_bytes()
    content = whole
    for kind, where, new in how:
        at = int(where * len(content))
        content = {
            "change": content[:at] + new + content[at + len(new) :],
            "cut": content[:at],
            "put in": content[:at] + new + content[at:],
            "add": content + new,
        }[kind]
    path.write_bytes(content)
    if content == whole:
        xr.testing.assert_identical(Table.load(path).data, table().data)
        return
    for kind in (Table, Result, Outcomes, Diagnosis):
        with pytest.raises(InputError):
            kind.load(path)  # type: ignore[attr-defined]


def test_a_sealed_file_that_is_no_result(tmp_path: Path) -> None:
    data = table().data
    for number, attrs in enumerate(
        (
            {},
            {"kvgeom_kind": Table.kind, "kvgeom_meta": "{"},
            {"kvgeom_kind": Table.kind, "kvgeom_meta": "[" * 100_000},
            {"kvgeom_kind": Table.kind, "kvgeom_text": '["nothing"]'},
            {"kvgeom_kind": "diagnosis"},
            {"kvgeom_kind": "diagnosis", "parts": ["curve"]},
            {"kvgeom_kind": 3},
        )
    ):
        path = tmp_path / f"{number}.nc"
        data.assign_attrs(attrs).to_netcdf(path, engine="h5netcdf")
        write_sealed(path, path.read_bytes())
        with pytest.raises(InputError, match="cannot load"):
            Result.load(path)
    write_sealed(path, b"no NetCDF")
    os.mkfifo(tmp_path / "pipe")
    for wrong in (path, tmp_path, tmp_path / "pipe", "/dev/zero", tmp_path / ("x" * 300), "a\0b", 3):
        with pytest.raises(InputError):
            Result.load(wrong)  # type: ignore[arg-type]


def test_other_readers_of_netcdf_read_results(tmp_path: Path) -> None:
    with xr.open_dataset(table().save(tmp_path / "t.nc"), engine="h5netcdf") as read:
        assert read.x.values.tolist() == [0, 1, 2]


# --- recipes and settings ---


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_recipe_is_refused_or_is_another(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("recipe") / "r.json"
    save_recipe(path, Recipe.uniform(2, "int4-asym-token").keep([0]))
    record = json.loads(path.read_text())
    holder, key = data.draw(st.sampled_from([*places(record)]))
    holder[key] = data.draw(anything)
    path.write_text(json.dumps(record))
    try:
        recipe, placement = load_recipe(path)
    except InputError:
        return
    save_recipe(path, recipe, placement)
    assert load_recipe(path) == (recipe, placement)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "null", '{"settings": 3}', '{"settings": [1]}', "[" * 100_000, "{", "\x00", '{"settings": NaN}'],
)
def test_settings_that_are_no_settings(
    text: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an earlier run, with which the new ones are compared; and of a fix that is read."""
    for command in ("audit", "fix"):
        (tmp_path / f"{command}.json").write_text(text)
        assert settings_in(tmp_path, command) == {}
    with pytest.raises(InputError, match="cannot load a fix"):
        Fix.load(tmp_path)


# --- full disks ---


def test_a_full_terminal_loses_no_table(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    asked = ["--out", str(tmp_path), "--limit", "2", "--max-new-tokens", "2", "--bits", "3", "--quiet"]
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["sweep", str(checkpoint), *asked]) == 2
        monkeypatch.undo()
    assert (tmp_path / "sweep.txt").read_text()


# --- what a killed run leaves ---


def test_recordings_end_with_their_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        import tempfile

        tempfile.tempdir = None
        space = kvgeom.subspace(tiny_model("qwen2"), kvgeom.calibration().take(3), progress=False)
        kept = space.source.activations._kept
        os.write(writing, f"{len(kept)} {[path.name for path in tmp_path.iterdir()]}".encode())
        time.sleep(600)
    try:
        assert os.read(reading, 100) == b"6 []"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not list(tmp_path.iterdir())


#: A command, and its files that are compared, without what differs from run to run.
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "sweep": (["--bits", "4", "3", "2"], ["sweep.txt"]),
    "diagnose": (["--bits", "4", "2", "--scan-bits", "3"], ["diagnose.txt"]),
    "scan": (["--scan-bits", "3"], ["scan.txt"]),
    "audit": (["--bits", "4", "2", "--scan-bits", "3"], ["audit.json"]),
    "fix": (["--bits", "3", "--scheme", "sym-tensor", "--memory", "0.2", "--controls", "1"], ["plan.json", "fix.json"]),
}


def held(path: Path) -> Any:
    if path.suffix == ".txt":
        return path.read_text()
    passing = ("seconds", "created")

    def lasting(found: Any) -> Any:
        if isinstance(found, dict):
            return {key: lasting(value) for key, value in found.items() if key not in passing}
        return [lasting(value) for value in found] if isinstance(found, list) else found

    return lasting(json.loads(path.read_text()))


def killed_run_is_the_same(
    command: str, checkpoint: Path, folder: Path, kills: int, more: list[str], seed: int
) -> None:
    """Undisturbed, and killed: the same tables and reports, and every record once."""
    options, files = COMMANDS[command]

    def asked(out: Path) -> list[str]:
        return [command, str(checkpoint), "--out", str(out), "--quiet", *options, *more]

    whole, out = folder / "whole", folder / "killed"
    with Runs(folder / "log") as runs:
        runs.start(asked(whole))
        assert runs.ended() == 0, runs.log.read_text()[-3000:]
        done = killed_and_run(runs, asked(out), out, size_of(whole), kills, seed)
    assert done >= kills // 2
    for file in files:
        assert held(out / file) == held(whole / file)
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
        path.name for path in whole.iterdir()
    }
    for journal in whole.glob("*.jsonl"):
        found = [(each / journal.name).read_text().splitlines() for each in (whole, out)]
        assert sorted(found[0]) == sorted(found[1])
    log = runs.log.read_text()
    assert "Traceback" not in log
    assert "damaged" not in log


@pytest.mark.slow
def test_a_sweep_that_is_killed_ten_times_is_the_same(checkpoint: Path, tmp_path: Path) -> None:
    killed_run_is_the_same(
        "sweep", checkpoint, tmp_path, 10, ["--limit", "4", "--max-new-tokens", "4"], random.randrange(2**32)
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_are_killed_fifty_times_are_the_same(command: str, tmp_path: Path, trained: Any) -> None:
    from kvgeom.organisms import Size

    # Refusals must be there to be lost. A planted constant is taken back by biases that a checkpoint of this type cannot hold (load
    # refuses it), a channel that is scaled by the weights themselves.
    model = copied(trained)
    for head in range(model.geometry.kv_heads):
        transform_values(model, 1, head, torch.diag(torch.tensor([1000.0] + [1.0] * (model.geometry.head_dim - 1))))
    model.hf_model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    sets = {}
    for name, prompts in (("choose", Size(3).prompts()), ("prove", Size(3).prompts("train"))):
        rows = [{"prompt": p, "label": label} for label in ("harmful", "harmless") for p in getattr(prompts, label)]
        sets[name] = tmp_path / f"{name}.jsonl"
        sets[name].write_text("\n".join(map(json.dumps, rows)))
    more = ["--prompts", str(sets["choose"]), "--limit", "6", "--max-new-tokens", "12"]
    more += ["--verify-prompts", str(sets["prove"])] if command == "fix" else []
    killed_run_is_the_same(command, tmp_path / "model", tmp_path, 50, more, random.randrange(2**32))


@pytest.mark.slow
def test_of_two_runs_in_one_folder_the_second_says_so(checkpoint: Path, tmp_path: Path) -> None:
    asked = [
        "sweep",
        str(checkpoint),
        "--out",
        str(tmp_path / "o"),
        "--limit",
        "2",
        "--max-new-tokens",
        "40",
        "--bits",
        "4",
        "3",
    ]
    with Runs(tmp_path / "log") as first, Runs(tmp_path / "other log") as second:
        first.start([*asked, "--quiet"])
        deadline = time.monotonic() + 120
        while not size_of(tmp_path / "o") and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(running := first.started[-1], signal.SIGSTOP)  # it holds the journal, however fast it is
        try:
            second.start([*asked, "--quiet"])
            assert os.waitstatus_to_exitcode(second.ended()) == 2
        finally:
            os.kill(running, signal.SIGCONT)
        assert first.ended() == 0
    said = second.log.read_text()
    assert said.startswith(f"kvgeom: journal {tmp_path / 'o' / 'journal.jsonl'} is in use by another run")
    assert said.count("\n") == 1
    assert (tmp_path / "o" / "sweep.txt").read_text()
