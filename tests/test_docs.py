"""What the documentation shows works, and its links lead somewhere."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

import kvgeom
from benchmarks import certificate
from kvgeom.cli.main import _parser
from kvgeom.engines import registry
from kvgeom.engines.spec import parse_spec
from kvgeom.prompts import sets
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


@pytest.mark.parametrize("name", ["gate.md", "ci.md"])
def test_the_pages_on_the_gate_name_options_that_exist(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    (commands,) = [each for each in _parser()._actions if isinstance(each, argparse._SubParsersAction)]
    known = {option for action in commands.choices["gate"]._actions for option in action.option_strings}
    lines = [line for block in re.findall(r"```(?:yaml)?\n(.*?)```", text, re.S) for line in block.splitlines()]
    shown = {
        word
        for line in lines
        if "kvgeom gate" in line or line.strip().startswith(("--", '"llamacpp:'))
        for word in re.findall(r"--[a-z-]+", line)
    }
    assert shown <= known
    for spec in re.findall(r"(?:llamacpp|vllm):[^\s'\"`]+", "\n".join(lines)):
        assert parse_spec(spec).model


def test_the_jobs_of_pipelines_are_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(encoding="utf-8"), re.S)
    github, step, gitlab = map(yaml.safe_load, blocks)
    assert {"uses", "run"} & {*github["jobs"]["gate"]["steps"][0]}
    assert "kvgeom gate" in step[0]["run"]
    assert any("kvgeom gate" in line for line in gitlab["gate"]["script"])


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there, on the demo model, with fewer requests: all of them are the measurements of the README, and take hours."""
    pairs = sets._pairs
    monkeypatch.setattr(sets, "_pairs", lambda name: pairs(name).take(16))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in python_blocks(ROOT / "README.md"):
        exec(block, names)
    for folder in ("audit", "fix"):
        assert (tmp_path / folder / "report.html").is_file()


ROWS = json.loads(certificate.ROWS.read_text())


def test_the_certificate_is_the_one_that_was_measured() -> None:
    """What docs/organisms.md counts is drawn from the rows, and nothing else there counts organisms."""
    for page, text in certificate.pages(ROWS).items():
        assert text in page.read_text(encoding="utf-8"), f"run make certificate: {page.name} is not what the rows say"
    assert len(ROWS) >= 30


def test_the_diagnosis_is_calibrated() -> None:
    """Modes that are likely enough to be named are true in nine of ten cases, as far as so many organisms tell."""
    right, sure, p = certificate.calibration(ROWS)
    assert sure >= 20
    assert p >= 0.05, f"{right} of {sure}"
    assert certificate.calibration([{**row, "true": "conflicting"} for row in ROWS])[2] < 1e-9


def numbers(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, " ".join(text.split()))
    assert found, pattern
    return [int(each) for each in found.groups()]


def test_another_outcome_is_said_as_it_is() -> None:
    """One wrong name, with a fix where nothing can be fixed; one fix that does not work; nothing breaks."""
    rows = json.loads(json.dumps(ROWS))
    prescribed, works = numbers(r"prescribed for (\d+) organisms .*? in (\d+) \(", certificate.claims(rows))
    no_fix = numbers(r"has no fix \| (\d+) \| (\d+) \| (\d+) \| (\d+)", certificate.tables(rows))
    robust = next(row for row in rows if row["true"] == "robust")
    robust |= {"found": "mixed", "posterior": {"mixed": 1.0}}
    next(row for row in rows if (row.get("recovery") or {}).get(certificate.OURS))["recovery"][certificate.OURS] = 0.2
    named = [row for row in rows if row["found"] != "undetermined"]
    right = sum(row["found"] == row["true"] for row in named)
    lost = sum(row["found"] == "language lost" for row in named)
    for text in certificate.pages(rows).values():
        said = " ".join(text.split())
        assert f"a mode was named for {len(named)}, {right} rightly" in said
        assert "; 1 named mixed is robust" in said
        assert f"{lost} of them were called *language lost*" in said
        assert (
            f"A fix was prescribed for {prescribed + 1} organisms whose truth is known, and takes away more than half of the "
            f"loss in {works - 1}" in said
        )
        assert "; 1 of these organisms has no fix, which counts as one that does not work" in said
    assert no_fix[1:] == [0, 0, 0]
    assert f"| has no fix | {no_fix[0]} | 1 | 0 | 1 |" in certificate.tables(rows)
    for few in ([], rows[:1], [row for row in rows if row["true"] is None], [{**rows[0], "error": "not planted"}]):
        assert certificate.pages(few), "any outcome is said"


def test_messages_that_the_page_of_errors_quotes_are_those_of_the_code() -> None:
    """By their fixed parts; a message that is worded anew is worded anew there too."""
    source = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "kvgeom").rglob("*.py")))
    source = re.sub(r'["\']\s*\n\s*f?["\']', "", source)
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    quoted = [row.split("`")[1] for row in page.splitlines() if row.startswith("| `")]
    assert len(quoted) >= 15
    for message in quoted:
        for part in message.split("..."):
            assert part.strip() in source, message
