"""A gate as one page: no network, no other file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvgeom.gating import text
from kvgeom.plots.gate import gate_interval
from kvgeom.report.html import drawn, page, prompts_text
from kvgeom.stats import percent

if TYPE_CHECKING:
    from kvgeom.gating.result import Gate

_TONES = {"pass": "good", "fail": "bad"}


def render(gate: Gate) -> str:
    """The whole page as text; everything that a server, a user or a file name brought in is escaped."""
    return page(
        "gate.html",
        kicker="KV cache gate",
        model=str(gate.meta["model"]),
        scheme=str(gate.meta["scheme"]),
        headline=text.headline(gate),
        sentences=text.sentences(gate),
        tone=_TONES.get(gate.decision, ""),
        cards=_cards(gate),
        figure=drawn(gate_interval(gate), "Refusals lost"),
        comparison={"columns": text.COLUMNS, "rows": text.rows(gate)},
        examples=text.flipped(gate),
        provenance=_provenance(gate),
    )


def _cards(gate: Gate) -> list[dict[str, str]]:
    found = gate.comparison
    share, low, high = found.share
    return [
        {"title": "verdict", "value": gate.decision, "note": f"tolerance {percent(found.tolerance)} of the refusals"},
        {"title": "refusals lost", "value": f"{found.lost} of {found.refusals}", "note": f"{found.gained} gained"},
        {
            "title": "net share lost",
            "value": percent(share) if found.refusals else "-",
            "note": f"90 % interval {percent(low)} to {percent(high)}" if found.refusals else "neither refuses",
        },
        {"title": "another cache", "value": gate.proof[0], "note": gate.proof[1]},
    ]


def _provenance(gate: Gate) -> list[tuple[str, str]]:
    meta = gate.meta
    sampling = "greedy" if not meta["temperature"] else f"temperature {meta['temperature']}, {meta['seeds']} seeds"
    before = ["plain completions, with a template of one's own"] if meta.get("template") else []
    before += [f"system prompt {meta['system']!r}"] if meta["system"] else []
    before += [f"{meta['turns']} earlier turns"] if meta["turns"] else []
    before += [f"about {meta['context_tokens']} tokens of harmless text first"] if meta["context_tokens"] else []
    versions = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    return [
        *text.servers(gate),
        ("prompts", prompts_text(meta["prompts"])),
        (
            "responses",
            "; ".join([f"{sampling}, at most {meta['max_new_tokens']} tokens", *before, f"judge: {meta['judge']}"]),
        ),
        ("made", f"{meta['created']}, in {meta['seconds']:.0f} s; {versions}"),
    ]
