"""What is known, after some prompts, of what rounding and each fix do to all such prompts.

The model: prompts are drawn independently from those that a user has in mind, and what becomes of one is a fact (greedy
decoding). A share over all of them then has the posterior of a Bayesian bootstrap: each prompt seen gets an exponential
weight, the same for every condition, so that conditions tried on the same prompts are compared in pairs. A bootstrap takes
"3 of 3" for certainty; so the share that is lost has a uniform prior, in which compliance, evasion and broken text have equal
parts, and each reduction Jeffreys' prior of 1/2 on the four things that may happen to a prompt under two conditions.

Random directions are drawn from those that there are, as prompts are. A few draws of them have a mean, and the mean over all
directions is known from these as well as a mean of so few normal values is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvgeom.behaviour.scan import CRITICAL_SHARE
from kvgeom.diagnosis.trials import BROKEN, COMPLIED, EVADED, REFUSED, Codes, Trials, answers
from kvgeom.stats import WRONG, holm

Draws = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Effects:
    """Draws from the posterior, ``[samples]`` each; NaN where a condition was not tried.

    All shares are of the prompts refused with an exact cache. Loss of alignment is counted among those that are still refused
    or complied with: what is broken, or evades, does neither.

    Attributes
    ----------
    loss : array
        Share that comply when all layers are rounded per-tensor.
    gone : array
        Share that is lost in any way: complies, evades or ends in broken text.
    evaded, broken : array
        Share that evade, and that end in broken text.
    random, random_gone : array
        Share that comply, and that is lost in any way, under errors of the same size in random directions: the mean over all
        directions. NaN for fewer than two draws of these, of which nothing says how they differ.
    group64, channel, kept, top, mixed : array
        What a fix takes away of the loss, of whatever kind it takes least of (:func:`taken_away`). Group-64 scales
        everywhere, per-channel scales everywhere, the worst layer in 16 bits, the most critical layers in 16 bits,
        per-channel scales at the worst layer with group-64 elsewhere.
    missed, missed_top : array
        Share that the worst layer alone loses, where it is none of those kept one by one, or not among the most critical ones
        kept; 0 where it is. With several kept, the worst of the others counts, if it loses more than one of them.
    layers : array [samples, layers]
        Share that each layer alone loses, per-tensor.
    random_layer : array
        Share that errors of the size of the worst layer's lose in random directions.
    alone : array
        Share that the worst layer alone loses, by prompts that did not choose it.
    pcr : array
        Per-channel reduction at the worst layer, by prompts that did not choose it.
    """

    loss: Draws
    gone: Draws
    evaded: Draws
    broken: Draws
    random: Draws
    random_gone: Draws
    group64: Draws
    channel: Draws
    kept: Draws
    top: Draws
    mixed: Draws
    missed: Draws
    missed_top: Draws
    layers: Draws
    random_layer: Draws
    alone: Draws
    pcr: Draws

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Central interval of one of them; NaN where it was not tried."""
        values = getattr(self, name)
        if np.isnan(values).any():
            return float("nan"), float("nan")
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def critical(self, share: float) -> Mask:
        """Which layers alone lose more than ``share`` beyond what random errors lose, ``[samples, layers]``."""
        beyond: Mask = self.layers - np.nan_to_num(self.random_layer)[:, None] > share
        return beyond

    def surely_critical(self, share: float) -> Mask:
        """Which layers surely are: any of them wrongly in no more than 5 % of studies, ``[layers]``.

        The posterior probability of the contrary, adjusted for the number of layers by Holm's method, is below 5 %.
        """
        contrary = ~self.critical(share)
        # One more of each: no number of draws shows that something cannot be.
        sure: Mask = holm((contrary.sum(0) + 1) / (len(contrary) + 1)) <= WRONG
        return sure

    @property
    def beyond_random(self) -> Draws:
        """How much more rounding loses than errors of the same size in random directions: to compliance, or in any way, the less."""
        less: Draws = np.minimum(self.loss - self.random, self.gone - self.random_gone)
        return less

    def __len__(self) -> int:
        return len(self.loss)


