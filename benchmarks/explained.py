"""What :mod:`benchmarks.explains` has measured, as tables: docs/explains.json and docs/explains.md.

Run:  python -m benchmarks.explained [--rows FOLDER]      (no model is run)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from kvgeom.geometry.prediction import PartialCorrelation, Units, partial_rank_correlation
from kvgeom.paths import cache_dir
from kvgeom.results import plain

DOCS = Path(__file__).parents[1] / "docs"
ROWS = cache_dir("explains")
LEVELS = {
    "layers": "whole layers",
    "keys": "keys of a layer",
    "values": "values of a layer",
    "heads of keys": "keys of a KV head",
    "heads of values": "values of a KV head",
    "groups of keys": "16 channels of keys",
    "groups of values": "16 channels of values",
    "channels of keys": "one channel of keys",
    "channels of values": "one channel of values",
}
PREDICTORS = {
    "ratio": "noise-sensitivity ratio",
    "error": "error of scores (keys) or outputs (values)",
    "error over gap": "error of scores over their gap",
    "attention moved": "attention that moves",
    "output error": "error of head outputs",
    "shift": "head outputs along the refusal direction",
    "margin drop": "head outputs along the margin's gradient",
    "first order": "first order",
    "integrated": "integrated",
}
CONTROLS = {
    "max": "max abs",
    "squared error": "MSE",
    "relative error": "relative MSE",
    "bias": "key-bias norm",
    "layer": "layer index",
}
DAMAGE = {"KL": "KL", "margin lost": "margin lost", "sign lost": "margins that change sign", "compliance": "refusals that become compliance"}  # fmt: skip
#: Predictors with a sign: of the divergence, which has none, their size predicts.
SIGNED = ("shift", "margin drop", "first order", "integrated")
REAL = ("demo", "gemma", "smollm2")
SAMPLES = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS)
    write(parser.parse_args().rows)


def keep(folder: Path, name: str, levels: Mapping[str, Mapping[str, Any]], meta: Mapping[str, Any]) -> None:
    """Write what was measured of one model."""
    arrays: dict[str, Any] = {}
    for level, own in levels.items():
        for kind, values in own.items():
            if isinstance(values, Mapping):
                arrays |= {f"{level}|{kind}|{key}": value for key, value in values.items()}
            else:
                arrays[f"{level}|{kind}|"] = values
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{name}.npz", meta=json.dumps(plain(dict(meta))), **arrays)


def kept(folder: Path, name: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]] | None:
    """The inverse of :func:`keep`; None if nothing was measured."""
    path = folder / f"{name}.npz"
    if not path.exists():
        return None
    levels: dict[str, dict[str, Any]] = {}
    with np.load(path) as held:
        for key in held.files:
            if key == "meta":
                meta = json.loads(str(held[key]))
                continue
            level, kind, name = key.split("|")
            own = levels.setdefault(level, {})
            if name:
                own.setdefault(kind, {})[name] = held[key]
            else:
                own[kind] = held[key]
    return levels, meta


def as_units(own: Mapping[str, Any], predictor: str, damage: str) -> Units | None:
    """The units of one model at one level, without those that a predictor says nothing of; None if it says nothing of any."""
    x, y = own["predictors"].get(predictor), own["damage"].get(damage)
    if x is None or y is None or np.ptp(y.mean(1)) == 0:
        return None
    x = np.abs(x) if predictor in SIGNED and damage == "KL" else x
    known = np.isfinite(x if x.ndim == 1 else x.mean(1)) & np.isfinite(y.mean(1))
    controls = [values[known] for values in own["controls"].values() if np.ptp(values[known]) > 0]
    clusters = own.get("cluster", own["layer"])[known]
    return Units(x[known], y[known], controls, clusters) if known.sum() > len(controls) + 4 else None


def correlations(models: Mapping[str, Mapping[str, Any]], level: str, damage: str) -> dict[str, PartialCorrelation]:
    """Every predictor of one damage, over all models together; the intervals hold for all predictors at once."""
    found = {}
    tried = [p for p in PREDICTORS if any(level in m and p in m[level]["predictors"] for m in models.values())]
    for predictor in tried:
        parts = [as_units(own[level], predictor, damage) for own in models.values() if level in own]
        known = [part for part in parts if part is not None]
        if known:
            found[predictor] = partial_rank_correlation(known, level=1 - 0.05 / len(tried), samples=SAMPLES)
    return found


def trivial(models: Mapping[str, Mapping[str, Any]], level: str, damage: str) -> dict[str, float]:
    """Plain rank correlation of each control with damage."""
    found = {}
    for control in CONTROLS:
        parts = []
        for own in models.values():
            x, y = (
                own.get(level, {}).get(kind, {}).get(key) for kind, key in (("controls", control), ("damage", damage))
            )
            if x is not None and y is not None and np.ptp(x) > 0 and np.ptp(y.mean(1)) > 0:
                parts.append(Units(x, y))
        if parts:
            found[control] = partial_rank_correlation(parts, samples=2).plain
    return found


def write(folder: Path) -> None:
    """Tables of everything that was measured."""
    loaded = {path.stem: kept(folder, path.stem) for path in sorted(folder.glob("*.npz"))}
    measured = {name: found for name, found in loaded.items() if found is not None}
    real = [name for name in REAL if name in measured]
    groups = {**({"real models": real} if len(real) > 1 else {}), **{name: [name] for name in measured}}
    tables: list[dict[str, Any]] = []
    for group, names in groups.items():
        models = {name: measured[name][0] for name in names}
        for damage in DAMAGE:
            for level in LEVELS:
                found = correlations(models, level, damage)
                if not found:
                    continue
                plainly = trivial(models, level, damage)
                for predictor, one in found.items():
                    row = {key: getattr(one, key) for key in ("value", "low", "high", "plain", "units", "clusters")}
                    tables.append({"models": group, "damage": damage, "level": level, "predictor": predictor, **row, "beyond": one.beyond})  # fmt: skip
                tables += [{"models": group, "damage": damage, "level": level, "predictor": c, "plain": v} for c, v in plainly.items()]  # fmt: skip
    meta = {name: found[1] for name, found in measured.items()}
    (DOCS / "explains.json").write_text(json.dumps(plain({"models": meta, "rows": tables}), indent=1) + "\n")
    page = DOCS / "explains.md"
    if page.exists():
        text = page.read_text(encoding="utf-8")
        head = text.split("<!-- measured -->")[0]
        page.write_text(f"{head}<!-- measured -->\n\n{markdown(tables, meta)}", encoding="utf-8")


def markdown(rows: list[dict[str, Any]], meta: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables as text."""
    lines = sums(meta)
    for group in dict.fromkeys(row["models"] for row in rows):
        named = meta.get(group, {}).get("model", ", ".join(str(meta[n]["model"]) for n in REAL if n in meta))
        lines += [f"### {group[0].upper() + group[1:]}: {named}", ""]
        for damage, title in DAMAGE.items():
            own = [row for row in rows if row["models"] == group and row["damage"] == damage]
            if own:
                lines += [f"**{title[0].upper() + title[1:]}**", "", *_table(own), ""]
    return "\n".join(lines)


