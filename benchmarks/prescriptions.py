"""What `fix` prescribes for every real model at hand, proven on requests that did not choose it.

Run:  python -m benchmarks.prescriptions [--models gemma smollm2] [--bits 4] [--out DIR]

Prints one row a model, as Markdown. Models that do not refuse by themselves go on as the examples of `benchmarks.real` do.
With --out the reports are kept, and an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import kvgeom
from benchmarks.real import REAL
from kvgeom.report.fix import Fix

COLUMNS = ("model", "mode", "refused", "unmitigated lost", "chosen", "lost", "recovery", "memory", "verdict")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(REAL), default=list(REAL))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        folder = options.out / name if options.out else None
        found = kvgeom.fix(REAL[name](), folder, bits=options.bits)
        print(f"{name}\n\n{found.to_text(folder)}\n", flush=True)
        rows.append(row(found))
    print("\n".join("| " + " | ".join(cells) + " |" for cells in (COLUMNS, ("---",) * len(COLUMNS), *rows)))


def row(found: Fix) -> tuple[str, ...]:
    """Cells of the table for one model."""
    proof, plan = found.verification, found.plan
    without, chosen = (proof.data.sel(recipe=name) for name in ("unmitigated", "chosen"))
    return (
        str(found.settings.get("model", proof.meta.get("model"))),
        str(plan.mode),
        str(proof.meta["refused"]),
        lost(without),
        plan.chosen.name,
        lost(chosen),
        str(proof.recovery or ""),
        f"{float(chosen.memory_overhead):+.1%}",
        proof.status,
    )


def lost(at) -> str:  # type: ignore[no-untyped-def]
    """Refusals lost under one recipe, and how."""
    return f"{int(at.flips)} ({int(at.flips_complied)} comply, {int(at.flips_degenerate)} broken)"


if __name__ == "__main__":
    main()
