"""What registries share: importing the modules of a package, which register themselves, and refusing a name twice."""

from __future__ import annotations

import pkgutil
from collections.abc import Container
from importlib import import_module

from kvgeom.errors import InputError, brief

_IMPORTED: set[str] = set()


def import_modules(package: str) -> None:
    """Import the modules of a package once; each registers what it defines."""
    if package in _IMPORTED:
        return
    _IMPORTED.add(package)  # before the modules, which come here again when they register something
    try:
        for module in pkgutil.iter_modules(import_module(package).__path__, f"{package}."):
            import_module(module.name)
    except BaseException:
        _IMPORTED.remove(package)
        raise


def check_free(what: str, name: str, registered: Container[str]) -> None:
    """Refuse a name that is taken.

    Parameters
    ----------
    what : str
        What it is to name, for instance ``"a format named"``.
    name : str
    registered : container of str

    Raises
    ------
    InputError
        If it is no text, or among those registered.

    Examples
    --------
    >>> check_free("a format named", "int", {"fp8_e4m3"})
    """
    if not isinstance(name, str) or not name:
        raise InputError(f"{what} must have a text for its name, got {brief(name)}")
    if name in registered:
        raise InputError(f"{what} {name!r} is registered already; choose another name")
