"""Figures by the kind of result that they draw.

A figure is a function of a result's data and meta. Decorated with :func:`figure`, in this package or anywhere else, it can be
drawn with ``result.plot("its name")``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from kvgeom.checks import at_coordinates
from kvgeom.errors import InputError, brief, unknown, unknown_option
from kvgeom.registry import import_modules

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr


class Plottable(Protocol):
    """All that a figure reads of a result."""

    @property
    def data(self) -> xr.Dataset:
        """The numbers."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """What made them, in JSON types."""


Figure = Callable[..., "go.Figure"]
F = TypeVar("F", bound=Figure)

_PACKAGE = __name__.rpartition(".")[0]
_FIGURES: dict[str, dict[str, Figure]] = {}
#: Kinds of the results that figures take as options, by the figure's kind and name.
_BESIDE: dict[tuple[str, str], dict[str, str]] = {}
#: Options whose coordinate has another name.
_COORDINATES = {"method": "estimator"}


def figure(kind: str, name: str, **beside: str) -> Callable[[F], F]:
    """Register a function as a figure of a kind of result.

    Parameters
    ----------
    kind : str
        The ``kind`` of the result's class, such as ``"sensitivity"``. The first figure registered for a kind is its
        default; figures of this package come before all others.
    name : str
        What ``result.plot(name)`` calls it.
    **beside
        Options that are results themselves, each with its kind.

    Returns
    -------
    callable
        A decorator that returns the function unchanged. The function takes a :class:`Plottable` and options by keyword, and
        returns a ``plotly.graph_objects.Figure``. An option with the name of a coordinate of the data must be one of its
        values; ``method`` is one of the coordinate ``estimator``.

    Raises
    ------
    InputError
        If the kind has another figure of this name.

    Examples
    --------
    >>> @figure("curve", "losses")
    ... def losses(curve):
    ...     return go.Figure(go.Bar(x=curve.data.bits, y=curve.data.flips))
    >>> diagnosis.curve.plot("losses")  # doctest: +SKIP
    """

    def register(function: F) -> F:
        if not str(function.__module__).startswith(f"{_PACKAGE}."):
            import_modules(_PACKAGE)
        known = _FIGURES.setdefault(kind, {})
        other = known.get(name)
        # A module that is reloaded, or a notebook cell that is run again, replaces its own figure.
        if other is not None and (other.__module__, other.__qualname__) != (function.__module__, function.__qualname__):
            raise InputError(f"{kind} has a figure {name!r} already, in {other.__module__}; choose another name")
        known[name] = function
        _BESIDE[kind, name] = beside
        return function

    return register


def figures(kind: str) -> list[str]:
    """Names of the figures of a kind of result, the default first."""
    import_modules(_PACKAGE)
    return list(_FIGURES.get(kind, {}))


def draw(result: Any, name: str | None = None, **options: Any) -> go.Figure:
    """Draw a result.

    Parameters
    ----------
    result : Result
        Or anything else with ``kind``, ``data`` and ``meta``.
    name : str, optional
        One of :func:`figures`; the first one by default.
    **options
        Of the figure.

    Raises
    ------
    InputError
        If the kind of result has no such figure, or an option is unknown, missing or none of the values that it can have.
    """
    known = figures(result.kind)
    if not known:
        raise InputError(f"there is no figure of kind {result.kind!r}; register one with kvgeom.plots.registry.figure")
    if name is not None and not isinstance(name, str):
        raise InputError(f"a figure is asked for by its name, got {brief(name)}; choose from {', '.join(known)}")
    if name is not None and name not in known:
        raise unknown(f"figure of {result.kind}", name, known)
    name = known[0] if name is None else name
    function = _FIGURES[result.kind][name]
    _check_options(function, name, options)
    _check_values(function, result, name, options)
    return function(result, **options)


def _check_options(function: Figure, name: str, options: Mapping[str, Any]) -> None:
    _, *others = signature(function).parameters.values()
    named = {p.name: p for p in others if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
    if not any(p.kind is Parameter.VAR_KEYWORD for p in others):
        for option in options:
            if option not in named:
                raise (
                    unknown_option(option, named) if named else InputError(f"figure {name!r} has no option {option!r}")
                )
    missing = [p.name for p in named.values() if p.default is Parameter.empty and p.name not in options]
    if missing:
        raise InputError(f"figure {name!r} needs {', '.join(missing)}; give it as plot({name!r}, {missing[0]}=...)")


def _check_values(function: Figure, result: Any, name: str, options: Mapping[str, Any]) -> None:
    parameters, beside = signature(function).parameters, _BESIDE.get((result.kind, name), {})
    for option, value in options.items():
        if option in beside:
            if getattr(value, "kind", None) != beside[option]:
                raise InputError(
                    f"option {option!r} of figure {name!r} must be a result of kind {beside[option]!r}, got a "
                    f"{type(value).__name__}"
                )
        elif value is not None or option not in parameters or parameters[option].default is not None:
            at_coordinates(result.data, **{_COORDINATES.get(option, option): value})
