"""What figures read of results, made by hand: nothing but a kind, a dataset and meta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from kvgeom.plots.registry import draw


@dataclass(frozen=True)
class Drawn:
    """All that a figure may use of a result."""

    kind: str
    data: xr.Dataset
    meta: dict[str, Any]

    def plot(self, name: str | None = None, **options: Any) -> go.Figure:
        return draw(self, name, **options)


def traces(figure: go.Figure, name: str) -> list[go.Figure]:
    return [trace for trace in figure.data if trace.name == name]


def of_type(figure: go.Figure, kind: str) -> list[go.Figure]:
    return [trace for trace in figure.data if trace.type == kind]


def notes(figure: go.Figure) -> str:
    return " ".join(note.text for note in figure.layout.annotations)


def curve(refused: int = 10, bits: tuple[int, ...] = (16, 8, 4, 2)) -> Drawn:
    n = len(bits)
    flips = np.linspace(0, refused, n).astype(int)
    rate = flips / refused if refused else np.full(n, np.nan)
    columns = {
        "refused": refused - flips,
        "complied": 20 - refused + flips // 2,
        "evaded": 0 * flips,
        "degenerate": flips - flips // 2,
        "flips": flips,
        "flips_complied": flips // 2,
        "flips_evaded": 0 * flips,
        "flips_degenerate": flips - flips // 2,
        "flip_rate": rate,
        "ci_low": np.maximum(rate - 0.1, 0),
        "ci_high": np.minimum(rate + 0.1, 1),
        "perplexity_ratio": np.geomspace(1, 50, n),
        "perplexity_ratio_low": np.geomspace(1, 40, n),
        "perplexity_ratio_high": np.geomspace(1, 70, n),
        "text_kl": np.linspace(0, 2, n),
        "text_kl_low": np.linspace(0, 1, n),
        "text_kl_high": np.linspace(0, 3, n),
        "text_top1": np.linspace(1, 0.5, n),
        "text_top1_low": np.linspace(1, 0.4, n),
        "text_top1_high": np.linspace(1, 0.6, n),
    }
    data = xr.Dataset({k: ("bits", v) for k, v in columns.items()}, coords={"bits": list(bits)})
    return Drawn("curve", data, {"scheme": "asym-token<4", "prompts": 20, "baseline_refused": refused})


def scan(layers: int = 6, worst: int | None = 2, refused: int = 10) -> Drawn:
    drop = np.linspace(-0.5, 1.0, layers) if refused else np.full(layers, np.nan)
    flips = np.full(layers, np.nan)
    if worst is not None:
        flips[worst] = 4
    columns = {
        "margin_drop": drop,
        "margin_low": drop - 0.2,
        "margin_high": drop + 0.3,
        "flips": flips,
        "flip_rate": flips / max(refused, 1),
        "ci_low": flips / max(refused, 1) - 0.1,
        "ci_high": flips / max(refused, 1) + 0.1,
    }
    data = xr.Dataset({k: ("layer", v) for k, v in columns.items()}, coords={"layer": np.arange(layers)})
    return Drawn(
        "scan",
        data,
        {
            "scheme": "int3-sym-tensor",
            "prompts": refused,
            "worst_layer": worst,
            "critical_share": 0.1,
            "reason": "r",
        },
    )


def sensitivity(layers: int = 4, heads: int = 2, head_dim: int = 8, undefined: bool = True) -> Drawn:
    rng = np.random.default_rng(0)
    shape = (layers, 3)
    gap, alignment = rng.uniform(1, 1e4, shape), rng.uniform(0.5, 2, shape)
    status = np.full(shape, "ok", dtype=object)
    reason = np.full(shape, "", dtype=object)
    if undefined:
        status[0, 0], reason[0, 0] = "undefined", "means <coincide>"
    status[1, 1] = "weak"
    ratio = np.where(status == "ok", gap * alignment, np.nan)
    variables: dict[str, object] = {
        name: (("layer", "site"), values)
        for name, values in {
            "ratio": ratio, "signal_gap": gap, "noise_alignment": alignment, "separation": np.full(shape, 0.9),
            "ratio_low": np.where(status == "undefined", np.nan, gap * alignment / 2), "ratio_high": ratio * 2,
            "null_low": ratio / 3, "null_median": ratio / 2, "null_high": ratio * 2,
            "dealt_low": ratio / 2, "dealt_high": ratio * 1.5,
            "alignment_null_low": np.full(shape, 0.8), "alignment_null_high": np.full(shape, 1.2),
            "status": status, "reason": reason,
        }.items()
    }  # fmt: skip
    at = ["instruction", "template-2", "template-1"]
    for name, factor in (("", 1.0), ("_low", 0.5), ("_high", 2.0)):
        values = np.repeat((gap * alignment)[..., None], 3, -1) * [1, 3, 10] * factor
        values[0, :2, 1:] = np.nan
        if name != "_low":
            values[1, 1, 0] = np.nan
        variables[f"at_ratio{name}"] = (("layer", "site", "at"), values)
    kv, resid = heads * head_dim, 32
    loading = rng.dirichlet(np.ones(kv), size=(layers, 2))
    magnitude = np.ones((layers, 2, kv))
    magnitude[:, :, 3] = 20
    for name, values in {"ratio": loading, "magnitude": magnitude, "noise": loading, "loading": loading}.items():
        variables[f"channel_{name}"] = (("layer", "kv", "channel"), values)
    for name in ("ratio", "magnitude", "noise", "loading"):
        variables[f"resid_channel_{name}"] = (("layer", "resid_channel"), rng.dirichlet(np.ones(resid), size=layers))
    coords = {"layer": np.arange(layers), "site": ["k", "v", "resid"], "kv": ["k", "v"], "at": at}
    meta = {"position": "instruction", "kv_heads": heads, "head_dim": head_dim, "scheme": "s", "outlier_factor": 5.0}
    return Drawn("sensitivity", xr.Dataset(variables, coords=coords), meta)


def patching(drops: list[list[float]]) -> Drawn:
    """Margins lost, by layer and scheme; one prompt."""
    drop = np.array(drops)
    columns = {
        "margin": (("prompt", "layer", "scheme"), -drop[None]),
        "kl": (("prompt", "layer", "scheme"), drop[None]),
    }
    names = [f"scheme {n}" for n in range(drop.shape[1])]
    data = xr.Dataset(
        {"clean_margin": ("prompt", [0.0]), **columns}, coords={"layer": np.arange(len(drop)), "scheme": names}
    )
    return Drawn("patching", data, {"schemes": {name: name for name in names}})


def pcr(value: float, low: float, high: float, status: str = "determined", reason: str = "r") -> Drawn:
    numbers = {"value": value, "low": low, "high": high}
    meta = {"layer": 2, "bits": 3, "status": status, "reason": reason, "thresholds": [0.3, 0.7]}
    return Drawn("pcr", xr.Dataset({name: ((), number) for name, number in numbers.items()}), meta)


def mode(findings: int = 3) -> Drawn:
    """The first finding decides for two modes, the last speaks for none."""
    modes = ["outlier-crushes-safety", "outlier-as-safety", "multi-layer dilution", "mixed", "robust", "undetermined"]
    speaks = np.zeros((findings, len(modes)), dtype=bool)
    speaks[0, :2] = speaks[1, 2] = True
    data = xr.Dataset(
        {
            "name": ("finding", [f"finding {n}" for n in range(findings)]),
            "value": ("finding", [f"{n} of <9>" for n in range(findings)]),
            "decisive": ("finding", np.arange(findings) == 0),
            "speaks_for": (("finding", "mode"), speaks),
            "share": (("basis", "mode"), [[0.75, 0, 0, 0.25, 0, 0], [0.5, 0.5, 0, 0, 0, 0]]),
        },
        coords={"mode": modes, "basis": ["posterior", "thresholds"]},
    )
    return Drawn("mode", data, {"name": "outlier-crushes-safety", "reason": "r", "sure": 0.9})


def ablation() -> Drawn:
    columns = {
        "family": ["whole", "site", "site"],
        "flips": [8, 7, 1],
        "flips_complied": [5, 5, 1],
        "flips_evaded": [0, 0, 0],
        "flips_degenerate": [3, 2, 0],
        "flip_rate": [0.8, 0.7, 0.1],
        "ci_low": [0.5, 0.4, 0.02],
        "ci_high": [0.95, 0.9, 0.4],
        "p": [1.0, 0.5, 0.01],
    }
    data = xr.Dataset({k: ("recipe", v) for k, v in columns.items()}, coords={"recipe": ["all", "keys", "values <b>"]})
    return Drawn("ablation", data, {"reference": "all", "prompts": 10})


def outcomes() -> Drawn:
    labels = np.array([["refused"] * 3 + ["complied"], ["refused", "complied", "degenerate", "complied"]], dtype=object)
    return Drawn("outcomes", xr.Dataset({"label": (("recipe", "prompt"), labels)}, coords={"recipe": ["a", "b"]}), {})


def over_refusal() -> Drawn:
    columns = {"refused": [2, 4], "rate": [0.1, 0.2], "ci_low": [0.05, 0.1], "ci_high": [0.2, 0.4], "p": [1.0, 0.5]}
    data = xr.Dataset({k: ("bits", v) for k, v in columns.items()}, coords={"bits": [16, 4]})
    return Drawn("over-refusal", data, {"prompts": 20})
