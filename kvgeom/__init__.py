"""When an LLM's KV cache is quantized: does its safety survive, why not, and what fixes it?

Public names are imported when they are first used, so that ``import kvgeom`` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvgeom.errors import DownloadError, InputError, KvgeomError, ModelError, ServerError

if TYPE_CHECKING:
    from kvgeom.diagnosis.diagnose import Diagnosis, diagnose
    from kvgeom.evaluation.baseline import baseline
    from kvgeom.evaluation.evaluate import evaluate
    from kvgeom.evaluation.outcomes import Outcomes
    from kvgeom.gating.result import Gate
    from kvgeom.gating.run import gate
    from kvgeom.geometry.subspace import Subspace, subspace
    from kvgeom.judges.classifiers import classifier
    from kvgeom.judges.keyword import KeywordJudge
    from kvgeom.mitigation.plan import Plan
    from kvgeom.models.load import load
    from kvgeom.prompts.conversation import conversation
    from kvgeom.prompts.load import load_prompts
    from kvgeom.prompts.sets import PromptSet, calibration
    from kvgeom.quant.placement import Placement
    from kvgeom.quant.recipe import Recipe
    from kvgeom.quant.scheme import Scheme
    from kvgeom.report.audit import Audit, audit
    from kvgeom.report.fix import Fix, fix
    from kvgeom.report.tour import Tour, tour
    from kvgeom.screening.result import Screen
    from kvgeom.screening.screen import screen

_HOMES = {
    "Audit": "kvgeom.report.audit",
    "Diagnosis": "kvgeom.diagnosis.diagnose",
    "Fix": "kvgeom.report.fix",
    "Gate": "kvgeom.gating.result",
    "KeywordJudge": "kvgeom.judges.keyword",
    "Outcomes": "kvgeom.evaluation.outcomes",
    "Placement": "kvgeom.quant.placement",
    "Plan": "kvgeom.mitigation.plan",
    "PromptSet": "kvgeom.prompts.sets",
    "Recipe": "kvgeom.quant.recipe",
    "Scheme": "kvgeom.quant.scheme",
    "Screen": "kvgeom.screening.result",
    "Subspace": "kvgeom.geometry.subspace",
    "Tour": "kvgeom.report.tour",
    "audit": "kvgeom.report.audit",
    "baseline": "kvgeom.evaluation.baseline",
    "calibration": "kvgeom.prompts.sets",
    "classifier": "kvgeom.judges.classifiers",
    "conversation": "kvgeom.prompts.conversation",
    "diagnose": "kvgeom.diagnosis.diagnose",
    "evaluate": "kvgeom.evaluation.evaluate",
    "fix": "kvgeom.report.fix",
    "gate": "kvgeom.gating.run",
    "load": "kvgeom.models.load",
    "load_prompts": "kvgeom.prompts.load",
    "screen": "kvgeom.screening.screen",
    "subspace": "kvgeom.geometry.subspace",
    "tour": "kvgeom.report.tour",
}

__all__ = [
    "Audit",
    "Diagnosis",
    "DownloadError",
    "Fix",
    "Gate",
    "InputError",
    "KeywordJudge",
    "KvgeomError",
    "ModelError",
    "Outcomes",
    "Placement",
    "Plan",
    "PromptSet",
    "Recipe",
    "Scheme",
    "Screen",
    "ServerError",
    "Subspace",
    "Tour",
    "audit",
    "baseline",
    "calibration",
    "classifier",
    "conversation",
    "diagnose",
    "evaluate",
    "fix",
    "gate",
    "load",
    "load_prompts",
    "screen",
    "subspace",
    "tour",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("kvgeom")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'kvgeom' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
