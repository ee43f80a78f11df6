"""What a quick look has found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from kvgeom.behaviour.scan import CRITICAL_SHARE
from kvgeom.checks import one_of, whole
from kvgeom.results import Result
from kvgeom.stats import percent
from kvgeom.words import counted, interval_text, listed, text_table

#: Layers that a sentence names.
NAMED = 3
SITES = {"k": "keys", "v": "values"}


@dataclass(frozen=True, repr=False)
class Screen(Result):
    """What forward passes say of a quantized cache before anything is generated. Made by :func:`kvgeom.screen`.

    The refusals of the exact cache are read under each cache. One is *expected to go* where its first token changes. That is
    an expectation, not a count; :attr:`caveat` says what it does not know.

    ``data`` has the tables

    - ``widths``, over ``bits``: ``expected_lost`` (refusals) with the Wilson interval ``expected_low``, ``expected_high`` of their
      share; ``margin_drop`` (nats, mean) with its bootstrap interval ``margin_low``, ``margin_high``; ``kl`` (nats a token) and
      ``top1`` (share of tokens whose most likely next token stays) of the refusals, with bootstrap intervals over them;
    - ``layers``, over (``layer``, ``site``), each rounded alone at ``meta["scan_bits"]``, on the first ``meta["few"]`` refused
      prompts: ``layer_lost``, ``layer_kl`` (nats, at the first token, mean), ``layer_margin_drop`` (nats) with its bootstrap interval
      ``layer_margin_low``, ``layer_margin_high``; ``first_order`` (nats), the same margin by its gradient; and ``ratio``, the
      noise-sensitivity ratio with ``ratio_low``, ``ratio_high`` (NaN where undefined or not measured);
    - ``channels``, over (``layer``, ``site``, ``channel``): ``channel_first_order`` (nats);
    - ``caches``, over ``cache``, at ``meta["scan_bits"]``, on the first ``meta["few"]`` refused prompts: ``cache_lost``,
      ``cache_margin_drop`` (nats) and ``memory_overhead`` of the cache as it is, of its keys and its values alone, and of
      candidates, as ``family`` says (``"whole"``, ``"part"``, ``"candidate"``);
    - ``prompts``, over (``bits``, ``prompt``), of refused prompts: ``margin`` (nats), ``first_change`` (the first token of the response that changes, -1 for none).
    """

    kind: ClassVar[str] = "screen"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "widths": ("bits",),
        "layers": ("layer", "site"),
        "channels": ("layer", "site", "channel"),
        "caches": ("cache",),
        "prompts": ("bits", "prompt"),
    }

    @property
    def refused(self) -> int:
        """Prompts that the model refuses with an exact cache."""
        return int(self.meta["refused"])

    @property
    def first_loss(self) -> int | None:
        """The widest width at which more than the critical share of the refusals is expected to go; None if there is none."""
        data = self.data.sortby("bits", ascending=False)
        lost = data.bits.values[data.expected_lost.values > CRITICAL_SHARE * self.refused]
        return int(lost[0]) if len(lost) and self.refused else None

    def worst(self, most: int = NAMED) -> pd.DataFrame:
        """The layers and sites whose rounding alone changes most first tokens, or else their distribution, worst first."""
        frame = self.to_frame("layers")
        worst = frame[frame.layer_kl > 0].sort_values(["layer_lost", "layer_kl"], ascending=False)
        return worst.head(whole("most", most, 1))

    @property
    def best_candidate(self) -> str | None:
        """The candidate that takes no memory under which fewest refusals are expected to go, if fewer than as it is."""
        frame = self.to_frame("caches")
        better = frame[
            (frame.family == "candidate") & (frame.memory_overhead <= 0) & (frame.cache_lost < frame.cache_lost.iloc[0])
        ]
        if better.empty:
            return None
        return str(better.sort_values(["cache_lost", "cache_margin_drop"]).cache.iloc[0])

    def lost_under(self, cache: str) -> int:
        """Refusals of the first ``meta["few"]`` that are expected to go under one of the caches."""
        one_of("cache", cache, self.data.cache.values.tolist())
        return int(self.data.cache_lost.sel(cache=cache))

    @property
    def expectation(self) -> str:
        """The provisional sentence: what is expected, through what, and what might help."""
        if not self.refused:
            return f"The model refuses none of {counted(self.meta['prompts'], 'request')} with an exact cache, so nothing can be lost."
        width = self.first_loss
        if width is None:
            least = int(self.data.bits.min())
            row = self.data.sel(bits=least)
            return (
                f"Down to {least} bits {self.meta['scheme']}, no more than {percent(CRITICAL_SHARE)} of {counted(self.refused, 'refusal')} are "
                f"expected to go ({int(row.expected_lost)} at {least} bits)."
            )
        row = self.data.sel(bits=width)
        parts = [
            f"At {width} bits {self.meta['scheme']}, {int(row.expected_lost)} of {counted(self.refused, 'refusal')} are expected to go "
            f"{interval_text(float(row.expected_low), float(row.expected_high))}"
        ]
        if int(self.meta["scan_bits"]) != width:
            return parts[0] + "."
        of = self.meta["few"]
        parts.append(
            f"of the first {of}, {self.lost_under('keys alone')} with only the keys rounded and {self.lost_under('values alone')} "
            "with only the values"
        )
        worst = self.worst()
        worst = worst[worst.layer_lost > 0]
        if len(worst):
            where = [
                f"{SITES[row['site']]} of layer {row['layer']} ({row['layer_lost']})"
                for row in worst.to_dict("records")
            ]
            parts.append(f"rounded alone, most by the {listed(where)}")
        elif of:
            parts.append("no layer alone takes any of them")
        best = self.best_candidate
        if best is not None:
            parts.append(
                f"{best} is expected to lose {self.lost_under(best)} of {of} instead of {self.lost_under('as it is')}"
            )
        return "; ".join(parts) + "."

    @property
    def caveat(self) -> str:
        """What is not known without generation."""
        return (
            "Nothing was generated under a rounded cache: a refusal is expected to go where its first token changes. Some begin otherwise "
            "and refuse all the same, some are given up later; whether the rest complies or is broken text takes kvgeom audit."
        )

    def summary(self) -> str:
        return self.expectation

    def to_text(self) -> str:
        """The widths, the worst layers and the caches, then what is expected."""
        bits, few = f"{self.meta['scan_bits']} bits", self.meta["few"]
        widths = [
            (
                int(row["bits"]),
                f"{row['expected_lost']:.0f} of {self.refused}",
                interval_text(row["expected_low"], row["expected_high"]),
                _nats(row["margin_drop"]),
                f"{row['kl']:.2g}",
                percent(row["top1"]),
            )
            for row in sorted(self.records(), key=lambda row: -row["bits"])
        ]
        parts = [text_table(("bits", "expected to go", "95 %", "margin lost", "KL", "same token"), widths)]
        layers = [
            (
                f"{row['layer']} {SITES[row['site']]}",
                f"{row['layer_lost']} of {few}",
                f"{row['layer_kl']:.2g}",
                _nats(row["layer_margin_drop"]),
                _nats(row["first_order"]),
                "" if pd.isna(row["ratio"]) else f"{row['ratio']:.3g}",
            )
            for row in self.worst(5).to_dict("records")
        ]
        if layers:
            header = (f"layer alone, {bits}", "expected to go", "KL", "margin lost", "first order", "ratio")
            parts.append(text_table(header, layers))
        caches = [
            (
                row["cache"],
                f"{row['cache_lost']:.0f} of {few}",
                _nats(row["cache_margin_drop"]),
                "" if pd.isna(row["memory_overhead"]) else f"{row['memory_overhead']:+.1%}",
            )
            for row in self.to_frame("caches").to_dict("records")
        ]
        if few:
            parts.append(text_table((f"cache, {bits}", "expected to go", "margin lost", "memory"), caches))
        return "\n\n".join([*parts, self.expectation, self.caveat])


def _nats(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:+.2f}"
