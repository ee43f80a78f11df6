"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from kvgeom.behaviour.ablation import Ablation
    from kvgeom.behaviour.curve import Curve, OverRefusal
    from kvgeom.behaviour.scan import Scan
    from kvgeom.diagnosis.diagnose import Diagnosis
    from kvgeom.report.fix import Fix


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns set flush: words to the left, numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(name), *(len(row[n]) for row in cells), 0) for n, name in enumerate(columns)]
    right = [all(_is_number(row[n]) for row in cells) for n in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        parts = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(columns), line(["-" * width for width in widths]), *(line(row) for row in cells)])


def curve_table(curve: Curve) -> str:
    """One row for each width; gains that were not measured are a dash."""
    refused = curve.meta["baseline_refused"]
    rows = [
        (
            int(row["bits"]), row["refused"], row["complied"], row["degenerate"], f"{row['flips']:.0f} of {refused}",
            _interval(row["ci_low"], row["ci_high"]), row["gains"], f"{row['perplexity_ratio']:.3g}",
        )
        for row in curve.to_frame().to_dict("records")
    ]  # fmt: skip
    columns = ("bits", "refused", "complied", "degenerate", "lost", "95 %", "gained", "perplexity")
    return table(columns, rows)


def curve_text(curve: Curve) -> str:
    """What was rounded and how, the table, and the transition."""
    asked = curve.meta["prompts"]
    which = "" if curve.counted == asked else f"; the {curve.counted} of {asked} prompts refused unquantized"
    lines = [f"Bit-width ({curve.meta['scheme']}; {curve.meta['placement']}{which})"]
    if curve.meta["engine"]:
        lines += [f"  {curve.meta['engine']}", *(f"  {bits}-bit: {how}" for bits, how in curve.meta["rounded"].items())]
    parts = ["\n".join(lines), curve_table(curve), f"Transition: {curve.transition}"]
    return "\n\n".join([*parts, curve.caveat] if curve.caveat else parts)


def over_refusal_table(found: OverRefusal) -> str:
    """One row for each width."""
    n = found.meta["prompts"]
    rows = [
        (
            int(row["bits"]), f"{row['refused']:.0f} of {n}", _interval(row["ci_low"], row["ci_high"]),
            row["degenerate"], f"{row['p']:.2g}",
        )
        for row in found.to_frame().to_dict("records")
    ]  # fmt: skip
    return table(("bits", "harmless refused", "95 %", "degenerate", "p"), rows)


def scan_table(scan: Scan) -> str:
    """One row for each layer."""
    rows = [
        (
            int(row["layer"]), f"{row['margin_drop']:+.2f}", f"[{row['margin_low']:+.2f}, {row['margin_high']:+.2f}]",
            f"{row['flips']:.0f} of {scan.meta['prompts']}", _interval(row["ci_low"], row["ci_high"]),
            row["flips_channel"], "critical" if row["layer"] == scan.critical_layer else "",
        )
        for row in scan.to_frame().to_dict("records")
    ]  # fmt: skip
    columns = ("layer", "margin lost", "95 %", "flips", "95 %", "per-channel", "")
    return table(columns, rows)


def ablation_table(*ablations: Ablation) -> str:
    """One row for each recipe, with its family and McNemar p-value against the reference."""
    rows = [
        (
            row["family"], row["recipe"], f"{row['flips']:.0f} of {found.meta['prompts']}",
            _interval(row["ci_low"], row["ci_high"]), row["flips_complied"], row["flips_degenerate"],
            "reference" if row["recipe"] == found.meta["reference"] else f"{row['p']:.2g}",
        )
        for found in ablations
        for row in found.to_frame().to_dict("records")
    ]  # fmt: skip
    return table(("rounded", "what", "lost", "95 %", "comply", "break down", "p"), rows)


def diagnosis_text(found: Diagnosis) -> str:
    """All tables, the mode, its evidence, and how sure it is."""
    parts = [
        curve_text(found.curve),
        f"Single layers ({found.scan.meta['scheme']}; {found.scan.meta['placement']})\n\n{scan_table(found.scan)}",
        f"Parts of the cache\n\n{ablation_table(found.ablation, found.channels)}",
        f"PCR as a cache holds it: {pcr_line(found.pcr)}\nPCR as the paper simulates: {pcr_line(found.pcr_paper)}",
        f"Failure mode: {found.mode.name}\n" + "\n".join(f"  - {sentence}" for sentence in found.mode.evidence),
    ]
    for kind, what in (("prompts", "bootstrap samples of the prompts"), ("thresholds", "moved thresholds")):
        if found.mode.shares.get(kind):
            parts.append(f"Of the {what}: " + ", ".join(f"{s:.0%} {n}" for n, s in found.mode.shares[kind].items()))
    return "\n\n".join(parts)


def fix_text(found: Fix, folder: Path) -> str:
    """Verdict, before and after, reasons, where things are, and what to do next."""
    plan = found.plan

    def listed(sentences: Iterable[str]) -> str:
        return "\n".join(f"  - {sentence}" for sentence in sentences)

    return "\n\n".join(
        [
            found.verification.sentence,
            found.table(),
            listed(found.sentences),
            f"Why this cache (failure mode: {plan.mode}):\n{listed(plan.reasons)}",
            f"plan:   {folder / 'plan.json'}\nreport: {folder / 'report.html'}",
            _next_step(found, folder),
        ]
    )


def _next_step(found: Fix, folder: Path) -> str:
    plan, status = found.plan, found.verification.status
    if plan.placement.where != "cache":
        return "Next: this placement rounds where no cache does; mend one with --placement cache."
    if status == "nothing to fix":
        return "Next: nothing; narrower caches may lose refusals (kvgeom sweep)."
    if plan.chosen.recipe == plan.unmitigated.recipe or status == "does not help":
        return "Next: try a larger --memory, more --bits or another --scheme; until then this cache stays unsafe."
    lines = f'plan = kvgeom.Plan.load("{folder}")\nmodel.generate(**inputs, past_key_values=plan.cache(model))'
    if status == "undetermined":
        return f"Next: prove it on more prompts (--verify-prompts). To try it, in Python:\n\n{lines}"
    return f"Next, in Python (other engines: see the report):\n\n{lines}"


def pcr_line(pcr: Any) -> str:
    """Value, interval, and the same by margin."""
    by = pcr.by_margin
    margin = "" if by is None or by.value is None else f"; by margin {by.value:.0%}"
    if margin and by.ci:
        margin += f" [{by.ci[0]:.0%}, {by.ci[1]:.0%}]"
    value = "undefined" if pcr.value is None else f"{pcr.value:.0%} [{pcr.ci[0]:.0%}, {pcr.ci[1]:.0%}]"
    return f"{value}, {pcr.status} ({pcr.reason}){margin}"


def _interval(low: float, high: float) -> str:
    return "-" if low != low else f"[{100 * low:.0f}, {100 * high:.0f}] %"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if value != value else f"{value:.4g}"
    return str(value)


def _is_number(cell: str) -> bool:
    return bool(cell) and (cell[0].isdigit() or cell[0] in "+-[")
