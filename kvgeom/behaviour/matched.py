"""The width at which a model is damaged, and still writes language."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvgeom.behaviour.scan import per_tensor
from kvgeom.checks import whole
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import Baseline
from kvgeom.progress import track
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import BITS, Scheme, check_bits
from kvgeom.words import listed, times_text

#: A model still writes language where the perplexity of plain text grows by no more than this factor.
LANGUAGE_KEPT = 1.1


@dataclass(frozen=True)
class ScanWidth:
    """The width of a scan and how it was found.

    Attributes
    ----------
    scheme : Scheme
        Symmetric, per-tensor.
    perplexity_ratio, low, high : float
        Of plain text, all layers rounded so, to the exact cache, with its 95 % interval.
    matched : bool
        Whether it was searched, and not given.
    undecided : tuple of int
        The widths tried whose interval does not exclude :data:`LANGUAGE_KEPT`: there the search went by the estimate.
    unmeasured : tuple of int
        The width tried whose perplexity is not a number: there the search ended.
    """

    scheme: Scheme
    perplexity_ratio: float
    low: float
    high: float
    matched: bool
    undecided: tuple[int, ...] = ()
    unmeasured: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        widths = {"undecided": list(self.undecided), "unmeasured": list(self.unmeasured)}
        return {**asdict(self), "scheme": str(self.scheme), **widths}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ScanWidth:
        """The inverse of :meth:`to_dict`."""
        widths = {name: tuple(record.get(name, ())) for name in ("undecided", "unmeasured")}
        return cls(**{**record, "scheme": Scheme.parse(record["scheme"]), **widths})

    def __str__(self) -> str:
        bits = self.scheme.bits
        if math.isnan(self.perplexity_ratio):
            unknown = f"perplexity cannot be measured at {bits} bits (it is not a number)"
            if not self.matched:
                return f"{bits} bits as asked; {unknown}"
            return f"{unknown}, so that no width is known to keep the language; {bits} bits are scanned all the same"
        grown = times_text(self.perplexity_ratio, self.low, self.high)
        if not self.matched:
            return f"{bits} bits as asked, at {grown} the perplexity"
        tested, beyond = f"tested downwards from {max(BITS)}", f"grows beyond {LANGUAGE_KEPT}x"
        if self.perplexity_ratio > LANGUAGE_KEPT:
            found = f"even at {bits} bits perplexity grows to {grown}, more than {LANGUAGE_KEPT}x"
        elif self.unmeasured:
            ended = f"at {listed([str(width) for width in self.unmeasured])} bits it cannot be measured"
            found = f"{bits} bits, {tested}, at {grown} the perplexity; {ended}"
        elif bits == min(BITS):
            found = f"{bits} bits, the fewest there are: {tested}, perplexity never {beyond}, at {grown}"
        else:
            found = f"{bits} bits, the fewest before perplexity first {beyond}, {tested}, at {grown}"
        if not self.undecided:
            return found
        return f"{found}; at {listed([str(width) for width in self.undecided])} bits the interval does not decide it"


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
    """The width at which layers are scanned: as given, or the fewest bits before the model stops writing language.

    Broken text neither complies nor refuses, so that at a width which breaks the language nothing is learned of
    alignment. From 8 bits on one is taken away as long as the perplexity of the run's text, all layers rounded symmetric
    per-tensor, grows by no more than :data:`LANGUAGE_KEPT`; where not even 8 bits do that, it is 8 bits. Fewer bits than the
    first at which it grows by more are not tested. The search ends, too, where perplexity is not a number; where that is at 8
    bits, the result is 8 bits and says that no width is known. The estimate decides; the result says where its interval
    does not.

    Parameters
    ----------
    base : Baseline
    bits : int, optional
    placement : Placement, optional
    """
    geometry = base.model.geometry

    def at(width: int, matched: bool) -> ScanWidth:
        scheme = per_tensor(Scheme(width, symmetric=True))
        ratio = base.perplexity_ratio(Recipe.uniform(geometry.layers, scheme, layers=geometry.stores), placement)
        return ScanWidth(scheme, ratio.value, ratio.low, ratio.high, matched)

    bits = check_scan_bits(bits)
    if bits is not None:
        return at(bits, False)
    tried: list[ScanWidth] = []
    with base.run.bars():
        for width in track(sorted(BITS, reverse=True), "width that keeps the language", len(BITS)):
            tried.append(at(width, True))
            if not tried[-1].perplexity_ratio <= LANGUAGE_KEPT:  # grown, or not a number
                break
    kept = [each for each in tried if each.perplexity_ratio <= LANGUAGE_KEPT]
    measured = [each for each in tried if not math.isnan(each.perplexity_ratio)]
    # An interval that is not a number excludes nothing.
    undecided = [each for each in measured if not (each.high < LANGUAGE_KEPT or each.low > LANGUAGE_KEPT)]
    return replace(
        kept[-1] if kept else tried[0],
        undecided=tuple(each.scheme.bits for each in undecided),
        unmeasured=tuple(each.scheme.bits for each in tried if each not in measured),
    )
