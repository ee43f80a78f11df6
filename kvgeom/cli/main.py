"""The command line: parses, calls the public API, prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvgeom
from kvgeom.errors import InputError, KvgeomError

if TYPE_CHECKING:
    from kvgeom.evaluation.baseline import Baseline
    from kvgeom.judges.classifiers import ClassifierJudge
    from kvgeom.prompts.sets import PromptSet


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``kvgeom``; returns the exit status: 0, 2 for input that cannot be used, 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        run = arguments.run
        status: int = run(arguments)
    except KvgeomError as error:
        print(f"kvgeom: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = " and what is done is kept: run it again to go on" if getattr(arguments, "out", None) else ""
        print(f"\nkvgeom: interrupted; nothing half-written is left behind{kept}", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvgeom",
        description="When an LLM's KV cache is quantized: does its safety survive, why not, and what fixes it?",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {kvgeom.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    for name, run, short, long in (
        (
            "audit",
            _audit,
            "audit a model end to end and write report.html and audit.json",
            "Audit a model end to end: where do its refusals break as the KV cache loses bits, and how?",
        ),
        (
            "diagnose",
            _diagnose,
            "name a model's failure mode, with all the evidence",
            "Sweep, single layers, ablations, PCR and failure mode, as tables. With --out, what is done is kept: the same "
            "command goes on where it was interrupted.",
        ),
        (
            "sweep",
            _sweep,
            "refusals at each bit-width",
            "Round the whole cache at each width, and find the transition.",
        ),
        ("scan", _scan, "refusals with one layer rounded", "Round each layer alone, per-tensor and per-channel."),
        (
            "fix",
            _fix,
            "find a cache that keeps refusals, prove it, write plan.json and report.html",
            "Diagnose a model, search a cache that keeps its refusals within a memory budget, and prove it on prompts that did "
            "not choose it. What is done is kept: the same command goes on where it was interrupted.",
        ),
    ):
        command = commands.add_parser(name, help=short, description=long)
        _add_options(command, name)
        command.set_defaults(run=run, command=name)
    schemes = commands.add_parser(
        "schemes",
        help="list formats and presets of engines, with bits per element",
        description="List formats and presets of engines, with the bits that an element of the cache takes, scales included.",
    )
    schemes.add_argument(
        "--heads", metavar="N", type=int, default=8, help="KV heads of the cache (default: %(default)s)"
    )
    schemes.add_argument(
        "--head-dim", metavar="N", type=int, default=128, help="channels of a head (default: %(default)s)"
    )
    schemes.add_argument("--tokens", metavar="N", type=int, default=4096, help="tokens held (default: %(default)s)")
    schemes.set_defaults(run=_schemes)
    return parser


def _add_options(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("model", metavar="MODEL", help="hub id, folder, .gguf file, or 'demo'")
    written = {"audit": "report.html, audit.json", "fix": "report.html, plan.json"}.get(
        name, f"the tables, {name}.txt,"
    )
    command.add_argument(
        "--out",
        metavar="DIR",
        required=name in ("audit", "fix"),
        help=f"folder for {written} and journal.jsonl, from which a run goes on",
    )
    command.add_argument(
        "--prompts",
        metavar="SET",
        default="calibration",
        help="a .txt/.csv/.jsonl file, or e.g. advbench=FILE (default: %(default)s)",
    )
    command.add_argument("--limit", metavar="N", type=int, help="use only the first N harmful and N harmless requests")
    if name != "scan":
        command.add_argument(
            "--scheme",
            default="asym-token",
            help=f"{'the cache to mend' if name == 'fix' else 'rounding of the curve'}, e.g. sym-tensor, asym-group64, kivi; "
            "kvgeom schemes lists them (default: %(default)s)",
        )
        command.add_argument("--text", metavar="FILE", help="plain text for perplexity (default: a short one)")
    if name == "fix":
        _add_fix_options(command)
    elif name != "scan":
        command.add_argument(
            "--bits",
            metavar="B",
            type=int,
            nargs="+",
            help="widths of the curve (default: 8 6 5 4 3 2, or those that the scheme offers)",
        )
    if name == "sweep":
        command.add_argument(
            "--over-refusal", action="store_true", help="also count harmless requests of the set that are refused"
        )
    if name not in ("sweep", "fix"):
        command.add_argument(
            "--scan-bits", metavar="B", type=int, default=3, help="width of layers, parts, PCR (default: %(default)s)"
        )
    if name == "diagnose":
        command.add_argument("--no-geometry", action="store_true", help="leave out the noise-sensitivity ratio")
    if name not in ("audit", "fix"):
        command.add_argument(
            "--judge",
            metavar="ID",
            help="a classifier instead of keywords: WildGuard, Llama Guard, HarmBench or Minos, by hub id or folder; it is "
            "loaded when the model is out of memory",
        )
        command.add_argument("--judge-kind", metavar="KIND", help="of a folder or fork, e.g. wildguard, minos")
    command.add_argument(
        "--placement",
        choices=("cache", "paper"),
        help="cache: as a real cache holds it; paper: as the released code simulates it (default: the engine's, or cache)",
    )
    command.add_argument(
        "--new-tokens", metavar="N", type=int, default=24, help="longest response (default: %(default)s)"
    )
    command.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=512,
        help="most responses decoded together (default: %(default)s)",
    )
    command.add_argument("--template", metavar="FILE", help="Jinja chat template, for a model without one")
    command.add_argument("--dtype", help="e.g. float32, bfloat16 (default: float32 on a CPU, else the checkpoint's)")
    command.add_argument("--device", help="e.g. cpu, cuda (default: an accelerator if there is one)")
    command.add_argument("--revision", help="of a hub id")
    command.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_fix_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--bits", metavar="B", type=int, help="width of the cache to mend (default: 4, or what the scheme offers)"
    )
    command.add_argument(
        "--memory",
        metavar="SHARE",
        type=float,
        default=0.02,
        help="budget: by how much the cache may exceed the unmitigated one (default: %(default)s)",
    )
    command.add_argument(
        "--verify-prompts",
        metavar="SET",
        default="held-out",
        help="requests that prove the plan, none of those that choose it; as --prompts (default: %(default)s)",
    )
    command.add_argument(
        "--controls",
        metavar="N",
        type=int,
        default=3,
        help="draws of errors of equal size in random directions (default: %(default)s)",
    )
    command.add_argument("--geometry", action="store_true", help="also measure the noise-sensitivity ratio")


def _checked(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of the Python functions. What is wrong is said before torch is imported and a model loaded."""
    from kvgeom.quant.scheme import check_bits

    for bits in (*(getattr(arguments, "bits", None) or ()), getattr(arguments, "scan_bits", 3)):
        check_bits(bits)
    if getattr(arguments, "scan_bits", 3) == 16:
        raise InputError("--scan-bits 16 was asked, but 16 bits round nothing; give 2-8")
    options = _common(arguments)
    if getattr(arguments, "over_refusal", False) and not options["prompts"].harmless:
        raise InputError(f"--over-refusal was asked, but {arguments.prompts} has no harmless requests")
    if "scan_bits" in arguments:
        options["bits"] = arguments.scan_bits
    if "scheme" in arguments:
        from kvgeom.behaviour.widths import at_widths

        options["curve_bits"] = arguments.bits
        at_widths(arguments.scheme, arguments.bits, options["placement"])
    return options


