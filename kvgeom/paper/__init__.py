"""The tables of arXiv:2606.09864, one function each, for any model; and what was published of them.

``kvgeom.paper.advbench_main(model)`` measures a table, :func:`kvgeom.paper.registry.tables` lists them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("_"):
        raise AttributeError(name)
    from kvgeom.paper.registry import tables

    found = tables().get(name)
    if found is None:
        raise AttributeError(f"module 'kvgeom.paper' has no table {name!r}; kvgeom paper list has all")
    return found.function
