"""What can run a model: backends by name.

A backend is one module, which registers itself with :func:`register_backend`. A model that runs by other means needs no
registration: :func:`kvgeom.load` takes any object that has the members of :class:`~kvgeom.models.model.Model`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from kvgeom.checks import suggests
from kvgeom.registry import check_free

if TYPE_CHECKING:
    from kvgeom.models.model import Model

_BUILT_IN = ("kvgeom.models.hf", "kvgeom.models.lens", "kvgeom.models.nnsight")
_BACKENDS: dict[str, Backend] = {}


@dataclass(frozen=True)
class Backend:
    """A way to run models; made by :func:`register_backend`, which describes the attributes."""

    name: str
    wraps: Callable[[object], bool]
    make: Callable[..., Model]
    remote: bool


@suggests()
def register_backend(
    name: str, *, wraps: Callable[[object], bool], make: Callable[..., Model], remote: bool = False
) -> Backend:
    """Make a backend known to :func:`kvgeom.load`.

    Parameters
    ----------
    name : str
        What ``load(backend=...)`` calls it.
    wraps : callable (object) -> bool
        Whether an object that a user has loaded belongs to this backend. It is asked about objects of any kind, so it
        must be cheap and must not fail.
    make : callable (object, tokenizer, *, name, template) -> Model
        Makes a :class:`~kvgeom.models.model.Model` of an object that it ``wraps``, or of a loaded transformers model.
        ``tokenizer``, ``name`` (str) and ``template`` (Jinja text) may be None where the object has its own. Where a user
        gives ``template_options`` they are a keyword too; one that does not take it serves users who give none.
    remote : bool
        Whether ``make`` also takes ``remote``, which says where the model runs.

    Raises
    ------
    InputError
        If the name is taken.

    Examples
    --------
    A backend of a package ``fastlm``, for ``kvgeom.load(fastlm_model)`` and ``kvgeom.load("owner/name", backend="fastlm")``::

        register_backend(
            "fastlm", wraps=lambda model: type(model).__module__.startswith("fastlm."), make=FastModel.around
        )
    """
    check_free("a backend named", name, _BACKENDS)
    backend = _BACKENDS[name] = Backend(name, wraps, make, remote)
    return backend


def backends() -> dict[str, Backend]:
    """All registered backends, by name."""
    for module in _BUILT_IN:
        import_module(module)
    return dict(_BACKENDS)


def from_package(package: str) -> Callable[[object], bool]:
    """For :func:`register_backend`: whether the class of an object is defined in a package, which is not imported."""
    return lambda model: type(model).__module__.partition(".")[0] == package