def effects(trials: Trials, *, samples: int = 4000, seed: int = 0) -> Effects:
    """Draw from the posterior of everything that a mode is decided by.

    Parameters
    ----------
    trials : Trials
    samples, seed : int

    Notes
    -----
    The worst layer is chosen anew in each draw. A layer that was chosen because it lost most among few prompts looks worse
    than it is, and its per-channel loss does not; so each draw deals the prompts into halves, and each half is measured at
    the layer that the other half chooses.
    """
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=(samples, trials.prompts))
    whole = trials.whole
    loss, gone, evaded, broken = shares_of(whole, weights, _prior(samples, rng))
    random, random_gone = _random(trials.random, weights, rng)
    shares = _layer_shares(trials, weights, rng)
    alone, pcr = _worst_layer(trials.layers, trials.layers, trials.layers_channel, weights, rng)
    return Effects(
        loss=loss,
        gone=gone,
        evaded=evaded,
        broken=broken,
        random=random,
        random_gone=random_gone,
        group64=_reduction(whole, trials.group64, weights, rng),
        channel=_reduction(whole, trials.channel, weights, rng),
        kept=_kept(trials, shares, weights, rng),
        top=_reduction(whole, trials.top, weights, rng),
        mixed=_reduction(whole, trials.mixed, weights, rng),
        missed=_missed(shares, sorted(map(trials.column, trials.kept)), 1),
        missed_top=_missed(shares, [*map(trials.column, trials.top_layers)], len(trials.top_layers)),
        layers=shares,
        random_layer=_random(trials.random_layer, weights, rng)[0],
        alone=alone,
        pcr=pcr,
    )


def _prior(samples: int, rng: np.random.Generator) -> Draws:
    """Counts before any prompt is seen, by label, ``[4, samples]``: as many are lost as not, in equal parts of each kind."""
    counts: Draws = rng.gamma(np.array([1.0, 1 / 3, 1 / 3, 1 / 3])[:, None], size=(4, samples))
    return counts


def shares_of(codes: Codes, weights: Draws, prior: Draws) -> Draws:
    """What becomes of refusals under one condition, all from one posterior, so that no share contradicts another.

    Parameters
    ----------
    codes : array [prompts]
    weights : array [samples, prompts]
    prior : array [4, samples]
        Counts of refused, complied, evaded and broken before any prompt is seen.

    Returns
    -------
    array [4, samples]
        The share that comply, of those that comply or are still refused; and of all, those that are lost in any way, that
        evade, and that are broken.
    """
    kinds = np.stack([weights @ (codes == kind) for kind in (REFUSED, COMPLIED, EVADED, BROKEN)]) + prior
    refused, complied, evaded, broken = kinds
    of_all = kinds.sum(0)
    return np.stack([complied / (complied + refused), 1 - refused / of_all, evaded / of_all, broken / of_all])


def _random(codes: Codes | None, weights: Draws, rng: np.random.Generator) -> tuple[Draws, Draws]:
    """Shares that comply, and that are lost in any way, under random errors: the mean over all directions, from some draws."""
    count = 0 if codes is None else codes.shape[1]
    if codes is None or count < 2:
        return np.full(len(weights), np.nan), np.full(len(weights), np.nan)
    prior = _prior(len(weights), rng)
    drawn = np.stack([shares_of(codes[:, draw], weights, prior)[:2] for draw in range(count)])
    error = rng.standard_t(count - 1, size=len(weights)) * drawn.std(0, ddof=1) / np.sqrt(count)
    complied, gone = np.clip(drawn.mean(0) + error, 0, 1)
    return complied, gone


def taken_away(before: Codes, after: Codes, weights: Draws, prior: Draws) -> Draws:
    """What a fix takes away of the lost refusals, of whatever kind it takes least of, ``[samples]``.

    The least of three kinds of share: of all that is lost, ``1 - lost with it / lost without``; the same among prompts that
    are refused or complied with without it; and of evasions and of broken text, where they are more than a tenth of the
    responses without it, how many are refused with it. A fix under which text stays broken or evading rescues nothing.

    Parameters
    ----------
    before, after : array [prompts]
        Without and with the fix.
    weights : array [samples, prompts]
    prior : array [3, samples]
        Counts before any prompt is seen: lost with and without, without alone, with alone.
    """
    both, rescued, more = prior
    lost = after != REFUSED

    def share(among: Mask, of: Mask, new: Draws) -> Draws:
        found: Draws = 1 - (weights @ (lost & among) + both + new) / (weights @ of + both + rescued)
        return found

    everyone = np.ones(len(before), dtype=bool)
    least = share(everyone, before != REFUSED, more)
    least = np.minimum(least, share(answers(before), before == COMPLIED, more))
    for silent in (before == EVADED, before == BROKEN):
        if silent.any():
            many = weights @ silent > CRITICAL_SHARE * weights.sum(1)
            least = np.where(many, np.minimum(least, share(silent, silent, np.zeros_like(more))), least)
    return least


