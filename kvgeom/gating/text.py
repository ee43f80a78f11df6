"""A gate in words: a headline, what follows it, and tables for terminals and for pull requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvgeom.gating.compare import BASELINE, CANDIDATE, REPEAT
from kvgeom.stats import percent
from kvgeom.words import counted, text_table, times_text

if TYPE_CHECKING:
    from kvgeom.evaluation.fidelity import TextFidelity
    from kvgeom.gating.result import Change, Gate

COLUMNS = ("", "baseline", "candidate", "change", "p")
WORDS = {"pass": "PASS", "fail": "FAIL", "too few": "TOO FEW"}


def headline(gate: Gate) -> str:
    """The verdict in a line."""
    found = gate.comparison
    share, low, high = found.share
    if not found.refusals:
        return "TOO FEW: neither server refuses any of these prompts; ask others"
    changed = f"{found.lost} of {counted(found.refusals, 'refusal')} lost, {found.gained} gained"
    interval = f"net {percent(share)} [{percent(low)}, {percent(high)}], tolerance {percent(found.tolerance)}"
    return f"{WORDS[gate.decision]}: {changed} ({interval})"


def sentences(gate: Gate) -> list[str]:
    """What else there is to say, the most important first."""
    found, said = gate.comparison, []
    if gate.proof[0] in ("doubtful", "unproven"):
        said.append(f"The candidate is not shown to run another cache: {gate.proof[1]}.")
    if gate.decision == "pass" and found.worse <= 0.05:
        said.append(f"It is worse than the baseline (p = {found.worse:.2g}), by less than the tolerance.")
    if gate.decision == "too few" and found.refusals:
        said.append(_needed(gate))
    if found.lost:
        flips = ", ".join(f"{count} {label}" for label, count in gate.flips.items() if count)
        rate, (low, high) = gate.flip_rate
        said.append(
            f"Of the baseline's refusals {percent(rate)} are lost (95 % interval {percent(low)} to {percent(high)}): {flips}."
        )
    said.append(_noise(gate))
    if np.isfinite(gate.margin_lost()):
        said.append(
            f"Harmful prompts lose {gate.margin_lost():.2g} nats of refusal margin on average{_noise_margin(gate)}."
        )
    said += [*_likelihoods(gate), *_reading(gate)]
    said += [_more(change, what) for change, what in _beside(gate) if change is not None and change.p <= 0.05]
    if gate.proof[0] in ("stated", "seen"):
        said.append(f"Shown to run another cache: {gate.proof[1]}.")
    return [*said, *([str(gate.meta["caveat"])] if gate.meta.get("caveat") else [])]


def _needed(gate: Gate) -> str:
    needed = gate.comparison.refusals_needed()
    if needed is None:
        return "No number of refusals that one would ask decides this; choose another tolerance."
    more = counted(needed - gate.comparison.refusals, "more refusal")
    return f"About {more} would decide it, {needed} in all, if as large a share of them changes; a wider tolerance needs fewer."


def _noise(gate: Gate) -> str:
    diverged = f"{percent(gate.diverged())} of the responses differ from the baseline's"
    if gate.noise is None:
        return f"{diverged}; without noise floor, as the baseline was asked once."
    changed = gate.noise.lost + gate.noise.gained
    again = f"{percent(gate.diverged(REPEAT))} when the baseline is asked again"
    return f"{diverged}, {again}; its own answers tip {counted(changed, 'harmful prompt')}, the candidate's {gate.comparison.lost + gate.comparison.gained}."


def _noise_margin(gate: Gate) -> str:
    return "" if gate.noise is None else f" ({abs(gate.margin_lost(REPEAT)):.2g} when the baseline is asked again)"


def _likelihoods(gate: Gate) -> list[str]:
    before, after = (gate.likelihood(server) for server in (BASELINE, CANDIDATE))
    if not np.isfinite(after - before):
        return []
    return [
        f"A token of a response has {after:.2f} nats under the candidate that wrote it, {before:.2f} under the baseline that wrote its "
        "own: much less is a sign of broken text, which no server is asked to judge."
    ]


def _reading(gate: Gate) -> list[str]:
    found, again = gate.text_fidelity(), gate.text_fidelity(REPEAT)
    if found is None:
        return []
    noise = "" if again is None else f" ({_of_text(again)} when the baseline is asked again)"
    return [f"Of {gate.meta['text']['tokens']:,} tokens of plain text: {_of_text(found)}{noise}."]


def _of_text(found: TextFidelity) -> str:
    ratio, same, kl = found.perplexity_ratio, found.top1, found.kl
    return (
        f"perplexity {times_text(ratio.value, ratio.low, ratio.high)}, the same most likely token for {same.value:.1%}, KL divergence at "
        f"least {kl.value:.2g} nats a token"
    )


def _more(change: Change, what: str) -> str:
    return f"{what}: {change.candidate} with the candidate, {change.baseline} with the baseline (p = {change.p:.2g})."


def _beside(gate: Gate) -> list[tuple[Change | None, str]]:
    return [
        (gate.over_refusal, "More harmless requests are refused"),
        (gate.degenerate, "More responses are broken text"),
        (gate.taken_back, "More refusals are taken back"),
    ]


def rows(gate: Gate) -> list[tuple[str, str, str, str, str]]:
    """The main table: :data:`COLUMNS`."""
    found, harmful = gate.comparison, int(gate.harmful.sum())
    before, after = (int(gate.refused(server).sum()) for server in (BASELINE, CANDIDATE))
    lines = [
        (
            "harmful refused",
            f"{before} of {harmful}",
            f"{after} of {harmful}",
            f"-{found.lost} +{found.gained}",
            f"{found.worse:.2g}",
        )
    ]
    names = ("harmless refused", "broken text", "refused, then answered")
    for (change, _), name in zip(_beside(gate), names, strict=True):
        if change is not None:
            of = f" of {change.prompts}" if name != names[2] else ""
            changed = f"+{change.more} -{change.less}"
            lines.append((name, f"{change.baseline}{of}", f"{change.candidate}{of}", changed, f"{change.p:.2g}"))
    if gate.noise is not None:
        again = int(gate.refused(REPEAT).sum())
        changed = f"-{gate.noise.lost} +{gate.noise.gained}"
        lines.append(
            (
                "harmful refused, asked again",
                f"{before} of {harmful}",
                f"{again} of {harmful}",
                changed,
                f"{gate.noise.worse:.2g}",
            )
        )
    return lines


def servers(gate: Gate) -> list[tuple[str, str]]:
    """What the two are, in words."""
    found = []
    for role in (BASELINE, CANDIDATE):
        own = gate.about[role]
        engine = f" ({own['engine']} {own['version']})" if "engine" in own else f" (model {own['model']})"
        found.append((role, f"{own['server']}{engine}"))
    return found


def flipped(gate: Gate, most: int | None = None) -> list[dict[str, str]]:
    """Prompts whose refusal is lost, with both responses."""
    lost = np.flatnonzero(gate.harmful)[gate.refused(BASELINE) & ~gate.refused(CANDIDATE)]
    return [_side_by_side(gate, int(prompt)) for prompt in lost[:most]]


def _side_by_side(gate: Gate, prompt: int) -> dict[str, str]:
    data = gate.data.isel(prompt=prompt)
    labels = data.label.sel(server=CANDIDATE).values
    seed = int(np.flatnonzero(labels != "refused")[0]) if (labels != "refused").any() else 0
    data = data.isel(seed=seed)
    one, other = (data.sel(server=server) for server in (BASELINE, CANDIDATE))
    return {
        "prompt": str(prompt),
        "request": str(data.request.values),
        "before": str(one.text.values),
        "after": str(other.text.values),
        "label": str(other.label.values),
        "reason": str(other.reason.values),
    }


def text(gate: Gate) -> str:
    """Verdict and tables for a terminal."""
    lines = [headline(gate), "", text_table(COLUMNS, rows(gate)), ""]
    lines += [f"  - {sentence}" for sentence in sentences(gate)]
    lines += ["", *(f"{role + ':':<11}{what}" for role, what in servers(gate))]
    for each in flipped(gate, 5):
        lines += [
            "",
            f"[{each['label']}] {each['request']}",
            f"  before: {_short(each['before'])}",
            f"  after:  {_short(each['after'])}",
        ]
    return "\n".join(lines)


def markdown(gate: Gate) -> str:
    """Verdict and tables for a comment on a pull request; what servers wrote cannot leave its table."""
    lines = [f"### KV cache gate: {_escaped(headline(gate))}", "", *_table(COLUMNS, rows(gate)), ""]
    lines += [f"- {_escaped(sentence)}" for sentence in sentences(gate)]
    lines += [f"- {role}: {_escaped(what)}" for role, what in servers(gate)]
    examples = flipped(gate, 5)
    if examples:
        cells = [(e["request"], e["label"], _short(e["before"]), _short(e["after"])) for e in examples]
        lines += ["", "<details><summary>Refusals that are lost</summary>", ""]
        lines += [*_table(("request", "label", "before", "after"), cells), "", "</details>"]
    return "\n".join(lines) + "\n"


def _table(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *cells]
    return [f"| {' | '.join(_escaped(cell) if cell != '---' else cell for cell in line)} |" for line in lines]


def _escaped(text: str) -> str:
    """Text that Markdown and HTML leave as it is, in one line."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "\\`*_[]|@":
        flat = flat.replace(sign, f"&#{ord(sign)};")
    return flat


def _short(text: str, most: int = 200) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else f"{flat[:most]}..."
