"""Whatever is written behind an option or in the place of the model ends in one short line, before a model is looked for."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from kvgeom.cli.main import COMMANDS, LONGEST, main

#: Names too long for a system, homes of nobody, what is no file, no number, no JSON, or not written in this alphabet.
NASTY = (
    *("a" * 5000, "x/" * 3000, "~nobody/x", "\udcff", "/dev/null/x", "/dev/zero", " ", "-1", "9" * 5000, "[]"),
    *("9" * 400, "asym-group1000000000", "asym-group" + "9" * 5000, "int4-asym-token@" + "0-999999," * 400 + "1"),
    *("minos=~nobody/x", "owner/"),
)
MISSING = "/no/such/model"


def options() -> list[tuple[str, str]]:
    """Every option of every command that takes something, and the model."""
    found = []
    for module in COMMANDS:
        command = argparse.ArgumentParser(add_help=False)
        module.add_options(command)
        taking = [each for each in command._actions if each.nargs != 0]
        found += [(module.NAME, each.option_strings[0] if each.option_strings else each.dest) for each in taking]
    return found


@pytest.mark.parametrize(("command", "option"), options())
def test_whatever_is_written_ends_in_one_short_line(
    command: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in NASTY:
        asked = [command, *([value] if not option.startswith("-") else [MISSING, option, value])]
        if option != "--out" and command != "schemes":
            asked += ["--out", "out"]
        try:
            status = main(asked)
        except SystemExit as ended:  # argparse
            status = int(ended.code or 0)
        said = capsys.readouterr().err.strip().splitlines()
        assert status == 2, (value[:40], said)
        assert len(said) == 1 or said[0].startswith("usage:"), (value[:40], said)
        assert len(said[-1]) < LONGEST + 100, (value[:40], len(said[-1]))
