"""Options that commands share, and what the Python functions are given of them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvgeom
from kvgeom.checks import as_path, as_text
from kvgeom.errors import InputError, brief
from kvgeom.paths import read_text
from kvgeom.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvgeom.evaluation.relabel import KeptLabels
    from kvgeom.judges.classifiers import ClassifierJudge
    from kvgeom.judges.judge import Judge
    from kvgeom.models.model import Model
    from kvgeom.prompts.sets import PromptSet


#: What a verdict may be for a pipeline to fail: the status of :class:`~kvgeom.report.verdict.Verdict`, in one word.
FAILURES = ("breaks", "language-lost", "refusals-lost", "undetermined")


def add_model(command: argparse.ArgumentParser, written: str, *, out: str | None = None) -> None:
    """The model, where results go (``out`` by default), and how the model is loaded."""
    command.add_argument("model", metavar="MODEL", help="hub id, folder, .gguf file, or 'demo'")
    command.add_argument(
        "--out",
        metavar="DIR",
        default=out,
        help=f"folder for {written} and journal.jsonl, from which an interrupted run goes on; results of the same command "
        f"with other settings are replaced, and said to be{' (default: %(default)s)' if out else ''}",
    )
    loading = command.add_argument_group("loading the model")
    loading.add_argument("--template", metavar="FILE", help="Jinja chat template, for a model without one")
    loading.add_argument(
        "--template-options",
        metavar="JSON",
        help="""what the chat template is told, e.g. '{"thinking": true}', '{"reasoning_effort": "low"}'""",
    )
    loading.add_argument(
        "--no-thinking",
        action="store_true",
        help="""no reasoning before the answer: the same as --template-options '{"enable_thinking": false}'""",
    )
    add_conversation(loading)
    loading.add_argument("--dtype", help="e.g. float32, bfloat16 (default: float32 on a CPU, else the checkpoint's)")
    loading.add_argument("--device", help="e.g. cpu, cuda (default: an accelerator if there is one)")
    loading.add_argument("--revision", help="of a hub id")
    loading.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")


def add_conversation(command: argparse._ActionsContainer) -> None:
    """What each request stands in."""
    command.add_argument("--system", metavar="TEXT", help="system prompt before each request")
    command.add_argument("--turns", metavar="N", type=int, default=0, help="harmless turns before each request")
    command.add_argument(
        "--context-tokens", metavar="N", type=int, default=0, help="about N tokens of harmless text before each request"
    )


def add_prompts(command: argparse.ArgumentParser) -> None:
    """Which requests are asked."""
    command.add_argument(
        "--prompts",
        metavar="SET",
        default="calibration",
        help="a .txt, .csv, .tsv, .json or .jsonl file, or e.g. advbench=FILE (default: %(default)s)",
    )
    command.add_argument(
        "--distinct",
        action=argparse.BooleanOptionalAction,
        help="ask only one of all requests in similar wording (default: of public benchmarks)",
    )
    command.add_argument("--limit", metavar="N", type=int, help="use only the first N harmful and N harmless requests")


def add_scheme(command: argparse.ArgumentParser, what: str, *, text: bool = True) -> None:
    """What is done to the cache, and with ``text`` what is read through it."""
    command.add_argument(
        "--scheme",
        default="asym-token",
        help=f"{what}, e.g. sym-tensor, asym-group64, kivi; kvgeom schemes lists them (default: %(default)s)",
    )
    if text:
        command.add_argument(
            "--text", metavar="FILE", help="plain text for perplexity and KL divergence (default: a short one)"
        )


def add_widths(command: argparse.ArgumentParser) -> None:
    """Widths of a curve."""
    command.add_argument(
        "--bits",
        metavar="B",
        type=int,
        nargs="+",
        help="widths of the curve (default: 8 6 5 4 3 2, or those that the scheme offers)",
    )


def add_scan_bits(
    command: argparse.ArgumentParser,
    what: str = "width of layers, fixes, PCR (default: the fewest before the model stops writing language)",
) -> None:
    """The width of layers, parts and PCR."""
    command.add_argument("--scan-bits", metavar="B", type=int, help=what)


def add_fail_on(command: argparse.ArgumentParser) -> None:
    """Which verdicts are an exit status of 1."""
    command.add_argument(
        "--fail-on",
        metavar="VERDICT",
        nargs="+",
        choices=FAILURES,
        default=(),
        help=f"for pipelines: exit with status 1 where this is the verdict ({', '.join(FAILURES)}; default: never)",
    )


def status_of(arguments: argparse.Namespace, verdict: str) -> int:
    """The exit status that --fail-on asks for."""
    return int(verdict.replace(" ", "-") in arguments.fail_on)


def add_geometry(command: argparse.ArgumentParser, *, default: bool) -> None:
    """Whether the geometry is measured too."""
    command.add_argument(
        "--geometry",
        action=argparse.BooleanOptionalAction,
        default=default,
        help=f"measure the noise-sensitivity ratio too (default: {'yes' if default else 'no'})",
    )


def add_judge(command: argparse.ArgumentParser, when: str = "it is loaded when the model is out of memory") -> None:
    """What labels the responses."""
    command.add_argument(
        "--judge",
        metavar="NAME",
        help="what labels responses: keyword (the default), or a classifier (WildGuard, Llama Guard, HarmBench or Minos) by kind "
        f"(wildguard), hub id, folder or fork (minos=FOLDER); {when}",
    )
    command.add_argument(
        "--judge-kind", metavar="KIND", help="of a folder or fork that --judge names, e.g. wildguard, minos"
    )


def add_run(command: argparse.ArgumentParser) -> None:
    """Where rounding happens, and how responses are made."""
    command.add_argument(
        "--placement",
        choices=("cache", "paper"),
        help="cache: as a real cache stores it; paper: as the released code simulates it (default: the engine's, or cache)",
    )
    add_responses(command)


def add_responses(command: argparse.ArgumentParser, beside: str = "") -> None:
    """How responses are made; ``beside`` the default of the longest answer stands in its help."""
    command.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=24, help=f"longest answer (default: %(default)s{beside})"
    )
    command.add_argument(
        "--max-reasoning-tokens",
        metavar="N",
        type=int,
        default=1024,
        help="longest reasoning before an answer, of models that reason (default: %(default)s)",
    )
    command.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=512,
        help="most responses decoded together (default: %(default)s)",
    )
    command.add_argument("--seed", metavar="N", type=int, default=0, help="of all random draws (default: %(default)s)")
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def run_options(arguments: argparse.Namespace, judge: Judge | None) -> dict[str, Any]:
    """Keywords of a run, with the judge that is asked during it.

    What is wrong with them is reported before torch is imported and a model loaded.
    """
    lengths = ("max_new_tokens", "max_reasoning_tokens", "batch_size")
    for name in lengths:
        value = getattr(arguments, name)
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be a positive integer, got {value}")
    options = {name: getattr(arguments, name) for name in (*lengths, "seed")}
    text = getattr(arguments, "text", None)
    plain = None if text is None else plain_text(text)
    return {**options, "text": plain, "progress": not arguments.quiet, "judge": judge}


def load_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keywords of :func:`kvgeom.load`."""
    names = ("template", "dtype", "device", "revision", "trust_remote_code")
    found = {name: getattr(arguments, name) for name in names}
    told = _template_options(arguments.template_options)
    if arguments.no_thinking:
        told = {**told, "enable_thinking": False}
    said = kvgeom.conversation(system=arguments.system, turns=arguments.turns, context_tokens=arguments.context_tokens)
    return {**found, "template_options": told or None, "conversation": said or None}


