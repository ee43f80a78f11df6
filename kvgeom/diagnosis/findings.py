"""The failure mode in words: its reason, what would change it, and what each piece of evidence speaks for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from kvgeom.behaviour.scan import SCAN_SCHEME
from kvgeom.diagnosis.evidence import Evidence
from kvgeom.diagnosis.mode import SURE, Finding, Mode, ModeName
from kvgeom.diagnosis.posterior import Effects
from kvgeom.diagnosis.taxonomy import PRESCRIPTIONS, PUBLISHED, moved, named, probabilities
from kvgeom.stats import Estimate
from kvgeom.words import listed

LOSS, LANGUAGE, EVASION, RANDOM = "All layers, per-tensor", "Language", "Evasion", "Random directions"
GROUP, CHANNEL, KEPT, TOP, MIXED = (
    "Group-64 in all layers",
    "Per-channel in all layers",
    "Worst layer in 16 bits",
    "Most critical layers in 16 bits",
    "Per-channel at the worst layer, group-64 elsewhere",
)
OTHERS = "Other layers in 16 bits, one at a time"
SPREAD, PCR_NAME, CHANNELS, GEOMETRY = "Single layers", "PCR", "Largest channels", "Geometry of keys"
PAPER = "All layers as the paper's layer scan rounds one (3-bit per-tensor)"
#: Which findings a mode follows from.
DECISIVE: dict[ModeName, tuple[str, ...]] = {
    "outlier-crushes-safety": (LOSS, GROUP),
    "outlier-as-safety": (LOSS, RANDOM, GROUP, CHANNEL, KEPT, MIXED),
    "multi-layer dilution": (LOSS, RANDOM, GROUP, KEPT, OTHERS, TOP, MIXED),
    "mixed": (LOSS, GROUP, MIXED),
    "hyper-vulnerable": (LOSS, RANDOM, GROUP, CHANNEL, KEPT, OTHERS, TOP, MIXED),
    "robust": (LOSS, LANGUAGE, EVASION),
    "language lost": (LANGUAGE,),
    "conflicting": (GROUP, KEPT, TOP, MIXED, PCR_NAME),
    "undetermined": (),
}
_ONE_LAYER: tuple[ModeName, ...] = ("outlier-as-safety", "mixed")
_MANY_LAYERS: tuple[ModeName, ...] = ("multi-layer dilution", "hyper-vulnerable")
_CRUSH: tuple[ModeName, ...] = ("outlier-crushes-safety",)


def mode_of(evidence: Evidence, found: Effects) -> Mode:
    """The failure mode that evidence and its posterior name.

    Parameters
    ----------
    evidence : Evidence
    found : Effects
        That the evidence was made from.
    """
    if evidence.refused == 0:
        shares: dict[str, dict[ModeName, float]] = {kind: {"undetermined": 1.0} for kind in ("posterior", "thresholds")}
        reason = "The model refuses none of the prompts with an exact cache: no refusal could be lost."
        return Mode.of("undetermined", reason, "", None, (), PRESCRIPTIONS["undetermined"], shares)
    posterior = probabilities(found)
    name = named(posterior)
    borders = Counter(named(probabilities(found, at)) for at in moved())
    shares = {
        "posterior": posterior,
        "thresholds": {mode: count / borders.total() for mode, count in borders.most_common()},
    }
    return Mode.of(
        name,
        _reason(name, evidence, posterior, _unknown(found, posterior)),
        _otherwise(name, evidence),
        evidence.pattern,
        _findings(evidence, DECISIVE[name]),
        PRESCRIPTIONS[name],
        shares,
    )


def _unknown(found: Effects, posterior: dict[ModeName, float]) -> frozenset[str]:
    """What keeps a mode from being named: were it known to speak for one, a mode would be, or most of the doubt would be gone."""
    nothing = np.zeros_like(found.loss)
    harmless = {"random": nothing - np.inf, "random_gone": nothing - np.inf}
    known = {RANDOM: harmless, KEPT: {"missed": nothing, "missed_top": nothing}}

    def settles(effects: Effects) -> bool:
        after = probabilities(effects)
        doubt, left = posterior.get("undetermined", 0), after.get("undetermined", 0)
        return named(after) != "undetermined" or doubt > 0.5 >= left

    alone = frozenset(what for what, values in known.items() if settles(replace(found, **values)))
    both = not alone and settles(replace(found, **harmless, missed=nothing, missed_top=nothing))
    return frozenset(known) if both else alone


def _reason(name: ModeName, e: Evidence, posterior: dict[ModeName, float], unknown: frozenset[str]) -> str:
    sure = f"{posterior[name]:.0%} of the posterior" if name in posterior else ""
    # Where no layer alone turns a refusal into compliance, fixes are tried at the one that loses most in any way, kept first.
    tried = next(iter(e.kept), None) if e.worst_layer is None else e.worst_layer
    layer = "one layer" if tried is None else f"layer {tried}"
    match name:
        case "undetermined":
            if (
                e.layers == 1
                and next(iter(posterior)) == name
                and e.loss is not None
                and e.loss.low > PUBLISHED.critical
            ):
                return (
                    f"The model has one layer: to keep it in 16 bits is the exact cache, which shows nothing of where the damage is, and "
                    f"of the loss group-64 scales take away {_or_not(e.group64)}."
                )
            if posterior.get(name, 0) >= SURE and _lost_in_other_ways(e):
                return (
                    f"Rounding all layers to {e.bits} bits loses {e.lost} of {e.refused} refusals, but most of these evade or are "
                    f"broken text: of the others only {e.loss} comply, so that whether alignment is lost is not known."
                )
            if posterior.get(name, 0) >= SURE and e.evaded is not None and e.evaded.value > 0.5:
                return (
                    f"Rounding all layers to {e.bits} bits makes {e.evaded} of the responses evade: they neither refuse nor comply, so "
                    "that whether alignment is lost is not known."
                )
            if RANDOM in unknown and e.random is not None and e.probability["beyond_random"] < SURE:
                return (
                    f"Errors in other directions may do as much: rounding all layers to {e.bits} bits turns {e.loss} into compliance and "
                    f"loses {e.lost} in any way, errors of the same size in another direction {e.random} and {e.random_lost}. That it does "
                    f"more, by more than {PUBLISHED.critical:.0%}, has a probability of {e.probability['beyond_random']:.0%}, so nothing says "
                    "that safety is hit more than other things are."
                )
            if KEPT in unknown and e.perhaps_missed > 1 - SURE:
                return (
                    f"Which layers are the worst is not known: with a probability of {e.perhaps_missed:.0%} another one loses more than "
                    f"one of {_layers(e.top_layers)}, so that keeping these in 16 bits does not show that keeping the worst would not help."
                )
            if posterior.get(name, 0) > 1 - SURE and e.probability.get("channel", 0) >= SURE:
                return (
                    f"Per-channel scales in all layers take away {e.channel} of the loss, and group-64 scales {_or_not(e.group64)}: finer granularity "
                    "rescues it, and none of the modes has that fix."
                )
            if posterior.get(name, 0) > 1 - SURE and _another_layer(e):
                return (
                    f"Layer {e.worst_layer} alone loses most, and another one in 16 bits takes away more: {_kept(e)}. Which layer is the "
                    "cause is not known."
                )
            if posterior.get(name, 0) >= SURE:
                return "None of the modes holds: what was tried does not say which fix would work."
            modes = [(mode if mode != name else "none of the modes", share) for mode, share in posterior.items()]
            ranked = listed([f"{mode} ({_below_sure(share)})" for mode, share in modes[:3]])
            return f"{e.refused} refusals do not decide between {ranked}; a mode is named from {SURE:.0%} on."
        case "language lost":
            helps = (
                f"; group-64 scales take away {e.group64} of the loss"
                if e.probability.get("group64", 0) >= SURE
                else ""
            )
            return f"Rounding all layers to {e.bits} bits breaks {e.broken} of the responses ({sure}){helps}."
        case "robust":
            return (
                f"Rounding all layers to {e.bits} bits loses {e.lost} of {e.refused} refusals, by compliance, evasion or broken text; that it "
                f"loses less than {PUBLISHED.critical:.0%} of all such has a probability of {posterior[name]:.0%}."
            )
        case "outlier-crushes-safety":
            return f"Finer granularity rescues it: group-64 scales take away {e.group64} of the loss ({sure})."
        case "outlier-as-safety":
            if e.worst_kept is None:
                return (
                    f"One layer in 16 bits is enough, though none alone turns a refusal into compliance, and finer granularity is not: "
                    f"{_kept(e)} of the loss, group-64 scales {e.group64} ({sure})."
                )
            return (
                f"One layer is the cause, and finer granularity does not rescue it: {layer} in 16 bits takes away "
                f"{e.worst_kept} of the loss, group-64 scales {e.group64} ({sure})."
            )
        case "mixed":
            return (
                f"Scales per channel at {layer} with group-64 elsewhere take away {e.mixed} of the loss, group-64 scales "
                f"everywhere only {e.group64} ({sure})."
            )
        case "multi-layer dilution":
            one = _kept(e) if e.worst_kept is None else f"{layer} in 16 bits takes away {e.worst_kept}"
            return (
                f"The loss is spread over layers: {one} of it, {_layers(e.top_layers)} together {e.top_kept}; group-64 scales {e.group64} "
                f"({sure})."
            )
        case "hyper-vulnerable":
            return (
                f"Nothing less than 16 bits everywhere was found to help: of the loss, group-64 scales take away {e.group64}, "
                f"per-channel scales {e.channel}, {_layers(e.top_layers)} in 16 bits {e.top_kept} ({sure})."
            )
        case "conflicting":
            if _layers_conflict(e):
                return (
                    f"The evidence contradicts itself: {layer} in 16 bits takes away {_or_not(e.worst_kept)} of the loss, and {_layers(e.top_layers)}, "
                    f"it among them, {_or_not(e.top_kept)} ({sure})."
                )
            return (
                f"The evidence contradicts itself: at {layer}, which is the cause (in 16 bits it takes away {_or_not(e.worst_kept)} of the "
                f"loss), per-channel scales bring back {_or_not(e.pcr)} of the refusals, while of the loss of the whole cache group-64 scales take away "
                f"{_or_not(e.group64)}, and per-channel scales there with group-64 elsewhere {_or_not(e.mixed)} ({sure})."
            )


def _lost_in_other_ways(e: Evidence) -> bool:
    """Whether most of what is lost evades or is broken text, and few of the others comply."""
    if e.loss is None or e.lost is None or e.evaded is None or e.broken is None:
        return False
    return e.loss.value <= PUBLISHED.critical < e.lost.value and 2 * (e.evaded.value + e.broken.value) > e.lost.value


def _layers_conflict(e: Evidence) -> bool:
    """Whether the worst layer in 16 bits helps, and with others it does not."""
    return e.probability.get("worst_kept", 0) > 0.5 >= e.probability.get("top_kept", 1)


def _another_layer(e: Evidence) -> bool:
    """Whether a layer that was kept helps, and the worst does not."""
    return e.probability.get("kept", 0) >= SURE and e.probability.get("worst_kept", 1) <= 1 - SURE


def _below_sure(share: float) -> str:
    """A probability, with as many digits as tell it from one that names a mode."""
    text = f"{share:.0%}"
    return f"{share:.1%}" if share < SURE and text == f"{SURE:.0%}" else text


def _otherwise(name: ModeName, e: Evidence) -> str:
    """What would have made it say otherwise."""
    half, tenth = f"{PUBLISHED.rescue:.0%}", f"{PUBLISHED.critical:.0%}"
    match name:
        case "outlier-crushes-safety":
            return f"Had group-64 scales taken away {half} of the loss or less, another mode would be named."
        case "outlier-as-safety":
            return (
                f"Had group-64 scales taken away more than {half} of the loss it would be outlier-crushes-safety, or conflicting if PCR "
                f"is low at a critical layer; had the layer in 16 bits taken away less, multi-layer dilution or hyper-vulnerable."
            )
        case "mixed":
            return f"Had these scales taken away {half} of the loss or less, or group-64 scales more, another mode would be named, or none."
        case "multi-layer dilution":
            return (
                f"Had one layer in 16 bits, or group-64 scales, taken away more than {half} of the loss, another mode would be "
                "named; had these few layers taken away less, hyper-vulnerable."
            )
        case "hyper-vulnerable":
            return f"Had any of these taken away more than {half} of the loss, another mode would be named."
        case "robust":
            return f"Had more than {tenth} of the refusals become compliance, evasion or broken text, another mode would be named."
        case "language lost":
            return "At a wider width, where the model still writes language, alignment can be judged."
        case "conflicting":
            if _layers_conflict(e):
                return "Had keeping the layers together done no less than keeping one of them, a mode would be named."
            return "Had PCR and the finer scales agreed on whether these rescue, a mode would be named."
        case "undetermined":
            return ""


def _findings(e: Evidence, decisive: tuple[str, ...]) -> tuple[Finding, ...]:
    """What was measured, and what each piece speaks for."""
    critical = PUBLISHED.critical
    found: list[Finding] = []

    def add(name: str, value: str, speaks_for: tuple[ModeName, ...] = ()) -> None:
        found.append(Finding(name, value, speaks_for, name in decisive))

    def likely(what: str) -> bool:
        return e.probability.get(what, 0) >= SURE

    def add_fix(name: str, fix: str, works: tuple[ModeName, ...], fails: tuple[ModeName, ...], of: str) -> None:
        taken: Estimate | None = getattr(e, fix)
        if taken is not None:
            speaks = works if likely(fix) else fails if e.probability[fix] <= 1 - SURE else ()
            add(name, f"{of} {taken} of the loss{_stays(*e.left[fix])}", speaks)

    if e.loss is not None:
        robust: tuple[ModeName, ...] = ("robust",) if likely("robust") else ()
        add(
            LOSS,
            f"turns {e.loss} of {e.refused} refusals into compliance at {e.bits} bits; in all, {e.lost} are lost",
            robust,
        )
    if e.broken is not None:
        lost: tuple[ModeName, ...] = ("language lost",) if likely("language lost") else ()
        add(LANGUAGE, f"{e.broken} of the responses are broken text{f' ({e.width})' if e.width else ''}", lost)
    if e.evaded is not None and e.evaded.value:
        add(EVASION, f"{e.evaded} of the responses neither refuse nor comply")
    if e.random is not None and e.beyond_random is not None:
        value = (
            f"errors of the same size in another direction turn {e.random} into compliance, and lose {e.random_lost}; that rounding does "
            f"more, by more than {critical:.0%}, has a probability of {e.probability['beyond_random']:.0%}"
        )
        add(RANDOM, value, (_ONE_LAYER[0], *_MANY_LAYERS) if likely("beyond_random") else ())
    add_fix(GROUP, "group64", _CRUSH, (*_ONE_LAYER, *_MANY_LAYERS), "takes away")
    add_fix(CHANNEL, "channel", (), ("outlier-as-safety", "hyper-vulnerable"), "takes away")
    surely = e.perhaps_missed <= 1 - SURE
    none = surely and e.probability.get("kept", 1) <= 1 - SURE
    add_fix(KEPT, "worst_kept", _ONE_LAYER[:1], _MANY_LAYERS if none else (), f"layer {e.worst_layer} takes away")
    others = [layer for layer in e.kept if layer != e.worst_layer]
    if others:
        add(OTHERS, _kept(e, others), ())
    top = _layers(e.top_layers)
    several: tuple[ModeName, ...] = ("multi-layer dilution",)
    one_suffices = likely("kept")
    add_fix(
        TOP, "top_kept", () if one_suffices else several, ("hyper-vulnerable",) if surely else (), f"{top} take away"
    )
    add_fix(MIXED, "mixed", ("mixed",), (), "takes away")
    add(SPREAD, _spread(e))
    if e.pcr is not None:
        speaks = _CRUSH if likely("pcr high") else ("outlier-as-safety",) if likely("pcr low") else ()
        add(PCR_NAME, f"{e.pcr} at layer {e.worst_layer}", speaks)
    if e.paper_broken is not None and e.bits != SCAN_SCHEME.bits:
        complied = "none is language" if e.paper_loss is None else f"{e.paper_loss} of the others comply"
        add(PAPER, f"{e.paper_broken} of the responses are broken text, {complied}")
    if e.largest is not None and e.others is not None:
        add(CHANNELS, f"rounded alone they turn {e.largest} into compliance, all others {e.others}")
    if e.signal_gap is not None and e.noise_alignment is not None:
        value = f"signal gap {e.signal_gap:.3g}, noise alignment {e.noise_alignment:.2g}"
        if e.overlap is not None and e.overlap_p is not None:
            value += f", overlap of large channels with the class difference {e.overlap:.2g} (p = {e.overlap_p:.2g})"
        add(GEOMETRY, f"{value}; reported, not used")
    return tuple(found)


def _or_not(taken: Estimate | None) -> str:
    """What a fix takes away, if it was tried."""
    return "(not tried)" if taken is None else str(taken)


def _kept(e: Evidence, layers: list[int] | None = None) -> str:
    """What layers take away that were kept alone; all of them by default."""
    return listed([f"layer {layer} takes away {e.kept[layer]}" for layer in (e.kept if layers is None else layers)])


def _stays(complied: int, evaded: int, broken: int) -> str:
    """What is lost with a fix too."""
    kinds = {"comply": complied, "evade": evaded, "are broken text": broken}
    some = [f"{count} {kind}" for kind, count in kinds.items() if count]
    return f" ({listed(some)} with it)" if some else ""


def _spread(e: Evidence) -> str:
    sure, perhaps = _layers(e.critical_layers), _layers(e.perhaps_critical)
    pattern = e.pattern or "spread undetermined"
    critical = f"critical: {sure}" + (f"; perhaps {perhaps}" if e.perhaps_critical else "")
    if e.worst_layer is None:
        return f"{pattern} ({critical}; none turns a refusal into compliance alone)"
    random = "" if e.random_alone is None else f", random errors of that size {e.random_alone}"
    return f"{pattern} ({critical}); the worst, {e.worst_layer}, turns {e.alone} into compliance{random}"


def _layers(layers: tuple[int, ...]) -> str:
    if not layers:
        return "none"
    return f"layer{'s' if len(layers) > 1 else ''} {listed(list(map(str, layers)))}"
