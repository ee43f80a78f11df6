"""What the rows of :mod:`benchmarks.organisms` say: tables, and the sentences with counts, whatever came out.

Run:  make certificate        (or: python -m benchmarks.certificate)

Written between markers in docs/organisms.md, from docs/organisms.json; `make organisms` measures anew and then does
the same. Nothing that is counted is written by hand, so that no outcome makes a page untrue.
"""

from __future__ import annotations

import itertools
import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from kvgeom.diagnosis.mode import MODES, SURE
from kvgeom.diagnosis.taxonomy import FIXABLE
from kvgeom.stats import WRONG, wilson
from kvgeom.words import counted, listed

Rows = Sequence[Mapping[str, Any]]
ROOT = Path(__file__).parents[1]
ROWS = ROOT / "docs" / "organisms.json"
#: Between these stands what is generated.
BEGIN, END = "<!-- certificate: begin -->", "<!-- certificate: end -->"
#: Caches that are tried whatever the mode.
ALWAYS = {"always group-64": "sym-group64", "always per-channel": "sym-channel", "always center": "sym-tensor+center"}
OURS, SEARCHED = "what the mode prescribes", "measured search"
#: Borders of the bins of the calibration curve, and of loudness.
BINS, LOUD = (0.0, 0.5, 0.7, 0.9, 0.99, 1.0), (0.125, 0.25, 0.5, 1.0)
UNNAMED, LANGUAGE, BORDER = "undetermined", "language lost", "is on a border"


def write(rows: Rows) -> None:
    """Write what the rows say into the page."""
    for page, text in pages(rows).items():
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        page.write_text(before + text + rest.partition(END)[2], encoding="utf-8")


def pages(rows: Rows) -> dict[Path, str]:
    """By page, what stands in it, markers included."""
    texts = {
        ROOT / "docs" / "organisms.md": f"{tables(rows)}\n\n{claims(rows)}",
    }
    return {page: f"{BEGIN}\n{text}\n{END}" for page, text in texts.items()}


def calibration(rows: Rows) -> tuple[int, int, float]:
    """Of the modes that are likely enough to be named, how many are true, how many there are, and the p-value.

    That of an exact binomial test, one-sided, of their being true in :data:`~kvgeom.diagnosis.mode.SURE` of all cases. Rows
    whose truth is on a border do not count.
    """
    sure = [row for row in _known(rows) if max(row["posterior"].values()) >= SURE]
    right = sum(_likeliest(row) == row["true"] for row in sure)
    p = float(binomtest(right, len(sure), SURE, alternative="less").pvalue) if sure else 1.0
    return right, len(sure), p


def claims(rows: Rows) -> str:
    """What the tables say in words, as a list."""
    right, sure, p = calibration(rows)
    unsure = [row for row in _known(rows) if max(row["posterior"].values()) < SURE]
    wrong = [row for row in unsure if _likeliest(row) != row["true"]]
    each = [f"{max(row['posterior'].values()):.0%} {_likeliest(row)}, and it is {row['true']}" for row in wrong]
    by_mode = [
        f"{name} {sum(row['found'] == name for row in own)} of {len(own)}"
        for name in MODES
        if (own := [row for row in _known(rows) if row["true"] == name])
    ]
    points = [
        _named(rows),
        f"Of {sure} modes with a probability of {SURE:.0%} or more {right} are true. That they are in {SURE:.0%} of all cases is "
        f"{'rejected' if p < WRONG else 'not rejected'} (exact binomial test, one-sided, p = {p:.2g}). Of {len(unsure)} likeliest "
        f"modes with less, which are not named, {len(wrong)} {'is' if len(wrong) == 1 else 'are'} wrong"
        + (f" ({'; '.join(each)})." if each else "."),
        _prescriptions(rows),
        f"Named rightly, by what is true: {', '.join(by_mode)}. {_absent(rows)}.",
    ]
    return "\n".join(_wrapped(f"- {point}", "  ") for point in points)


