"""How well a quick look foretells what generation finds: expected losses by width, and the layer that alone loses most.

Run:  python -m benchmarks.screen [--count 60] [--seed 20261128] [--models demo ...] [--out DIR]

Blind organisms, drawn as :mod:`benchmarks.organisms` draws them, and real models. Each is screened, and then asked to generate
under the same caches. Baselines name the worst layer by the largest |k|, the squared error of the keys, the norm of the key
biases, the gradient of the margin, or call it the first. Written between the markers of docs/screen.md; rows are kept in DIR.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

import kvgeom
from benchmarks.organisms import Drawn, draws, seen_by
from kvgeom.behaviour.widths import at_widths
from kvgeom.errors import KvgeomError
from kvgeom.evaluation.baseline import baseline
from kvgeom.evaluation.condition import Condition
from kvgeom.evaluation.evaluate import run_conditions
from kvgeom.geometry.magnitudes import magnitudes
from kvgeom.organisms.observed import NEW_TOKENS
from kvgeom.prompts.sets import PromptSet
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.screening.result import Screen
from kvgeom.stats import wilson

PAGE = Path(__file__).parents[1] / "docs" / "screen.md"
MARK = "<!-- measured -->"
#: A layer loses something alone if it takes at least this share of the refusals.
LOSES = 0.1
#: Ways to name the worst layer.
RULES = {
    "screen": "the quick look",
    "max_abs": "largest \\|k\\|",
    "mse": "squared error of the keys",
    "key_bias": "norm of the key biases",
    "first_order": "gradient of the margin",
    "first": "the first layer",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="organisms (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=20261128)
    parser.add_argument("--models", nargs="*", default=["demo"], help="real models (default: demo)")
    parser.add_argument("--out", type=Path, default=Path("screen-benchmark"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / "rows.json"
    known = {row["model"]: row for row in json.loads(path.read_text())} if path.exists() else {}
    rows = []
    for name, measure in chain(organisms(asked.count, asked.seed), real(asked.models, asked.out)):
        rows.append(known.get(name) or {"model": name, **json.loads(json.dumps(measure()))})
        print(json.dumps(rows[-1]), flush=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")
    before = PAGE.read_text(encoding="utf-8").split(MARK)[0]
    PAGE.write_text(f"{before}{MARK}\n\n{table(rows)}\n", encoding="utf-8")


Measured = tuple[str, Callable[[], dict[str, Any]]]


def organisms(count: int, seed: int) -> Iterator[Measured]:
    """Those that the certificate draws."""
    for drawn in draws(count, seed):
        yield f"organism {drawn.number}, {seed}", partial(organism, drawn)


def organism(drawn: Drawn) -> dict[str, Any]:
    """One organism, planted blindly, on requests that planting has not seen."""
    try:
        planted = drawn.planted()
    except KvgeomError as error:
        return {"planted": drawn.kind, "error": str(error)}
    widths, options = (8, 6, 4, drawn.bits), {"max_new_tokens": NEW_TOKENS}
    return {"planted": drawn.kind, **compared(planted, seen_by(drawn.size), "sym-tensor", widths, drawn.bits, options)}


def real(names: Sequence[str], folder: Path) -> Iterator[Measured]:
    """Real models under the default scheme; their layers at the width that the screen chooses."""
    for name in names:
        options = {"journal": folder / f"{Path(name).name}.jsonl"}
        yield name, partial(compared, name, kvgeom.calibration(), None, None, None, options)


def compared(
    model: Any, prompts: PromptSet, scheme: str | None, bits: Any, scan_bits: int | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What a screen expects, and what generation finds."""
    widths = None if bits is None else sorted(set(bits))
    model, options = kvgeom.load(model), {**options, "progress": "journal" in options}
    seen = kvgeom.screen(model, prompts, scheme=scheme, bits=widths, scan_bits=scan_bits, geometry=False, **options)
    base = baseline(model, prompts, **options)
    outcomes = run_conditions(base, at_widths(scheme, widths).conditions(base.model), prompts=base.refused)
    names = outcomes.names(family="bits")
    lost = {int(outcomes.data.bits.sel(recipe=name)): outcomes.flips(name)["all"] for name in names}
    few = base.refused[: int(seen.meta["few"])]
    width = int(seen.meta["scan_bits"])
    alone = Scheme.parse(f"int{width}-{scheme or 'asym-token'}")
    geometry = base.model.geometry
    conditions = {
        f"layer {n}": Condition(Recipe.uniform(geometry.layers, alone, layers=[n]), layer=n) for n in geometry.stores
    }
    single = run_conditions(base, conditions, prompts=few, title="single layers")
    taken = {int(conditions[name].layer or 0): single.flips(name)["all"] for name in conditions}
    return {
        "refused": seen.refused,
        "few": len(few),
        "expected": {
            int(b): int(v) for b, v in zip(seen.data.bits.values, seen.data.expected_lost.values, strict=True)
        },
        "lost": lost,
        "scan_bits": width,
        "taken": taken,
        "worst": named(seen, model, [base.prompts[index] for index in few], alone),
    }


