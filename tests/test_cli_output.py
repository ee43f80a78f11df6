"""Where the command line shows what it finds: output that is closed, or that lacks a character."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kvgeom.cli import main


def short(command: str, checkpoint: Path, out: Path, *more: str) -> list[str]:
    """A command that ends within seconds."""
    asked = ["--out", str(out), "--limit", "2", "--max-new-tokens", "2", "--quiet", *more]
    return [command, str(checkpoint), *asked]


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as a shell runs it, where files can be closed."""
    return subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


KVGEOM = f"{shlex.quote(sys.executable)} -m kvgeom"


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (f"{KVGEOM} schemes >&-", 0),
        (f"{KVGEOM} --help >&-", 0),
        pytest.param(f"{KVGEOM} schemes 2>&-", 0, marks=pytest.mark.slow),
        (f"{KVGEOM} schemes >&- 2>&-", 0),
        (f"{KVGEOM} schemes --tokens 0 >&-", 2),
        pytest.param(f"{KVGEOM} schemes --tokens 0 2>&-", 2, marks=pytest.mark.slow),
        (f"{KVGEOM} schemes --tokens 0 >&- 2>&-", 2),
        (f"{KVGEOM} schemes --tokens x >&- 2>&-", 2),
        pytest.param(f"{KVGEOM} schemes 1</dev/null", 2, marks=pytest.mark.slow),
    ],
)
def test_output_that_is_closed(command: str, status: int) -> None:
    """The status says what was done; no error shows where nobody would look for results."""
    found = shell(command)
    assert found.returncode == status, found.stderr
    assert "Traceback" not in found.stderr
    assert found.stderr.count("\n") <= 1 + found.stderr.startswith("usage:")
    if "2>&-" in command and status:
        assert not found.stdout


@pytest.mark.slow
def test_what_is_found_is_kept_where_output_is_closed(checkpoint: Path, tmp_path: Path) -> None:
    asked = shlex.join(short("sweep", checkpoint, tmp_path, "--bits", "3"))
    found = shell(f"{KVGEOM} {asked} >&-")
    assert (found.returncode, found.stderr) == (0, "")
    kept = (tmp_path / "sweep.txt").read_text()
    assert "3" in kept
    again = shell(f"{KVGEOM} {asked}")
    assert kept.strip() in again.stdout
    assert json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("command", [pytest.param(each, marks=pytest.mark.slow) for each in ("audit", "sweep")])
def test_an_ascii_terminal_is_shown_escaped_names(command: str, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "a\u00e9"
    asked = shlex.join(short(command, checkpoint, out, "--bits", "3"))
    found = shell(f"{KVGEOM} {asked}", LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert (found.returncode, found.stderr) == (0, "")
    assert "\\" in found.stdout.splitlines()[-1]
    assert "a\u00e9" not in found.stdout
    assert [*out.iterdir()]


def test_streams_are_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stdout.errors, sys.stderr.errors
    assert main(["schemes"]) == 0
    assert (sys.stdout, sys.stdout.errors, sys.stderr.errors) == before
    assert "int4-asym-token" in capsys.readouterr().out
