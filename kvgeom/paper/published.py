"""Numbers published in arXiv:2606.09864, as facts to compare with."""

from __future__ import annotations

from dataclasses import dataclass

from kvgeom.diagnosis.mode import ModeName, Pattern
from kvgeom.diagnosis.taxonomy import published_mode


@dataclass(frozen=True)
class PublishedModel:
    """One row of the paper's taxonomy.

    Attributes
    ----------
    name : str
    layers, critical_layer : int
    pcr : float
    pattern : str
        Its layer pattern, in the paper's words; empty where none is given.
    group64 : (float, float)
        Range of the flips that group-64 scales take away, as published for the models of this mode.
    mode : str
    """

    name: str
    layers: int
    critical_layer: int
    pcr: float
    pattern: str
    group64: tuple[float, float]
    mode: ModeName

    def named(self) -> ModeName:
        """The mode that the paper's rules name from these numbers."""
        return published_mode(self.pcr, _PATTERNS[self.pattern], self.group64)


#: "Front-heavy" says where damage lies, not how many layers are critical.
_PATTERNS: dict[str, Pattern | None] = {
    "": None,
    "front-heavy": None,
    "concentrated": "concentrated",
    "distributed-early": "distributed-early",
    "hyper-vulnerable": "hyper-vulnerable",
    "uniformly diffuse": "ultra-distributed",
}
_AS, _CRUSH, _SPREAD = (0.0, 0.36), (0.55, 0.92), (0.0, 0.76)

MODELS: tuple[PublishedModel, ...] = (
    PublishedModel("Qwen-2.5-7B", 28, 0, 0.15, "concentrated", _AS, "outlier-as-safety"),
    PublishedModel("Mistral-7B v0.2", 32, 0, 0.33, "", _AS, "outlier-as-safety"),
    PublishedModel("Yi-1.5-9B", 48, 16, 0.78, "", _CRUSH, "outlier-crushes-safety"),
    PublishedModel("DeepSeek-7B", 30, 17, 0.97, "front-heavy", _CRUSH, "outlier-crushes-safety"),
    PublishedModel("Gemma-2-9B", 42, 1, 1.00, "", _CRUSH, "outlier-crushes-safety"),
    PublishedModel("Phi-3.5-mini", 32, 2, 0.81, "hyper-vulnerable", _SPREAD, "multi-layer dilution"),
    PublishedModel("Llama-3.1-8B", 32, 2, 0.89, "distributed-early", _SPREAD, "multi-layer dilution"),
    PublishedModel("Mistral-Small-24B", 40, 14, 0.50, "uniformly diffuse", _SPREAD, "multi-layer dilution"),
)
