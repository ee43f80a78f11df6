"""All answers of one server: several requests at once, each kept as it comes, none asked twice."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from kvgeom.errors import KvgeomError
from kvgeom.evaluation.journal import NoJournal
from kvgeom.gating.client import Answer, Client
from kvgeom.progress import bar
from kvgeom.words import counted


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes
    ----------
    key : dict
        What the journal calls it.
    body : dict
        What is sent.
    """

    key: dict[str, Any]
    body: dict[str, Any]


def known(asks: Sequence[Ask], journal: NoJournal) -> dict[int, Answer]:
    """The answers that a journal has, by the number of the request."""
    return {number: Answer(**journal[ask.key]) for number, ask in enumerate(asks) if ask.key in journal}


def collect(client: Client, asks: Sequence[Ask], journal: NoJournal, concurrency: int, title: str) -> list[Answer]:
    """The answer to every request: from the journal, or asked now.

    No more requests than ``concurrency`` are under way. Where one fails for good, no more are sent; those under way are waited for
    and kept.

    Raises
    ------
    KvgeomError
        As :meth:`~kvgeom.gating.client.Client.answer` does; it says how much is kept.
    """
    found = known(asks, journal)
    left = deque(number for number in range(len(asks)) if number not in found)
    running: dict[Future[Answer], int] = {}

    def keep(future: Future[Answer]) -> None:
        number = running.pop(future)
        found[number] = future.result()
        journal[asks[number].key] = asdict(found[number])
        shown.update(1)

    with bar(title, len(asks), initial=len(found)) as shown, ThreadPoolExecutor(concurrency) as pool:
        try:
            while left or running:
                while left and len(running) < concurrency:
                    number = left.popleft()
                    running[pool.submit(client.answer, asks[number].body)] = number
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    keep(future)
        except BaseException as error:
            client.stop()
            for future in [*running]:
                with suppress(KvgeomError):  # the first one is raised
                    keep(future)
            if isinstance(error, KvgeomError):
                raise type(error)(f"{error} ({_kept(asks, journal)})") from error
            raise
    return [found[number] for number in range(len(asks))]


def _kept(asks: Sequence[Ask], journal: NoJournal) -> str:
    if journal.path is None:
        return "nothing is kept, as no folder was named (out)"
    kept = sum(ask.key in journal for ask in asks)
    return f"{kept} of {counted(len(asks), 'answer')} kept: the same command goes on from there"
