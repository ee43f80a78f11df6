"""Checks of what users write, each with an error that says what was found and what is wanted."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from functools import wraps
from inspect import Parameter, isclass, signature
from math import inf, isnan
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar, cast

from kvgeom.errors import InputError, brief, check_names, choices, unknown

F = TypeVar("F", bound=Callable[..., Any])

#: More random draws than anybody waits for; of each something is kept.
MOST_DRAWS = 100_000
#: The largest seed that all generators of random numbers take.
LARGEST_SEED = 2**32 - 1


def suggests(more: Iterable[str] = ()) -> Callable[[F], F]:
    """Let a function, a method or a dataclass name the keyword that was meant where one is misspelt, and take flags as flags.

    A keyword that is annotated as ``bool`` must be True or False (:func:`flag`): Python would take ``"no"`` for true.

    Parameters
    ----------
    more : iterable of str
        Keywords that ``**options`` takes. A function with ``**options`` takes no others.

    Returns
    -------
    callable
        A decorator. The function keeps its name, signature, hints and documentation.

    Raises
    ------
    InputError
        When the function is called with a keyword that it does not take, or a flag that is none, before it is entered.

    Examples
    --------
    >>> @suggests()
    ... def scaled(x, *, factor=1.0):
    ...     return factor * x
    >>> scaled(2.0, facter=3.0)
    Traceback (most recent call last):
    kvgeom.errors.InputError: unknown option 'facter'; did you mean 'factor'?
    """
    beside = tuple(more)

    def decorate(target: F) -> F:
        if isclass(target):
            made: Any = target
            made.__init__ = decorate(made.__init__)
            return target
        by_keyword = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        own = {p.name: p for p in signature(target).parameters.values() if p.kind in by_keyword and p.name != "self"}
        known = dict.fromkeys([*own, *beside])
        flags = {name for name, each in own.items() if each.annotation in (bool, "bool")}

        @wraps(target)
        def checked(*args: Any, **keywords: Any) -> Any:
            for name in keywords:
                if name not in known:
                    raise unknown("option", name, known)
            return target(*args, **keywords | {name: flag(name, keywords[name]) for name in flags & {*keywords}})

        return cast(F, checked)

    return decorate


def whole(name: str, value: object, low: int | None = 0, high: int | None = None) -> int:
    """A whole number, also of numpy, as an ``int``; with ``low=None`` any.

    Raises
    ------
    InputError
        If it is something else, or not from ``low`` to ``high``.

    Examples
    --------
    >>> whole("k", 3, 1)
    3
    >>> whole("k", 1.5, 1)
    Traceback (most recent call last):
    kvgeom.errors.InputError: k must be a whole number, 1 or more, got 1.5
    """
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or (low is not None and number < low) or (high is not None and number > high):
        wanted = "" if low is None else f", {low} or more" if high is None else f", {low} to {high}"
        raise InputError(f"{name} must be a whole number{wanted}, got {brief(value)}")
    return number


def whole_numbers(name: str, values: Any, low: int = 0, high: int | None = None) -> list[int]:
    """Whole numbers, or one, as a list; raises as :func:`whole`, before numbers without end fill the memory.

    Examples
    --------
    >>> whole_numbers("layers", range(2)), whole_numbers("layers", 3)
    ([0, 1], [3])
    """
    return [whole(name, value, low, high) for value in one_by_one(values)]


def number(name: str, value: object, low: float = -inf, high: float = inf) -> float:
    """A real number, also of numpy, as a ``float``; raises as :func:`whole`, and for NaN.

    Examples
    --------
    >>> number("memory", 1, 0)
    1.0
    >>> number("max_loop", "x", 0, 1)
    Traceback (most recent call last):
    kvgeom.errors.InputError: max_loop must be a number, 0 to 1, got 'x'
    """
    found = float("nan")
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            found = float(value)
        except OverflowError:  # a whole number beyond all of them
            found = -inf if value < 0 else inf
    if isnan(found) or not low <= found <= high:
        ends = (f", {low:g} to {high:g}" if high < inf else f", {low:g} or more") if low > -inf else ""
        ends = f", {high:g} or less" if low == -inf and high < inf else ends
        raise InputError(f"{name} must be a number{ends}, got {brief(value)}")
    return found


def as_seed(value: object) -> int:
    """The seed of random draws; raises as :func:`whole`."""
    return whole("seed", value, 0, LARGEST_SEED)


def flag(name: str, value: object) -> bool:
    """True or False, also of numpy or as 1 or 0; raises as :func:`whole` for all else, though Python finds it true or false.

    Examples
    --------
    >>> flag("symmetric", "no")
    Traceback (most recent call last):
    kvgeom.errors.InputError: symmetric must be True or False, got 'no'
    """
    plain = isinstance(value, Hashable) and (isinstance(value, Real) or type(value).__module__ == "numpy")
    if not plain or value not in (True, False):
        raise InputError(f"{name} must be True or False, got {brief(value)}")
    return bool(value)


def one_of(kind: str, value: Any, known: Collection[Any]) -> None:
    """Check that something is one of some names or whole numbers.

    Raises
    ------
    InputError
        If it is not, with the nearest name.

    Examples
    --------
    >>> one_of("site", "kk", ["k", "v"])
    Traceback (most recent call last):
    kvgeom.errors.InputError: unknown site 'kk'; did you mean 'k'?
    >>> one_of("layer", 9, range(8))
    Traceback (most recent call last):
    kvgeom.errors.InputError: unknown layer 9; choose from 0 to 7
    """
    numbers = bool(known) and all(isinstance(each, Integral) for each in known)
    alike = isinstance(value, Integral) and not isinstance(value, bool) if numbers else isinstance(value, Hashable)
    if alike and value in known:
        return
    if numbers:  # a near number is no misspelt one
        first, last = min(known), max(known)
        some = f"{first} to {last}" if last - first + 1 == len(known) else choices([*map(str, known)])
        raise InputError(f"unknown {kind} {brief(value)}; choose from {some}")
    raise unknown(kind, value, map(str, known))


def as_names(kind: str, given: Any, known: Collection[str], *, none: bool = False) -> list[str]:
    """Some of the names that are known, or one of them, as a list.

    Raises
    ------
    InputError
        If one is not known, or none is given, unless ``none`` allows that.

    Examples
    --------
    >>> as_names("method", "mean", ["mean", "pca"])
    ['mean']
    """
    found = [*one_by_one(given)]
    if found or not none:
        check_names(kind, found, [*known])
    return found


def one_by_one(given: Any) -> Iterator[Any]:
    """The items of what is given, or itself if it is one, such as a text or an array without dimensions."""
    if isinstance(given, str | bytes):
        return iter([given])
    try:
        return iter(given)
    except TypeError:  # asking for its type would not do: an array without dimensions says that it is iterable
        return iter([given])


def at_coordinates(data: Any, **coordinates: Any) -> None:
    """Check that a dataset has values at some coordinates.

    Parameters
    ----------
    data : xarray.Dataset
    **coordinates
        Values by the name of the coordinate; those that the dataset does not have are left alone.

    Raises
    ------
    InputError
        For a value that the coordinate does not have, with those that it has.
    """
    for name, value in coordinates.items():
        if name in data.coords:
            one_of("method" if name == "estimator" else name, value, data.coords[name].values.tolist())


def as_text(name: str, value: object) -> str:
    r"""A text that says something and can be written to a file.

    Raises
    ------
    InputError
        If it is something else, has nothing but blanks, or half a character: one of two surrogates without the other.

    Examples
    --------
    >>> as_text("text", " \n")
    Traceback (most recent call last):
    kvgeom.errors.InputError: text must be text, got ' \n' (str)
    """
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{name} must be text, got {brief(value)} ({type(value).__name__})")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} has half a character ({value[error.start]!a}, at {error.start}); write it again as UTF-8"
        ) from error
    return str(value)


def as_name(what: str, value: object) -> str:
    r"""A text by which something is known in files; raises as :func:`as_text`, and for a NUL, where a file may end it.

    Examples
    --------
    >>> as_name("the name of a recipe", "a\0b")
    Traceback (most recent call last):
    kvgeom.errors.InputError: the name of a recipe has a NUL character, which files cannot keep; remove it: 'a\x00b'
    """
    text = as_text(what, value)
    if "\0" in text:
        raise InputError(f"{what} has a NUL character, which files cannot keep; remove it: {brief(text)}")
    return text


def check_texts(what: str, of: object, *names: str) -> None:
    """Check that some fields of a value are texts that can be kept in a file; they may be empty.

    Raises
    ------
    InputError
        For the first that is none.
    """
    for name in names:
        if not isinstance(found := getattr(of, name), str):
            raise InputError(f"{name} of {what} must be text, got {brief(found)}")
        if found.strip():
            as_name(f"{name} of {what}", found)


def as_path(name: str, value: object) -> Path:
    """A path, with ``~`` for the user's folder.

    Raises
    ------
    InputError
        If it is no path, longer than the system's are, or in the folder of a user whom the system does not know.

    Examples
    --------
    >>> as_path("journal", 0)
    Traceback (most recent call last):
    kvgeom.errors.InputError: journal must be a path, got 0
    """
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes) or "\0" in os.fspath(value):
        raise InputError(f"{name} must be a path, got {brief(value)}")
    try:
        os.fsencode(value)
        path = Path(value).expanduser()
        path.lstat()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} must be a path, got {brief(value)}") from error
    except RuntimeError as error:
        raise InputError(
            f"{name} is in the home folder of nobody: {brief(str(value))}; write the path without ~"
        ) from error
    except OSError as error:  # what is not there may be made
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{name} is too long for this system: {brief(str(value))}; give a shorter one") from error
    return path
