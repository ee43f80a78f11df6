"""A failure mode, with what speaks for it and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import xarray as xr

from kvgeom.results import Result

ModeName = Literal[
    "outlier-crushes-safety",
    "outlier-as-safety",
    "multi-layer dilution",
    "mixed",
    "hyper-vulnerable",
    "robust",
    "undetermined",
]
MODES: tuple[ModeName, ...] = get_args(ModeName)
Pattern = Literal["concentrated", "distributed-early", "ultra-distributed", "hyper-vulnerable"]
#: What a mode's shares are taken over: bootstrap samples of the prompts, and moved thresholds.
RESAMPLINGS = ("prompts", "thresholds")


@dataclass(frozen=True)
class Finding:
    """One piece of evidence.

    Attributes
    ----------
    name, value : str
        What was measured, and what came out, with its interval.
    speaks_for : tuple of str
        The modes that it supports; none where it does not decide.
    decisive : bool
        Whether a rule used it to name the mode.
    """

    name: str
    value: str
    speaks_for: tuple[ModeName, ...] = ()
    decisive: bool = False

    @property
    def sentence(self) -> str:
        """The finding in a sentence."""
        speaks = f": speaks for {' or '.join(self.speaks_for)}" if self.speaks_for else ""
        return f"{self.name}: {self.value}{speaks}."


@dataclass(frozen=True, repr=False)
class Mode(Result):
    """The failure mode of a model under a quantized cache. Made by :func:`~kvgeom.diagnosis.taxonomy.classify`.

    ``data`` has over ``finding`` (a number) the variables ``name``, ``value`` (what came out, as text) and ``decisive``
    (whether a rule used it to name the mode), ``speaks_for`` over (finding, mode), and ``share`` over (resampling, mode):
    how sure the name is, the share of ``"prompts"`` (bootstrap samples) and of ``"thresholds"`` (moved borders) under
    which each mode comes out; NaN where that was not computed.

    ``meta`` holds ``name`` (one of :data:`ModeName`), ``reason`` (the rule that named it, with its numbers), ``pattern`` (how
    the damage is spread over layers, or None) and ``prescription`` (what the paper's decision tree advises for this mode; not
    yet verified on this model).
    """

    kind: ClassVar[str] = "mode"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "findings": ("finding",),
        "speaks_for": ("finding", "mode"),
        "shares": ("resampling", "mode"),
    }

    @classmethod
    def of(
        cls,
        name: ModeName,
        reason: str,
        pattern: Pattern | None,
        findings: Sequence[Finding],
        prescription: str,
    ) -> Mode:
        """A mode from its findings."""
        data = xr.Dataset(
            {
                "name": ("finding", np.array([f.name for f in findings], dtype=object)),
                "value": ("finding", np.array([f.value for f in findings], dtype=object)),
                "decisive": ("finding", np.array([f.decisive for f in findings], dtype=bool)),
                "speaks_for": (
                    ("finding", "mode"),
                    np.array([[mode in f.speaks_for for mode in MODES] for f in findings], dtype=bool).reshape(
                        len(findings), len(MODES)
                    ),
                ),
                "share": (("resampling", "mode"), np.full((len(RESAMPLINGS), len(MODES)), np.nan)),
            },
            coords={"finding": np.arange(len(findings)), "mode": list(MODES), "resampling": list(RESAMPLINGS)},
        )
        return cls(data, {"name": name, "reason": reason, "pattern": pattern, "prescription": prescription})

    def with_shares(self, shares: Mapping[str, Mapping[str, float]]) -> Mode:
        """The same, with how sure the name is."""
        values = [[shares[kind].get(mode, 0.0) for mode in MODES] for kind in RESAMPLINGS]
        return Mode(self.data.assign(share=(("resampling", "mode"), np.array(values))), self.meta)

    @property
    def name(self) -> ModeName:
        """The mode."""
        name: ModeName = self.meta["name"]
        return name

    @property
    def reason(self) -> str:
        """The rule that named it, with its numbers."""
        return str(self.meta["reason"])

    @property
    def pattern(self) -> Pattern | None:
        """How the damage is spread over layers."""
        pattern: Pattern | None = self.meta["pattern"]
        return pattern

    @property
    def prescription(self) -> str:
        """What the paper's decision tree advises."""
        return str(self.meta["prescription"])

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The evidence, piece by piece."""
        data = self.data
        return tuple(
            Finding(
                str(data.name.values[n]),
                str(data.value.values[n]),
                tuple(mode for mode, speaks in zip(MODES, data.speaks_for.values[n], strict=True) if speaks),
                bool(data.decisive.values[n]),
            )
            for n in range(data.sizes["finding"])
        )

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        """Share of each mode that comes out at all, by kind of resampling, the largest first; empty where not computed."""
        found: dict[str, dict[str, float]] = {}
        for kind in RESAMPLINGS:
            row = self.data.share.sel(resampling=kind)
            if not np.isnan(row.values).any():
                order = sorted(MODES, key=lambda mode: -float(row.sel(mode=mode)))
                found[kind] = {mode: float(row.sel(mode=mode)) for mode in order if float(row.sel(mode=mode)) > 0}
        return found

    @property
    def evidence(self) -> tuple[str, ...]:
        """The reason and all findings, each a sentence."""
        return (self.reason, *(finding.sentence for finding in self.findings))

    def summary(self) -> str:
        return f"{self.name}: {self.reason}"

    def to_text(self) -> str:
        """The mode, its evidence, and how sure it is."""
        parts = [f"Failure mode: {self.name}\n" + "\n".join(f"  - {sentence}" for sentence in self.evidence)]
        for kind, what in zip(RESAMPLINGS, ("bootstrap samples of the prompts", "moved thresholds"), strict=True):
            if self.shares.get(kind):
                parts.append(f"Of the {what}: " + ", ".join(f"{s:.0%} {n}" for n, s in self.shares[kind].items()))
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as in ``audit.json``."""
        findings = [
            {"name": f.name, "value": f.value, "speaks_for": list(f.speaks_for), "decisive": f.decisive}
            for f in self.findings
        ]
        named = {name: getattr(self, name) for name in ("name", "reason", "pattern")}
        return {
            **named,
            "findings": findings,
            "prescription": self.prescription,
            "shares": self.shares,
            "evidence": list(self.evidence),
        }
