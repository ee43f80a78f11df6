"""What is done to the cache at each width of a curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvgeom.checks import suggests, whole_numbers
from kvgeom.engines.engine import CacheConfig
from kvgeom.engines.registry import resolve, widths
from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.condition import Condition, with_model_constants
from kvgeom.models.model import Model
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme, check_bits

#: Widths of a curve where none are given.
WIDTHS = (8, 6, 5, 4, 3, 2)
#: What a curve's ``meta`` says of the rounding itself, whoever labels the responses.
DESCRIBED = ("scheme", "engine", "stored", "untouched")
#: What it may say of the model: which layers store no keys and values, and why a geometry is missing.
NOTES = ("cache", "no_geometry")


@dataclass(frozen=True)
class WidthSeries:
    """A cache at several widths, resolved once. Made by :func:`at_widths`.

    Attributes
    ----------
    scheme : str
        The scheme as a string without its width, or the name of a preset.
    engine : str
        Engine and version that a preset's name stands for; empty for a scheme of no engine.
    configs : mapping of int to CacheConfig
        By width, widest first.
    placement : Placement
        That of all of them.
    """

    scheme: str
    engine: str
    configs: Mapping[int, CacheConfig]
    placement: Placement

    def conditions(self, model: Model) -> dict[str, Condition]:
        """All layers of a model at each width: ``family="bits"`` and ``bits``."""
        geometry = model.geometry
        widths = {
            f"{bits}-bit": Condition(
                geometry.stored(config.recipe(geometry.layers), model.name), config.placement, family="bits", bits=bits
            )
            for bits, config in self.configs.items()
        }
        return with_model_constants(model, widths)

    def described(self, base: Baseline) -> dict[str, Any]:
        """What is done to the cache, and how many prompts never meet it: the keys of :data:`DESCRIBED`."""

        def untouched(index: int) -> bool:
            prompt = len(base.prompts[index])
            stored = prompt + base.longest(index) - 1  # the last token is generated, never read
            return not any(
                config.placement.rounds(prompt, stored, one.spans_tokens)
                for config in self.configs.values()
                for one in config.schemes
            )

        return {
            "scheme": self.scheme,
            "engine": self.engine,
            "stored": {str(bits): config.stored for bits, config in self.configs.items()},
            "untouched": sum(map(untouched, range(len(base.prompts)))) if self.configs else 0,
        }


@suggests()
def at_widths(
    scheme: CacheConfig | Recipe | Scheme | str | None = None,
    bits: Sequence[int] | int | None = None,
    placement: Placement | str | None = None,
) -> WidthSeries:
    """Resolve a cache at some widths. Needs no model.

    Parameters
    ----------
    scheme : str, Scheme, CacheConfig or Recipe, optional
        Asymmetric per-token by default; the bits of an integer Scheme are left open. A name is that of an engine's preset
        (``"kivi"``) or a scheme as a string (``"asym-group64"``, ``"q4_0"``); see :func:`kvgeom.engines.registry.resolve`.
    bits : int or sequence of int, optional
        16 is always part of a curve. By default 8, 6, 5, 4, 3, 2, as far as the scheme offers them.
    placement : Placement, "cache" or "paper", optional
        That of the preset, or decode-faithful, by default.

    Raises
    ------
    InputError
        For an unknown scheme, or a width that it does not offer.
    """
    spec = _without_width(scheme)
    if bits is None:
        offered = widths(spec)
        bits = [b for b in WIDTHS if b in offered] or list(offered)
    chosen = sorted({check_bits(b) for b in whole_numbers("bits", bits, 2, 16)} - {16}, reverse=True)
    configs = {b: resolve(spec, bits=b, placement=placement) for b in chosen}
    first = next(iter(configs.values()), None) or resolve(spec, bits=widths(spec)[0], placement=placement)
    name = spec.name if isinstance(spec, CacheConfig) else str(spec)
    return WidthSeries(name, first.version, configs, first.placement)


def _without_width(scheme: CacheConfig | Recipe | Scheme | str | None) -> CacheConfig | Recipe | Scheme | str:
    """What is resolved at any width: the bits of an integer Scheme are left open."""
    if scheme is None:
        return "asym-token"
    if isinstance(scheme, Scheme) and scheme.format == "int":
        return str(scheme).removeprefix(f"int{scheme.bits}-")
    return scheme
