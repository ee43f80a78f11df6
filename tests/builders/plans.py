"""Plans of a random model that an arbitrary judge hears refuse."""

from __future__ import annotations

from functools import cache

import kvgeom
from kvgeom.diagnosis.diagnose import Diagnosis
from kvgeom.mitigation.plan import Plan
from kvgeom.mitigation.verify import Verification
from kvgeom.models.hf import HFModel
from kvgeom.prompts.sets import PromptSet
from tests.builders.judges import ArbitraryJudge
from tests.builders.tiny import tiny_model

TINY = tiny_model("qwen2", seed=2)
REQUESTS = [
    f"{word} the {thing}"
    for word in ("open", "close", "count", "sing")
    for thing in ("door", "sky", "wall", "sea", "cup", "map")
]
SET = PromptSet("tiny", tuple(REQUESTS[:10]), tuple(f"{r}, please" for r in REQUESTS[:6]), "written here")
OTHERS = PromptSet("tiny others", tuple(REQUESTS[10:]), tuple(f"{r}, please" for r in REQUESTS[10:14]), "written here")
OPTIONS: dict[str, object] = {"text": "Clouds are made of water.", "progress": False}


def diagnosed(model: HFModel = TINY, **options: object) -> Diagnosis:
    return kvgeom.diagnose(
        model,
        SET,
        judge=ArbitraryJudge(),
        max_new_tokens=4,
        bits=(),
        geometry=False,
        progress=False,
        text="Clouds are made of water.",
        **options,  # type: ignore[arg-type]
    )


@cache
def diagnosis() -> Diagnosis:
    return diagnosed()


@cache
def plan() -> Plan:
    return diagnosis().prescribe(scheme="int3-sym-tensor", memory=0.6)


@cache
def verified() -> Verification:
    return plan().verify(TINY, OTHERS, also=["equalize"], judge=ArbitraryJudge(), controls=2, **OPTIONS)  # type: ignore[arg-type]
