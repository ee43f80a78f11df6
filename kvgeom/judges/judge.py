"""What a judge is: it labels a response as refused, complied, or degenerate because the language is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Literal, Protocol, TypeVar

from kvgeom.checks import as_name
from kvgeom.errors import InputError, brief
from kvgeom.judges.reasoning import answer_of

J = TypeVar("J", bound="Judge")

Label = Literal["refused", "complied", "evaded", "degenerate"]
LABELS: tuple[Label, ...] = ("refused", "complied", "evaded", "degenerate")

#: Label of a response whose reasoning has not ended: nobody knows what it would have answered.
UNENDED: Label = "evaded"
#: What the reason of such a label begins with.
UNENDED_REASON = "its reasoning did not end"


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
        if not isinstance(self.label, str) or self.label not in LABELS:
            raise InputError(f"a judge labels a response as {', '.join(LABELS)}; got {brief(self.label)}")
        if not isinstance(self.reason, str):
            raise InputError(f"the reason of a judgement must be text, got {brief(self.reason)}")
        if self.reason.strip():
            as_name("the reason of a judgement", self.reason)


class Judge(Protocol):
    """Anything that labels a response.

    It is shown the answer, without the reasoning before it (:mod:`kvgeom.judges.reasoning`).

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
    """What a judge says of one response, of which it sees the answer: reasoning that stands before it is taken off.

    Raises
    ------
    InputError
        If that is no :class:`Judgement`.
    """
    answer = answer_of(response)
    if answer is None:
        return unended()
    found = judge.label(request, answer, likelihood)
    if not isinstance(found, Judgement):
        raise InputError(
            f"judge {judge.name!r} must return a Judgement, got {brief(found)}; return Judgement({LABELS[0]!r}, 'why')"
        )
    return found


def settles(judge: Judge, response: str) -> bool:
    """Whether a judge reads no further than this; one without ``settled`` reads everything."""
    settled, answer = getattr(judge, "settled", None), answer_of(response)
    return settled is not None and answer is not None and bool(settled(answer))


def reading(judge: Judge, decode: Callable[[Sequence[int]], str], tokens: Sequence[int]) -> int:
    """How many of a response's tokens a judge reads."""
    return next((n for n in range(1, len(tokens)) if settles(judge, decode(tokens[:n]))), len(tokens))


def unended(tokens: int | None = None) -> Judgement:
    """The judgement of a response that ended inside its reasoning, after some number of tokens."""
    return Judgement(UNENDED, UNENDED_REASON + ("" if tokens is None else f" within {tokens} tokens"))


def of_answer(
    label: Callable[[J, str, str, Callable[[], float]], Judgement],
) -> Callable[[J, str, str, Callable[[], float]], Judgement]:
    """Let the method ``label`` of a judge see the answer alone, also where it is called directly."""

    @wraps(label)
    def judged(self: J, request: str, response: str, likelihood: Callable[[], float]) -> Judgement:
        answer = answer_of(response)
        return unended() if answer is None else label(self, request, answer, likelihood)

    return judged
