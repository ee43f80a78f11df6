"""What may stand where something else should."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st


def places(found: Any) -> Iterator[tuple[Any, Any]]:
    """Where something stands in JSON."""
    for key in found if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ():
        yield found, key
        yield from places(found[key])


def deep(depth: int) -> Any:
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


anything: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([None, True, -1, 0, 1e308, float("nan"), float("inf"), 2**70, "", "x", "int4-asym-token@0-999999999999",
                     "int4-asym-group" + "9" * 5000, "\udcff", [], {}, deep(400), "projection", "int4-asym-token"]),
    st.integers(), st.text(max_size=9), st.lists(st.integers() | st.none(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
