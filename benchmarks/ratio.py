"""The noise-sensitivity ratio of models by layer, site, position, contrast and estimator: what docs/ratio.md reports.

Run:  python -m benchmarks.ratio demo demo-no-refusal gemma --out ratios     (some minutes a model on two cores)

Writes ratios.nc (a :class:`kvgeom.geometry.ratios.Ratios`), ratios.html, and a sensitivity for each model; prints tables.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import kvgeom
from benchmarks.real import REAL
from kvgeom.geometry.ratios import ratios
from kvgeom.geometry.sensitivity import Sensitivity

SITES = ("k", "v", "resid")


def spread(found: Sensitivity) -> str:
    """How much the position alone, and the estimator alone, change the ratio of a layer."""
    data, lines = found.data, []
    for site in SITES:
        one = data.sel(site=site)
        at = one.at_ratio.values
        several = np.isfinite(at).sum(1) > 1
        times = np.nanmax(at[several], 1) / np.nanmin(at[several], 1) if several.any() else np.array([np.nan])
        biased = one.ratio_plugin / one.ratio
        lines.append(
            f"{site:<5} positions change it {np.median(times):.3g} times in the median layer, up to {times.max():.3g}; "
            f"plug-in over cross-fitted {float(biased.median()):.2f} (lowest {float(biased.min()):.2f}); "
            f"signal share {float(one.signal_share.min()):.2f} to {float(one.signal_share.max()):.2f}; "
            f"status {dict(zip(*np.unique(one.status.values.astype(str), return_counts=True), strict=True))}; "
            f"above random directions (p <= 0.05) {int((one.null_p <= 0.05).sum())}, above those of chance "
            f"{int((one.dealt_p <= 0.05).sum())}; specific {dict(zip(*np.unique(one.specific.values.astype(str), return_counts=True), strict=True))}; "
            f"with a value in 10^2-10^3 {int(((one.ratio >= 1e2) & (one.ratio <= 1e3)).sum())}, centred below 1 "
            f"{int((one.ratio_centered < 1).sum())} of {int(np.isfinite(one.ratio_centered).sum())}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "models", nargs="*", default=["demo"], help="names of benchmarks.real, or what kvgeom.load takes"
    )
    parser.add_argument("--out", type=Path, default=Path("ratios"))
    parser.add_argument("--scheme", default="int3-sym-tensor")
    parser.add_argument("--no-contrasts", action="store_true", help="without null (b), which is most of the time")
    options = parser.parse_args()
    found: dict[str, Sensitivity] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        begin = time.perf_counter()
        space = kvgeom.subspace(REAL[name]() if name in REAL else name, progress=False)
        captured = time.perf_counter()
        label = Path(name).name
        found[label] = space.sensitivity(options.scheme, contrasts=() if options.no_contrasts else None, progress=False)
        found[label].save(options.out / f"{label}.nc")
        print(f"== {label}: capture {captured - begin:.0f} s, ratio with nulls {time.perf_counter() - captured:.0f} s")
        print(spread(found[label]), flush=True)
    together = ratios(found)
    together.save(options.out / "ratios.nc")
    together.plot().write_html(options.out / "ratios.html")
    table = together.table()
    print(table[table.index.get_level_values("kind") != "contrast"].round(3).to_string())


if __name__ == "__main__":
    main()
