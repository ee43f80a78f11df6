"""What nobody should hand to a function, and how a function may end that is handed it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvgeom.errors import KvgeomError

NASTY: tuple[Any, ...] = (
    *(None, True, -1, 1.5, float("nan"), "", "x", b"x", [], {}, object(), 10**30, "a" * 5000, np.array([1])),
    *(Path("nope"), [None], ["x", 3], {"x": 1}, "\udcff", "~nobody/x", {1, 2}, 2 + 3j, [[]]),
)
#: For what is made in no time.
MORE: tuple[Any, ...] = (
    *(
        *NASTY,
        np.array(4),
        np.array([1, 2]),
        np.array(["a", "b"]),
        torch.tensor(4),
        torch.tensor([1]),
        range(3),
        slice(3),
    ),
    *("a" * 300, 2**63, math.inf, -math.inf, 10**400, 10**5000, np.bool_(True), np.float32("nan"), [10**5000]),
)


def wrong_ends(
    call: Callable[..., Any], works: dict[str, Any], keywords: Iterable[str], values: Iterable[Any]
) -> list[Any]:
    """Errors that are no short line, or that are not on purpose, of calls with one keyword changed."""
    values, found = [*values], []
    for keyword in keywords:
        for value in values:
            try:
                call(**works | {keyword: value})
            except KvgeomError as error:
                if len(str(error)) > 800 or "\n" in str(error):
                    found.append((keyword, str(error)))
            except Exception as error:  # what nobody has thought of
                found.append((keyword, type(value), repr(error)[:200]))
    return found
