"""Tables in a folder: the command, its files, and how they read."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kvgeom.cli import main
from kvgeom.errors import InputError, ModelError
from kvgeom.evaluation import config
from kvgeom.folders import report_folder
from kvgeom.models.hf import HFModel
from kvgeom.paper import registry
from kvgeom.paper.layout import Grid, grid, latex
from kvgeom.paper.page import render
from kvgeom.paper.published import published
from kvgeom.paper.registry import tables
from kvgeom.paper.run import check_tables, read_folder, run_tables, slug
from kvgeom.paper.study import as_suite
from tests.builders.paper import ASKED, RUN, WIDE, study
from tests.builders.tiny import tiny_tokenizer

OPTIONS = {"prompts": ASKED, "judge": RUN.judge, "max_new_tokens": RUN.max_new_tokens, "progress": False}
RUN_ARGUMENTS = ["--max-new-tokens", "4", "--quiet"]


def named(name: str) -> HFModel:
    return HFModel(WIDE.hf_model, tiny_tokenizer(), name=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tables of two models, one of which is the paper's, by both protocols."""
    made = tmp_path_factory.mktemp("tables")
    for model in (named("Qwen/Qwen2.5-7B-Instruct"), named("<script>alert(1)</script> & co")):
        for label in ("pcr_framework", "advbench_main"):
            run_tables(label, model, made, mode="both", **OPTIONS)
    return made


def test_every_table_is_written_four_times(folder: Path) -> None:
    found = read_folder(folder)
    assert len(found) == 8
    for table in found:
        place = folder / slug(table.meta["model"]) / table.meta["mode"]
        name = table.meta["table"]
        assert {path.suffix for path in place.glob(f"{name}.*")} == {".nc", ".csv", ".md", ".tex"}
        with (place / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        frame = table.to_frame()
        assert [row["source"] for row in rows] == frame.source.tolist()
        assert len(rows) == len(frame)
        lines = (place / f"{name}.md").read_text().splitlines()
        pipes = [len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")]
        assert len({*pipes}) == 1


def test_latex_is_whole_and_escaped(folder: Path) -> None:
    for path in folder.rglob("*.tex"):
        text = path.read_text()
        body = re.search(r"\\midrule\n(.*)\\bottomrule", text, re.S)
        head = re.search(r"\\toprule\n(.*)\\midrule", text, re.S)
        columns = re.search(r"\\begin\{tabular\}\{(l+)\}", text)
        assert body
        assert head
        assert columns
        for line in (body[1] + head[1]).strip().splitlines():
            assert line.endswith(r" \\")
            assert len(re.findall(r"(?<!\\)&", line)) == len(columns[1]) - 1
            assert not re.search(r"(?<!\\)[%#_]", line)
        assert text.count(r"\begin{") == text.count(r"\end{")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5 % & #1 of a_b$", r"5 \% \& \#1 of a\_b\$"), ("x^2 ~ {1}", r"x\textasciicircum{}2 \textasciitilde{} \{1\}"),
     ("\\", r"\textbackslash{}"), ("< 30 %", r"\textless{} 30 \%")],
)  # fmt: skip
def test_what_latex_reads_otherwise_is_escaped(text: str, expected: str) -> None:
    assert latex(text) == expected


def test_markdown_cells_stay_in_their_columns() -> None:
    made = Grid(["a|b", "c"], [["1\n2", "<b>"]]).to_markdown()
    assert made.splitlines() == [r"| a\|b | c |", "| --- | --- |", "| 1 2 | &lt;b> |"]


class _Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_escapes_what_a_model_is_called(folder: Path) -> None:
    seen, page = _Seen(), (folder / "report.html").read_text()
    seen.feed(page)
    assert "<script>alert" not in page
    assert page.count("plotly-graph-div") == 2 * 2 * 2  # of each table, model and mode
    assert "<script>alert(1)</script> & co" in seen.text
    assert "not a model" not in seen.text  # the page prints a source only where there is a value
    assert "(paper: 15.0 %)" in seen.text
    assert "abstract of arXiv:2606.09864" in seen.text
    assert seen.tags.count("table") == 2 * (2 * 2 + 2)  # each of two by model and mode, and for both models by mode


def test_tables_of_several_models_stand_in_one_with_what_is_published_of_others(folder: Path) -> None:
    found = [
        each for each in read_folder(folder) if (each.meta["table"], each.meta["mode"]) == ("pcr_framework", "faithful")
    ]
    readable = grid(*found)
    models = [row[0] for row in readable.rows]
    assert readable.columns[:2] == ["model", "grid"]
    assert {"Qwen/Qwen2.5-7B-Instruct", "<script>alert(1)</script> & co", "DeepSeek-7B", "Gemma-2-9B"} <= {*models}
    assert "Qwen-2.5-7B" not in models  # measured, so that its published value stands there
    deepseek = readable.rows[models.index("DeepSeek-7B")]
    assert deepseek[readable.columns.index("PCR")] == "(paper: 97.0 %)"
    assert all(len(row) == len(readable.columns) for row in readable.rows)
    assert (folder / "models" / "released" / "pcr_framework.tex").is_file()


