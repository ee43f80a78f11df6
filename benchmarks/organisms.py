"""The calibration certificate: organisms with a planted mode, diagnosed, and the confusion matrix of the two.

Run:  make organisms        (or: python benchmarks/organisms.py [--seeds 0 1 2 ...] [--out docs/organisms.json])

Every organism is diagnosed on 48 harmful requests of the toy language that neither training nor planting has seen. The
table is written as JSON and into docs/organisms.md, where a test compares the two.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any, get_args

import kvgeom
from kvgeom.diagnosis.taxonomy import ModeName
from kvgeom.organisms import MODES, Size, plant, tiny_model

DOCS = Path(__file__).parents[1] / "docs"
#: Sizes on which nothing was tuned.
SIZES = (Size(3, 2, 64), Size(4, 4, 32), Size(4, 4, 64), Size(5, 2, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[100, 101, 102], help="of which none was looked at before"
    )
    parser.add_argument("--out", type=Path, default=DOCS / "organisms.json")
    asked = parser.parse_args()
    rows = []
    for size in SIZES:
        model = tiny_model(size)
        for mode in MODES:
            for seed, verify in [*((seed, True) for seed in asked.seeds), (asked.seeds[0] + 1000, False)]:
                rows.append(diagnosed(model, size, mode, seed, verify))
                print(json.dumps(rows[-1]), flush=True)
    asked.out.write_text(json.dumps(rows, indent=1) + "\n")
    page = DOCS / "organisms.md"
    begin, end = "<!-- confusion matrix: begin -->", "<!-- confusion matrix: end -->"
    written = re.sub(f"{begin}.*{end}", f"{begin}\n{matrix(rows)}\n{end}", page.read_text(), flags=re.S)
    page.write_text(written)
    print(matrix(rows))


def diagnosed(model: Any, size: Size, mode: Any, seed: int, verify: bool = True) -> dict[str, Any]:
    """Plant, diagnose, compare. Planting checks its product on its own prompts unless ``verify`` is False."""
    began = time.monotonic()
    organism = plant(model, mode, seed=seed, prompts=size.prompts("train").take(24), verify=verify)
    found = kvgeom.diagnose(
        organism.model, size.prompts(), bits=organism.bits, curve_bits=(), geometry=False, progress=False, seed=seed
    )
    return {
        "size": str(size),
        "planted": mode,
        "seed": seed,
        "verified": verify,
        "draws": organism.draws,
        "layers": list(organism.layers),
        "found": found.mode.name,
        "worst_layer": found.scan.critical_layer,
        "reason": found.mode.reason,
        "share_of_prompts": found.mode.shares["prompts"].get(found.mode.name, 0.0),
        "seconds": round(time.monotonic() - began, 1),
    }


def matrix(rows: list[dict[str, Any]]) -> str:
    """Planted modes against found ones, in Markdown."""
    kept, blind = ([row for row in rows if row["verified"] is verified] for verified in (True, False))
    names = [name for name in get_args(ModeName) if name in MODES or any(row["found"] == name for row in kept)]
    lines = ["| planted | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for mode in MODES:
        found = [row["found"] for row in kept if row["planted"] == mode]
        lines.append(f"| {mode} ({len(found)}) | " + " | ".join(str(found.count(name)) for name in names) + " |")
    right, guessed = (sum(row["planted"] == row["found"] for row in some) for some in (kept, blind))
    draws = sum(row["draws"] for row in kept) / len(kept)
    return "\n".join(
        [
            *lines,
            "",
            f"{right} of {len(kept)} organisms get the mode that was planted in them. Planting had looked at each on other",
            f"requests and had drawn anew until its mode showed ({draws:.1f} draws on average); of {len(blind)} that were",
            f"taken as first drawn, unseen, {guessed} get it.",
        ]
    )


if __name__ == "__main__":
    main()