def _template_options(text: str | None) -> dict[str, Any]:
    """What --template-options says."""
    try:
        found = {} if text is None else json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(
            f"--template-options must be a JSON object such as '{{\"enable_thinking\": false}}', got {brief(text)}"
        )
    return found


def prompt_set(spec: str, arguments: argparse.Namespace) -> PromptSet:
    """A prompt set, or the first part of it; what is left out is said, and what should be."""
    prompts = kvgeom.load_prompts(spec, distinct=arguments.distinct)

    def note(text: str) -> None:
        print(f"kvgeom: {spec}: {text}", file=sys.stderr)

    if prompts.repeated:
        note(f"{counted(prompts.repeated, 'repeated request')} left out")
    if prompts.similar:
        note(
            f"{counted(sum(prompts.clusters), 'cluster')} of similar wording, one request of each is asked and "
            f"{prompts.similar} are left out; --no-distinct asks all"
        )
    prompts = prompts if arguments.limit is None else prompts.take(arguments.limit)
    if prompts.caveat:
        note(prompts.caveat)
    return prompts


def judge(arguments: argparse.Namespace) -> Judge | None:
    """The judge that was named, if any; whether it is there is known before the model is loaded."""
    name, kind = arguments.judge, arguments.judge_kind
    if name is None:
        if kind is not None:
            raise InputError("--judge-kind says what a --judge is; give --judge too, or leave it out")
        return None
    from kvgeom.judges.registry import as_judge, judges

    settings = {"device": arguments.device, "progress": not arguments.quiet}
    if kind is None:
        return as_judge(name, **settings)
    if name.partition("=")[0] in judges() and not os.path.exists(name):
        raise InputError(f"--judge-kind is for a folder or fork, and {name} says itself what it is; leave it out")
    return kvgeom.classifier(name, kind=kind, **settings)