def _named(rows: Rows) -> str:
    """How many modes were named, how many rightly, and how many of them are the loss of language."""
    named = [row for row in _made(rows) if row["found"] != UNNAMED]
    known = [row for row in named if row["true"] is not None]
    wrong = Counter((row["found"], row["true"]) for row in known if row["found"] != row["true"])
    errors = "".join(
        f"; {count} named {found} {'is' if count == 1 else 'are'} {true}" for (found, true), count in wrong.items()
    )
    border = len(named) - len(known)
    lost = [row for row in known if row["found"] == LANGUAGE]
    other = [row for row in known if row["found"] != LANGUAGE]
    return (
        f"Of {len(rows)} organisms a mode was named for {len(named)}, {_rightly(known)}{errors}"
        + (f"; of {border} the truth is on a border" if border else "")
        + f". {len(lost)} of them were called *{LANGUAGE}*, for which broken text suffices; of the other {len(other)}, "
        f"{_rightly(other)}."
    )


def _rightly(rows: Rows) -> str:
    right = sum(row["found"] == row["true"] for row in rows)
    return f"{right} rightly{_ends(right, len(rows))}"


def _ends(some: int, of: int) -> str:
    """The interval of a count of some in brackets; nothing for none."""
    low, high = wilson(some, of)
    return f" (95 %: {100 * low:.0f} to {100 * high:.0f} %)" if of else ""


def _prescriptions(rows: Rows) -> str:
    """How many fixes were prescribed, and how many of them work, where nothing can be fixed, too."""
    given = {truth: [r for r in own if r["found"] in FIXABLE] for truth, own in _by_truth(_made(rows)).items()}
    tried = given["has a fix"] + given["has no fix"]
    works, vain = sum(map(_works, tried)), len(given["has no fix"])
    if vain:
        nothing = (
            f"{vain} of these organisms {'has' if vain == 1 else 'have'} no fix, which counts as one that does not work"
        )
    else:
        nothing = "none was prescribed where nothing can be fixed"
    return (
        f"A fix was prescribed for {counted(len(tried), 'organism')} whose truth is known, and takes away more than half of the loss "
        f"in {works}{_ends(works, len(tried))}; {nothing}."
    )


def _counts(rows: Rows) -> dict[str, int]:
    """Where the truth has a fix: how often the cache that a rule chooses takes away more than half of the loss."""
    lossy = [row["recovery"] for row in _known(rows) if "recovery" in row]
    return {rule: sum((row.get(rule) or 0) > 0.5 for row in lossy) for rule in (OURS, *ALWAYS, SEARCHED)}


def _absent(rows: Rows) -> str:
    absent = [f"*{name}*" for name in MODES if name != UNNAMED and all(row["true"] != name for row in _known(rows))]
    return f"Did not come out: {listed(absent)}" if absent else "Every mode came out"


def _likeliest(row: Mapping[str, Any]) -> str:
    return str(max(row["posterior"], key=row["posterior"].get))


def _made(rows: Rows) -> list[Mapping[str, Any]]:
    return [row for row in rows if "error" not in row]


def _known(rows: Rows) -> list[Mapping[str, Any]]:
    return [row for row in _made(rows) if row["true"] is not None]


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def tables(rows: Rows) -> str:
    """What came of what was planted, calibration curve, confusion matrix, prescriptions and what they cost, in Markdown."""
    made, known = _made(rows), _known(rows)
    seeds = ", ".join(sorted({str(row["seed"]) for row in rows}))
    opening = (
        f"Seed {seeds}: {len(rows)} organisms, of which {len(rows) - len(made)} could not be planted and {len(made) - len(known)} "
        f"are on a border even on the unseen prompts. What came of what was planted, and whether the diagnosis named it:"
    )
    about = f"How sure the diagnosis was, and how often it was right, for the {len(known)} of which the truth is known:"
    parts = [
        opening,
        _planted(made),
        _grades(made),
        about,
        _calibration(known),
        _confusion(known),
        _prescribed(made),
        _costs(known),
    ]
    return "\n\n".join(parts)


def _planted(rows: Rows) -> str:
    """What was planted, what is true of it, and what was said."""
    lines = ["| planted | organisms | true | named, rightly | named, wrongly |", "|---|---:|---|---:|---:|"]
    for kind in dict.fromkeys(row["planted"] for row in rows):
        own = [row for row in rows if row["planted"] == kind]
        true = Counter(row["true"] or "on a border" for row in own)
        said = [row for row in own if row["true"] and row["found"] != "undetermined"]
        right = sum(row["found"] == row["true"] for row in said)
        what = ", ".join(f"{name} {count}" for name, count in true.most_common())
        lines.append(f"| {kind} | {len(own)} | {what} | {right} | {len(said) - right} |")
    return "\n".join(lines)


