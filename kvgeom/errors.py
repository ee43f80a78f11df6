"""The errors that kvgeom raises on purpose: each says what is wrong, what was found, what to do."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Hashable, Iterable, Sequence
from difflib import get_close_matches

#: An error that says what there is to choose from lists so many names, and no more.
MANY = 30


class KvgeomError(Exception):
    """Base of every error that kvgeom raises on purpose; its message is one line."""


class InputError(KvgeomError):
    """The user gave something that cannot be used: a path, a file, a number, a model."""


class ModelError(KvgeomError):
    """A model was loaded, but it lacks what is needed (a cache, a chat template, a module)."""


class DownloadError(KvgeomError):
    """Something that had to be fetched did not arrive, or is not what its hash says."""


class ServerError(KvgeomError):
    """A server did not start, ended, or answered what cannot be used."""


class KvgeomWarning(UserWarning):
    """Something that kvgeom takes care of, and that the user may want otherwise."""


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
    """The error for a name that is not one of those known, with the nearest of them where one is near.

    Parameters
    ----------
    kind : str
        What it should name, for instance ``"backend"``.
    name : object
        What was given.
    known : iterable of str

    Examples
    --------
    >>> unknown("backend", "jax", ["hf", "lens"])
    InputError("unknown backend 'jax'; choose from hf, lens")
    >>> unknown("judge", "keywords", ["keyword", "minos"])
    InputError("unknown judge 'keywords'; did you mean 'keyword'?")
    >>> unknown("preset", "vllm-fp8", ["vllm-nvfp4", "vllm-fp8-e4m3"])
    InputError("unknown preset 'vllm-fp8'; did you mean 'vllm-fp8-e4m3'?")
    """
    names, given = [*known], (name if isinstance(name, str) else brief(name)).lower()
    # A name that goes on where the given one ends is nearer than one with other letters.
    close = [each for each in names if len(given) > 3 and each.startswith(given)] or get_close_matches(given, names, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose from {choices(names)}"
    return InputError(f"unknown {kind} {brief(name)}; {hint}")


def choices(names: Sequence[str]) -> str:
    """Names to choose from, the first of them where they are many: a scan has a recipe for each layer of a model.

    Examples
    --------
    >>> choices([str(n) for n in range(100)])
    '0, 1, 2, 3, 4, 5, 6, 7, ... (100 in all)'
    """
    few = len(names) <= MANY
    return ", ".join(names) if few else f"{', '.join(names[:8])}, ... ({len(names)} in all)"


def check_names(kind: str, names: Sequence[object], known: Collection[str]) -> None:
    """Check that names are given, and that each is one of those known.

    Raises
    ------
    InputError
        For the first that is not, or if none is given.
    """
    if not names:
        raise InputError(f"no {kind} was given; choose from {choices([*known])}")
    for name in names:
        if not isinstance(name, Hashable) or name not in known:
            raise unknown(kind, name, known)


def unknown_option(name: str, known: Iterable[str]) -> InputError:
    """The error for a keyword option that does not exist.

    Examples
    --------
    >>> unknown_option("dtpye", ["dtype", "device"])
    InputError("unknown option 'dtpye'; did you mean 'dtype'?")
    """
    return unknown("option", name, sorted(known))


def brief(value: object) -> str:
    """A value in an error: short and in one line, however large or deep it is.

    Examples
    --------
    >>> brief("long " * 100)
    "'long long long long long lo...ng long long long long long '"
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    short.maxlist = 12
    try:
        return " ".join(short.repr(value).split())
    except ValueError:  # a number of more digits than Python writes
        return f"a {type(value).__name__}"


def reason(error: BaseException) -> str:
    r"""The first line that an error of another library says, or its kind if it says nothing.

    Examples
    --------
    >>> reason(OSError("\n  no such file\n  and more")), reason(KeyError())
    ('no such file', 'KeyError')
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
