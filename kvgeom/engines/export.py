"""What an export is, and how far what an engine holds is from what was asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme, runs

#: Where a scale is, in words.
_SCALES = {
    "tensor": "one scale for a sequence",
    "head": "a scale for each head",
    "channel": "a scale for each channel",
    "token": "a scale for each token",
    "token-head": "a scale for each head of a token",
    "none": "no scale",
}
_FOLD = "kvgeom.models.checkpoint puts them into the weights"
_MISSING = {
    "center": "no offset is taken out (center)",
    "equalize": f"no factors (equalize; {_FOLD})",
    **dict.fromkeys(("hadamard", "hadamard64", "rht"), f"no rotation of heads (of values, {_FOLD})"),
}


@dataclass(frozen=True)
class Export:
    """What to give to an engine, and what that does not do.

    *Nearest* means: for each site, the engine's format of the same width, or else the next wider one that it has, or else 16
    bits; never a narrower one. Where one setting must serve several layers or both sites, the widest that is asked decides,
    and a layer of which any part is to stay in 16 bits stays there as a whole.

    Attributes
    ----------
    engine : str
    text : str
        Flags, or lines of Python to paste.
    versions : str
        Of the engine: which have what the text uses, and which was looked at.
    cannot : tuple of str
        What was asked and this does not do; empty if it is all there.
    notes : tuple of str
        What must hold for the text to work.
    recipe, placement : Recipe, Placement
        What the engine then holds, as nearly as kvgeom emulates it: evaluate this, not only what was asked.
    """

    engine: str
    text: str
    versions: str
    cannot: tuple[str, ...]
    notes: tuple[str, ...] = ()
    recipe: Recipe = field(default=Recipe(()), repr=False)
    placement: Placement = field(default=Placement(), repr=False)

    def __str__(self) -> str:
        lines = [f"# {self.engine} ({self.versions})", self.text]
        lines += [f"# cannot: {line}" for line in self.cannot] + [f"# note: {line}" for line in self.notes]
        return "\n".join(lines)


def differences(asked: Recipe, placement: Placement, held: Recipe, held_placement: Placement) -> tuple[str, ...]:
    """What an engine does otherwise than was asked, a sentence each.

    Parameters
    ----------
    asked, placement
        The mitigation.
    held, held_placement
        What the engine holds, for the same number of layers.
    """
    found: dict[tuple[str, Scheme, Scheme | None], list[int]] = {}
    for layer, (pair, other) in enumerate(zip(asked, held, strict=True)):
        for site, scheme, engine in zip(("keys", "values"), pair, other, strict=True):
            if scheme is not None and scheme != engine:
                found.setdefault((site, scheme, engine), []).append(layer)
    alike: dict[tuple[Scheme, Scheme | None, tuple[int, ...]], list[str]] = {}
    for (site, scheme, engine), layers in found.items():
        alike.setdefault((scheme, engine, tuple(layers)), []).append(site)
    sentences = []
    for (scheme, engine, where), sites in alike.items():
        which = f"{' and '.join(sites)} of {spelled(where, len(asked))}"
        if engine is None:
            sentences.append(f"{which}: {scheme} was asked, but they stay in 16 bits")
        else:
            sentences.append(
                f"{which}: {scheme} was asked, {engine} is what is held: {'; '.join(_apart(scheme, engine))}"
            )
    return (*sentences, *_placed(placement, held_placement, asked))


def _apart(scheme: Scheme, engine: Scheme) -> list[str]:
    parts = []
    if engine.bits != scheme.bits:
        parts.append(f"{engine.bits} bits instead of {scheme.bits}")
    if (engine.granularity, engine.group_size) != (scheme.granularity, scheme.group_size):
        parts.append(f"{_shared(engine)} instead of {_shared(scheme)}")
    if scheme.channels is not None:
        parts.append("all channels are rounded, not some")
    if engine.transform != scheme.transform:
        rotates = engine.transform != "none"  # no engine does anything else
        if rotates:
            parts.append(f"the engine rotates heads first ({engine.transform})")
        if scheme.transform in ("center", "equalize") or (scheme.transform != "none" and not rotates):
            parts.append(_MISSING[scheme.transform])
    plain = (scheme.format, scheme.symmetric, scheme.scales) == (engine.format, engine.symmetric, engine.scales)
    return parts if plain and parts else [*parts, "the engine's own grid"]


def _shared(scheme: Scheme) -> str:
    if scheme.granularity == "group":
        return f"a scale for {scheme.group_size} channels"
    if scheme.granularity == "channel-group":
        return f"a scale for {scheme.group_size} tokens of a channel"
    return _SCALES[scheme.granularity]


def _placed(asked: Placement, held: Placement, recipe: Recipe) -> list[str]:
    parts = []
    if asked.where != held.where:
        parts.append("rounding of projections was asked, which is a simulation; the engine rounds what it stores")
    if asked.residual and not held.residual:
        parts.append(f"{asked.residual} tokens were to wait in 16 bits, but each is rounded when it comes")
    if asked.sinks and not held.sinks:
        parts.append(f"the first {asked.sinks} tokens were to stay in 16 bits, but they are rounded like all others")
    if asked.prefill_reads != held.prefill_reads:
        parts.append(f"the prompt's own attention was to read {_reads(asked)}, but it reads {_reads(held)}")
    spans = any(scheme is not None and scheme.spans_tokens for pair in recipe for scheme in pair)
    if spans and asked.scales != held.scales:
        parts.append("scales were to be set anew in every call, but the engine keeps them")
    return parts


def _reads(placement: Placement) -> str:
    return {"rounded": "rounded values", "exact": "exact values", "last": "exact values but for its last token"}[
        placement.prefill_reads
    ]


def spelled(layers: Iterable[int], of: int) -> str:
    """``[0, 1, 2, 5]`` as ``"layers 0-2, 5"``, and all of them as ``"all layers"``."""
    layers = sorted(layers)
    if layers == list(range(of)):
        return "all layers"
    return f"layer{'' if len(layers) == 1 else 's'} {', '.join(runs(layers))}"


def kept(recipe: Recipe) -> tuple[int, ...]:
    """Layers of which any part is to stay in 16 bits: as a whole, where an engine has one setting for both sites."""
    return tuple(layer for layer, pair in enumerate(recipe) if None in pair)


def widest(schemes: Iterable[Scheme | None]) -> int:
    """Bits of the widest of some schemes; 16 if one of them, or all, is none."""
    return max((16 if scheme is None else scheme.bits for scheme in schemes), default=16)