def judges(arguments: argparse.Namespace) -> tuple[Judge | None, ClassifierJudge | None]:
    """The judge that is asked during the run, and the classifier that is asked when the model is out of memory."""
    named = judge(arguments)
    if named is None:
        return None, None
    from kvgeom.judges.classifiers import ClassifierJudge

    return (None, named) if isinstance(named, ClassifierJudge) else (named, None)


@contextmanager
def released(
    model: Model, classifier: ClassifierJudge, arguments: argparse.Namespace
) -> Iterator[ClassifierJudge | KeptLabels]:
    """Take the model out of memory and let a classifier label; with --out, its labels are kept as it gives them."""
    model.release()
    path = journal(arguments, "labels.jsonl")
    if path is None:
        yield classifier
    else:
        from kvgeom.evaluation.relabel import KeptLabels

        with KeptLabels(classifier, path) as keeping:
            yield keeping
    note_unread(classifier)


def note_unread(asked: Judge | None) -> None:
    """Say how many answers of a classifier could not be read, if any."""
    unread = getattr(asked, "unread", 0)
    if unread:
        print(
            f"kvgeom: {unread} of {counted(getattr(asked, 'asked', unread), 'answer')} of the judge could not be read; keywords "
            "alone label these responses",
            file=sys.stderr,
        )


def out_folder(arguments: argparse.Namespace) -> Path:
    """The folder that --out names, made if it is not there."""
    from kvgeom.paths import writable_folder

    return writable_folder(arguments.out).resolve()


def journal(arguments: argparse.Namespace, name: str = "journal.jsonl") -> Path | None:
    """The journal in the folder that --out names."""
    return None if arguments.out is None else out_folder(arguments) / name


def check_out(arguments: argparse.Namespace) -> None:
    """Check, before a model is loaded, that the tables of :func:`report` would replace nothing that somebody else wrote."""
    from kvgeom.folders import check_replaceable

    if arguments.out is not None:
        check_replaceable(out_folder(arguments), [f"{arguments.command}.txt"])


def report(arguments: argparse.Namespace, text: str) -> int:
    """Keep what a command has found beside the journal, with --out, and print it."""
    if arguments.out is None:
        print(f"\n{text}")
        return 0
    from kvgeom.paths import write_whole

    path = out_folder(arguments) / f"{arguments.command}.txt"
    replaces = path.is_file() and path.read_text(encoding="utf-8", errors="replace") != f"{text}\n"
    write_whole(path, f"{text}\n")
    if replaces:
        _note_replaced(path)
    print(f"\n{text}\n\ntables: {path}")
    return 0


def earlier(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings of the report that --out holds before a command runs; empty if there is none."""
    from kvgeom.report.folder import settings_in

    return settings_in(arguments.out, arguments.command)


def compare(arguments: argparse.Namespace, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Say so if a command has replaced a report of other settings."""
    from kvgeom.report.folder import same_settings

    if before and not same_settings(before, now):
        _note_replaced(out_folder(arguments) / "report.html")


def _note_replaced(path: Path) -> None:
    """Say that results of other settings are gone."""
    print(f"kvgeom: replaced {path}, which held results of other settings", file=sys.stderr)


def plain_text(given: str) -> str:
    """What the file of ``--text`` holds; only line feeds end its lines, whatever system wrote it."""
    if not given:
        raise InputError("the name of --text is empty; give a file of plain text, or leave it out")
    path = as_path("--text", given)
    return as_text(f"--text {path}", StringIO(read_text(path), newline=None).read())