def sums(meta: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is left over of the margin lost, and how contributions rank layers and sites beside patching."""
    rows = []
    for one in meta.values():
        patched = one.get("patched")
        if patched is None:
            continue
        lost, left = (np.array([*one[a], *patched[a]], dtype=float) for a in ("lost", "remainder"))
        points, settled = ([*one[a], *patched[a]] for a in ("points", "settled"))
        ranks = [
            f"{spearmanr(np.ravel(patched['sum']), np.ravel(patched[b])).statistic:.2f}"
            for b in ("alone", "restored", "first order")
        ]
        totals = [f"{np.sum(patched[a]):.2f}" for a in ("sum", "alone", "restored", "first order")]
        rows.append(
            f"| {one['model']} | {len(lost)} | {lost.mean():.2f} | {np.abs(left).mean():.3f} | {min(points)} to {max(points)} | "
            f"{sum(settled)} of {len(settled)} | {' | '.join(totals)} | {' | '.join(ranks)} |"
        )
    if not rows:
        return []
    head = "| | prompts | lost (nats) | left over | points | settled | sum | alone | restored | first order | alone | restored | first order |"  # fmt: skip
    return [
        "### The sum beside patching",
        "",
        "The margin lost to the whole cache and what the integral leaves over of it (mean absolute value); then, over the prompts that were "
        "patched, what all layers and sites add up to, and the rank correlation of contributions with each.",
        "",
        head,
        "|---|" + "---:|" * 12,
        *rows,
        "",
    ]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    levels = [level for level in LEVELS if any(row["level"] == level for row in rows)]
    cells = {(row["predictor"], row["level"]): row for row in rows}
    lines = ["| | " + " | ".join(LEVELS[level] for level in levels) + " |", "|---|" + "---:|" * len(levels)]
    for control, name in CONTROLS.items():
        values = [cells.get((control, level)) for level in levels]
        if any(values):
            lines.append(
                f"| *{name}*, plain | " + " | ".join("" if c is None else f"{c['plain']:.2f}" for c in values) + " |"
            )
    for predictor, name in PREDICTORS.items():
        values = [cells.get((predictor, level)) for level in levels]
        if any(values):
            lines.append(f"| {name} | " + " | ".join(map(_cell, values)) + " |")
    return lines


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if not np.isfinite(row["value"]):
        return f"undetermined (plain {row['plain']:.2f})"
    text = f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{f'**{text}**' if row['beyond'] else text} · {row['plain']:.2f}"


if __name__ == "__main__":
    main()
