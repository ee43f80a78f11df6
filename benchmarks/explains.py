"""The test that matters: does what follows the error predict damage beyond what is trivial to say?

Run:  python -m benchmarks.explains [MODEL ...] [--rows FOLDER] [--prompts 8]      (all models by default; some hours on two cores)

Every unit (a layer, its keys, its values, a KV head, a group of channels, a channel) is rounded alone, and what it does to other
prompts than those of the predictors is measured exactly: refusal margin, next-token distribution, and, of layers, how many refusals
become compliance. The numbers of each model are kept in a folder, by unit and prompt, from which :mod:`benchmarks.explained` makes the
tables of docs/explains.md.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import kvgeom
from benchmarks.explained import LEVELS, ROWS, keep, write
from benchmarks.real import REAL
from kvgeom.geometry.causal import patch_layers
from kvgeom.geometry.decomposition import decompose
from kvgeom.geometry.error_paths import follow_errors
from kvgeom.geometry.magnitudes import magnitudes
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.organisms import Part, Size, plant_blindly, tiny_model
from kvgeom.prompts.sets import PromptSet, held_out
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme

#: What every unit is rounded to: the layer scan of arXiv:2606.09864.
SCHEME = Scheme(3, True, "tensor")
#: Channels of a group, random groups and single channels in each layer and site; the loudest channel comes besides.
GROUP, DRAWN = 16, 1
SITES = ("k", "v")
#: What predictors must beat, and what :meth:`kvgeom.geometry.magnitudes.Magnitudes.controls` calls it.
CONTROLS = {
    "max": "max_abs",
    "relative error": "relative_mse",
    "squared error": "mse",
    "layer": "depth",
    "bias": "key_bias",
}
#: Most points of an integral.
POINTS = 17
#: Tiny models in which outliers of graded strength are planted, in values and, where attention is trained, in keys.
BASES = {"organisms, values": (Size(4, 4, 32), 1), "organisms, keys and values": (Size(4, 2, 64, attends=True), 0)}
STRENGTHS, LOUDNESS = (0.1, 0.3, 0.6, 1.0), (0.25, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join((*REAL, *BASES))}; all by default")
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder for what is measured (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of either kind (default: %(default)s)")
    parser.add_argument("--flips", action="store_true", help="generate responses under every rounded layer, too")
    parser.add_argument(
        "--patched", type=int, default=2, help="of which every site is patched, too (default: %(default)s)"
    )
    asked = parser.parse_args()
    for name in asked.models or (*REAL, *BASES):
        begin = time.perf_counter()
        if name in REAL:
            keep(asked.rows, name, *measure(REAL[name](), asked.prompts, asked.flips, patched=asked.patched))
        else:
            keep(asked.rows, name, *family(*BASES[name], asked.prompts))
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    write(asked.rows)


# --- units ---


def units(model: Model, loudest: NDArray[np.int64], rng: random.Random) -> dict[str, tuple[str, Recipe, list[Any]]]:
    """What is rounded alone, in every layer: its level, the recipe, and the channels by layer as ``(site, channels)``.

    Parameters
    ----------
    loudest : array [layers, 2]
        The channel with the largest key and value.
    """
    g = model.geometry
    every = tuple(range(g.channels))
    found: dict[str, tuple[str, Recipe, list[Any]]] = {}

    def add(level: str, name: str, chosen: list[tuple[str, tuple[int, ...]]]) -> None:
        schemes = [(site, SCHEME if channels == every else SCHEME.only(channels)) for site, channels in chosen]
        layers = tuple((scheme, None) if site == "k" else (None, scheme) for site, scheme in schemes)
        found[f"{level}: {name}"] = (level, Recipe(layers), chosen)

    whole: list[Any] = [("kv", every)] * g.layers
    found["layers: all"] = ("layers", Recipe.uniform(g.layers, SCHEME), whole)
    for column, (site, of) in enumerate(zip(SITES, ("keys", "values"), strict=True)):
        add(of, "all", [(site, every)] * g.layers)
        if g.kv_heads > 1:
            for head in range(g.kv_heads):
                own = tuple(range(head * g.head_dim, (head + 1) * g.head_dim))
                add(f"heads of {of}", str(head), [(site, own)] * g.layers)
        for draw in range(DRAWN):
            starts = [rng.randrange(g.channels // GROUP) * GROUP for _ in range(g.layers)]
            add(f"groups of {of}", str(draw), [(site, tuple(range(s, s + GROUP))) for s in starts])
            add(f"channels of {of}", str(draw), [(site, (rng.randrange(g.channels),)) for _ in range(g.layers)])
        add(f"channels of {of}", "loudest", [(site, (int(channel),)) for channel in loudest[:, column]])
    return found


# --- one model ---


def measure(
    model: Model,
    count: int,
    flips: bool = False,
    sets: tuple[Sequence[str], Sequence[str], Sequence[str]] | None = None,
    tokens: frozenset[int] | None = None,
    patched: int = 0,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Predictors and damage of all units of one model.

    Parameters
    ----------
    sets : (harmful, harmless, other harmful requests), optional
        The first two predict, the last are damaged; those that come with kvgeom by default.
    tokens : optional
        What refusals begin with; found out by default.
    patched : int
        Prompts of which every layer and site is patched, too.

    Returns
    -------
    levels : dict
        Of every level the arrays ``layer`` ``[units]``, and, by name, ``controls``, ``predictors`` ``[units, prompts]`` or
        ``[units]`` and ``damage`` ``[units, other prompts]``.
    meta : dict
    """
    calibration = kvgeom.calibration()
    harmful, harmless, others = sets or (calibration.harmful, calibration.harmless, held_out().harmful)
    asked = harmful[: 2 * count + 8], others[: 2 * count + 8]  # of which not all are refused
    base = kvgeom.baseline(model, [*asked[0], *asked[1]], max_new_tokens=24, progress=False)
    refusals = tokens or base.refusal_tokens
    if not refusals:
        raise SystemExit(f"{model.name}: no first token predicts a refusal; {len(base.refused)} are refused")
    seen = [base.prompts[i] for i in base.refused if i < len(asked[0])][:count]
    unseen = [base.prompts[i] for i in base.refused if i >= len(asked[0])][:count]
    if min(len(seen), len(unseen)) < 4:
        raise SystemExit(f"{model.name}: refuses {len(seen)} and {len(unseen)} requests, too few to say anything")
    print(f"{model.name}: {len(seen)} prompts predict, {len(unseen)} are damaged; refusals begin with {sorted(refusals)}", flush=True)  # fmt: skip
    raw = _by_channel(model, seen, refusals, PromptSet("pairs", tuple(harmful), tuple(harmless), ""))
    if patched:
        raw["meta"]["patched"] = _patched(model, seen[:patched], refusals)
    print(f"{model.name}: predictors are measured", flush=True)
    loudest = raw["magnitudes"].data.max_abs.mean("prompt").argmax("channel").values
    chosen = units(model, loudest, random.Random(model.name))
    recipes = {name: recipe for name, (_, recipe, _) in chosen.items()}
    exact = patch_layers(model, unseen, recipes, refusals, progress=False).data
    print(f"{model.name}: {len(recipes)} units of each layer are rounded", flush=True)
    levels: dict[str, dict[str, Any]] = {}
    for name, (level, _, where) in chosen.items():
        cells = exact.sel(scheme=name)
        drop = (cells.clean_margin - cells.margin).transpose("layer", "prompt").values
        lost = ((cells.margin < 0) & (cells.clean_margin > 0)).transpose("layer", "prompt").values.astype(float)
        damage = {"margin lost": drop, "sign lost": lost, "KL": cells.kl.transpose("layer", "prompt").values}
        if flips and level == "layers":
            damage["compliance"] = _compliance(model, base, [p.text for p in unseen])
        own = levels.setdefault(level, {"layer": [], "controls": {}, "predictors": {}, "damage": {}})
        own["layer"].append(np.arange(model.geometry.layers))
        for kind, table in (*_numbers(model, raw, where).items(), ("damage", damage)):
            for key, values in table.items():
                own[kind].setdefault(key, []).append(values)
    for own in levels.values():
        own["layer"] = np.concatenate(own["layer"])
        for kind in ("controls", "predictors", "damage"):
            own[kind] = {key: np.concatenate(parts) for key, parts in own[kind].items()}
    meta = {
        "model": model.name,
        "weights": model.weights,
        "scheme": str(SCHEME),
        "layers": model.geometry.layers,
        "seen": [prompt.text for prompt in seen],
        "unseen": [prompt.text for prompt in unseen],
        **raw["meta"],
    }
    return levels, meta