def _grades(rows: Rows) -> str:
    """What organisms of outliers lose of the unseen requests, by the loudest outlier in them."""
    lines = [
        "| loudest outlier | organisms | at most a tenth comply or break | in between | more than nine tenths |",
        "|---|---:|---:|---:|---:|",
    ]
    loud = [
        (
            max(part["loudness"] for part in row["parts"]),
            row.get("broken", 0) + row.get("loss", 0) * (1 - row.get("broken", 0)),
        )
        for row in rows
        if row["parts"] and row["parts"][0]["change"] != "jitter"
    ]
    for low, high in itertools.pairwise(LOUD):
        lost = [share for size, share in loud if low <= size < high or size == high == LOUD[-1]]
        few, most = sum(share <= 0.1 for share in lost), sum(share > 0.9 for share in lost)
        if lost:
            lines.append(f"| {low:g} to {high:g} | {len(lost)} | {few} | {len(lost) - few - most} | {most} |")
    return "\n".join(lines)


def _calibration(rows: Rows) -> str:
    lines = ["| probability of the likeliest mode | organisms | it is the true one | 95 % |", "|---|---:|---:|---|"]
    for low, high in itertools.pairwise(BINS):
        chosen = [row for row in rows if low <= max(row["posterior"].values()) < (high if high < 1 else 2)]
        right = sum(_likeliest(row) == row["true"] for row in chosen)
        if chosen:
            ci = wilson(right, len(chosen))
            lines.append(f"| {low:.0%} to {high:.0%} | {len(chosen)} | {right} | {ci[0]:.0%} to {ci[1]:.0%} |")
    return "\n".join(lines)


def _confusion(rows: Rows) -> str:
    names = [name for name in MODES if any(name in (row["true"], row["found"]) for row in rows)]
    lines = [
        "| true | " + " | ".join(names) + " | right where one is named | 95 % |",
        "|---|" + "---:|" * (len(names) + 1) + "---|",
    ]
    for true in names:
        found = [row["found"] for row in rows if row["true"] == true]
        named = [name for name in found if name != "undetermined"]
        if found:
            counts = " | ".join(str(found.count(name)) for name in names)
            lines.append(f"| {true} ({len(found)}) | {counts} | {_share(named.count(true), len(named))} |")
    return "\n".join(lines)


def _share(some: int, of: int) -> str:
    """A count of some, and its interval, as two cells."""
    if not of:
        return "0 of 0 | "
    low, high = wilson(some, of)
    return f"{some} of {of} | {low:.0%} to {high:.0%}"


def _prescribed(rows: Rows) -> str:
    """What became of the fixes that were prescribed, where the truth has a fix, where it has none, and where it is not known."""
    lines = ["| the truth | organisms | a fix was prescribed | it works | it does not |", "|---|---:|---:|---:|---:|"]
    for truth, own in _by_truth(rows).items():
        given = [row for row in own if row["found"] in FIXABLE]
        works = sum(map(_works, given))
        what = " | " if truth == BORDER else f"{works} | {len(given) - works}"
        lines.append(f"| {truth} | {len(own)} | {len(given)} | {what} |")
    return "\n".join(lines)


def _by_truth(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {"has a fix": [], "has no fix": [], BORDER: []}
    for row in rows:
        found[BORDER if row["true"] is None else "has a fix" if row["true"] in FIXABLE else "has no fix"].append(row)
    return found


def _works(row: Mapping[str, Any]) -> bool:
    """Whether the prescribed fix takes away more than half of the loss; where the truth has no fix, none does."""
    return bool((row.get("recovery", {}).get(OURS) or 0) > 0.5)


def _costs(rows: Rows) -> str:
    """How often the cache that a rule chooses takes away more than half of the loss, where there is one to take away."""
    lossy = [row for row in rows if "recovery" in row]
    lines = [
        "| cache | tried | takes away more than half of the loss | 95 % | less than nothing |",
        "|---|---:|---:|---|---:|",
    ]
    for rule in (OURS, *ALWAYS, SEARCHED):
        found = [row["recovery"][rule] for row in lossy if row["recovery"].get(rule) is not None]
        works = _counts(rows)[rule]
        if found:
            ci = wilson(works, len(found))
            lines.append(
                f"| {rule} | {len(found)} of {len(lossy)} | {works} | {ci[0]:.0%} to {ci[1]:.0%} | {sum(v < 0 for v in found)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    write(json.loads(ROWS.read_text()))
