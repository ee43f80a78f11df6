"""The command line: parses, calls the public API, prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import kvgeom
from kvgeom.errors import InputError, KvgeomError


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
        print("\nkvgeom: interrupted; nothing half-written is left behind", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvgeom",
        description="When an LLM's KV cache is quantized: does its safety survive, why not, and what fixes it?",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {kvgeom.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    audit = commands.add_parser(
        "audit",
        help="audit a model end to end and write report.html and audit.json",
        description="Audit a model end to end: where do its refusals break as the KV cache loses bits, and how?",
    )
    audit.add_argument("model", metavar="MODEL", help="hub id, folder, .gguf file, or 'demo'")
    audit.add_argument("--out", metavar="DIR", required=True, help="folder for report.html and audit.json")
    audit.add_argument(
        "--prompts",
        metavar="SET",
        default="calibration",
        help="a .txt/.csv/.jsonl file, or e.g. advbench=FILE (default: %(default)s)",
    )
    audit.add_argument("--limit", metavar="N", type=int, help="use only the first N harmful and N harmless requests")
    audit.add_argument(
        "--scheme",
        default="asym-token",
        help="rounding of the curve, e.g. sym-tensor, asym-group64 (default: %(default)s)",
    )
    audit.add_argument(
        "--bits",
        metavar="B",
        type=int,
        nargs="+",
        default=[8, 6, 5, 4, 3, 2],
        help="widths of the curve (default: 8 6 5 4 3 2)",
    )
    audit.add_argument(
        "--scan-bits", metavar="B", type=int, default=3, help="width of layer scan and PCR (default: %(default)s)"
    )
    audit.add_argument(
        "--placement",
        choices=("cache", "paper"),
        default="cache",
        help="cache: as a real cache holds it; paper: as the released code simulates it (default: %(default)s)",
    )
    audit.add_argument(
        "--new-tokens", metavar="N", type=int, default=24, help="longest response (default: %(default)s)"
    )
    audit.add_argument(
        "--batch-size", metavar="N", type=int, default=32, help="sequences decoded together (default: %(default)s)"
    )
    audit.add_argument("--template", metavar="FILE", help="Jinja chat template, for a model without one")
    audit.add_argument("--dtype", help="e.g. float32, bfloat16 (default: float32 on a CPU, else the checkpoint's)")
    audit.add_argument("--device", help="e.g. cpu, cuda (default: an accelerator if there is one)")
    audit.add_argument("--revision", help="of a hub id")
    audit.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    audit.add_argument("--quiet", action="store_true", help="no progress bars")
    audit.set_defaults(run=_audit)

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


def _schemes(arguments: argparse.Namespace) -> int:
    from kvgeom.quant.presets import scheme_rows

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
    # What is wrong with the input is said before torch is imported and a model loaded.
    from kvgeom.quant.scheme import Scheme, check_bits

    for bits in (*arguments.bits, arguments.scan_bits):
        check_bits(bits)
    if arguments.scan_bits == 16:
        raise InputError("--scan-bits 16 was asked, but 16 bits round nothing; give 2-8")
    for name in ("new_tokens", "batch_size"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(arguments, name)} was asked; give a positive number")
    scheme = Scheme.parse(f"int4-{arguments.scheme}")
    prompts = kvgeom.load_prompts(arguments.prompts)
    if arguments.limit is not None:
        prompts = prompts.take(arguments.limit)
    from kvgeom.quant.placement import Placement

    result = kvgeom.audit(
        arguments.model,
        arguments.out,
        prompts=prompts,
        scheme=scheme,
        curve_bits=tuple(arguments.bits),
        bits=arguments.scan_bits,
        placement=Placement.paper() if arguments.placement == "paper" else Placement(),
        max_new_tokens=arguments.new_tokens,
        batch_size=arguments.batch_size,
        progress=not arguments.quiet,
        template=arguments.template,
        dtype=arguments.dtype,
        device=arguments.device,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(f"\n{result.verdict.headline}\n")
    for sentence in result.verdict.sentences:
        print(f"  - {sentence}")
    folder = Path(arguments.out)
    print(f"\nreport: {(folder / 'report.html').resolve()}\nnumbers: {(folder / 'audit.json').resolve()}")
    return 0
