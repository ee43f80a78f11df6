"""``kvgeom paper``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from kvgeom.cli import options
from kvgeom.errors import InputError, KvgeomError

if TYPE_CHECKING:
    from kvgeom.paper.table import PaperTable

NAME = "paper"
HELP = "measure the tables of arXiv:2606.09864 on a model, beside what was published"
DESCRIPTION = (
    "One command for each table of arXiv:2606.09864, for any model, with intervals and the published value where one is "
    "public. list: what there is. run: measure one table or all. show: print what a folder holds."
)


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the commands below this one, and their options."""
    actions = command.add_subparsers(title="actions", required=True, metavar="ACTION", parser_class=type(command))
    listing = actions.add_parser("list", help="all tables, with what they measure and cost")
    listing.add_argument(
        "model", metavar="MODEL", nargs="?", help="whose layers the cost is for: as of run, or e.g. qwen7b"
    )
    listing.set_defaults(action=_list)
    running = actions.add_parser("run", help="measure one table or all")
    running.add_argument("table", metavar="LABEL", help="a table that list shows, a label of the paper, or all")
    options.add_model(running, "report.html, each table as .csv, .tex, .md and .nc,", out="kvgeom-paper")
    running.add_argument(
        "--mode",
        choices=("faithful", "released", "both"),
        default="faithful",
        help="faithful: what a cache would hold; released: what the paper's code does (default: %(default)s)",
    )
    running.add_argument(
        "--prompts",
        metavar="SET",
        default="calibration",
        help="in the place of the paper's own set: a file, or the folder data/prompts of its release (default: %(default)s)",
    )
    running.add_argument(
        "--advbench",
        metavar="SET",
        help="in the place of AdvBench, e.g. advbench=FILE (default: the same as --prompts)",
    )
    running.add_argument(
        "--figures",
        metavar="KIND",
        choices=("pdf", "svg", "png"),
        help="write figures as files too: pdf, svg or png (needs kaleido and a Chrome; the page has them anyway)",
    )
    running.add_argument(
        "--text", metavar="FILE", help="plain text for perplexity and KL divergence (default: a short one)"
    )
    running.add_argument(
        "--judge", metavar="NAME", help="what labels responses while the model runs (default: keyword)"
    )
    running.add_argument("--judge-kind", metavar="KIND", help="of a folder or fork that --judge names, e.g. wildguard")
    options.add_responses(running, "; the paper: 256")
    running.set_defaults(action=_run)
    showing = actions.add_parser("show", help="print the tables of a folder")
    showing.add_argument("folder", metavar="DIR", help="what --out of run named")
    showing.add_argument("table", metavar="LABEL", nargs="?", help="one of them (default: all)")
    showing.set_defaults(action=_show)


def run(arguments: argparse.Namespace) -> int:
    """Do what is asked below this command."""
    status: int = arguments.action(arguments)
    return status


def _list(arguments: argparse.Namespace) -> int:
    from kvgeom.paper.registry import tables
    from kvgeom.words import text_table

    layers = None if arguments.model is None else _layers(arguments.model)
    rows = [
        (
            name,
            "" if layers is None else f"{spec.passes(layers):.0f}",
            spec.values or "none",
            spec.measures
            + (f" (there: {', '.join(spec.published)})" if list(spec.published) not in ([], [name]) else ""),
        )
        for name, spec in tables().items()
    ]
    print(text_table(("table", "" if layers is None else "passes", "published", "measures"), rows, last=40))
    if layers is not None:
        print(
            f"\npasses: forward passes over each refused prompt, with {layers} layers, what tables share counted in each; "
            "released: and decoding in batches of 4"
        )
    print("published: results that are public, of all models together; there: what the paper calls it")
    return 0


def _layers(model: str) -> int:
    """How many layers a model has; those of the paper need not be loaded."""
    from kvgeom.models.zoo import in_zoo

    known = in_zoo(model)
    if known is not None:
        return known.layers
    import kvgeom

    return kvgeom.load(model, progress=False).geometry.layers


def _run(arguments: argparse.Namespace) -> int:
    from kvgeom.models.zoo import in_zoo

    judge = options.judge(arguments)
    run = options.run_options(arguments, judge)
    from kvgeom.paper.run import run_tables

    known, failed = in_zoo(arguments.model), list[str]()

    def show(table: PaperTable) -> None:
        print(f"\n{table.to_text()}")

    def note(name: str, error: KvgeomError) -> None:
        failed.append(name)
        print(f"kvgeom: {name} is not measured: {' '.join(str(error).split())}", file=sys.stderr)

    made = run_tables(
        arguments.table,
        known.hub_id if known is not None and arguments.model == known.name else arguments.model,
        arguments.out,
        mode=arguments.mode,
        prompts=arguments.prompts,
        advbench=arguments.advbench,
        figures=arguments.figures,
        on_table=show,
        on_failure=note,
        **run,
        **options.load_options(arguments),
    )
    options.note_unread(judge)
    if not made:
        raise InputError(f"none of the tables could be measured ({', '.join(failed)}); see above")
    folder = options.out_folder(arguments)
    print(f"\nreport: {folder / 'report.html'}\ntables: {folder}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from kvgeom.errors import unknown
    from kvgeom.paper.layout import grid
    from kvgeom.paper.registry import get_table
    from kvgeom.paper.run import read_folder

    found = read_folder(arguments.folder)
    if arguments.table is not None:
        name = get_table(arguments.table).name
        there = {str(each.meta["table"]) for each in found}
        if name not in there:
            raise unknown(f"table of {arguments.folder}", name, sorted(there))
        found = [each for each in found if each.meta["table"] == name]
    print("\n\n".join(f"{each.meta['model']}: {each.to_text()}" for each in found))
    for name, mode in dict.fromkeys((each.meta["table"], each.meta["mode"]) for each in found):
        several = [each for each in found if (each.meta["table"], each.meta["mode"]) == (name, mode)]
        if len(several) > 1:
            print(f"\nAll models: {name} ({mode})\n\n{grid(*several).to_text()}")
    return 0
