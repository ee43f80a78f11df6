"""Judges by name, and what a user means by one.

A judge is one file: a class with the members of :class:`~kvgeom.judges.judge.Judge`, and a call of :func:`register_judge`.
A classifier with a prompt of its own is one :class:`~kvgeom.judges.guards.Guard`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from kvgeom.errors import InputError, brief, unknown
from kvgeom.judges.judge import Judge
from kvgeom.registry import check_free

_BUILT_IN = ("kvgeom.judges.keyword", "kvgeom.judges.classifiers")
_JUDGES: dict[str, Callable[[], Judge]] = {}
_FAMILIES: list[_Family] = []


@dataclass(frozen=True)
class _Family:
    make: Callable[..., Judge | None]
    names: Callable[[], Iterable[str]]


def register_judge(name: str, make: Callable[[], Judge]) -> None:
    """Let a judge be named by string wherever one is taken.

    Parameters
    ----------
    name : str
        Without "=" and "/", which belong to classifiers (:func:`as_judge`).
    make : callable () -> Judge
        For instance its class.

    Raises
    ------
    InputError
        If the name is taken, or has a sign that it must not have.

    Examples
    --------
    ::

        register_judge("apologies", Apologies)
        kvgeom.audit("demo", "out", judge="apologies")
    """
    check_free("a judge named", name, _JUDGES)
    if not name or set(name) & set("=/"):
        raise InputError(f"the name of a judge must be without '=' and '/', got {brief(name)}")
    if not callable(make):
        raise InputError(f"judge {name!r} must be made by a callable, such as its class, got {brief(make)}")
    _JUDGES[name] = make


def register_family(make: Callable[..., Judge | None], names: Callable[[], Iterable[str]]) -> None:
    """Let strings of some form stand for judges.

    Parameters
    ----------
    make : callable (str, **options) -> Judge or None
        None for a string of another form. The options are those of :func:`as_judge`.
    names : callable () -> iterable of str
        Some that ``make`` takes, to suggest.
    """
    _FAMILIES.append(_Family(make, names))


def judges() -> tuple[str, ...]:
    """Names that :func:`as_judge` takes."""
    for module in _BUILT_IN:
        import_module(module)
    return (*_JUDGES, *(name for family in _FAMILIES for name in family.names()))


def as_judge(judge: Any = None, **options: Any) -> Judge:
    """A judge from whatever stands for one.

    Parameters
    ----------
    judge : Judge or str, optional
        One of:

        - nothing: the keyword judge;
        - a judge, which is returned as it is;
        - a name: ``"keyword"``, ``"wildguard"``, ``"minos"``, or another that is registered;
        - the hub id of a known classifier: ``"allenai/wildguard"``;
        - another classifier of a known kind, in a folder or on the hub: ``"minos=FOLDER"``.
    **options
        Of :func:`kvgeom.classifier`, for a classifier that is named; others take none.

    Raises
    ------
    InputError
        If it is none of these, or the classifier is not there.

    Examples
    --------
    >>> as_judge("keyword").name
    'keyword (log-likelihood -3.2, loop 0.4, opening 160)'
    """
    known = judges()
    if judge is None:
        return _JUDGES["keyword"]()
    if isinstance(judge, str):
        if not judge.strip():
            raise InputError(f"the name of a judge is empty; choose from {', '.join(known)}")
        if judge in _JUDGES:
            return _JUDGES[judge]()
        found = next((found for family in _FAMILIES if (found := family.make(judge, **options)) is not None), None)
        if found is None:
            raise unknown("judge", judge, known)
        return found
    if isinstance(judge, type):
        raise InputError(f"judge must be an object, got the class {judge.__name__}; give {judge.__name__}(...)")
    if not callable(getattr(judge, "label", None)) or not isinstance(getattr(judge, "name", None), str):
        raise InputError(
            f"judge must have a name and a method label, or be one of {', '.join(known)}; got {type(judge).__name__}"
        )
    settled = getattr(judge, "settled", None)
    if settled is not None and not callable(settled):
        raise InputError(
            f"settled of judge {judge.name!r} must be a method (response) -> bool, got {brief(settled)}; leave it out for a judge "
            "that reads whole responses"
        )
    whole: Judge = judge
    return whole
