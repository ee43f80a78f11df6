"""Progress bars, the same everywhere: in a terminal, in a notebook, or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


@contextmanager
def bar(title: str, total: int, show: bool = True, **options: Any) -> Iterator[Any]:
    """A tqdm bar with time left; its ``update(n)`` counts, ``show=False`` makes it silent."""
    from tqdm.auto import tqdm

    with tqdm(
        total=total, desc=f"{title:<34}", disable=not show, dynamic_ncols=True, smoothing=0.1, **options
    ) as shown:
        yield shown


def track(items: Iterable[T], title: str, total: int, show: bool = True) -> Iterator[T]:
    """Iterate over ``items`` under a :func:`bar`."""
    with bar(title, total, show) as shown:
        for item in items:
            yield item
            shown.update(1)
