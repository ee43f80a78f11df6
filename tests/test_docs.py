"""What the documentation shows works, and its links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import kvgeom
from benchmarks import organisms
from kvgeom.engines import registry
from tests.builders.tiny import tiny_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8").replace("\n", " ")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.is_file(), target
        assert not anchor or anchor in anchors(other), target


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def test_the_page_on_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model instead of the demo."""
    monkeypatch.chdir(tmp_path)
    tiny = tiny_model("qwen2")
    monkeypatch.setattr(kvgeom, "load", lambda _: tiny)
    names: dict[str, object] = {}
    for block in python_blocks(ROOT / "docs" / "export.md"):
        exec(block, names)
    assert (tmp_path / "folded" / "model.safetensors").is_file()


def test_the_page_on_engines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a tiny model instead of the demo."""
    tiny = tiny_model("qwen2")
    monkeypatch.setattr(kvgeom, "load", lambda _: tiny)
    monkeypatch.setattr(registry, "_ENGINES", {engine.name: engine for engine in registry.engines()})
    names: dict[str, object] = {}
    for block in python_blocks(ROOT / "docs" / "engines.md"):
        exec(block, names)
    assert "ours-int4" in capsys.readouterr().out


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there, on the demo model."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in python_blocks(ROOT / "README.md"):
        exec(block, names)
    assert (tmp_path / "audit" / "report.html").is_file()


def test_the_certificate_is_the_one_that_was_measured() -> None:
    """The tables in docs/organisms.md are drawn from the rows beside them, and say what is claimed."""
    page = (ROOT / "docs" / "organisms.md").read_text()
    rows = json.loads((ROOT / "docs" / "organisms.json").read_text())
    assert f"<!-- certificate: begin -->\n{organisms.tables(rows)}\n<!-- certificate: end -->" in page
    assert len(rows) >= 30
    sure = [row for row in rows if row.get("true") is not None and max(row["posterior"].values()) >= 0.9]
    right = sum(max(row["posterior"], key=row["posterior"].get) == row["true"] for row in sure)
    assert right >= 0.9 * len(sure)
    named = [row for row in rows if row.get("found", "undetermined") != "undetermined"]
    assert all(row["found"] == row["true"] for row in named)
    assert f"All {len(named)} modes that were named are true" in page
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"Of {len(rows)} organisms it named a mode for {len(named)}, all of them rightly" in readme
