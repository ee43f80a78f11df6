"""How what an engine stores differs from the recipe that it was exported from."""

from __future__ import annotations

from collections.abc import Iterable

from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme, runs
from kvgeom.quant.transforms import ROTATIONS

#: What shares a scale.
_SCALES = {
    "tensor": "one scale for a sequence",
    "head": "a scale for each head",
    "channel": "a scale for each channel",
    "token": "a scale for each token",
    "token-head": "a scale for each head of a token",
    "none": "no scale",
}
_FOLD = "kvgeom.models.checkpoint puts them into the weights"
#: What the lack of a transform means.
_MISSING = {
    "center": "no offset is subtracted (center)",
    "equalize": f"channels are not divided by factors (equalize; {_FOLD})",
    **dict.fromkeys(ROTATIONS, f"heads are not rotated (for values, {_FOLD})"),
}


def differences(recipe: Recipe, placement: Placement, stored: Recipe, stored_placement: Placement) -> tuple[str, ...]:
    """What an engine does otherwise than a recipe says, a sentence each.

    Parameters
    ----------
    recipe, placement
        What is to be run.
    stored, stored_placement
        What the engine stores, for the same number of layers.
    """
    found: dict[tuple[str, Scheme | None, Scheme | None], list[int]] = {}
    for layer, (pair, other) in enumerate(zip(recipe, stored, strict=True)):
        for site, scheme, actual in zip(("keys", "values"), pair, other, strict=True):
            if scheme != actual:
                found.setdefault((site, scheme, actual), []).append(layer)
    alike: dict[tuple[Scheme | None, Scheme | None, tuple[int, ...]], list[str]] = {}
    for (site, scheme, actual), layers in found.items():
        alike.setdefault((scheme, actual, tuple(layers)), []).append(site)
    sentences = []
    for (scheme, actual, where), sites in alike.items():
        which = f"{' and '.join(sites)} of {layer_names(where, len(recipe))}"
        if actual is None or scheme is None:
            sentences.append(f"{which}: {actual or '16 bits'} instead of {scheme or '16 bits'}")
        else:
            sentences.append(f"{which}: {actual} instead of {scheme}: {'; '.join(_scheme_differences(scheme, actual))}")
    return (*sentences, *_placement_differences(placement, stored_placement, recipe))


def _scheme_differences(scheme: Scheme, actual: Scheme) -> list[str]:
    parts = []
    if actual.bits != scheme.bits:
        parts.append(f"{actual.bits} bits instead of {scheme.bits}")
    if (actual.granularity, actual.group_size) != (scheme.granularity, scheme.group_size):
        parts.append(f"{_shared(actual)} instead of {_shared(scheme)}")
    if scheme.channels is not None:
        parts.append("all channels are rounded")
    if actual.transform != scheme.transform:
        rotates = actual.transform != "none"  # no engine has another transform
        if rotates:
            parts.append(f"the engine rotates heads first ({actual.transform})")
        if scheme.constants is not None or (scheme.transform != "none" and not rotates):
            parts.append(_MISSING.get(scheme.transform, f"{scheme.transform} is not applied"))
    same_grid = (scheme.format, scheme.symmetric, scheme.scales) == (actual.format, actual.symmetric, actual.scales)
    return parts if same_grid and parts else [*parts, "the engine's own grid"]


def _shared(scheme: Scheme) -> str:
    if scheme.granularity == "group":
        return f"a scale for {scheme.group_size} channels"
    if scheme.granularity == "channel-group":
        return f"a scale for {scheme.group_size} tokens of a channel"
    return _SCALES[scheme.granularity]


def _placement_differences(placement: Placement, actual: Placement, recipe: Recipe) -> list[str]:
    parts = []
    if placement.where != actual.where:
        parts.append("the engine rounds what it stores; rounding at the projection is a simulation")
    if placement.residual != actual.residual:
        parts.append(f"{_window(actual)} instead of {_window(placement)}")
    elif placement.flush != actual.flush:
        parts.append(f"tokens leave the residual window by {actual.flush!r} instead of {placement.flush!r}")
    if placement.sinks != actual.sinks:
        parts.append(f"the first {actual.sinks} tokens stay in 16 bits instead of the first {placement.sinks}")
    if placement.prefill_reads != actual.prefill_reads:
        parts.append(f"the prompt's own attention reads {_reads(actual)} instead of {_reads(placement)}")
    spans = any(scheme is not None and scheme.spans_tokens for pair in recipe for scheme in pair)
    if spans and placement.scales != actual.scales:
        parts.append(f"scales are set by the {actual.scales} instead of the {placement.scales}")
    return parts


def _window(placement: Placement) -> str:
    return f"a residual window of {placement.residual} tokens" if placement.residual else "no residual window"


def _reads(placement: Placement) -> str:
    reads = {"rounded": "rounded values", "exact": "exact values", "last": "exact values except for its last token"}
    return reads[placement.prefill_reads]


def layer_names(layers: Iterable[int], of: int) -> str:
    """``[0, 1, 2, 5]`` as ``"layers 0-2, 5"``, and all of them as ``"all layers"``."""
    layers = sorted(layers)
    if layers == list(range(of)):
        return "all layers"
    return f"layer{'' if len(layers) == 1 else 's'} {', '.join(runs(layers))}"


def unrounded(recipe: Recipe) -> tuple[int, ...]:
    """Layers of which any part stays in 16 bits; where an engine has one setting for both sites, all of the layer does."""
    return tuple(layer for layer, pair in enumerate(recipe) if None in pair)


def widest(schemes: Iterable[Scheme | None]) -> int:
    """Bits of the widest of some schemes; 16 if there are none, or one of them is ``None``."""
    return max((16 if scheme is None else scheme.bits for scheme in schemes), default=16)
