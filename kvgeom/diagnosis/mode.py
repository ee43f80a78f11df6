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
    "language lost",
    "conflicting",
    "undetermined",
]
MODES: tuple[ModeName, ...] = get_args(ModeName)
Pattern = Literal["no critical layer", "concentrated", "distributed-early", "ultra-distributed", "hyper-vulnerable"]
#: A mode is named if its posterior probability is at least this.
SURE = 0.9
#: What a mode's shares are shares of: draws from the posterior, and moved thresholds.
SHARES = ("posterior", "thresholds")


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
    """The failure mode of a model under a quantized cache. Made by :func:`~kvgeom.diagnosis.findings.mode_of`.

    ``data`` has over ``finding`` (a number) the variables ``name``, ``value`` (what came out, as text) and ``decisive``
    (whether it decides the mode), ``speaks_for`` over (finding, mode), and ``share`` over (basis, mode): how sure the name
    is, the posterior probability of each mode (``"posterior"``) and the share of moved borders under which it is named
    (``"thresholds"``).

    ``meta`` holds ``name`` (one of :data:`ModeName`), ``reason`` (why it is named, with its numbers), ``otherwise`` (what would
    have made it say otherwise), ``pattern`` (how the damage is spread over layers, or None) and ``prescription`` (what the
    paper's decision tree advises for this mode) and ``sure`` (:data:`SURE`).
    """

    kind: ClassVar[str] = "mode"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "findings": ("finding",),
        "speaks_for": ("finding", "mode"),
        "shares": ("basis", "mode"),
    }

    @property
    def likeliest(self) -> tuple[str, float]:
        """The mode with most of the posterior, and its probability; it is named only where that is enough."""
        return max(self.shares["posterior"].items(), key=lambda item: item[1])

    @classmethod
    def of(
        cls,
        name: ModeName,
        reason: str,
        otherwise: str,
        pattern: Pattern | None,
        findings: Sequence[Finding],
        prescription: str,
        shares: Mapping[str, Mapping[ModeName, float]],
    ) -> Mode:
        """A mode from its findings, and how sure its name is."""
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
                "share": (
                    ("basis", "mode"),
                    np.array([[shares[kind].get(mode, 0.0) for mode in MODES] for kind in SHARES]),
                ),
            },
            coords={"finding": np.arange(len(findings)), "mode": list(MODES), "basis": list(SHARES)},
        )
        meta = {
            "name": name,
            "reason": reason,
            "otherwise": otherwise,
            "pattern": pattern,
            "prescription": prescription,
            "sure": SURE,
        }
        return cls(data, meta)

    @property
    def name(self) -> ModeName:
        """The mode."""
        name: ModeName = self.meta["name"]
        return name

    @property
    def reason(self) -> str:
        """Why it is named, with its numbers."""
        return str(self.meta["reason"])

    @property
    def otherwise(self) -> str:
        """What would have made it say otherwise."""
        return str(self.meta["otherwise"])

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
        """Share of each mode that comes out at all, of draws from the posterior and of moved thresholds, the largest first."""
        found: dict[str, dict[str, float]] = {}
        for kind in SHARES:
            row = self.data.share.sel(basis=kind)
            order = sorted(MODES, key=lambda mode: -float(row.sel(mode=mode)))
            found[kind] = {mode: float(row.sel(mode=mode)) for mode in order if float(row.sel(mode=mode)) > 0}
        return found

    @property
    def probability(self) -> float:
        """Posterior probability of the mode; of an undetermined one, that of the likeliest."""
        return max(self.shares["posterior"].values())

    @property
    def evidence(self) -> tuple[str, ...]:
        """The reason, what would change the name, and all findings, each a sentence."""
        others = [self.otherwise] if self.otherwise else []
        return (self.reason, *others, *(finding.sentence for finding in self.findings))

    def summary(self) -> str:
        return f"{self.name}: {self.reason}"

    def to_text(self) -> str:
        """The mode, its evidence, and how sure it is."""
        parts = [f"Failure mode: {self.name}\n" + "\n".join(f"  - {sentence}" for sentence in self.evidence)]
        for kind, what in zip(SHARES, ("Posterior probability", "Named under moved thresholds"), strict=True):
            parts.append(f"{what}: " + ", ".join(f"{n} {s:.0%}" for n, s in self.shares[kind].items() if s >= 0.005))
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as in ``audit.json``."""
        findings = [
            {"name": f.name, "value": f.value, "speaks_for": list(f.speaks_for), "decisive": f.decisive}
            for f in self.findings
        ]
        named = {name: getattr(self, name) for name in ("name", "reason", "otherwise", "pattern")}
        return {
            **named,
            "findings": findings,
            "prescription": self.prescription,
            "shares": self.shares,
            "evidence": list(self.evidence),
        }
