"""docs/vocabulary.md lists what is public, under one name everywhere."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import kvgeom
import kvgeom.paper
from kvgeom.cli.main import _parser
from kvgeom.evaluation.config import RunConfig

PAGE = (Path(__file__).parents[1] / "docs" / "vocabulary.md").read_text(encoding="utf-8")
SCHEMA = json.loads(files("kvgeom.report").joinpath("audit.schema.json").read_text())
#: Options whose two names differ, because one says the contrary or names its object.
DIFFERENT = {("progress", "--quiet"), ("kind", "--judge-kind")}


def rows(title: str) -> list[list[str]]:
    part = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    table = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table]


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = [each for each in _parser()._actions if isinstance(each, argparse._SubParsersAction)]
    return dict(found.choices)


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Of a command and of those below it."""
    found: list[argparse.Action] = []
    for action in parser._actions:
        below = action.choices.values() if isinstance(action, argparse._SubParsersAction) else ()
        found += [each for one in below for each in options(one)] if below else [action]
    return found


def functions() -> dict[str, Any]:
    return {name: each for name in kvgeom.__all__ if inspect.isfunction(each := getattr(kvgeom, name))}


def test_every_function_and_command_is_listed() -> None:
    table = rows("Functions")
    assert {row[0] for row in table if row[0]} == {f"kvgeom.{name}" for name in functions()}
    assert {row[1] for row in table if row[1]} == {f"kvgeom {name}" for name in commands()}


def test_every_result_that_can_be_loaded_is_listed() -> None:
    classes = {name for name in kvgeom.__all__ if inspect.isclass(getattr(kvgeom, name))}
    loadable = {name for name in classes if hasattr(getattr(kvgeom, name), "load")}
    table = rows("Results")
    assert {row[0] for row in table} == {f"kvgeom.{name}" for name in loadable}
    for python, made_by, _ in table:
        owner, _, function = made_by.removeprefix("kvgeom.").rpartition(".")
        maker = getattr(getattr(kvgeom, owner) if owner else kvgeom, function)
        assert inspect.signature(maker).return_annotation == python.removeprefix("kvgeom.")


def test_every_keyword_is_listed() -> None:
    listed = {row[0] for row in rows("Options")} - {""}
    public = {
        each.name
        for function in (*functions().values(), kvgeom.paper.advbench_main)
        for each in inspect.signature(function).parameters.values()
        if each.kind is not each.VAR_KEYWORD
    }
    assert listed == public | {each.name for each in dataclasses.fields(RunConfig)}


def test_every_option_of_a_command_is_listed() -> None:
    listed = {row[1] for row in rows("Options")} - {""}
    public = {
        action.option_strings[0] if action.option_strings else action.metavar
        for command in commands().values()
        for action in options(command)
    }
    assert listed == public - {"-h"}


def test_a_keyword_and_its_option_have_one_name() -> None:
    for python, option, _, _ in rows("Options"):
        if python and option and (python, option) not in DIFFERENT:
            assert option.lower().removeprefix("--").replace("-", "_") == python


def test_every_json_field_is_in_the_schema() -> None:
    for python, _, path, _ in rows("Options"):
        schema = SCHEMA
        for part in path.split(".") if path else ():
            schema = schema["properties"][part.removesuffix("[]")]
            schema = schema["items"] if part.endswith("[]") else schema
        if path and python not in ("scan_bits", "geometry"):
            assert re.split(r"\W+", path)[-1] == python


def test_a_word_is_listed_once() -> None:
    for title, columns in (("Functions", (0, 1)), ("Results", (0,)), ("Options", (0, 1))):
        for column in columns:
            names = [row[column] for row in rows(title) if row[column]]
            assert len(names) == len(set(names))
