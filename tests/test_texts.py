"""Texts that users give beside prompts, for perplexity and as chat templates: read whole, or refused before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvgeom
from kvgeom.cli import main, options
from kvgeom.cli.main import _parser
from kvgeom.errors import InputError
from kvgeom.evaluation.config import RunConfig
from kvgeom.models.hf import HFModel
from kvgeom.paths import LARGEST_TEXT, read_text
from tests.builders.tiny import tiny_hf_model, tiny_tokenizer

TEMPLATE = "Q: {{ messages[0].content }}\nA:"


def holding(content: bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / "given.txt").write_bytes(content)
        return str(folder / "given.txt")

    return write


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe.txt")
    return str(folder / "pipe.txt")


def large(folder: Path) -> str:
    with (folder / "large.txt").open("wb") as file:
        file.truncate(LARGEST_TEXT + 1)  # takes no room on the disk
    return str(folder / "large.txt")


#: What options that name a file of text are given, and what is said of it.
NO_TEXT: dict[str, tuple[Callable[[Path], str], str]] = {
    "nothing": (lambda folder: "", ""),
    "an empty file": (holding(b""), "given.txt"),
    "blanks": (holding(b" \r\n\t\n"), "given.txt"),
    "a mark alone": (holding(b"\xff\xfe"), "given.txt"),
    "binary": (holding(b"GGUF\x03\0\0\0\x1f\0{{}}"), "NUL at byte 5"),
    "another encoding": (holding(b"a\n{{ \xe9"), "line 2 of "),
    "a pipe": (pipe, "a pipe or a device"),
    "a device": (lambda folder: "/dev/zero", "/dev/zero"),
    "a large file": (large, "MiB"),
    "a folder": (str, ""),
    "a missing file": (lambda folder: str(folder / "my folder" / "none.txt"), "no such file"),
    "a long name": (lambda folder: "x" * 5000, ""),
    "a file in a file": (lambda folder: "/dev/null/x", "no such file"),
    "nobody's file": (lambda folder: "~nouser-of-this-name/t.txt", "home folder of nobody"),
    "NUL in a name": (lambda folder: "a\0b", "must be a path"),
    "half a character": (lambda folder: "\ud800", "must be a path"),
}


@pytest.mark.parametrize("option", ["--text", "--template", "--prompts"])
@pytest.mark.parametrize("kind", NO_TEXT)
def test_a_file_that_holds_no_text_is_one_line_and_status_2(
    kind: str, option: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, says = NO_TEXT[kind]
    asked = ["sweep", str(checkpoint), "--quiet", "--limit", "1", "--bits", "4", "--max-new-tokens", "1"]
    assert main([*asked, f"{option}={name(tmp_path)}"]) == 2
    found = capsys.readouterr()
    assert found.err.startswith("kvgeom: ")
    assert found.err.count("\n") == 1
    assert len(found.err) < 600
    assert says in found.err
    assert not found.out


def test_a_text_is_the_same_whatever_wrote_it(tmp_path: Path) -> None:
    """Ends of lines, and marks at the beginning, are the system's."""
    wanted = "Clouds are made of water.\n\nSo is é.\n"
    windows = wanted.replace("\n", "\r\n")
    for content in (wanted.encode(), windows.encode("utf-8-sig"), windows.encode("utf-16")):
        arguments = _parser().parse_args(["sweep", "demo", "--text", holding(content)(tmp_path)])
        assert options.run_options(arguments, None)["text"] == wanted


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_texts_are_read_as_they_are(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "text.txt"
    for encoding, mark in (("utf-8", b""), ("utf-8-sig", b""), ("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")):
        file.write_bytes(mark + text.encode(encoding))
        assert read_text(file) == (text.removeprefix("\ufeff") if encoding == "utf-8" else text)


@pytest.mark.parametrize("text", ["", " \n", 3, b"text", ["text"], "\ud800", float("nan")], ids=repr)
def test_a_text_in_python(text: Any) -> None:
    with pytest.raises(InputError, match="text"):
        RunConfig.from_options({"text": text})
    with pytest.raises(InputError, match="template"):
        HFModel(tiny_hf_model(), tiny_tokenizer(), name="x", template=text)
    with pytest.raises(InputError, match="template"):
        kvgeom.load(tiny_hf_model(), tokenizer=tiny_tokenizer(), template=text)


def test_a_template_is_a_text_or_a_file(tmp_path: Path) -> None:
    """A path is a file though it looks like Jinja, and a template of one's own replaces that of the model."""
    file = tmp_path / "{mine}.jinja"
    file.write_bytes(TEMPLATE.encode("utf-16"))
    for given_as in (TEMPLATE, file):
        model = kvgeom.load(tiny_hf_model(), tokenizer=tiny_tokenizer(), template=given_as)
        assert model.template == TEMPLATE


@pytest.mark.parametrize("told", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, '{"a": NaN}', "[]", "", "x" * 5000])
def test_options_of_a_template_that_are_no_json(told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "/nowhere", "--quiet", "--template-options", told]) == 2
    found = capsys.readouterr().err
    assert found.count("\n") == 1
    assert "template" in found
    assert len(found) < 600