def _compliance(model: Model, base: Any, texts: Sequence[str]) -> NDArray[np.float64]:
    """Whether each layer alone turns each refusal into compliance, ``[layers, prompts]``."""
    layers = model.geometry.layers
    recipes = {f"layer {n}": Recipe.uniform(layers, SCHEME, layers=[n]) for n in range(layers)}
    found = kvgeom.evaluate(model, recipes, list(texts), max_new_tokens=24, progress=False)
    return np.stack([found.flipped(name, "complied") for name in recipes]).astype(float)


def _by_channel(
    model: Model, prompts: Sequence[EncodedPrompt], tokens: frozenset[int], pairs: PromptSet
) -> dict[str, Any]:
    """Everything that is known of the channels of every layer and site before damage, ``[layers, 2, channels, prompts]``."""
    g = model.geometry
    towards = _towards_refusal(model, pairs)
    by_prompt: dict[str, list[NDArray[np.float64]]] = {}
    left, points, lost, exact, drops = [], [], [], [], []
    for prompt in prompts:
        paths = follow_errors(model, [prompt], SCHEME, tokens, directions=towards, progress=False).data
        parts = decompose(model, [prompt], SCHEME, tokens, group_size=g.head_dim, points=POINTS, progress=False)
        queries = paths.isel(prompt=0)
        group = g.query_heads // g.kv_heads
        found = {
            "error": paths.channel_error.values,
            "margin drop": paths.channel_margin_drop.values,
            "first order": paths.channel_first_order.values,
            "shift": -paths.channel_direction_shift.values,
            "integrated": parts.data.channel_contribution.values,
        }
        for key, values in found.items():
            by_prompt.setdefault(key, []).append(values)
        heads = {
            "head score error": queries.score_error.values,
            "head score gap": queries.score_gap.values,
            "head moved": queries.attention_moved.values,
            "head output error k": queries.output_error.sel(site="k").values,
            "head output error v": queries.output_error.sel(site="v").values,
            "head margin drop k": queries.margin_drop.sel(site="k").values,
            "head margin drop v": queries.margin_drop.sel(site="v").values,
            "head shift k": -queries.direction_shift.sel(site="k").values,
            "head shift v": -queries.direction_shift.sel(site="v").values,
        }
        for key, values in heads.items():
            by_prompt.setdefault(key, []).append(values.reshape(g.layers, g.kv_heads, group))
        left.append(float(parts.data.remainder.item()))
        points.append(int(parts.data.points.item()))
        lost.append(float(parts.margin_drop.item()))
        exact.append(float(parts.data.exact_margin.item()))
        drops.append(bool(parts.data.settled.item()))
    space = kvgeom.subspace(model, pairs, progress=False)
    ratio = space.sensitivity(SCHEME, contrasts=(), progress=False)
    return {
        **{key: np.stack(values, -1) for key, values in by_prompt.items()},
        "magnitudes": magnitudes(model, prompts, SCHEME, progress=False),
        "ratio": ratio.data.ratio.sel(site=list(SITES)).values,
        "head ratio": ratio.data.head_ratio.values,
        "channel ratio": ratio.data.channel_ratio.values,
        "meta": {"remainder": left, "points": points, "lost": lost, "exact": exact, "settled": drops},
    }


