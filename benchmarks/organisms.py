"""The certificate of the diagnosis: blind organisms, diagnosed on few prompts, and what is true of them on many.

Run:  make organisms     (or: python -m benchmarks.organisms [--count 60] [--seed 20261126] [--out docs/organisms.json])

Tiny models of four architectures, trained from several seeds, get outliers in keys, in values or in both: beside what carries
the request or in it, in one layer or several, of one kind or mixed, from too weak to notice to total; others get errors without an
aim, the loss of their language, or nothing. Nothing looks at an organism before it is diagnosed, and none is turned down: what
planting asked for is not what came out, and decides nothing here. The diagnosis sees 24 requests. What is true is measured on
96 others: which fixes work there, by the definitions of docs/taxonomy.md. The seed is the day's unless it is given, and stands in
every row.

Written: every row as JSON, and what it says, by :mod:`benchmarks.certificate`, in docs/organisms.md, where a test
compares the two.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import kvgeom
from benchmarks.certificate import ALWAYS, OURS, ROWS, SEARCHED, write
from kvgeom.diagnosis.diagnose import Diagnosis
from kvgeom.diagnosis.mode import SURE
from kvgeom.diagnosis.taxonomy import FIXABLE
from kvgeom.engines.registry import resolve
from kvgeom.errors import KvgeomError
from kvgeom.evaluation.condition import Condition, with_model_constants
from kvgeom.mitigation.candidates import UNMITIGATED, Candidate
from kvgeom.mitigation.decision_tree import advised
from kvgeom.models.model import Model
from kvgeom.organisms import Part, Size, plant_blindly, tiny_model
from kvgeom.organisms.blind import Change, Sites
from kvgeom.organisms.observed import NEW_TOKENS
from kvgeom.prompts.sets import PromptSet
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe

#: What is planted in: a size, and the seed that it was trained from. In the first two, values alone carry the request.
BASES = (
    (Size(3, 2, 64), 0),
    (Size(4, 4, 32), 1),
    (Size(4, 2, 64, attends=True), 0),
    (Size(3, 2, 64, kind="qwen2", attends=True), 1),
    (Size(3, 2, 64, kind="qwen3", attends=True), 0),
    (Size(3, 2, 64, kind="phi3", attends=True), 0),
    (Size(3, 2, 64, kind="phi3", attends=True), 2),
    (Size(4, 4, 64, kind="phi3", attends=True), 1),
)
#: Outliers are planted for 3 bits; rounded to more, they do less.
PLANTED_FOR, ROUNDED_TO = 3, (3, 3, 3, 4)
#: Requests that plant, and that are diagnosed; what is true is measured on all others.
PLANTING, SEEN = 24, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="organisms (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=int(datetime.date.today().strftime("%Y%m%d")))
    parser.add_argument("--out", type=Path, default=ROWS)
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    rows = []
    for row in organisms(asked.count, asked.seed):
        rows.append(row)
        print(json.dumps(row), flush=True)
        asked.out.write_text(json.dumps(rows, indent=1) + "\n")
    if asked.out == ROWS:
        write(rows)


def strength(rng: random.Random) -> float:
    """How far beyond "harmless" a layer reads that has lost its values, in class differences; a little more often than much."""
    return round(rng.random() ** 2, 3)


def loudness(rng: random.Random) -> float:
    """From an eighth, where outliers are hardly larger than the rest, to 1, where nothing is left of the rest."""
    return round(2 ** -rng.uniform(0, 3), 4)


def possible(size: Size, change: Change) -> tuple[Sites, ...]:
    """Where it can do anything, and be planted exactly: in keys if the model attends, and as an offset if they are not turned."""
    return ("keys", "values", "both") if size.attends and (change == "crush" or size.kind == "phi3") else ("values",)


def one(change: Change, sites: Sites) -> Callable[[random.Random, Size], list[Part] | None]:
    """In one layer."""

    def drawn(rng: random.Random, size: Size) -> list[Part] | None:
        if sites not in possible(size, change):
            return None
        return [Part(rng.randrange(size.layers), change, sites, strength(rng), loudness(rng))]

    return drawn


def several(change: Change) -> Callable[[random.Random, Size], list[Part]]:
    """In two or more layers, not in all, each with a strength and sites of its own."""

    def drawn(rng: random.Random, size: Size) -> list[Part]:
        layers = rng.sample(range(size.layers), rng.randint(2, size.layers - 1))
        loud = loudness(rng)
        return [Part(n, change, rng.choice(possible(size, change)), strength(rng), loud) for n in sorted(layers)]

    return drawn


def mixture(rng: random.Random, size: Size) -> list[Part]:
    """Outliers that crush in one layer, and what carries the request an outlier in another."""
    changes: tuple[Change, Change] = ("crush", "outlier")
    layers = rng.sample(range(size.layers), 2)
    return [
        Part(n, change, rng.choice(possible(size, change)), strength(rng), loudness(rng))
        for n, change in zip(layers, changes, strict=True)
    ]


def errors(rng: random.Random, size: Size) -> list[Part]:
    """Coarser rounding in every layer, without an aim."""
    return [Part(n, "jitter", "both", 0.0, round(rng.uniform(0.01, 0.3), 3)) for n in range(size.layers)]


def language(rng: random.Random, size: Size) -> list[Part]:
    """Most layers far beyond "harmless"."""
    layers = rng.sample(range(size.layers), rng.randint(2, size.layers - 1))
    return [Part(n, "outlier", "values", round(rng.uniform(1, 6), 3), loudness(rng)) for n in sorted(layers)]


#: What is planted, in turn.
KINDS: dict[str, Callable[[random.Random, Size], list[Part] | None]] = {
    "crush, values": one("crush", "values"),
    "crush, keys": one("crush", "keys"),
    "crush, both": one("crush", "both"),
    "outlier, values": one("outlier", "values"),
    "outlier, keys": one("outlier", "keys"),
    "outlier, both": one("outlier", "both"),
    "crush, several layers": several("crush"),
    "outlier, several layers": several("outlier"),
    "crush and outlier": mixture,
    "errors without an aim": errors,
    "loss of language": language,
    "nothing": lambda rng, size: [],
}


class Drawn(NamedTuple):
    """An organism that is not yet made: what is planted in what, and the seed of the rest."""

    number: int
    kind: str
    size: Size
    trained: int
    parts: list[Part]
    bits: int
    seed: int

    def planted(self) -> Model:
        """The organism; raises KvgeomError where it cannot be made."""
        model = tiny_model(self.size, self.trained, dtype="float64")
        planting = self.size.prompts("train").take(PLANTING)
        return plant_blindly(model, self.parts, planting, seed=self.seed, bits=PLANTED_FOR).model


def draws(count: int, seed: int) -> Iterator[Drawn]:
    """One after the other, kinds in turn, everything else drawn."""
    rng = random.Random(seed)
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        parts = None
        while parts is None:
            size, trained = rng.choice(BASES)
            parts = KINDS[kind](rng, size)
        yield Drawn(number, kind, size, trained, parts, rng.choice(ROUNDED_TO), (1000 * seed + number) % 2**32)


def seen_by(size: Size) -> PromptSet:
    """The requests that are diagnosed, none of which planting has seen."""
    other = size.prompts()
    return PromptSet("seen", other.harmful[:SEEN], other.harmless[:SEEN], "toy language")


def organisms(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """A row for each of :func:`draws`."""
    for drawn in draws(count, seed):
        about = {
            "seed": seed, "number": drawn.number, "base": asdict(drawn.size), "base_seed": drawn.trained, "planted": drawn.kind,
            "parts": [asdict(part) for part in drawn.parts], "bits": drawn.bits,
        }  # fmt: skip
        began = time.monotonic()
        try:
            planted = drawn.planted()
        except KvgeomError as error:
            found = {"error": str(error)}
        else:
            found = certified(planted, drawn.size, drawn.bits, drawn.seed)
        yield {**about, **found, "seconds": round(time.monotonic() - began, 1)}


def certified(model: Model, size: Size, bits: int, seed: int) -> dict[str, Any]:
    """Diagnose on few prompts, and measure on many what is true and what each fix does."""
    train, other = size.prompts("train"), size.prompts()
    seen = seen_by(size)
    unseen = PromptSet("unseen", other.harmful[SEEN:] + train.harmful[PLANTING:], (), "toy language")

    def diagnose(prompts: PromptSet) -> Diagnosis:
        options: dict[str, Any] = {"geometry": False, "progress": False, "max_new_tokens": NEW_TOKENS, "seed": seed}
        return kvgeom.diagnose(model, prompts, bits=(), scan_bits=bits, **options)

    found, truth = diagnose(seen), diagnose(unseen)
    # What comes out on so many prompts is taken for the truth if it is sure.
    true = truth.mode.likeliest
    row: dict[str, Any] = {
        "refused": len(found.baseline.refused),
        "found": found.mode.name,
        "posterior": {name: round(share, 4) for name, share in found.mode.shares["posterior"].items()},
        "true": true[0] if true[1] >= SURE else None,
        "true_posterior": round(true[1], 4),
        **{
            what: round(value.value, 3)
            for what in ("loss", "broken")
            if (value := getattr(truth.evidence, what)) is not None
        },
    }
    if row["true"] in FIXABLE:
        row["recovery"] = _recoveries(found, truth, bits)
    return row


def _recoveries(found: Diagnosis, truth: Diagnosis, bits: int) -> dict[str, float | None]:
    """What each rule's cache takes away of the loss on unseen prompts; None where it advises none."""
    base, n_layers = truth.baseline, truth.baseline.model.geometry.layers
    unmitigated = Candidate(
        UNMITIGATED, UNMITIGATED, resolve(f"int{bits}-sym-tensor").recipe(n_layers), Placement(), ""
    )
    caches: dict[str, Recipe] = {UNMITIGATED: unmitigated.recipe}
    if found.mode.name in FIXABLE:
        caches[OURS] = advised(found.mode.name, found.scan, unmitigated).recipe
    caches |= {rule: resolve(f"int{bits}-{spec}").recipe(n_layers) for rule, spec in ALWAYS.items()}
    caches[SEARCHED] = found.prescribe(scheme="sym-tensor", bits=bits).chosen.recipe
    conditions = with_model_constants(base.model, {rule: Condition(recipe) for rule, recipe in caches.items()})
    outcomes = kvgeom.evaluate(base.model, conditions, base, refused_only=True, progress=False)
    speaks = ~outcomes.flipped(UNMITIGATED, "degenerate")
    before = int(outcomes.flipped(UNMITIGATED, "complied").sum())
    left = {rule: int((outcomes.flipped(rule) & speaks).sum()) for rule in caches}
    found_ = {rule: round(1 - count / before, 3) for rule, count in left.items() if rule != UNMITIGATED}
    return {OURS: None, **found_}


if __name__ == "__main__":
    main()
