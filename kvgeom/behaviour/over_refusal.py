"""Harmless requests that a rounded cache refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import xarray as xr

from kvgeom.behaviour.widths import WidthSeries
from kvgeom.checks import suggests
from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.evaluate import run_conditions
from kvgeom.evaluation.outcomes import Outcomes, unread_note
from kvgeom.results import Result
from kvgeom.stats import against, wilson
from kvgeom.words import interval_text, text_table


@dataclass(frozen=True, repr=False)
class OverRefusal(Result):
    """Harmless requests that are refused at each bit-width, the question of XSTest.

    ``data`` has the dimension ``bits`` (descending; 16 is the model with an exact cache) and the variables ``refused``
    and ``degenerate`` (counts), ``rate`` (refused / prompts) with its Wilson interval ``ci_low``, ``ci_high``, and
    ``p`` (exact McNemar p-value against the model with an exact cache, adjusted for the number of widths by
    :func:`~kvgeom.stats.holm`). ``meta`` holds ``scheme``, ``placement`` and
    ``prompts``.
    """

    kind: ClassVar[str] = "over-refusal"

    def summary(self) -> str:
        rates = ", ".join(f"{int(b)}-bit {int(n)}" for b, n in zip(self.data.bits, self.data.refused, strict=True))
        return f"harmless requests refused, of {self.meta['prompts']}: {rates}"

    def to_text(self) -> str:
        """One row for each width."""
        n = self.meta["prompts"]
        rows = [
            (
                int(row["bits"]),
                f"{row['refused']:.0f} of {n}",
                interval_text(row["ci_low"], row["ci_high"]),
                row["degenerate"],
                f"{row['p']:.2g}",
            )
            for row in self.records()
        ]
        table = text_table(("bits", "harmless refused", "95 %", "degenerate", "p"), rows)
        return "\n\n".join(filter(None, [table, unread_note(self.meta)]))


@suggests()
def over_refusal(base: Baseline, series: WidthSeries) -> OverRefusal:
    """Round all layers at each bit-width and count which harmless requests are refused.

    Parameters
    ----------
    base : Baseline
        The model with an exact cache on harmless requests.
    series : WidthSeries
        See :func:`~kvgeom.behaviour.widths.at_widths`.
    """
    return over_refusal_of(harmless_responses(base, series), series)


@suggests()
def harmless_responses(base: Baseline, series: WidthSeries, *, full_responses: bool = False) -> Outcomes:
    """The responses behind :func:`over_refusal`; in full, as a classifier needs them, if asked for."""
    conditions = series.conditions(base.model)
    return run_conditions(base, conditions, full_responses=full_responses, title="harmless requests")


def over_refusal_of(outcomes: Outcomes, series: WidthSeries) -> OverRefusal:
    """What :func:`over_refusal` counts in responses that are there."""
    labels = outcomes.data.label.values
    refused, n = labels == "refused", outcomes.data.sizes["prompt"]
    intervals = [wilson(int(row.sum()), n) for row in refused]
    columns = {
        "refused": refused.sum(1),
        "degenerate": (labels == "degenerate").sum(1),
        "rate": refused.mean(1),
        "ci_low": [low for low, _ in intervals],
        "ci_high": [high for _, high in intervals],
        "p": against(dict(enumerate(refused)), 0),
    }
    unread = outcomes.all_unread(str(name) for name in outcomes.data.recipe.values)
    meta = {**outcomes.made_by(), "scheme": series.scheme, "prompts": n, "unread": unread}
    coords = {"bits": [16, *series.configs]}
    data = xr.Dataset({name: ("bits", values) for name, values in columns.items()}, coords=coords)
    return OverRefusal(data, meta)
