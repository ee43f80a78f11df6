"""What the explorer is given: numbers and texts of results, in JSON types."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvgeom.outliers import outlier_border

if TYPE_CHECKING:
    import xarray as xr

#: Columns of the map of layers that a sensitivity has, by site; the third is shown, and never stored.
SITES = {"k": "keys", "v": "values", "resid": "residual"}
#: What is known of each channel.
CHANNELS = ("magnitude", "noise", "loading")
#: What is shown of a response.
ANSWER = ("text", "label", "reason", "divergence", "margin")
#: How recipes are grouped, by their families; all others are "other caches".
GROUPS = {"bits": "widths", "layer": "single layers"}
OTHERS = "other caches"


class Part(Protocol):
    """All that is read of a result."""

    @property
    def kind(self) -> str: ...

    @property
    def data(self) -> xr.Dataset: ...

    @property
    def meta(self) -> Mapping[str, Any]: ...


def payload(parts: Iterable[Part]) -> dict[str, Any]:
    """What can be pointed at in some results: sensitivity, layer scan and outcomes, as far as they are there.

    Of several outcomes the recipes are taken together. Prompts are those that the model refuses with an exact cache.
    """
    given = sorted(parts, key=lambda part: part.kind != "sensitivity")  # whose columns come first
    found: dict[str, Any] = {"columns": [], "channels": {}, "recipes": [], "prompts": []}
    metas = [part.meta for part in given]
    found["model"] = next((str(meta["model"]) for meta in metas if "model" in meta), "")
    layers: list[int] = []
    for part in given:
        if part.kind == "sensitivity":
            layers = layers or _numbers(part.data.layer)
            _add_sensitivity(found, part)
        elif part.kind == "scan":
            layers = layers or _numbers(part.data.layer)
            _add_scan(found, part, layers)
    found["layers"] = layers
    _add_outcomes(found, [part for part in given if part.kind == "outcomes"])
    return found


def _numbers(values: Any) -> list[int]:
    return [int(value) for value in values.values]


def _plain(values: Any) -> list[float | None]:
    """Numbers that JSON has: None for NaN and infinity."""
    return [float(value) if np.isfinite(value) else None for value in np.asarray(values, dtype=float)]


def _packed(values: Any) -> str:
    """A matrix as base64 of little-endian float32, row by row."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


def _add_sensitivity(found: dict[str, Any], part: Part) -> None:
    data, meta = part.data, part.meta
    for site in map(str, data.site.values):
        one = data.sel(site=site)
        weak = (one.status.values != "ok") if "status" in one else np.zeros(one.sizes["layer"], dtype=bool)
        value = np.where(np.isfinite(one.ratio.values), one.ratio.values, one.ratio_low.values)
        found["columns"].append(
            {
                "name": f"ratio, {SITES.get(site, site)}",
                "site": site,
                "scale": "log",
                "values": _plain(value),
                "marks": ["at least" if w and np.isfinite(v) else "" for w, v in zip(weak, value, strict=True)],
                "note": f"noise-sensitivity ratio under {meta['scheme']}; above 1 rounding hits the safety direction harder",
            }
        )
    heads = int(meta["kv_heads"])
    for site in ("k", "v"):
        if site not in data.kv.values:
            continue
        columns = {name: data[f"channel_{name}"].sel(kv=site).transpose("layer", "channel").values for name in CHANNELS}
        found["channels"][site] = {
            "count": int(data.sizes["channel"]),
            "heads": heads,
            "outliers": [_border(row, float(meta["outlier_factor"])) for row in columns["magnitude"]],
            **{name: _packed(values) for name, values in columns.items()},
        }


def _border(magnitude: NDArray[np.float64], factor: float) -> float | None:
    """From which magnitude on a channel is an outlier; None if that is not known."""
    border = outlier_border(magnitude, factor).item()
    return border if np.isfinite(border) and border > 0 else None


def _add_scan(found: dict[str, Any], part: Part, layers: list[int]) -> None:
    data, meta = part.data, part.meta
    at = {int(layer): n for n, layer in enumerate(data.layer.values)}
    for name, title, note in (
        ("flips", "refusals lost", f"of {meta['prompts']}, with this layer alone rounded to {meta['scheme']}"),
        ("margin_drop", "margin lost", f"nats, mean, with this layer alone rounded to {meta['scheme']}"),
    ):
        values = np.asarray(data[name].values, dtype=float)
        found["columns"].append(
            {
                "name": title,
                "site": "",
                "scale": "linear",
                "values": _plain([values[at[layer]] if layer in at else np.nan for layer in layers]),
                "marks": [""] * len(layers),
                "note": note,
            }
        )


def _add_outcomes(found: dict[str, Any], parts: list[Part]) -> None:
    prompts: dict[int, dict[str, Any]] = {}
    for part in parts:
        answers = _answers(part.data)
        refused = [index for index, answer in answers["exact"].items() if answer["label"] == "refused"]
        requests = dict(zip(_numbers(part.data.prompt), map(str, part.data.request.values), strict=True))
        for index in refused:
            row = {"index": index, "request": requests[index], "exact": answers["exact"][index], "answers": {}}
            prompts.setdefault(index, row)
        families = zip(*(part.data[name].values for name in ("recipe", "family", "layer")), strict=True)
        known = {each["name"] for each in found["recipes"]}
        for name, family, layer in ((str(name), str(family), int(layer)) for name, family, layer in families):
            if name == "exact":
                continue
            if name not in known:
                found["recipes"].append(
                    {
                        "name": name,
                        "group": GROUPS.get(family, OTHERS),
                        "layer": layer if family == "layer" and layer >= 0 else None,
                        "about": str(part.meta["recipes"].get(name, "")),
                    }
                )
            for index in refused:
                prompts[index]["answers"].setdefault(name, answers[name][index])
    found["prompts"] = [prompts[index] for index in sorted(prompts)]


def _answers(data: xr.Dataset) -> dict[str, dict[int, dict[str, Any]]]:
    """Every response, by recipe and prompt; arrays are read once, because there may be tens of thousands."""
    columns = {name: data[name].transpose("recipe", "prompt").values.tolist() for name in ANSWER}
    return {
        str(recipe): {
            index: _plain_answer({name: columns[name][row][at] for name in ANSWER})
            for at, index in enumerate(_numbers(data.prompt))
        }
        for row, recipe in enumerate(data.recipe.values)
    }


def answer_of(row: xr.Dataset) -> dict[str, Any]:
    """One response of outcomes: a recipe and a prompt."""
    return _plain_answer({name: row[name].item() for name in ANSWER})


def _plain_answer(values: Mapping[str, Any]) -> dict[str, Any]:
    margin = float(values["margin"])
    return {
        **{name: str(values[name]) for name in ("text", "label", "reason")},
        "divergence": int(values["divergence"]),
        "margin": margin if np.isfinite(margin) else None,
    }
