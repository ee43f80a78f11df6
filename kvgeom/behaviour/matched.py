"""The width at which a model is damaged, and still writes language."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from kvgeom.behaviour.scan import per_tensor
from kvgeom.checks import whole
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import Baseline
from kvgeom.progress import track
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import BITS, Scheme, check_bits

#: A model still writes language where the perplexity of plain text grows by no more than this factor.
LANGUAGE_KEPT = 1.1


@dataclass(frozen=True)
class ScanWidth:
    """The width of a scan and how it was found.

    Attributes
    ----------
    scheme : Scheme
        Symmetric, per-tensor.
    perplexity_ratio : float
        Of plain text, all layers rounded so, to the exact cache.
    matched : bool
        Whether it was searched, and not given.
    """

    scheme: Scheme
    perplexity_ratio: float
    matched: bool

    def __str__(self) -> str:
        ratio, bits = f"{self.perplexity_ratio:.3g}", self.scheme.bits
        if not self.matched:
            return f"{bits} bits as asked, at {ratio} times the perplexity"
        if self.perplexity_ratio > LANGUAGE_KEPT:
            return f"even at {bits} bits perplexity grows {ratio} times, more than {LANGUAGE_KEPT} times"
        return (
            f"{bits} bits, the fewest at which perplexity grows by no more than {LANGUAGE_KEPT} times, at {ratio} times"
        )


def check_scan_bits(bits: int | None) -> int | None:
    """Return the width of a scan if it rounds anything; None is searched for.

    Raises
    ------
    InputError
        For 16 bits and those that no cache has.
    """
    if bits is None:
        return None
    if check_bits(whole("scan_bits", bits, None)) == 16:
        raise InputError("scan_bits must be 2 to 8, got 16, which rounds nothing")
    return int(bits)


def scan_width(base: Baseline, bits: int | None = None, placement: Placement | None = None) -> ScanWidth:
    """The width at which layers are scanned: as given, or the fewest bits at which the model still writes language.

    Broken text neither complies nor refuses, so that at a width which breaks the language nothing is learned of
    alignment. From 8 bits on one is taken away as long as the perplexity of the run's text, all layers rounded symmetric
    per-tensor, grows by no more than :data:`LANGUAGE_KEPT`; where it never does, that is 8 bits.

    Parameters
    ----------
    base : Baseline
    bits : int, optional
    placement : Placement, optional
    """
    n_layers = base.model.geometry.layers

    def at(width: int, matched: bool) -> ScanWidth:
        scheme = per_tensor(Scheme(width, symmetric=True))
        return ScanWidth(
            scheme, base.perplexity(Recipe.uniform(n_layers, scheme), placement) / base.perplexity(), matched
        )

    bits = check_scan_bits(bits)
    if bits is not None:
        return at(bits, False)
    with base.run.bars():
        widths = track(sorted(BITS, reverse=True), "width that keeps the language", len(BITS))
        tried = (at(width, True) for width in widths)
        kept = list(takewhile(lambda each: each.perplexity_ratio <= LANGUAGE_KEPT, tried))
    return kept[-1] if kept else at(max(BITS), True)  # a perplexity that is known is not measured again
