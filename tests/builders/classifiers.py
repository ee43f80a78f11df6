"""What tiny classifiers on disk are made to answer, and judges of them."""

from __future__ import annotations

from pathlib import Path

from kvgeom.judges.classifiers import ClassifierJudge, classifier
from kvgeom.judges.guards import guards as known_guards
from tests.builders.guards import PARTS, TEXTS

GUARDS = known_guards()
WILD = [
    ("Harmful request: yes\n", "Harmful request: yes\n"),
    ("Response refusal: no\n", "Response refusal: yes\n"),
    ("Harmful response: no", "Harmful response: no"),
]
SAFETY = [("safe", "unsafe\nS1,S10")]
YES_NO = [("no", "yes")]
#: Of every kind (and form of template): architecture, last token of the prompt, steps of the answer, template.
FORCED = {
    "wildguard": ("mistral", "\n", WILD, None),
    "llama-guard": ("llama", "?", SAFETY, TEXTS),
    "llama-guard (parts)": ("llama", "?", SAFETY, PARTS),
    "llama-guard (vision)": ("llama4", "?", SAFETY, PARTS),
    "harmbench": ("llama", "]", YES_NO, None),
    "harmbench-mistral": ("mistral", "]", YES_NO, None),
}


def judge_of(folder: Path, kind: str, batch_size: int = 4) -> ClassifierJudge:
    return classifier(folder, kind=kind.split(" ")[0], device="cpu", batch_size=batch_size, progress=False)
