"""Progress bars, the same everywhere: in a terminal, in a notebook, or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

#: Whether bars are drawn. Public functions set it from their ``progress`` keyword; nothing below them passes it on.
_SHOWN: ContextVar[bool] = ContextVar("kvgeom_progress", default=True)


@contextmanager
def shown(show: bool) -> Iterator[None]:
    """Draw bars, or do not, within a ``with`` block. Inside a silent block nothing is drawn."""
    token = _SHOWN.set(show and _SHOWN.get())
    try:
        yield
    finally:
        _SHOWN.reset(token)


@contextmanager
def bar(title: str, total: int, show: bool = True, **options: Any) -> Iterator[Any]:
    """A tqdm bar with the time left; its ``update(n)`` counts."""
    from tqdm.auto import tqdm

    with tqdm(
        total=total,
        desc=f"{title:<34}",
        disable=not (show and _SHOWN.get()),
        dynamic_ncols=True,
        smoothing=0.1,
        **options,
    ) as drawn:
        yield drawn


def track(items: Iterable[T], title: str, total: int, show: bool = True) -> Iterator[T]:
    """Iterate over ``items`` under a :func:`bar`."""
    with bar(title, total, show) as drawn:
        for item in items:
            yield item
            drawn.update(1)
