"""Store heads as TurboQuant does: a norm, and levels that are the best ones for a randomly rotated direction."""

from __future__ import annotations

from collections.abc import Iterator

from kvgeom.mitigation.candidates import Candidate
from kvgeom.mitigation.methods.registry import Setting, method
from kvgeom.mitigation.methods.schemes import alike
from kvgeom.quant.formats.base import get_format
from kvgeom.quant.scheme import Scheme


@method("turboquant")
def turboquant(setting: Setting) -> Iterator[Candidate]:
    """Of the same widths, for keys and values; and with one bit of the keys for the signs of what is left.

    A norm in 16 bits for each head of a token is all that is stored beside the codes.
    """
    k, v = setting.config.k, setting.config.v
    if not all(scheme is None or scheme.bits in get_format("turboquant").widths for scheme in (k, v)):
        return
    keys, values = _as("turboquant", k), _as("turboquant", v)
    yield alike(
        setting,
        "turboquant",
        "turboquant",
        (keys, values),
        "stores a norm for each head of a token, and a randomly rotated direction by optimal levels",
    )
    if k is not None:
        yield alike(
            setting,
            "turboquant, residual signs of keys",
            "turboquant",
            (_as("turboquant_prod", k), values),
            "stores norms and randomly rotated directions, one bit of the keys for signs of a projected residual",
        )


def _as(name: str, scheme: Scheme | None) -> Scheme | None:
    """Another format of the same width, rotated; what is not rounded stays as it is."""
    return None if scheme is None else Scheme.parse(f"{name}{scheme.bits}+rotation")
