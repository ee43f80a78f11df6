"""Measuring tables into a folder, journalled: an interrupted run goes on where it was, and a second table finds what a first has measured."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from kvgeom.checks import as_path, one_of, suggests
from kvgeom.errors import InputError, KvgeomError, reason
from kvgeom.evaluation.config import RUN_OPTIONS, open_run
from kvgeom.folders import SETTINGS, check_replaceable, is_ours, report_folder
from kvgeom.paper.layout import asked, grid
from kvgeom.paper.page import write_page
from kvgeom.paper.protocol import MODES, Mode
from kvgeom.paper.registry import get_table, tables
from kvgeom.paper.study import Study, suites_of
from kvgeom.paper.table import PaperTable
from kvgeom.paths import write_whole
from kvgeom.progress import track

#: Stands for all tables.
ALL = "all"
#: What figures can be written as.
FIGURES = ("pdf", "svg", "png")
#: Of the files of a table.
_ENDINGS = (".nc", ".csv", ".md", ".tex")


@suggests(RUN_OPTIONS)
def run_tables(
    label: str,
    model: Any,
    out: str | Path,
    *,
    mode: str = "faithful",
    prompts: Any = "calibration",
    advbench: Any = None,
    figures: str | None = None,
    on_table: Callable[[PaperTable], None] = lambda table: None,
    on_failure: Callable[[str, KvgeomError], None] | None = None,
    **options: Any,
) -> list[PaperTable]:
    """Measure one table or all, and write each as CSV, LaTeX, Markdown and NetCDF, and one page of all that the folder holds.

    Parameters
    ----------
    label : str
        Name of a table, label of the paper, or ``"all"``.
    model : anything that :func:`kvgeom.load` takes
    out : str or Path
        A folder, where tables of several models may come together.
    mode : {"faithful", "released", "both"}
    prompts, advbench
        As of each table.
    figures : {"pdf", "svg", "png"}, optional
        What to write figures as, beside the page, which has them all; needs kaleido and a Chrome.
    on_table : callable (PaperTable) -> None
        Called with every table as it is written.
    on_failure : callable (name, error) -> None, optional
        Called with a table of several that cannot be measured; by default its error ends the run.
    **options
        Of :class:`~kvgeom.evaluation.config.RunConfig`, but for the journal, and of :func:`kvgeom.load`.

    Raises
    ------
    InputError
        For an unknown table, mode, kind of figure or option, a folder that holds something else, or if figures cannot be written.
    """
    specs = [*tables().values()] if label == ALL else [get_table(label)]
    if mode not in (*MODES, "both"):
        raise InputError(f"mode must be {', '.join(MODES)} or both, got {mode!r}")
    if figures is not None:
        one_of("kind of figure", figures, FIGURES)
        _check_writer()
    if options.get("journal") is not None:
        raise InputError("tables keep journals of their own in the folder; leave journal out")
    suites, folder = suites_of(prompts, advbench), report_folder(out, "paper")
    check_tables(folder, [spec.name for spec in specs])
    loaded, run = open_run(model, options)
    own = folder / slug(loaded.name)
    modes: Sequence[Mode] = MODES if mode == "both" else [mode]  # type: ignore[list-item]
    work = [(each, spec) for each in modes for spec in specs]
    made: list[PaperTable] = []
    with run.bars(), Study(loaded, run, suites, own).opened() as study:
        for each, spec in track(work, "tables", len(work)):
            try:
                table = spec.function(study, mode=each)
            except KvgeomError as error:
                if on_failure is None or label != ALL:
                    raise
                on_failure(f"{spec.name} ({each})", error)
                continue
            write_table(table, own / each)
            if figures is not None:
                write_figures(table, own / each, figures)
            on_table(table)
            made.append(table)
    found = read_folder(folder)
    write_whole(folder / SETTINGS["paper"], json.dumps(_index(found), indent=1) + "\n")
    write_page(folder, found)
    write_cross(folder, found)
    return made


def check_tables(folder: Path, names: Sequence[str]) -> None:
    """Check that tables, of whatever model, would replace none that kvgeom did not write."""
    kept = is_ours(folder / SETTINGS["paper"])
    for place in (each for mode in MODES for each in sorted(folder.glob(f"*/{mode}"))):
        check_replaceable(place, [f"{name}{ending}" for name in names for ending in _ENDINGS], kept=kept)


def slug(name: str) -> str:
    """A model's name as that of a folder.

    Examples
    --------
    >>> slug("Qwen/Qwen2.5-7B-Instruct"), slug("../x y")
    ('Qwen-Qwen2.5-7B-Instruct', 'x-y')
    """
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")[-80:] or "model"


def write_table(table: PaperTable, folder: Path) -> None:
    """One table as NetCDF, CSV (every cell with its source), Markdown and LaTeX (as it is read)."""
    folder.mkdir(parents=True, exist_ok=True)
    name, readable = table.meta["table"], grid(table)
    table.save(folder / f"{name}.nc")
    write_whole(folder / f"{name}.csv", table.to_frame().to_csv(index=False))
    caption = f"{table.meta['title'].capitalize()}: {table.meta['model']}, {table.meta['mode']}."
    below = "\n\n".join(filter(None, [asked(table), *table.meta["remarks"]]))
    write_whole(folder / f"{name}.md", f"{caption}\n\n{readable.to_markdown()}\n\n{below}\n")
    write_whole(
        folder / f"{name}.tex", f"% {below}\n".replace("\n\n", "\n% ") + readable.to_latex(caption, name) + "\n"
    )


def _check_writer() -> None:
    """Whether plotly can write a figure to a file, before anything is measured."""
    try:
        go.Figure().to_image("svg")
    except Exception as error:  # kaleido is not there, or finds no Chrome, or that fails
        raise InputError(
            f"figures cannot be written to files ({reason(error)}); pip install 'kvgeom[figures]' and a Chrome or Chromium, or leave "
            "figures out: the page has them"
        ) from error


def write_figures(table: PaperTable, folder: Path, kind: str) -> None:
    """The figures of a table, named after it: ``cumulative-cells.pdf``."""
    for name in table.figures():
        path = folder / f"{table.meta['table']}-{name.replace('_', '-')}.{kind}"
        write_whole(path, table.plot(name).to_image(kind, width=800))


def write_cross(folder: Path, found: Sequence[PaperTable]) -> None:
    """Tables of several models, with what was published of others, as Markdown and LaTeX."""
    for mode in MODES:
        for name in tables():
            several = [each for each in found if (each.meta["table"], each.meta["mode"]) == (name, mode)]
            if len(several) < 2:
                continue
            place, readable = folder / "models" / mode, grid(*several)
            place.mkdir(parents=True, exist_ok=True)
            caption = f"{several[0].meta['title'].capitalize()}, {mode}."
            write_whole(place / f"{name}.md", f"{caption}\n\n{readable.to_markdown()}\n")
            write_whole(place / f"{name}.tex", readable.to_latex(caption, f"{name}-models") + "\n")


def read_folder(folder: str | Path) -> list[PaperTable]:
    """All tables that a folder holds: by name, then by model and mode.

    Raises
    ------
    InputError
        If there is no such folder, or it holds none.
    """
    path = as_path("the folder of tables", folder)
    if not path.is_dir():
        raise InputError(f"no such folder: {folder}; kvgeom paper run ... --out {folder} makes it")
    found = [PaperTable.load(file) for mode in MODES for file in sorted(path.glob(f"*/{mode}/*.nc"))]
    if not found:
        raise InputError(f"{folder} holds no tables; kvgeom paper run ... --out {folder} writes some")
    return sorted(found, key=lambda each: (each.meta["table"], each.meta["model"], each.meta["mode"]))


def _index(found: Sequence[PaperTable]) -> list[dict[str, Any]]:
    names = (
        "table",
        "model",
        "fingerprint",
        "mode",
        "labels",
        "prompt_set",
        "judge",
        "max_new_tokens",
        "seed",
        "versions",
    )
    return [{name: each.meta[name] for name in names} for each in found]
