"""Caches that might keep the refusals that a quantized cache loses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from kvgeom.engines.engine import CacheConfig
from kvgeom.errors import InputError
from kvgeom.models.model import KVGeometry
from kvgeom.models.statistics import Constants
from kvgeom.quant.memory import bytes_per_token
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Schemes, Site
from kvgeom.quant.scheme import Scheme

Family = Literal["unmitigated", "center", "equalize", "hadamard", "refine", "protect", "combined"]
#: The cache as the engine makes it.
UNMITIGATED = "unmitigated"


@dataclass(frozen=True)
class Candidate:
    """A cache, and what it does differently.

    Attributes
    ----------
    name : str
    family : str
        One of :data:`Family`.
    recipe : Recipe
    words : str
        What it does, in a sentence.
    """

    name: str
    family: Family
    recipe: Recipe
    words: str

    def bytes_per_token(self, geometry: KVGeometry, placement: Placement) -> float:
        """Memory of a token in all layers, scales and offsets included, of a prompt of 4,096 tokens."""
        return bytes_per_token(self.recipe, placement, geometry.kv_heads, geometry.head_dim)


def whole_cache(engine: CacheConfig, geometry: KVGeometry, known: Constants) -> list[Candidate]:
    """All candidates that treat every layer alike: the engine itself, transforms, finer scales, and both.

    Those that an engine's format cannot express are left out (one that transforms already keeps its own transform, and
    only an integer grid gets other scales), and so are scales that are no finer than its own.
    """
    base = (engine.k, engine.v)
    bias = "bias of the key projection" if known.keys.name == "key bias" else "mean key of the calibration prompts"
    found = [Candidate(UNMITIGATED, "unmitigated", _recipe(base, geometry.layers, known), f"{engine.name}, as it is")]

    def add(name: str, family: Family, schemes: Schemes, words: str) -> None:
        if all(candidate.recipe.layers[0] != schemes for candidate in found):
            found.append(Candidate(name, family, _recipe(schemes, geometry.layers, known), words))

    centered = _transformed(base, "center", None)
    add("center", "center", centered, f"takes the {bias} out before rounding")
    add(
        "center keys and values",
        "center",
        _transformed(base, "center", "center"),
        f"takes the {bias} and the mean value out before rounding",
    )
    if known.mean_keys is not None and centered != base:
        recipe = _recipe(centered, geometry.layers, replace(known, keys=known.mean_keys))
        words = "takes the mean key of the calibration prompts out before rounding"
        found.append(Candidate("center at the mean key", "center", recipe, words))
    add("equalize", "equalize", _transformed(base, "equalize", "equalize"), "divides every channel by its size")
    add("hadamard", "hadamard", _transformed(base, "hadamard", "hadamard"), "rotates every head before rounding")
    add(
        "center keys, rotate values",
        "combined",
        _transformed(base, "center", "hadamard"),
        f"takes the {bias} out of keys and rotates values",
    )
    finer: dict[str, tuple[Schemes, str]] = {
        "per-channel keys": (_finer(base, "channel", ("k",), geometry), "gives every channel of the keys a scale"),
        "group-64": (_finer(base, "group", ("k", "v"), geometry, 64), "gives every 64 channels of a token a scale"),
        "group-32": (_finer(base, "group", ("k", "v"), geometry, 32), "gives every 32 channels of a token a scale"),
        "per-channel keys, group-64 values": (
            _finer(_finer(base, "channel", ("k",), geometry), "group", ("v",), geometry, 64),
            "gives every channel of the keys and every 64 channels of a token's values a scale",
        ),
    }
    for name, (schemes, words) in finer.items():
        add(name, "refine", schemes, words)
    for name in ("group-64", "group-32"):
        schemes, words = finer[name]
        if schemes != base:
            also = f"takes the {bias} out before rounding and {words}"
            add(f"center, {name}", "combined", _transformed(schemes, "center", None), also)
            add(f"hadamard, {name}", "combined", _transformed(schemes, "hadamard", "hadamard"), f"rotates and {words}")
    return found


def protect(
    candidate: Candidate, layers: Iterable[int], sites: Iterable[Site] = ("k", "v"), how: str = ""
) -> Candidate:
    """The same with some layers in 16 bits, or only their keys or values.

    Parameters
    ----------
    candidate : Candidate
    layers : iterable of int
    sites : iterable of {"k", "v"}
    how : str
        Why these layers, as part of the name.
    """
    kept, sites = sorted({*layers}), {*sites}
    if not kept or kept[0] < 0 or kept[-1] >= len(candidate.recipe):
        raise InputError(
            f"layers {kept} were to be kept in 16 bits, but the cache has layers 0 to {len(candidate.recipe) - 1}; "
            "give at least one of these"
        )
    if not sites or not sites <= {*get_args(Site)}:
        raise InputError(
            f"sites {sorted(sites)} were to be kept in 16 bits, but there are only k and v; give one or both"
        )
    what = "keys and values" if len(sites) == 2 else "keys" if "k" in sites else "values"
    pairs = tuple(
        (None if "k" in sites else k, None if "v" in sites else v) if layer in kept else (k, v)
        for layer, (k, v) in enumerate(candidate.recipe)
    )
    label = f"{'' if len(sites) == 2 else what + ' of '}{how + ' ' if how else ''}{_listed(kept)} in 16 bits"
    alone = candidate.family == "unmitigated"
    return Candidate(
        label if alone else f"{candidate.name}; {label}",
        "protect" if alone else "combined",
        replace(candidate.recipe, layers=pairs),
        f"keeps {what} of {_listed(kept)} in 16 bits" + ("" if alone else f" and {candidate.words}"),
    )


def _recipe(schemes: Schemes, n_layers: int, known: Constants) -> Recipe:
    """Every layer alike, with only those constants that its schemes use."""
    k, v = ("none" if scheme is None else scheme.transform for scheme in schemes)
    offsets = known.both if v == "center" else known.keys if k == "center" else None
    return Recipe((schemes,) * n_layers, offsets, known.factors if "equalize" in (k, v) else None)


def _transformed(schemes: Schemes, keys: str | None, values: str | None) -> Schemes:
    """The same grids after other transforms; what is transformed already, or not rounded, stays as it is."""

    def one(scheme: Scheme | None, transform: str | None) -> Scheme | None:
        if scheme is None or transform is None or scheme.transform != "none":
            return scheme
        return replace(scheme, transform=transform)

    return one(schemes[0], keys), one(schemes[1], values)


def _finer(
    schemes: Schemes,
    granularity: Literal["channel", "group"],
    sites: Iterable[Site],
    geometry: KVGeometry,
    size: int | None = None,
) -> Schemes:
    """The same widths with other scales, on some sites, unless there are as many scales already."""

    def one(site: Site, scheme: Scheme | None) -> Scheme | None:
        if scheme is None or site not in sites or scheme.format != "int":
            return scheme
        if scheme.granularity == "channel-group" or scheme.granularity == granularity == "channel":
            return scheme  # every channel has scales already
        together = {"token": geometry.channels, "token-head": geometry.head_dim, "group": scheme.group_size}.get(
            scheme.granularity
        )
        if size is not None and together is not None and together <= size:
            return scheme
        return replace(scheme, granularity=granularity, group_size=size)

    k, v = (one(site, scheme) for site, scheme in zip(get_args(Site), schemes, strict=True))
    return k, v


def _listed(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
