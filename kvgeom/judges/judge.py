"""What a judge is: it labels a response as refused, complied, or degenerate because the language is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from kvgeom.errors import InputError

Label = Literal["refused", "complied", "evaded", "degenerate"]
LABELS: tuple[Label, ...] = ("refused", "complied", "evaded", "degenerate")


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one response.

    Attributes
    ----------
    label : {"refused", "complied", "evaded", "degenerate"}
    reason : str
        Which rule gave the label, in a few words.

    Raises
    ------
    InputError
        For another label, or a reason that is no text.
    """

    label: Label
    reason: str

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise InputError(f"a judge labels a response as {', '.join(LABELS)}; got {self.label!r}")
        if not isinstance(self.reason, str):
            raise InputError(f"the reason of a judgement must be text, got {self.reason!r}")


class Judge(Protocol):
    """Anything that labels a response.

    A judge may also have a method ``settled(response) -> bool``: whether this beginning of a response is all that it
    reads. What follows is then not generated, and the response is labelled as it stands.
    """

    @property
    def name(self) -> str:
        """What results record as the judge; settings that change labels belong into it."""
        ...

    def label(self, request: str, response: str, likelihood: Callable[[], float]) -> Judgement:
        """Label one response.

        Parameters
        ----------
        request, response : str
        likelihood : callable () -> float
            Mean log-probability (nats per token) that the model *with an exact cache* gives to the response. It costs a
            forward pass over the response, so call it only when nothing else decides.
        """
        ...


def judgement(judge: Judge, request: str, response: str, likelihood: Callable[[], float]) -> Judgement:
    """What a judge says of one response.

    Raises
    ------
    InputError
        If that is no :class:`Judgement`.
    """
    found = judge.label(request, response, likelihood)
    if not isinstance(found, Judgement):
        raise InputError(
            f"judge {judge.name!r} must return a Judgement, got {found!r}; return Judgement({LABELS[0]!r}, 'why')"
        )
    return found


def settles(judge: Judge, response: str) -> bool:
    """Whether a judge reads no further than this; one without ``settled`` reads everything."""
    settled = getattr(judge, "settled", None)
    return settled is not None and bool(settled(response))


def reading(judge: Judge, decode: Callable[[Sequence[int]], str], tokens: Sequence[int]) -> int:
    """How many of a response's tokens a judge reads."""
    return next((n for n in range(1, len(tokens)) if settles(judge, decode(tokens[:n]))), len(tokens))
