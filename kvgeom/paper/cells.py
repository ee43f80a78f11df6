"""Cells that several tables have: flips with their kinds, errors, and the conditions of a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from kvgeom.evaluation.condition import Condition
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.models.templates import Message
from kvgeom.paired import share_difference
from kvgeom.paper.protocol import Protocol
from kvgeom.paper.study import Study
from kvgeom.paper.table import Row, share
from kvgeom.stats import bootstrap_means


def widths(protocol: Protocol, bits: Iterable[int]) -> dict[str, Condition]:
    """The whole cache at each width, asymmetric with a scale for each token; names are the widths."""
    return {str(b): protocol.over(protocol.by_token(b), family="bits") for b in bits}


def flip_rows(
    at: Mapping[str, int | str],
    found: Outcomes,
    name: str,
    prompts: Sequence[int] | None = None,
    quantity: str = "flip",
) -> list[Row]:
    """Flips under one condition, of some refused prompts or all, and how many of them comply, evade and are broken.

    The paper counts all of them alike.
    """
    labels = found.data.label.sel(recipe=name)
    labels = labels if prompts is None else labels.sel(prompt=list(prompts))
    values, n = labels.values, labels.sizes["prompt"]
    rows = [share(at, quantity, int((values != "refused").sum()), n)]
    kinds = {"complied": "comply", "evaded": "evade", "degenerate": "broken text"}
    for label, word in kinds.items():
        row = share(at, f"{quantity}: {word}", int((values == label).sum()), n, None)
        rows.append(row)
    return rows


def in_conversation_rows(
    study: Study,
    protocol: Protocol,
    bits: Sequence[int],
    settings: Mapping[str, Sequence[Message]],
    key: str,
    suite: str,
) -> list[Row]:
    """Refusals with an exact cache and flips by width, of the same requests in several conversations.

    Parameters
    ----------
    settings : mapping of name to messages
        What stands before each request; nothing in the first. The others are compared with it on the requests that both refuse.
    key : str
        The column of the names.
    """
    conditions, rows, before = widths(protocol, bits), [], None
    for name, messages in settings.items():
        asked = study.after(f"{key} {name}".replace(" ", "-"), messages) if messages else study
        base = asked.base(suite)
        found = asked.outcomes(conditions, suite, f"{key}: {name}")
        flips = {each: dict(zip(base.refused, found.flipped(each).tolist(), strict=True)) for each in conditions}
        rows.append(share({"bits": 16, key: name}, "refused", len(base.refused), len(base.prompts), None))
        for each in conditions:
            at: dict[str, int | str] = {"bits": int(each), key: name}
            rows += flip_rows(at, found, each)
            if before is not None:
                both = sorted(before[each].keys() & flips[each].keys())
                more = sum(flips[each][n] and not before[each][n] for n in both)
                fewer = sum(before[each][n] and not flips[each][n] for n in both)
                net = share_difference(more, fewer, len(both))
                rows.append(Row(at, "more flips, of what both refuse", net.value, net.low, net.high, len(both)))
        before = before or flips
    return rows


def error_row(at: Mapping[str, int | str], errors: Sequence[float], n: int) -> Row:
    """Mean squared error of keys and values over ``n`` prompts, with an interval where each prompt has its own."""
    mean = float(np.mean(errors))
    low, high = bootstrap_means(np.array(errors)) if len(errors) > 1 else (float("nan"), float("nan"))
    return Row(at, "KV MSE", mean, float(low), float(high), n, "squared activation")