def _common(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options that all commands share."""
    for name in ("new_tokens", "batch_size"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(arguments, name)} was asked; give a positive number")
    options: dict[str, Any] = {}
    if "scheme" in arguments:
        options["scheme"] = arguments.scheme
        options["text"] = _read(arguments.text) if arguments.text else None
    options["prompts"] = _prompts(arguments.prompts, arguments.limit)
    from kvgeom.quant.placement import Placement

    placements = {None: None, "cache": Placement(), "paper": Placement.paper()}
    options["placement"] = placements[arguments.placement]
    return options | {
        "max_new_tokens": arguments.new_tokens,
        "batch_size": arguments.batch_size,
        "progress": not arguments.quiet,
    }


def _prompts(spec: str, limit: int | None) -> PromptSet:
    prompts = kvgeom.load_prompts(spec)
    return prompts if limit is None else prompts.take(limit)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text {path} was asked, but it cannot be read ({error}); give a UTF-8 text file") from error


def _loading(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("template", "dtype", "device", "revision", "trust_remote_code")
    return {name: getattr(arguments, name) for name in names}


def _journal(arguments: argparse.Namespace, name: str = "journal.jsonl") -> Path | None:
    return None if arguments.out is None else _folder(arguments) / name


def _folder(arguments: argparse.Namespace) -> Path:
    """The folder that --out names, made if it is not there."""
    from kvgeom.paths import writable_folder

    return writable_folder(arguments.out).resolve()


def _schemes(arguments: argparse.Namespace) -> int:
    from kvgeom.engines.registry import scheme_rows

    shape = (arguments.heads, arguments.head_dim, arguments.tokens)
    if min(shape) < 1:
        raise InputError(
            f"a cache of {shape[0]} heads, {shape[1]} channels and {shape[2]} tokens was asked; give 1 or more"
        )
    rows = scheme_rows(*shape)
    for kind in ("format", "preset"):
        print(f"{kind + 's':<28}{'bits':>4}  {'per element':>11}")
        for row in (row for row in rows if row["kind"] == kind):
            print(f"  {row['name']:<26}{row['bits']:>4}  {row['bits_per_element']:>11.3f}  {row['note']}")
        print()
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    result = kvgeom.audit(arguments.model, arguments.out, **_checked(arguments), **_loading(arguments))
    print(f"\n{result.verdict.headline}\n")
    for sentence in result.verdict.sentences:
        print(f"  - {sentence}")
    folder = _folder(arguments)
    print(f"\nreport: {folder / 'report.html'}\nnumbers: {folder / 'audit.json'}")
    return 0


def _fix(arguments: argparse.Namespace) -> int:
    options = _common(arguments)
    found = kvgeom.fix(
        arguments.model,
        arguments.out,
        **options,
        **_loading(arguments),
        bits=arguments.bits,
        memory=arguments.memory,
        verify_prompts=_prompts(arguments.verify_prompts, arguments.limit),
        controls=arguments.controls,
        geometry=arguments.geometry,
    )
    from kvgeom.report.terminal import fix_text

    print(f"\n{fix_text(found, _folder(arguments))}")
    return 0


def _diagnose(arguments: argparse.Namespace) -> int:
    options, journal, judge = _checked(arguments), _journal(arguments), _judge(arguments)
    found = kvgeom.diagnose(
        arguments.model,
        **options,
        geometry=not arguments.no_geometry,
        whole=judge is not None,
        journal=journal,
        **_loading(arguments),
    )
    if judge is not None:
        found.baseline.model.release()
        found = found.relabel(judge)
    from kvgeom.report.terminal import diagnosis_text

    return _told(arguments, diagnosis_text(found))


def _sweep(arguments: argparse.Namespace) -> int:
    judge = _judge(arguments)
    options, base = _unquantized(arguments)
    from kvgeom.behaviour.curve import bit_width_curve, curve_of, over_refusal
    from kvgeom.prompts.sets import perplexity_text
    from kvgeom.report.terminal import curve_text, over_refusal_table

    how = {name: options[name] for name in ("scheme", "placement", "progress")} | {"bits": options["curve_bits"]}
    curve, outcomes = bit_width_curve(base, options["text"] or perplexity_text(), exact=judge is not None, **how)
    said = []
    if arguments.over_refusal:
        # A journal is about one set of requests.
        journal = _journal(arguments, "over-refusal.jsonl")
        asked = kvgeom.baseline(base.model, options["prompts"].harmless, journal=journal, **_running(options))
        said.append(over_refusal_table(over_refusal(asked, **how)))
    if judge is not None:
        base.model.release()
        curve = curve_of(outcomes.relabel(judge), list(curve.data.perplexity_ratio.values), curve.meta)
    return _told(arguments, "\n\n".join([curve_text(curve), *said]))


def _scan(arguments: argparse.Namespace) -> int:
    judge = _judge(arguments)
    options, base = _unquantized(arguments)
    from kvgeom.behaviour.scan import scan_of, single_layers
    from kvgeom.quant.scheme import Scheme
    from kvgeom.report.terminal import scan_table

    scheme, n_layers = Scheme(options["bits"], symmetric=True, granularity="tensor"), base.model.geometry.layers
    outcomes = kvgeom.evaluate(
        base.model,
        single_layers(n_layers, scheme),
        base,
        placement=options["placement"],
        refused_only=judge is None,
        exact=judge is not None,
        progress=options["progress"],
        title="single layers",
    )
    if judge is not None:
        base.model.release()
        outcomes = outcomes.relabel(judge)
    scan = scan_of(outcomes, n_layers, scheme)
    return _told(arguments, f"{scan_table(scan)}\n\nCritical layer: {scan.meta['reason']}.")


def _told(arguments: argparse.Namespace, text: str) -> int:
    """Print what a command has found, and with --out keep it beside the journal."""
    print(f"\n{text}")
    if arguments.out is not None:
        from kvgeom.paths import write_whole

        path = write_whole(_folder(arguments) / f"{arguments.command}.txt", f"{text}\n")
        print(f"\ntables: {path}")
    return 0


def _judge(arguments: argparse.Namespace) -> ClassifierJudge | None:
    """The classifier that was asked for, if any; whether it is there is known before the model is loaded."""
    if arguments.judge is None:
        return None
    return kvgeom.classifier(
        arguments.judge,
        kind=arguments.judge_kind,
        device=arguments.device,
        progress=not arguments.quiet,
    )


def _unquantized(arguments: argparse.Namespace) -> tuple[dict[str, Any], Baseline]:
    """Checked options, and the unquantized model on the harmful requests."""
    options, journal = _checked(arguments), _journal(arguments)
    model = kvgeom.load(arguments.model, progress=options["progress"], **_loading(arguments))
    return options, kvgeom.baseline(model, options["prompts"].harmful, journal=journal, **_running(options))


def _running(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("max_new_tokens", "batch_size", "progress")}