def test_a_page_is_the_same_each_time(folder: Path) -> None:
    assert render(read_folder(folder)) == (folder / "report.html").read_text()
    assert report_folder(folder, "paper") == folder  # may be replaced
    check_tables(folder, [*tables()])


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    model = named("again")

    class Stop(Exception):
        pass

    def stop(table: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        run_tables("cumulative", model, tmp_path, on_table=stop, **OPTIONS)  # type: ignore[arg-type]
    journal = tmp_path / "again" / "custom.jsonl"
    before = journal.read_bytes()
    (table,) = run_tables("cumulative", model, tmp_path, **OPTIONS)
    assert journal.read_bytes() == before
    assert table.to_frame().equals(tables()["cumulative"].function(study()).to_frame())


@pytest.mark.slow
def test_a_table_that_cannot_be_measured_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = named("no attention")

    def cannot(layer: int) -> None:
        raise ModelError("the attention of layer 0 cannot be rebuilt")

    monkeypatch.setattr(model, "attention", cannot)
    failed = []
    made = run_tables(
        "all", model, tmp_path, on_failure=lambda name, error: failed.append((name, str(error))), **OPTIONS
    )
    assert [name for name, _ in failed] == ["causal_vs_attention (faithful)", "naive_baselines (faithful)"]
    assert len(made) == len(tables()) - 2
    with pytest.raises(ModelError, match="cannot be rebuilt"):
        run_tables("naive_baselines", model, tmp_path, **OPTIONS)


def test_a_folder_of_the_releases_prompts_has_categories(tmp_path: Path) -> None:
    for name, count in (("refusal", 3), ("privacy", 2), ("jailbreak", 1)):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} request {n}" for n in range(count)))
    suite = as_suite("custom", tmp_path)
    assert suite.categories == ("refusal",) * 3 + ("privacy",) * 2 + ("jailbreak",)
    own = study(asked=ASKED)
    own.suites = {"custom": suite, "advbench": suite}  # type: ignore[misc]
    quantities = set(tables()["custom_all_models"].function(own).to_frame().quantity)
    assert {"refusal flip", "privacy flip", "jailbreak flip", "privacy prompts refused"} <= quantities
    (tmp_path / "privacy.txt").unlink()
    with pytest.raises(InputError, match=r"has no privacy\.txt"):
        as_suite("custom", str(tmp_path))
    with pytest.raises(InputError, match="no harmful requests"):
        as_suite("custom", {"harmless": ["hello"]})


def test_the_command_lists_runs_and_shows(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "list", "qwen7b"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in tables())
    assert "with 28 layers" in listed
    assert main(["paper", "list"]) == 0
    assert "passes" not in capsys.readouterr().out
    out = tmp_path / "out"
    command = ["paper", "run", "deepseek_asymmetry", str(checkpoint), "--out", str(out), *RUN_ARGUMENTS]
    assert main(command) == 0
    ran = capsys.readouterr().out
    assert "asymmetry (faithful)" in ran
    assert f"report: {out / 'report.html'}" in ran
    assert main(["paper", "show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "flip of the first" in shown
    assert main(["paper", "show", str(out), "deepseek_asymmetry"]) == 0
    assert main([*command, "--mode", "released"]) == 0
    assert main(["paper", "show", str(out), "asymmetry"]) == 0
    assert "asymmetry (released)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["run", "cumulativ", "MODEL", "--out", "OUT"], "unknown table 'cumulativ'; did you mean 'cumulative'?"),
        (["run", "ifeval", "MODEL", "--out", "OUT"], "kvgeom does not measure"),
        (
            ["run", "seeds", "MODEL", "--out", "OUT", "--max-new-tokens", "0"],
            "--max-new-tokens must be a positive integer",
        ),
        (["run", "seeds", "MODEL", "--out", "OUT", "--prompts", "nope.txt"], "no such file"),
        (["run", "seeds", "nowhere/at/all", "--out", "OUT"], "nowhere/at/all"),
        (["show", "nope"], "no such folder: nope"),
        (["show", "EMPTY"], "holds no tables"),
        (["list", "nowhere/at/all"], "nowhere/at/all"),
    ],
    ids=str,
)
def test_what_cannot_be_done_ends_in_one_line(
    command: list[str], said: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"MODEL": str(checkpoint), "OUT": str(tmp_path / "out"), "EMPTY": str(tmp_path / "empty")}
    assert main(["paper", *(places.get(word, word) for word in command)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert said in errors[-1]
    assert errors[-1].startswith("kvgeom: ")


def test_a_folder_with_another_report_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "audit.json").write_text("{}")
    with pytest.raises(InputError, match="holds the results of kvgeom audit"):
        run_tables("seeds", WIDE, tmp_path, **OPTIONS)
    with pytest.raises(InputError, match="mode must be"):
        run_tables("seeds", WIDE, tmp_path / "new", mode="relased", **OPTIONS)
    with pytest.raises(InputError, match="journals of their own"):
        run_tables("seeds", WIDE, tmp_path / "new", journal="x.jsonl", **OPTIONS)


def test_seeds_read_no_journal(tmp_path: Path) -> None:
    own = study(tmp_path)
    own.run = replace(own.run, seed=3)
    found = tables()["seeds"].function(own)
    assert found.cell("responses that all seeds share", bits=4, seed="all")["measured"] == 1
    own.base().journal.close()


def test_the_page_on_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small model instead of the demo; a table of one's own is registered, measured and refused a second time."""
    monkeypatch.setattr(config, "load", lambda *_, **__: WIDE)
    monkeypatch.setattr(registry, "_TABLES", dict(tables()))
    page = (Path(__file__).parents[2] / "docs" / "paper.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert "sinks" in registry.tables()
    with pytest.raises(InputError, match="registered already"):
        exec(blocks[-1], names)


def test_the_page_names_what_is_not_measured() -> None:
    page = (Path(__file__).parents[2] / "docs" / "paper.md").read_text(encoding="utf-8")
    said = page.split("Not measured:")[1].split("No figure")[0]
    facts = {each.name for each in (*published().tables.values(), *published().experiments.values())}
    assert {*re.findall(r"`(\w+)`", said)} == facts - {*tables()}
    assert {*tables()} - facts == {"geometry", "long_context"}  # claims of the paper without a table of their own