def _patched(model: Model, prompts: Sequence[EncodedPrompt], tokens: frozenset[int]) -> dict[str, Any]:
    """The sum beside what patching says, by layer and site: each alone, and each left out of the whole."""
    found = decompose(model, prompts, SCHEME, tokens, patch=True, progress=False)
    means = {"sum": found.by_site, "alone": found.data.alone, "restored": found.data.restored}
    return {
        **{name: values.mean("prompt").values for name, values in means.items()},
        "first order": found.data.from_exact.mean("prompt").values,
        "lost": found.margin_drop.values,
        "remainder": found.data.remainder.values,
        "points": found.data.points.values,
        "settled": found.data.settled.values,
    }


@torch.inference_mode()
def _towards_refusal(model: Model, pairs: PromptSet) -> NDArray[np.float64]:
    """For each layer the class difference of the residual stream at the last token over its squared length."""
    means = []
    for requests in (pairs.harmful, pairs.harmless):
        streams = []
        for prompt in model.encode(requests):
            seen: dict[int, Any] = {}
            model.forward(prompt.ids, on_resid=seen.__setitem__)
            streams.append(np.stack([seen[n][0, -1].double().cpu().numpy() for n in range(model.geometry.layers)]))
        means.append(np.mean(streams, 0))
    gap = means[0] - means[1]
    size = (gap**2).sum(1, keepdims=True)  # 0 in a first layer that has not attended to anything yet
    scaled: NDArray[np.float64] = np.divide(gap, size, out=np.zeros_like(gap), where=size > 0)
    return scaled


