"""Files that are in --out and that kvgeom did not write."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import kvgeom
from kvgeom.cli import main
from kvgeom.errors import InputError
from kvgeom.folders import check_replaceable
from kvgeom.sealed import write_sealed

REPORTS = {
    "audit": ["audit.json", "report.html", "audit.nc"],
    "fix": ["fix.json", "report.html", "plan.json", "diagnosis.nc", "verification.nc"],
    "paper": ["paper.json", "report.html", "a-model/faithful/seeds.csv", "models/faithful/seeds.md"],
    "gate": ["gate.json", "report.html", "gate.md", "junit.xml", "gate.sarif", "gate.nc"],
    **{name: [f"{name}.txt"] for name in ("sweep", "scan", "diagnose", "screen")},
}
MINE = '{"mine": "<html>kvgeom</html>"}\n'


def command(name: str, model: object, out: Path) -> list[str]:
    given = {"paper": ["run", "seeds", str(model)], "gate": ["http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1"]}
    return [name, *given.get(name, [str(model)]), "--out", str(out), "--quiet"]


def short(name: str, model: Path, out: Path) -> list[str]:
    return [*command(name, model, out), "--limit", "2", "--max-new-tokens", "2"]


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in REPORTS.items() for file in files])
def test_a_file_of_somebody_else_is_left_alone(
    name: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before the model is looked for, or a server asked."""
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(MINE)
    before = {*tmp_path.rglob("*")}
    assert main(command(name, tmp_path / "missing", tmp_path)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert file in said
    assert "another folder" in said
    assert path.read_text() == MINE
    assert {*tmp_path.rglob("*")} == before


def test_so_are_they_in_python(tmp_path: Path) -> None:
    for function, file in ((kvgeom.audit, "report.html"), (kvgeom.fix, "plan.json")):
        (tmp_path / file).write_text(MINE)
        with pytest.raises(InputError, match=rf"{file} would be replaced.*another folder"):
            function(tmp_path / "missing", tmp_path)
        (tmp_path / file).unlink()


@pytest.mark.parametrize("name", [pytest.param("audit", marks=pytest.mark.slow), "sweep"])
def test_what_kvgeom_wrote_is_replaced(
    name: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(short(name, checkpoint, tmp_path)) == 0
    assert main(short(name, checkpoint, tmp_path)) == 0
    (tmp_path / "journal.jsonl").unlink()
    expected = 0 if name == "audit" else 2  # a page says whose it is, plain text does not
    assert main(short(name, checkpoint, tmp_path)) == expected
    assert capsys.readouterr().err.count("sweep.txt would be replaced") == (name == "sweep")


def test_a_report_is_not_replaced_by_that_of_a_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fix.json").write_text("{}")
    assert main(command("gate", "", tmp_path)) == 2
    assert "holds the results of kvgeom fix" in capsys.readouterr().err
    (tmp_path / "fix.json").rename(tmp_path / "gate.json")
    assert main(command("audit", tmp_path / "missing", tmp_path)) == 2
    assert "holds the results of kvgeom gate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("report.html", b"<!doctype html>\n<title>kvgeom</title>"),
        ("audit.json", b"[]"),
        ("audit.json", b"[" * 5000),
        ("audit.json", json.dumps({"verdict": "guilty"}).encode()),
        ("paper.json", json.dumps([{"table": 1, "mode": 2, "prompt_set": 3}, {}]).encode()),
        ("audit.nc", b"CDF\x01 of somebody"),
        ("sweep.txt", b"my tables"),
    ],
    ids=str,
)
def test_what_is_not_ours(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        check_replaceable(tmp_path, ["absent.txt", name])


def test_what_is_no_regular_file_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    os.mkfifo(tmp_path / "audit.json")
    (tmp_path / "sweep.txt").symlink_to(tmp_path / "nowhere")
    for name in ("report.html", "audit.json", "sweep.txt"):
        with pytest.raises(InputError, match=name):
            check_replaceable(tmp_path, [name])


def test_what_is_ours(tmp_path: Path) -> None:
    def ours(name: str, content: Any) -> None:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        check_replaceable(tmp_path, [name])

    ours("report.html", "")
    ours("plan.json", {"plan_version": 1, "chosen": {}})
    write_sealed(tmp_path / "gate.nc", b"x")
    check_replaceable(tmp_path, ["gate.nc"])
    ours("sweep.txt", "beside a result")
