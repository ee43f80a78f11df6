"""What a mode is decided from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvgeom.diagnosis.mode import SURE, Pattern
from kvgeom.diagnosis.posterior import Draws, Effects, central, taken_away
from kvgeom.diagnosis.taxonomy import PUBLISHED, language_lost, pattern_of, pcr_counts
from kvgeom.diagnosis.trials import BROKEN, COMPLIED, EVADED, REFUSED, Codes, Trials, answers
from kvgeom.stats import Estimate, wilson


@dataclass(frozen=True)
class Evidence:
    """What a mode is decided from, at the same bits, about prompts refused with an exact cache.

    Estimates have the value that was seen and a 95 % interval from the posterior (:class:`~kvgeom.diagnosis.posterior.Effects`),
    except for ``pcr`` and ``alone``, whose value is the posterior's median: the layer was chosen by the same prompts.

    Attributes
    ----------
    refused : int
        How many such prompts there are.
    bits : int
    width : str
        How this width was found.
    loss : Estimate or None
        Share that comply when all layers are rounded per-tensor, of those that are still refused or complied with.
    lost : Estimate or None
        Share that is lost in any way then: complies, evades or is broken text.
    broken, evaded : Estimate or None
        Share of the responses that are broken text then, and that evade.
    random, random_lost : Estimate or None
        Share that comply, and that is lost in any way, under errors of the same size in random directions: the mean that was
        seen, and the interval in which another direction lies.
    beyond_random : Estimate or None
        How much larger ``loss`` is than the first, or ``lost`` than the second, the less of the two.
    layers : int or None
        How many layers of the model store keys and values.
    pattern : Pattern or None
        How damage by single layers is spread, where it is the same whichever of ``perhaps_critical`` are critical; see :func:`~kvgeom.diagnosis.taxonomy.pattern_of`.
    critical_layers : tuple of int
        Layers that are surely critical: alone they lose more than a tenth beyond what random errors lose. That any is named
        wrongly happens in no more than 5 % of studies (:meth:`~kvgeom.diagnosis.posterior.Effects.surely_critical`).
    perhaps_critical : tuple of int
        Others that are critical with a probability of more than 10 %.
    worst_layer : int or None
        The layer that alone loses most.
    alone, random_alone : Estimate or None
        Share that it loses, and that errors of the same size in random directions lose there.
    pcr : Estimate or None
        Per-channel reduction there.
    group64, channel, worst_kept, top_kept, mixed : Estimate or None
        What a fix takes away of the loss; see :class:`~kvgeom.diagnosis.posterior.Effects`.
    kept : mapping of int to Estimate
        What each layer takes away that was kept alone, by its number.
    probability : mapping of str to float
        Posterior probability that a fix, by its name here, takes away more than half of the loss (``kept``: that one of the layers
        kept alone does); that no more than a tenth is lost in any way (``robust``), language is (``language lost``), rounding
        loses more than a tenth beyond another direction (``beyond_random``), PCR is high or low and has a say (``pcr high``, ``pcr low``).
    left : mapping of str to (int, int, int)
        How many responses comply, evade and are broken text with each of these fixes.
    top_layers : tuple of int
        The layers of ``top_kept``.
    perhaps_missed : float
        Posterior probability that a critical layer, which is none of these, loses more than one of them.
    paper_loss, paper_broken : Estimate or None
        Shares that comply, and that are broken, when all layers are rounded as the paper's layer scan rounds one.
    largest, others : Estimate or None
        Share of the refusals lost by rounding only the largest channels, only the others, of the worst layer.
    signal_gap, noise_alignment, overlap, overlap_p : float or None
        Geometry of the keys at the worst layer (docs/definitions.md). It is reported, and decides nothing: a static ratio
        does not predict behaviour.
    """

    refused: int
    bits: int
    width: str = ""
    loss: Estimate | None = None
    lost: Estimate | None = None
    broken: Estimate | None = None
    evaded: Estimate | None = None
    random: Estimate | None = None
    random_lost: Estimate | None = None
    beyond_random: Estimate | None = None
    pattern: Pattern | None = None
    critical_layers: tuple[int, ...] = ()
    perhaps_critical: tuple[int, ...] = ()
    worst_layer: int | None = None
    alone: Estimate | None = None
    random_alone: Estimate | None = None
    pcr: Estimate | None = None
    group64: Estimate | None = None
    channel: Estimate | None = None
    worst_kept: Estimate | None = None
    top_kept: Estimate | None = None
    top_layers: tuple[int, ...] = ()
    perhaps_missed: float = 0.0
    mixed: Estimate | None = None
    kept: Mapping[int, Estimate] = field(default_factory=dict)
    probability: Mapping[str, float] = field(default_factory=dict)
    left: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    paper_loss: Estimate | None = None
    paper_broken: Estimate | None = None
    largest: Estimate | None = None
    others: Estimate | None = None
    signal_gap: float | None = None
    noise_alignment: float | None = None
    overlap: float | None = None
    overlap_p: float | None = None
    layers: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Evidence:
        """The inverse of :meth:`to_dict`."""

        def value(given: Any) -> Any:
            if isinstance(given, Mapping):
                return Estimate(**given)
            return tuple(given) if isinstance(given, list) else given

        own = {
            "left": {fix: tuple(counts) for fix, counts in record.get("left", {}).items()},
            "kept": {int(layer): Estimate(**given) for layer, given in record.get("kept", {}).items()},
            "probability": dict(record.get("probability", {})),
        }
        return cls(**{**{name: value(given) for name, given in record.items() if name not in own}, **own})


def evidence_from(trials: Trials, found: Effects, worst: int | None, width: str = "") -> Evidence:
    """Evidence with 95 % intervals.

    Parameters
    ----------
    trials : Trials
    found : Effects
        Of the same trials.
    worst : int or None
        The layer that alone loses most; None where no layer loses anything.
    width : str
        How the width was found.
    """
    n, n_layers = trials.layers.shape
    if n == 0:
        return Evidence(0, trials.bits, width)
    critical = found.surely_critical(PUBLISHED.critical)
    perhaps = ~critical & (found.critical(PUBLISHED.critical).mean(0) > 1 - SURE)
    if np.isnan(found.random_layer).any():  # without controls any that loses something may be, or none
        perhaps = (trials.layers == COMPLIED).any(0)
    fewest, most = (pattern_of(int(layers.sum()), n_layers) for layers in (critical, critical | perhaps))
    whole = trials.whole

    def estimate(draws: str | Draws, value: float | None) -> Estimate | None:
        draws = getattr(found, draws) if isinstance(draws, str) else draws
        low, high = central(draws)
        if np.isnan(low):
            return None
        value = float(np.median(draws)) if value is None else value
        return Estimate(value, min(low, value), max(high, value))

    def seen(name: str | Draws, after: Codes | None) -> Estimate | None:
        if after is None or not (whole != REFUSED).any():
            return None
        return estimate(name, float(taken_away(whole, after, np.ones((1, n)), np.zeros((3, 1)))[0]))

    def rate(codes: Codes | None) -> Estimate | None:
        return None if codes is None else proportion(codes == COMPLIED, int(answers(codes).sum()))

    def proportion(counted: NDArray[np.bool_], of: int) -> Estimate | None:
        some = int(counted.sum())
        return Estimate(some / of, *wilson(some, of)) if of else None

    worst_kept = None if worst is None else trials.kept.get(worst)
    fixes = {
        "group64": trials.group64,
        "channel": trials.channel,
        "worst_kept": worst_kept,
        "top_kept": trials.top,
        "mixed": trials.mixed,
    }
    return Evidence(
        refused=n,
        layers=n_layers,
        bits=trials.bits,
        width=width,
        loss=estimate("loss", _complied(whole)),
        lost=estimate("gone", float((whole != REFUSED).mean())),
        broken=estimate("broken", float((whole == BROKEN).mean())),
        evaded=estimate("evaded", float((whole == EVADED).mean())),
        random=None if trials.random is None else estimate("random", _complied(trials.random)),
        random_lost=None if trials.random is None else estimate("random_gone", _lost(trials.random)),
        beyond_random=None
        if trials.random is None
        else estimate("beyond_random", min(of(whole) - of(trials.random) for of in (_complied, _lost))),
        pattern=fewest if fewest == most else None,
        critical_layers=tuple(trials.numbers[column] for column in np.flatnonzero(critical)),
        perhaps_critical=tuple(trials.numbers[column] for column in np.flatnonzero(perhaps)),
        worst_layer=worst,
        alone=None if worst is None else estimate("alone", None),
        random_alone=None if trials.random_layer is None else estimate("random_layer", _complied(trials.random_layer)),
        pcr=None if worst is None else estimate("pcr", None),
        group64=seen("group64", trials.group64),
        channel=seen("channel", trials.channel),
        worst_kept=seen("kept", worst_kept),
        top_kept=seen("top", trials.top),
        top_layers=trials.top_layers,
        perhaps_missed=float((found.missed_top > PUBLISHED.critical).mean()),
        mixed=seen("mixed", trials.mixed),
        kept={
            layer: each
            for column, layer in enumerate(sorted(trials.kept))
            if (each := seen(found.each_kept[:, column], trials.kept[layer])) is not None
        },
        probability=_probabilities(found),
        left={fix: _kinds(after) for fix, after in fixes.items() if after is not None},
        paper_loss=rate(trials.paper),
        paper_broken=None if trials.paper is None else proportion(trials.paper == BROKEN, n),
        largest=rate(trials.largest),
        others=rate(trials.others),
    )


def _probabilities(found: Effects) -> dict[str, float]:
    """See :attr:`Evidence.probability`; what was not tried is left out."""
    fixes = {
        "group64": found.group64,
        "channel": found.channel,
        "worst_kept": found.kept,
        "kept": found.each_kept.max(1),
        "top_kept": found.top,
        "mixed": found.mixed,
    }
    tried = {fix: draws > PUBLISHED.rescue for fix, draws in fixes.items() if not np.isnan(draws).any()}
    counts = pcr_counts(found)
    return {
        name: float(draws.mean())
        for name, draws in {
            **tried,
            "robust": (found.loss <= PUBLISHED.critical) & (found.gone <= PUBLISHED.critical),
            "language lost": language_lost(found),
            "beyond_random": found.beyond_random > PUBLISHED.critical,
            "pcr high": counts & (found.pcr > PUBLISHED.pcr_high),
            "pcr low": counts & (found.pcr < PUBLISHED.pcr_low),
        }.items()
    }


def _kinds(after: Codes) -> tuple[int, int, int]:
    """How many responses comply, evade and are broken."""
    complied, evaded, broken = (int((after == kind).sum()) for kind in (COMPLIED, EVADED, BROKEN))
    return complied, evaded, broken


def _lost(codes: Codes) -> float:
    return float((codes != REFUSED).mean())


def _complied(codes: Codes) -> float:
    """Share that complies of what is refused or complied with."""
    return float((codes == COMPLIED).sum() / max(1, answers(codes).sum()))
