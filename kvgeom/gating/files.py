"""The files of a gate: for people, for pipelines, and to be read back."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from kvgeom.evaluation.fidelity import FIDELITY, TextFidelity
from kvgeom.folders import report_folder
from kvgeom.gating import text
from kvgeom.gating.compare import BASELINE, CANDIDATE, REPEAT
from kvgeom.gating.config import ASKED
from kvgeom.paths import write_whole
from kvgeom.results import plain

if TYPE_CHECKING:
    from kvgeom.gating.result import Change, Gate

#: Version of the layout of gate.json; gate.schema.json describes it.
VERSION = 2
_SARIF = "https://json.schemastore.org/sarif-2.1.0.json"


def write(gate: Gate, out: str | Path) -> Path:
    """Write all files into a folder; returns it."""
    from kvgeom.gating.page import render

    folder = report_folder(out, "gate")
    contents = {
        "gate.json": json.dumps(record(gate), indent=1, allow_nan=False) + "\n",
        "gate.md": gate.to_markdown(),
        "junit.xml": junit(gate),
        "gate.sarif": json.dumps(sarif(gate), indent=1) + "\n",
        "report.html": render(gate),
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
    gate.save(folder / "gate.nc")
    return folder


def schema() -> dict[str, Any]:
    """JSON schema of ``gate.json``."""
    found: dict[str, Any] = json.loads(files("kvgeom.gating").joinpath("gate.schema.json").read_text(encoding="utf-8"))
    return found


def record(gate: Gate) -> dict[str, Any]:
    """What ``gate.json`` holds."""
    found = gate.comparison
    share, low, high = found.share
    rate, (rate_low, rate_high) = gate.flip_rate
    answers = gate.to_frame().to_dict("records")
    content: dict[str, Any] = {
        "gate_version": VERSION,
        "verdict": {
            "decision": gate.decision,
            "status": gate.status,
            "headline": text.headline(gate),
            "sentences": text.sentences(gate),
            "refusals_needed": found.refusals_needed() if gate.decision == "too few" else None,
        },
        "servers": gate.about,
        "settings": {
            name: gate.meta.get(name)
            for name in (
                *("tolerance", "judge", *ASKED),
                *("concurrency", "seconds", "created", "versions"),
            )
        },
        "prompts": gate.meta["prompts"],
        "refusals": {
            **{
                "both": found.both,
                "lost": found.lost,
                "gained": found.gained,
                "baseline": int(gate.refused(BASELINE).sum()),
            },
            **{"candidate": int(gate.refused(CANDIDATE).sum()), "lost_as": gate.flips},
            **{
                "net_share": share,
                "net_share_interval_90": [low, high],
                "p_worse": found.worse,
                "p_not_worse": found.not_worse,
            },
            **{"flip_rate": rate, "flip_rate_interval_95": [rate_low, rate_high]},
        },
        "over_refusal": _change(gate.over_refusal),
        "degenerate": _change(gate.degenerate),
        "taken_back": _change(gate.taken_back),
        "noise": None
        if gate.noise is None
        else {
            "lost": gate.noise.lost,
            "gained": gate.noise.gained,
            "diverged": gate.diverged(REPEAT),
            "margin_lost": gate.margin_lost(REPEAT),
        },
        "diverged": gate.diverged(),
        "margin_lost": gate.margin_lost(),
        "text": {
            "tokens": gate.meta["text"]["tokens"],
            **{name: _text(gate.text_fidelity(name)) for name in (CANDIDATE, REPEAT)},
        },
        "proof": dict(zip(("status", "reason"), gate.proof, strict=True)),
        "answers": answers,
    }
    plain_content: dict[str, Any] = plain(content)
    return plain_content


def _text(found: TextFidelity | None) -> dict[str, Any] | None:
    """How text is read, with 95 % intervals."""
    if found is None:
        return None
    return {
        name: {"value": each.value, "interval_95": [each.low, each.high]}
        for name, each in zip(FIDELITY, (found.perplexity_ratio, found.kl, found.top1), strict=True)
    }


def _change(change: Change | None) -> dict[str, Any] | None:
    return None if change is None else {**vars(change), "p": change.p}


def junit(gate: Gate) -> str:
    """JUnit XML: a test for each of the baseline's refusals, which fails where it is lost, and one for the verdict.

    Single losses of a gate that passes, or cannot tell, are skipped tests: they are shown, and fail nothing.
    """
    refused, kept = gate.refused(BASELINE), gate.refused(CANDIDATE)
    lost = {int(each["prompt"]): each for each in text.flipped(gate)}
    requests = [str(request) for request in gate.data.request.values]
    verdict = {"pass": 0, "fail": 1, "too few": 1}[gate.decision]
    failures = (len(lost) if gate.decision == "fail" else 0) + verdict
    suite = ElementTree.Element(
        "testsuite", {"name": "kvgeom gate", "tests": str(int(refused.sum()) + 1), "errors": "0"}
    )
    suite.set("failures", str(failures))
    suite.set("skipped", str(0 if gate.decision == "fail" else len(lost)))
    suite.set("time", f"{gate.meta['seconds']:.1f}")
    case = ElementTree.SubElement(suite, "testcase", {"classname": "kvgeom.gate", "name": "verdict"})
    if verdict:
        _child(
            case,
            "failure",
            {"message": _xml(text.headline(gate)), "type": gate.decision},
            "\n".join(text.sentences(gate)),
        )
    for number in range(len(refused)):
        if not refused[number]:
            continue
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "kvgeom.gate.refusal", "name": _xml(f"{number}: {requests[number]}"[:200])}
        )
        if not kept[number]:
            found = lost[number]
            what = {"message": _xml(f"refusal lost: {found['label']} ({found['reason']})")}
            said = f"before: {found['before']}\nafter: {found['after']}"
            _child(case, "failure" if gate.decision == "fail" else "skipped", what, said)
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _child(parent: ElementTree.Element, name: str, attributes: dict[str, str], content: str) -> None:
    ElementTree.SubElement(parent, name, attributes).text = _xml(content)


def _xml(content: str) -> str:
    """Text without the characters that XML has not."""
    return "".join(
        c if c in "\t\n" or (c >= " " and not 0xD800 <= ord(c) <= 0xDFFF and c not in "\ufffe\uffff") else "\ufffd"
        for c in content
    )


def sarif(gate: Gate) -> dict[str, Any]:
    """SARIF 2.1.0: a result for the verdict, unless it passes, and one for each refusal that is lost."""
    level = {"pass": "note", "fail": "error", "too few": "warning"}[gate.decision]
    results = []
    if gate.decision != "pass":
        results.append(_result("verdict", level, text.headline(gate), "verdict"))
    for each in text.flipped(gate):
        message = f"A refusal is lost ({each['label']}): {each['request']}"
        results.append(_result("refusal-lost", level, message, f"prompt {each['prompt']}"))
    rules = [
        {
            "id": "verdict",
            "shortDescription": {"text": "The candidate is not shown to keep the refusals of the baseline"},
        },
        {
            "id": "refusal-lost",
            "shortDescription": {"text": "A request that the baseline refuses is not refused"},
        },
    ]
    driver = {"name": "kvgeom", "version": gate.meta["versions"]["kvgeom"], "rules": rules}
    return {"$schema": _SARIF, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}


def _result(rule: str, level: str, message: str, where: str) -> dict[str, Any]:
    return {
        "ruleId": rule,
        "level": level,
        "message": {"text": message},
        "locations": [
            {
                "physicalLocation": {"artifactLocation": {"uri": "gate.json"}, "region": {"startLine": 1}},
                "logicalLocations": [{"name": where, "kind": "member"}],
            }
        ],
    }
