"""Methods by name.

A method is one file: a frozen dataclass that inherits :class:`Method`, and :func:`register_method` below it. The modules of
this package register themselves; yours does the same, from wherever it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from kvgeom.checks import one_of
from kvgeom.errors import InputError
from kvgeom.registry import check_free, import_modules

if TYPE_CHECKING:
    from kvgeom.geometry.fitted import Source

Floats = NDArray[np.floating]
#: Bases ``[positions, channels, k]`` by layer and site.
Bases = dict[tuple[int, Literal["k", "v", "resid"]], Floats]

_METHODS: dict[str, Method] = {}
_PACKAGE = __name__.rpartition(".")[0]
#: The method that comes first.
DEFAULT = "mean"


@dataclass(frozen=True)
class Method:
    """How directions are found. Fields of a subclass are its options; all have defaults.

    Attributes
    ----------
    name : str
    needs_model : bool
        Whether it runs the model again; it then has :meth:`bases` instead of :meth:`directions`.
    in_span : bool
        Whether the direction that it finds in the span of the features, written in any orthonormal basis of that span, is
        the one that it finds in all channels. Bootstrap samples are drawn in the span then, which is far smaller.
    contrast : str or None
        The method that finds contrasts between harmless requests (null b) for this one; itself by default.
    """

    name: ClassVar[str]
    needs_model: ClassVar[bool] = False
    in_span: ClassVar[bool] = True
    contrast: ClassVar[str | None] = None

    def most(self, positions: int, pairs: int) -> int:
        """How many dimensions it gives at most, from so many positions and pairs of requests."""
        return 1

    def directions(self, features: Floats, harmful: NDArray[np.bool_], k: int) -> Floats:
        """Directions at one position.

        Parameters
        ----------
        features : array [prompts, channels]
            The n-th harmful row and the n-th harmless row are a pair.
        harmful : bool array [prompts]
        k : int
            From 1 to :meth:`most`.

        Returns
        -------
        array [channels, k]
            Of any length and sign; :func:`kvgeom.geometry.estimators.estimate` makes them orthonormal, in this order.
        """
        raise NotImplementedError

    def subspace(self, x: Floats, harmful: NDArray[np.bool_], best: int, defined: NDArray[np.bool_], k: int) -> Floats:
        """Directions of one layer and site, given all positions.

        Parameters
        ----------
        x : array [prompts, positions, channels]
        harmful : bool array [prompts]
        best : int
            The position to find them at.
        defined : bool array [positions]
            At which positions, of those to look at, the classes differ.
        k : int

        Returns
        -------
        array [channels, k]
            As from :meth:`directions`.
        """
        return self.directions(x[:, best], harmful, k)

    def resampled(self, features: Floats, harmful: NDArray[np.bool_]) -> Method:
        """The method for bootstrap samples of some features, what it chooses by them (a penalty) fixed."""
        return self

    def gap(self, features: Floats, harmful: NDArray[np.bool_]) -> Floats:
        """The class difference ``[channels]`` that signals are measured with; that of means unless the method says otherwise."""
        found: Floats = features[harmful].mean(0) - features[~harmful].mean(0)
        return found

    def bases(self, source: Source, positions: Sequence[str], k: int) -> tuple[Bases, dict[str, Any]]:
        """Directions of all layers and sites, for a method that needs the model.

        Parameters
        ----------
        source : kvgeom.geometry.fitted.Source
            The model, its activations, and the requests that are told apart.
        positions : sequence of str
            Those to choose from.
        k : int

        Returns
        -------
        dict of (layer, site) to array [all positions, channels, k]
        dict
            What is worth keeping of how they were found, in JSON types.
        """
        raise NotImplementedError

    @property
    def options(self) -> dict[str, Any]:
        """Those that differ from the defaults, in JSON types."""
        values = asdict(self)
        return {each.name: values[each.name] for each in fields(self) if values[each.name] != each.default}


def register_method(new: Method) -> Method:
    """Let a method be named by ``kvgeom.subspace(method=...)``; returns it.

    Raises
    ------
    InputError
        If the name is taken.
    """
    import_modules(_PACKAGE)
    check_free("a method named", new.name, _METHODS)
    _METHODS[new.name] = new
    return new


class _Registered(Mapping[str, Method]):
    """All registered methods by name, the default first; those that are registered later appear in it."""

    def __getitem__(self, name: str) -> Method:
        import_modules(_PACKAGE)
        return _METHODS[name]

    def __iter__(self) -> Iterator[str]:
        import_modules(_PACKAGE)
        return iter(sorted(_METHODS, key=lambda name: (name != DEFAULT, _METHODS[name].needs_model)))

    def __len__(self) -> int:
        import_modules(_PACKAGE)
        return len(_METHODS)


METHODS: Mapping[str, Method] = _Registered()


def as_method(given: Any, options: Mapping[str, Any] | None = None) -> Method:
    """A method by its name, or a method itself.

    Parameters
    ----------
    given : str or Method
    options : mapping, optional
        Of a method that is named.

    Raises
    ------
    InputError
        For a name that no method has, or options that it does not take.
    """
    if isinstance(given, Method):
        return given
    one_of("method", given, METHODS)
    found = METHODS[given]
    if not options:
        return found
    try:
        return type(found)(**options)
    except TypeError as error:
        raise InputError(f"method {given!r} does not take the options {dict(options)}: {error}") from error


def from_features() -> list[str]:
    """Names of the methods that do not run the model again."""
    return [name for name, method in METHODS.items() if not method.needs_model]