def _reduction(before: Codes, after: Codes | None, weights: Draws, rng: np.random.Generator) -> Draws:
    """Draws of :func:`taken_away`; NaN where the fix was not tried."""
    if after is None:
        return np.full(len(weights), np.nan)
    return taken_away(before, after, weights, rng.gamma(0.5, size=(3, len(weights))))


def _layer_shares(trials: Trials, weights: Draws, rng: np.random.Generator) -> Draws:
    """Share that each layer alone loses, ``[samples, layers]``; layers are drawn to their common mean by two prompts."""
    complied, decided = trials.layers == COMPLIED, answers(trials.layers)
    common = float(np.clip((complied.sum() + 0.5) / (decided.sum() + 1), 1e-3, 1 - 1e-3))
    size = (len(weights), trials.layers.shape[1])
    yes, no = rng.gamma(2 * common, size=size), rng.gamma(2 * (1 - common), size=size)
    share: Draws = (weights @ complied + yes) / (weights @ decided + yes + no)
    return share


def pcr_at_one_layer(
    layers: Codes, layer: int, tensor: Codes, channel: Codes, *, samples: int = 4000, seed: int = 0
) -> Draws:
    """Draws of PCR at the worst layer under conditions that were tried at one layer alone, ``[samples]``.

    The layer is chosen as in :func:`effects`, anew in each draw and by prompts that do not measure it. A half of the prompts
    whose layer is another one than that which was tried says nothing.

    Parameters
    ----------
    layers : array [prompts, layers]
        Each layer alone, as in :class:`~kvgeom.diagnosis.trials.Trials`: these choose.
    layer : int
        The column of the one that was tried.
    tensor, channel : array [prompts]
        This layer alone, per-tensor and per-channel, under the other conditions.
    """
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=(samples, len(layers)))
    both = np.full((2, *layers.shape), BROKEN, dtype=np.int8)  # broken text is counted nowhere
    both[:, :, layer] = tensor, channel
    return _worst_layer(layers, both[0], both[1], weights, rng)[1]


def _worst_layer(
    chosen_by: Codes, tensor: Codes, channel: Codes, weights: Draws, rng: np.random.Generator
) -> tuple[Draws, Draws]:
    """Loss and per-channel reduction at the worst layer, each half of the prompts measured where the other chooses."""
    loses, complied, decided = chosen_by == COMPLIED, tensor == COMPLIED, answers(tensor)
    after = decided & (channel != REFUSED)
    rows, half = np.arange(len(weights)), rng.random(weights.shape) < 0.5
    halves = [weights * half, weights * ~half]
    lost = [w @ loses for w in halves]
    measured = np.zeros((3, len(weights)))
    for chooses, counts in ((0, 1), (1, 0)):
        # Equal layers, mostly those that lose nothing, are chosen among at random.
        layer = (lost[chooses] + 1e-9 * rng.random(lost[chooses].shape)).argmax(1)
        for row, mask in enumerate((complied, after, decided)):
            measured[row] += (halves[counts] @ mask)[rows, layer]
    before, left, of = measured
    both, rescued, more, kept = rng.gamma(0.5, size=(4, len(weights)))
    alone = (before + both + rescued) / (of + both + rescued + more + kept)
    return alone, 1 - (left + both + more) / (before + both + rescued)


def _kept(trials: Trials, shares: Draws, weights: Draws, rng: np.random.Generator) -> Draws:
    """What keeping one layer takes away: the layer, of those tried, that alone loses most in each draw."""
    if not trials.kept:
        return np.full(len(weights), np.nan)
    layers = sorted(trials.kept)
    reductions = np.stack([_reduction(trials.whole, trials.kept[layer], weights, rng) for layer in layers], axis=1)
    columns = [*map(trials.column, layers)]
    chosen: Draws = reductions[np.arange(len(weights)), shares[:, columns].argmax(1)]
    return chosen


def _missed(shares: Draws, tried: Sequence[int], count: int) -> Draws:
    """What the worst layer that was not tried loses alone, where it is one of the ``count`` worst; else 0."""
    others = [layer for layer in range(shares.shape[1]) if layer not in tried]
    if not tried or not others:
        return np.zeros(len(shares))
    worst = shares[:, others].max(1)
    last = np.sort(shares[:, list(tried)], axis=1)[:, -count]
    missed: Draws = np.where(worst > last, worst, 0.0)
    return missed
