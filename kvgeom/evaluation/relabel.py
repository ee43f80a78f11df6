"""What a classifier says of responses, written down as it says it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import versions
from kvgeom.evaluation.journal import Journal
from kvgeom.judges.guards import UNREAD_REASON
from kvgeom.judges.judge import Judgement

if TYPE_CHECKING:
    from kvgeom.judges.classifiers import ClassifierJudge


class KeptLabels:
    """A classifier whose labels are kept in a file, so that a relabelling that was interrupted goes on.

    It stands for the classifier in every ``relabel``, and asks it once about responses that many recipes give. Answers that
    could not be read are not kept: another run asks for them again.

    Parameters
    ----------
    judge : ClassifierJudge
        From :func:`kvgeom.classifier`.
    journal : str or Path
        The file; what other classifiers said may be in it too.

    Raises
    ------
    InputError
        If the file cannot be used (see :class:`~kvgeom.evaluation.journal.Journal`), or holds something else than labels.

    Examples
    --------
    ::

        with KeptLabels(kvgeom.classifier("wildguard"), "labels.jsonl") as judge:
            found = found.relabel(judge)
    """

    def __init__(self, judge: ClassifierJudge, journal: str | Path) -> None:
        self._judge, self._journal = judge, Journal(journal, {"measure": "labels of classifiers"})
        self._made_by = {"judge": judge.name, "versions": versions()}
        self._path, self._unread = self._journal.path, dict[str, Judgement]()

    @property
    def name(self) -> str:
        """That of the classifier."""
        return self._judge.name

    @property
    def asked(self) -> int:
        """Responses put to the classifier in this run."""
        return self._judge.asked

    @property
    def unread(self) -> int:
        """Those of them that it did not decide."""
        return self._judge.unread

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def label_all(
        self, requests: Sequence[str], responses: Sequence[str], likelihoods: Sequence[float]
    ) -> list[Judgement]:
        """As :meth:`ClassifierJudge.label_all <kvgeom.judges.classifiers.ClassifierJudge.label_all>`."""
        rows = list(zip(requests, responses, likelihoods, strict=True))
        keys = [self._key(*row) for row in rows]
        new = {str(key): at for at, key in enumerate(keys) if key not in self._journal and str(key) not in self._unread}
        asked = list(new.values())

        def keep(number: int, found: Judgement) -> None:
            key = keys[asked[number]]
            if found.reason.startswith(UNREAD_REASON):
                self._unread[str(key)] = found
            else:
                self._journal[key] = [found.label, found.reason]

        if asked:
            self._judge.label_all(
                [requests[at] for at in asked],
                [responses[at] for at in asked],
                [likelihoods[at] for at in asked],
                on_label=keep,
                read_before=len({str(key) for key in keys if key in self._journal}),
            )
        return [self._unread.get(str(key)) or self._kept(key) for key in keys]

    def _kept(self, key: dict[str, Any]) -> Judgement:
        found = self._journal[key]
        if not (isinstance(found, list) and len(found) == 2):
            raise InputError(
                f"{self._path} holds {found!r} where a label and its reason should be; delete that line, or give another file"
            )
        return Judgement(*found)

    def _key(self, request: str, response: str, likelihood: float) -> dict[str, Any]:
        return {**self._made_by, "request": request, "response": response, "likelihood": likelihood}
