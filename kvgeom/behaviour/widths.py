"""What is done to the cache at each width of a curve, as engines and in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvgeom.engines.engine import Engine
from kvgeom.engines.registry import engine_of, offers, resolve
from kvgeom.evaluation.baseline import Baseline
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme, check_bits

#: Widths of a curve where none are given.
WIDTHS = (8, 6, 5, 4, 3, 2)


def at_widths(
    scheme: Scheme | str | None, bits: Sequence[int] | None = None, placement: Placement | None = None
) -> dict[int, Engine]:
    """What is done to the cache at each width, widest first; see :func:`~kvgeom.behaviour.curve.bit_width_curve`.

    Raises
    ------
    InputError
        For a scheme or width that there is not.
    """
    name = spelled(scheme)
    if bits is None:
        offered = offers(name)
        bits = [b for b in WIDTHS if b in offered] or list(offered)
    widths = sorted({check_bits(b) for b in bits} - {16}, reverse=True)
    return {b: resolve(name, b, placement) for b in widths}


def width_recipes(
    n_layers: int, engines: Mapping[int, Engine], placement: Placement | None = None
) -> tuple[dict[str, Recipe], Placement]:
    """Recipes ``"8-bit"``, ``"6-bit"``, ... of what :func:`at_widths` found, and the placement that they share.

    ``placement`` is that of no widths at all; decode-faithful by default.
    """
    recipes = {f"{bits}-bit": engine.recipe(n_layers) for bits, engine in engines.items()}
    return recipes, next((engine.placement for engine in engines.values()), placement or Placement())


def spelled(scheme: Scheme | str | None) -> str:
    """A scheme as :func:`kvgeom.engines.registry.resolve` takes it, without its width where that is free."""
    text = "asym-token" if scheme is None else str(scheme)
    found = re.match(r"int\d-((?:a?sym)-.*)", text)
    return found[1] if found and not isinstance(scheme, str) else text


#: What a curve's ``meta`` says of the rounding itself, whoever labels the responses.
ROUNDING = ("scheme", "engine", "rounded", "untouched")


def about(base: Baseline, scheme: Scheme | str | None, engines: Mapping[int, Engine]) -> dict[str, Any]:
    """What is done to the cache, in words, and how many prompts never meet it: the keys of :data:`ROUNDING`.

    Parameters
    ----------
    base : Baseline
    scheme : Scheme or str, optional
        As it was asked for.
    engines : mapping of int to Engine
        From :func:`at_widths`.
    """
    name = spelled(scheme)

    def untouched(prompt: int) -> bool:
        held = prompt + base.max_new_tokens - 1  # the last token is said, never read
        return not any(
            engine.placement.rounds(prompt, held, site.spans_tokens)
            for engine in engines.values()
            for site in (engine.k, engine.v)
            if site is not None
        )

    return {
        "scheme": name,
        "engine": engine_of(name),
        "rounded": {str(bits): engine.held for bits, engine in engines.items()},
        "untouched": sum(untouched(len(prompt.ids)) for prompt in base.prompts) if engines else 0,
    }