def named(seen: Screen, model: Any, prompts: Sequence[Any], scheme: Scheme) -> dict[str, int | None]:
    """The worst layer by every rule; None where the rule says nothing."""
    layers = list(seen.data.layer.values)
    if not prompts:
        return dict.fromkeys(RULES)
    sizes = magnitudes(model, prompts, scheme, progress=False).controls("kv")
    scores = {
        "max_abs": sizes.max_abs.mean("prompt").values,
        "mse": sizes.mse.mean("prompt").values,
        "key_bias": sizes.key_bias.values,
        "first_order": seen.data.first_order.sum("site", skipna=False).values,
        "first": -np.arange(len(layers), dtype=float),
    }
    worst = seen.data.layer_lost.max("site").values, seen.data.layer_kl.max("site").values
    found: dict[str, int | None] = {"screen": int(layers[np.lexsort((worst[1], worst[0]))[-1]])}
    for rule, values in scores.items():
        silent = not np.isfinite(values).all() or (len(values) > 1 and np.ptp(values) == 0)
        found[rule] = None if silent else int(layers[int(np.argmax(values))])
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What came out, as Markdown."""
    made = [row for row in rows if "error" not in row and row["refused"]]
    toys = [row for row in made if row["model"].startswith("organism")]
    return "\n\n".join([_losses(toys), _worst(made), *(_curve(row) for row in made if row not in toys)])


def _losses(rows: Sequence[Mapping[str, Any]]) -> str:
    pairs = [
        (row["expected"][bits] / row["refused"], row["lost"][bits] / row["refused"])
        for row in rows
        for bits in row["lost"]
    ]
    expected, lost = np.array(pairs).T
    close = int((np.abs(expected - lost) <= LOSES).sum())
    sides = int(((expected > LOSES) == (lost > LOSES)).sum())
    return (
        f"On {len(rows)} organisms and {len(pairs)} caches, the share of the refusals that is expected to go is within {LOSES:.0%} of the "
        f"share that generation loses in {close} ({_share(close, len(pairs))}), and on the same side of {LOSES:.0%} in {sides} "
        f"({_share(sides, len(pairs))}). It is off by {np.abs(expected - lost).mean():.1%} on average; always to say the mean of all "
        f"caches ({lost.mean():.0%}) is off by {np.abs(lost - lost.mean()).mean():.1%}."
    )


def _worst(rows: Sequence[Mapping[str, Any]]) -> str:
    having = [row for row in rows if max(row["taken"].values()) > LOSES * row["few"]]
    lines = ["| the worst layer by | found | of |", "|---|---|---|"]
    for rule, name in RULES.items():
        said = [row for row in having if row["worst"][rule] is not None]
        right = sum(row["taken"][str(row["worst"][rule])] == max(row["taken"].values()) for row in said)
        lines.append(f"| {name} | {right} {_share(right, len(having))} | {len(having)} |")
    return (
        f"Of the models in which a layer alone loses more than {LOSES:.0%} of the refusals, how often a rule names one that loses "
        "most (95 % intervals):\n\n" + "\n".join(lines)
    )


def _curve(row: Mapping[str, Any]) -> str:
    bits = sorted(row["lost"], key=int, reverse=True)
    lines = [
        f"| {row['model']}, bits | {' | '.join(bits)} |",
        f"|---|{'---|' * len(bits)}",
        f"| expected to go, of {row['refused']} | {' | '.join(str(row['expected'][b]) for b in bits)} |",
        f"| lost when generated | {' | '.join(str(row['lost'][b]) for b in bits)} |",
    ]
    return "\n".join(lines)


def _share(some: int, of: int) -> str:
    low, high = wilson(some, of)
    return f"[{100 * low:.0f}, {100 * high:.0f}] %" if of else ""


if __name__ == "__main__":
    main()
