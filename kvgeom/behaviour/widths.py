"""What is done to the cache at each width of a curve, as engines and in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvgeom.engines.engine import CacheConfig
from kvgeom.engines.registry import resolve, widths
from kvgeom.evaluation.baseline import Baseline
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme, check_bits

#: Widths of a curve where none are given.
WIDTHS = (8, 6, 5, 4, 3, 2)


def at_widths(
    scheme: CacheConfig | Recipe | Scheme | str | None,
    bits: Sequence[int] | None = None,
    placement: Placement | str | None = None,
) -> dict[int, CacheConfig]:
    """What is done to the cache at each width, widest first; see :func:`~kvgeom.behaviour.curve.bit_width_curve`.

    Raises
    ------
    InputError
        For a scheme or width that does not exist.
    """
    spec = without_width(scheme)
    if bits is None:
        offered = widths(spec)
        bits = [b for b in WIDTHS if b in offered] or list(offered)
    chosen = sorted({check_bits(b) for b in bits} - {16}, reverse=True)
    return {b: resolve(spec, bits=b, placement=placement) for b in chosen}


def width_recipes(
    n_layers: int, engines: Mapping[int, CacheConfig], placement: Placement | None = None
) -> tuple[dict[str, Recipe], Placement]:
    """Recipes ``"8-bit"``, ``"6-bit"``, ... of what :func:`at_widths` found, and the placement that they share.

    ``placement`` is that of no widths at all; decode-faithful by default.
    """
    recipes = {f"{bits}-bit": engine.recipe(n_layers) for bits, engine in engines.items()}
    return recipes, next((engine.placement for engine in engines.values()), placement or Placement())


def without_width(scheme: CacheConfig | Recipe | Scheme | str | None) -> CacheConfig | Recipe | Scheme | str:
    """What :func:`kvgeom.engines.registry.resolve` takes at any width: the bits of an integer Scheme are left open."""
    if scheme is None:
        return "asym-token"
    found = re.match(r"int\d-((?:a?sym)-.*)", str(scheme)) if isinstance(scheme, Scheme) else None
    return found[1] if found else scheme


def name_of(scheme: CacheConfig | Recipe | Scheme | str | None) -> str:
    """The scheme of a curve as a string, without its width where that is open."""
    spec = without_width(scheme)
    return spec.name if isinstance(spec, CacheConfig) else str(spec)


#: What a curve's ``meta`` says of the rounding itself, whoever labels the responses.
ROUNDING = ("scheme", "engine", "rounded", "untouched")


def about(
    base: Baseline, scheme: CacheConfig | Recipe | Scheme | str | None, engines: Mapping[int, CacheConfig]
) -> dict[str, Any]:
    """What is done to the cache, in words, and how many prompts never meet it: the keys of :data:`ROUNDING`.

    Parameters
    ----------
    base : Baseline
    scheme : CacheConfig, Recipe, Scheme or str, optional
        As given to :func:`at_widths`.
    engines : mapping of int to CacheConfig
        From :func:`at_widths`.
    """
    spec = without_width(scheme)
    config = next(iter(engines.values()), None) or resolve(spec, bits=widths(spec)[0])

    def untouched(prompt: int) -> bool:
        held = prompt + base.max_new_tokens - 1  # the last token is said, never read
        return not any(
            config.placement.rounds(prompt, held, one.spans_tokens)
            for config in engines.values()
            for one in config.schemes
        )

    return {
        "scheme": name_of(scheme),
        "engine": config.version,
        "rounded": {str(bits): at.stored for bits, at in engines.items()},
        "untouched": sum(untouched(len(prompt.ids)) for prompt in base.prompts) if engines else 0,
    }