def _numbers(model: Model, raw: dict[str, Any], where: list[Any]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Controls and predictors of one unit of every layer."""
    g = model.geometry
    trivial = raw["magnitudes"].controls("".join(where[0][0]), [channels for _, channels in where])
    rows: list[dict[str, Any]] = []
    for layer, (site, channels) in enumerate(where):
        columns, at = [SITES.index(s) for s in site], list(channels)
        row: dict[str, Any] = {f"c:{key}": trivial[name][layer].values for key, name in CONTROLS.items()}
        for key in ("margin drop", "first order", "shift", "integrated"):
            row[f"p:{key}"] = raw[key][layer][columns][:, at].sum((0, 1))
        row["p:error"] = np.sqrt((raw["error"][layer][columns[0]][at] ** 2).sum(0))
        single, heads = len(at) < g.head_dim, sorted({channel // g.head_dim for channel in at})
        if not single:  # whole heads: the softmax of all their channels' errors together
            row["p:margin drop"] = sum(raw[f"head margin drop {s}"][layer][heads].sum((0, 1)) for s in site)
            row["p:shift"] = sum(raw[f"head shift {s}"][layer][heads].sum((0, 1)) for s in site)
            row["p:output error"] = sum(raw[f"head output error {s}"][layer][heads].mean((0, 1)) for s in site)
            if "k" in site:
                scores = raw["head score error"][layer][heads]
                row["p:error"] = np.sqrt((scores**2).mean((0, 1)))
                row["p:error over gap"] = (scores / raw["head score gap"][layer][heads]).mean((0, 1))
                row["p:attention moved"] = raw["head moved"][layer][heads].mean((0, 1))
        if len(at) == g.channels:
            row["p:ratio"] = float(np.nanmax([raw["ratio"][layer, c] for c in columns] + [-np.inf]))
        elif not single:
            row["p:ratio"] = float(raw["head ratio"][layer, columns[0], heads[0]])
        else:
            row["p:ratio"] = float(np.nanmedian(raw["channel ratio"][layer, columns[0], at]))
        rows.append(row)
    tables: dict[str, dict[str, NDArray[np.float64]]] = {"controls": {}, "predictors": {}}
    for key in rows[0]:
        tables["controls" if key[0] == "c" else "predictors"][key[2:]] = np.stack([row[key] for row in rows])
    return tables


# --- organisms ---


def grades(keys: bool) -> Iterator[tuple[str, float, float]]:
    """Sites, strength and loudness of what is planted."""
    for loudness in LOUDNESS:
        yield from (("values", strength, loudness) for strength in STRENGTHS)
        if keys:
            yield "keys", 0.0, loudness
            yield "both", 0.5, loudness


def family(size: Size, seed: int, count: int) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """All organisms of one base, each measured as a model; units of one organism are a cluster."""
    base = tiny_model(size, seed, dtype="float64")
    train, test = size.prompts("train"), size.prompts()
    refusals = frozenset({int(base.forward(base.encode([test.harmful[0]])[0].ids)[-1].argmax())})
    found: dict[str, dict[str, Any]] = {}
    rng, metas = random.Random(f"{size} {seed}"), []
    for number, (sites, strength, loudness) in enumerate(grades(size.attends)):
        part = Part(rng.randrange(size.layers), "crush", sites, strength, loudness)  # type: ignore[arg-type]
        planted = plant_blindly(base, [part], train.take(24), seed=number).model
        sets = (train.harmful[24 : 24 + count], train.harmless[24 : 24 + count], test.harmful[:count])
        levels, meta = measure(planted, count, sets=sets, tokens=refusals)
        metas.append({**meta, "planted": [part.layer, sites, strength, loudness]})
        for level, own in levels.items():
            if level in LEVELS:
                clusters = np.full(len(own["layer"]), number)
                _append(found.setdefault(level, {}), {**own, "cluster": clusters})
    return found, {"model": f"tiny {size.kind}, {number + 1} organisms", "organisms": metas, "layers": size.layers}


def _append(whole: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict):
            _append(whole.setdefault(key, {}), value)
        else:
            whole[key] = value if key not in whole else np.concatenate([whole[key], value])


if __name__ == "__main__":
    main()
