"""What the decision tree of arXiv:2606.09864 prescribes, as a cache that can be tried."""

from __future__ import annotations

from dataclasses import replace

from kvgeom.behaviour.scan import Scan
from kvgeom.diagnosis.mode import ModeName
from kvgeom.diagnosis.taxonomy import PRESCRIPTIONS
from kvgeom.mitigation.candidates import Candidate, protect
from kvgeom.quant.recipe import Recipe, Schemes
from kvgeom.quant.scheme import Granularity, Scheme


def advised(mode: ModeName, scan: Scan, unmitigated: Candidate) -> Candidate:
    """The paper's prescription for a mode (section on mitigation), for the cache at hand.

    It was written for integer grids; a format of an engine's own is replaced by an asymmetric integer grid of its width
    where the prescription asks for other scales.

    Parameters
    ----------
    mode : str
    scan : Scan
        Names the layers that lose most alone. A diagnosis has tried to keep them in 16 bits, each and together.
    unmitigated : Candidate
    """
    layers = scan.worst()
    description = PRESCRIPTIONS[mode]
    match mode:
        case "outlier-crushes-safety":
            return _other(unmitigated, "group-64 everywhere", _scales(unmitigated, "group", 64), description)
        case "outlier-as-safety":
            return replace(protect(unmitigated, layers[:1], how="critical"), description=description)
        case "multi-layer dilution":
            return replace(protect(unmitigated, layers, how="critical"), description=description)
        case "mixed":
            fine, coarse = _scales(unmitigated, "channel"), _scales(unmitigated, "group", 64)
            pairs = tuple(
                f if layer in layers[:1] else c for layer, (f, c) in enumerate(zip(fine, coarse, strict=True))
            )
            return _other(unmitigated, f"per-channel in layer {layers[0]}, group-64 elsewhere", pairs, description)
        case "hyper-vulnerable":
            exact = Recipe.exact(len(unmitigated.recipe)).layers
            return _other(unmitigated, "whole cache in 16 bits", exact, description)
        case _:
            return replace(unmitigated, description=description)


def _scales(unmitigated: Candidate, granularity: Granularity, size: int | None = None) -> tuple[Schemes, ...]:
    def one(scheme: Scheme | None) -> Scheme | None:
        if scheme is None:
            return None
        symmetric = scheme.symmetric if scheme.format == "int" else False
        return Scheme(scheme.bits, symmetric, granularity, size)

    return tuple((one(k), one(v)) for k, v in unmitigated.recipe)


def _other(unmitigated: Candidate, name: str, layers: tuple[Schemes, ...], description: str) -> Candidate:
    return Candidate(name, "refine", replace(unmitigated.recipe, layers=layers), unmitigated.placement, description)
