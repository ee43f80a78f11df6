"""All tables of a folder as one page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgeom.paper.layout import Grid, asked, grid
from kvgeom.paper.published import published
from kvgeom.paper.table import PaperTable
from kvgeom.paths import write_whole
from kvgeom.report.html import drawn, page

if TYPE_CHECKING:
    from markupsafe import Markup

PAGE = "report.html"


def write_page(folder: Path, found: Sequence[PaperTable]) -> Path:
    """Write the page; everything that a model, a user or a file name brought in is escaped."""
    return write_whole(folder / PAGE, render(found))


def render(found: Sequence[PaperTable]) -> str:
    """The page as text, tables in the order in which they come."""
    models = list(dict.fromkeys(str(each.meta["model"]) for each in found))
    names = list(dict.fromkeys(str(each.meta["table"]) for each in found))
    return page(
        "paper.html",
        kicker="Tables of arXiv:2606.09864",
        model=", ".join(models),
        scheme=f"{len(names)} tables",
        tone="",
        headline=f"The tables of {published().paper.title}, measured",
        sentences=[
            "faithful: rounded as a cache stores it, each prompt by itself.",
            "released: the grids of the released code, at the projection, in padded batches of 4 that share scales.",
            "A number stands with its 95 % interval, and the published value of the same model in brackets where one is public.",
        ],
        tables=[_table(name, list(group)) for name, group in groupby(found, key=lambda each: str(each.meta["table"]))],
        sources=[
            f"{name}: {source.what} ({source.grade}){f', {source.address}' if source.address else ''}"
            for name, source in published().sources.items()
        ],
        provenance=[_made(each) for each in _one_of_each(found)],
    )


def _table(name: str, found: list[PaperTable]) -> dict[str, Any]:
    facts = published().measured_by(name)
    parts = [
        _part(str(each.meta["model"]), each.meta["mode"], grid(each), [asked(each), *each.meta["remarks"]])
        | {"figures": _figures(each)}
        for each in found
    ]
    for mode in dict.fromkeys(each.meta["mode"] for each in found):
        several = [each for each in found if each.meta["mode"] == mode]
        if len(several) > 1:
            parts.append(_part("All models", mode, grid(*several), []))
    return {
        "id": name,
        "name": name,
        "title": found[0].meta["title"].capitalize(),
        "labels": ", ".join(facts),
        "parts": parts,
        "released_code": list(dict.fromkeys(line for each in facts.values() for line in each.released_code)),
    }


def _figures(table: PaperTable) -> list[Markup]:
    meta = table.meta
    where = f"{meta['model']} {meta['fingerprint']} {meta['mode']}"
    return [drawn(table.plot(name), f"{meta['table']} {name} {where}") for name in table.figures()]


def _part(model: str, mode: str, readable: Grid, remarks: Sequence[str]) -> dict[str, Any]:
    return {
        "model": model,
        "mode": mode,
        "table": {"columns": readable.columns, "rows": readable.rows},
        "remarks": [remark for remark in remarks if remark],
    }


def _one_of_each(found: Sequence[PaperTable]) -> list[PaperTable]:
    return list(
        {(each.meta["model"], each.meta["mode"], str(each.meta["prompt_set"])): each for each in found}.values()
    )


def _made(table: PaperTable) -> str:
    meta = table.meta
    versions = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    return (
        f"{meta['model']} ({meta['fingerprint']}), {meta['mode']}: {meta['placement']}; judge {meta['judge']}, "
        f"{meta['max_new_tokens']} new tokens, prompts {meta['prompt_set']}, seed {meta['seed']}; {versions}"
    )
