"""Refusal, compliance and degeneration against the bit-width of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import xarray as xr

from kvgeom.diagnosis.evaluate import EXACT, Baseline, Outcomes, evaluate
from kvgeom.diagnosis.perplexity import perplexity
from kvgeom.progress import track
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme, check_bits
from kvgeom.results import Result
from kvgeom.stats import wilson

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, repr=False)
class Curve(Result):
    """What a uniform cache recipe does to behaviour at each bit-width.

    ``data`` has the dimension ``bits`` (descending; the unquantized model is 16) and the variables

    - ``refused``, ``complied``, ``degenerate``: how many of the harmful prompts got each label;
    - ``flips``: prompts refused unquantized and labelled otherwise here, split into
      ``flips_complied`` and ``flips_degenerate``;
    - ``flip_rate``: flips / unquantized refusals, with its Wilson 95 % interval ``ci_low``, ``ci_high``
      (NaN where the model refuses nothing);
    - ``perplexity_ratio``: perplexity of a plain text under the recipe over the unquantized one.

    ``meta`` holds ``scheme`` (spelling without bits), ``placement``, ``prompts`` and ``baseline_refused``.
    """

    kind: ClassVar[str] = "curve"

    def summary(self) -> str:
        refused = self.meta["baseline_refused"]
        rates = ", ".join(
            f"{int(bits)}-bit {int(flips)}/{refused}"
            for bits, flips in zip(self.data.bits, self.data.flips, strict=True)
            if bits < 16
        )
        return f"flips of {self.meta['scheme']}: {rates}"

    def plot(self) -> go.Figure:
        """Labels against bits, with intervals, and perplexity below them."""
        from kvgeom.plots.curve import bit_curve

        return bit_curve(self)


def bit_width_curve(
    base: Baseline,
    text: str,
    *,
    bits: Sequence[int] = (8, 6, 5, 4, 3, 2),
    scheme: Scheme | None = None,
    placement: Placement | None = None,
    progress: bool = True,
) -> tuple[Curve, Outcomes]:
    """Round all layers at each bit-width and look at every response.

    Parameters
    ----------
    base : Baseline
        The unquantized model on the prompts; all of them are run, not only the refused ones.
    text : str
        Plain text for the perplexity ratio.
    bits : sequence of int
        2 to 8; 16 is always part of the curve.
    scheme : Scheme, optional
        Its bits are ignored. Asymmetric per-token by default.
    placement : Placement, optional

    Returns
    -------
    (Curve, Outcomes)
        The outcomes hold each response, by recipe ``"8-bit"``, ``"6-bit"``, ...
    """
    model, n_layers = base.model, base.model.geometry.layers
    widths = sorted({check_bits(b) for b in bits} - {16}, reverse=True)
    scheme = scheme or Scheme(4)
    recipes = {f"{b}-bit": Recipe.uniform(n_layers, replace(scheme, bits=b)) for b in widths}
    outcomes = evaluate(model, recipes, base, placement=placement, progress=progress, title="responses by bit-width")
    perplexities = [
        perplexity(model, text, recipe, placement=placement)
        for recipe in track([None, *recipes.values()], "perplexity by bit-width", len(recipes) + 1, progress)
    ]
    names = [EXACT, *recipes]
    counts = [outcomes.counts(name) for name in names]
    flips = [outcomes.flips(name) for name in names]
    refused = len(base.refused)
    # The unquantized model is what flips are counted against: its own rate is no estimate.
    itself = (0.0, 0.0) if refused else (float("nan"), float("nan"))
    intervals = [itself, *(wilson(flip["all"], refused) for flip in flips[1:])]
    columns = {
        **{label: [count[label] for count in counts] for label in ("refused", "complied", "degenerate")},
        "flips": [flip["all"] for flip in flips],
        "flips_complied": [flip["complied"] for flip in flips],
        "flips_degenerate": [flip["degenerate"] for flip in flips],
        "flip_rate": [flip["all"] / refused if refused else float("nan") for flip in flips],
        "ci_low": [low for low, _ in intervals],
        "ci_high": [high for _, high in intervals],
        "perplexity_ratio": [value / perplexities[0] for value in perplexities],
    }
    meta = {
        **{key: outcomes.meta[key] for key in ("model", "fingerprint", "placement", "judge", "max_new_tokens")},
        "scheme": str(scheme).split("-", 1)[1],
        "prompts": len(base.prompts),
        "baseline_refused": refused,
        "baseline_perplexity": perplexities[0],
    }
    data = xr.Dataset({name: ("bits", values) for name, values in columns.items()}, coords={"bits": [16, *widths]})
    return Curve(data, meta), outcomes
