"""Arithmetic of the noise-sensitivity ratio: sums over tokens, and every quantity that follows from them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from kvgeom.geometry.signal import COVERAGE, Design, Signal, chance, noise_to_signal, signal

#: A class difference that chance makes more often than this cannot be told from 0.
ALPHA = 0.05

Floats = NDArray[np.floating]


@dataclass
class Moments:
    """Sums over the tokens at one layer, site and position, from which every quantity follows; no token is kept.

    Attributes
    ----------
    tokens : int
    x, x2, e2 : array [channels]
        Sums of the stored vectors, of their squares, and of the squared rounding errors.
    unit_e2 : array [units, units]
        Sum of the products of the error's components along the units of the contrast
        (:class:`~kvgeom.geometry.signal.Design`), ``(G e)(G e)'``.
    head_e2 : array [heads, units, units]
        The same within each head.
    safety_e2 : float
        Sum of the squared projections of the error on the safety subspace.
    null_e2 : array [subspaces]
        The same for random subspaces.
    """

    x: NDArray[np.float64]
    x2: NDArray[np.float64]
    e2: NDArray[np.float64]
    unit_e2: NDArray[np.float64]
    head_e2: NDArray[np.float64]
    null_e2: NDArray[np.float64]
    tokens: int = 0
    safety_e2: float = field(default=0.0)

    @classmethod
    def zero(cls, channels: int, units: int, subspaces: int = 0, heads: int = 0) -> Moments:
        """Before the first token."""
        x, x2, e2 = np.zeros((3, channels))
        return cls(x, x2, e2, np.zeros((units, units)), np.zeros((heads, units, units)), np.zeros(subspaces))

    def add(
        self,
        x: NDArray[np.float64],
        e: NDArray[np.float64],
        rows: Floats,
        basis: NDArray[np.float64] | None = None,
        null: NDArray[np.float64] | None = None,
    ) -> None:
        """Add tokens.

        Parameters
        ----------
        x, e : array [tokens, channels]
        rows : array [units, channels]
            Of the contrast; :meth:`kvgeom.geometry.signal.Design.rows`.
        basis : array [channels, k], optional
        null : array [subspaces, channels, k], optional
        """
        self.tokens += len(x)
        self.x += x.sum(0)
        self.x2 += (x**2).sum(0)
        self.e2 += (e**2).sum(0)
        units, heads = len(rows), len(self.head_e2)
        if heads:
            within = np.einsum(
                "thd,uhd->thu", e.reshape(len(e), heads, -1), rows.reshape(units, heads, -1), optimize=True
            )
            self.head_e2 += np.einsum("thu,thw->huw", within, within)
            along = within.sum(1)
        else:
            along = e @ rows.T
        self.unit_e2 += along.T @ along
        if basis is not None:
            self.safety_e2 += float(((e @ basis) ** 2).sum())
        if null is not None and len(null):
            projected = e @ null.transpose(1, 0, 2).reshape(x.shape[1], -1)
            self.null_e2 += (projected**2).reshape(len(e), len(null), -1).sum((0, 2))


@dataclass(frozen=True)
class Contrast:
    """Two classes of requests at one layer, site and position, as the ratio needs them.

    Attributes
    ----------
    design : Design
    rows : array [units, channels]
    dealt : array [draws, units]
        Weights under labels that chance dealt; see :meth:`~kvgeom.geometry.signal.Design.dealt`.
    tried : int
        Positions of which this one was chosen because the classes are far apart there.
    basis : array [channels, k], optional
        A subspace that is not simply the class difference, and
    held_out : Signal, optional
        its signal, :func:`~kvgeom.geometry.signal.held_out_signal`.
    """

    design: Design
    rows: Floats
    dealt: NDArray[np.float64]
    tried: int = 1
    basis: NDArray[np.float64] | None = None
    held_out: Signal | None = None


def quantities(moments: Moments, contrast: Contrast) -> dict[str, float]:
    """Ratio with its interval and its parts; what cannot be known is NaN.

    Parameters
    ----------
    moments : Moments
    contrast : Contrast

    Returns
    -------
    dict of str to float
        ``ratio``, ``ratio_low``, ``ratio_high``, ``ratio_plugin`` (the biased value that the gap of the sample gives),
        ``ratio_centered``, ``nsr_safety``, ``nsr_full``, ``signal``, ``signal_low``, ``signal_high``, ``signal_share``,
        ``signal_p``, ``signal_gap``, ``noise_alignment``; and ``raw``, the ratio whether or not the signal can be told from
        0, infinite where signal or noise are estimated at 0 or less.

    Notes
    -----
    ``ratio = NSR_U / NSR_full`` with ``NSR_full = sum |e|^2 / sum |x|^2`` and ``NSR_U = E|U'e|^2 / (|U'mu|^2 / 4)``, whose
    denominator is the between-class variance. This is the project's definition (docs/definitions.md): arXiv:2606.09864
    reports a ratio of 10^2 to 10^3 without defining it.
    """
    n, channels = moments.tokens, len(moments.x2)
    x2, e2 = float(moments.x2.sum()), float(moments.e2.sum())
    rows, design = contrast.rows.astype(np.float64), contrast.design
    gram, noise = rows @ rows.T, moments.unit_e2 / n
    weights, k = design.weights, 1
    p = min(1.0, contrast.tried * chance(gram, contrast.dealt, weights))
    with np.errstate(divide="ignore", invalid="ignore"):
        full = np.float64(e2) / x2
        if contrast.basis is None:
            found = signal(gram, design)
            both = noise_to_signal(gram, noise, design, found, p <= ALPHA)
            value, low, high, raw = both.estimate.value, both.estimate.low, both.estimate.high, both.raw
            along, seen = np.float64(both.noise), float(weights @ gram @ weights)
            plain = float(weights @ noise @ weights) / np.float64(seen)
        else:
            assert contrast.held_out is not None  # noqa: S101  # for the type checker
            found, k = contrast.held_out, contrast.basis.shape[1]
            along = plain = np.float64(moments.safety_e2 / n)
            seen = float((((weights @ rows) @ contrast.basis) ** 2).sum())
            raw = along / found.value if found.value > 0 else float("inf")
            value = raw if p <= ALPHA and found.value > 0 else float("nan")
            low = along / found.high if found.high > 0 else float("nan")
            high = along / found.low if found.low > 0 and np.isfinite(value) else float("nan")
        known = np.isfinite(value)
        centered = x2 - float((moments.x**2).sum()) / n
        return {
            "ratio": float(4 * value / full),
            "ratio_low": float(4 * low / full),
            "ratio_high": float(4 * high / full),
            "ratio_plugin": float(4 * plain / np.float64(seen) / full),
            "ratio_centered": float(4 * value / (e2 / np.float64(centered))),
            "nsr_safety": float(4 * value),
            "nsr_full": float(full),
            "signal": found.value / 4,
            "signal_low": found.low / 4,
            "signal_high": found.high / 4,
            "signal_share": found.share,
            "signal_p": p,
            "signal_gap": float((x2 / n / channels) / (np.float64(found.value) / 4 / k)) if known else float("nan"),
            "noise_alignment": float((along / k) / (e2 / n / channels)) if known else float("nan"),
            "raw": float(4 * raw / full) if e2 > 0 else float("nan"),
        }


def null_quantities(moments: Moments, contrast: Contrast, signal_gap: float) -> dict[str, float]:
    """Null (a): the ratio if the same class difference lay in another direction (docs/definitions.md).

    The signal is held fixed: only the noise along the direction is another. Directions are uniformly random, or those in
    which the same requests differ by chance: class differences under labels that are dealt anew within twins, with the
    class difference itself taken out, of which they would mostly consist where it is large.

    Parameters
    ----------
    moments : Moments
    contrast : Contrast
    signal_gap : float
        Of :func:`quantities`; NaN where there is no ratio.

    Returns
    -------
    dict of str to float
        ``null_low``, ``null_median``, ``null_high`` (2.5, 50 and 97.5 % of the ratio along random directions), ``null_p``
        (one-sided: share of directions, the true one among them, with as much noise); the same with ``dealt_``;
        ``alignment_null_low``, ``alignment_null_high``: 2.5 and 97.5 % of the noise alignment of random directions.
    """
    n, channels = moments.tokens, len(moments.x2)
    rows, weights = contrast.rows.astype(np.float64), contrast.design.weights
    gram, noise, k = rows @ rows.T, moments.unit_e2 / n, 1
    even = float(moments.e2.sum()) / n / channels
    with np.errstate(divide="ignore", invalid="ignore"):
        if contrast.basis is None:
            own = float(weights @ noise @ weights) / np.float64(weights @ gram @ weights) / even
        else:
            k = contrast.basis.shape[1]
            own = np.float64(moments.safety_e2) / n / k / even
        random = moments.null_e2 / n / k / even
        drawn = contrast.design.centred(contrast.dealt)
        dealt = ((drawn @ noise) * drawn).sum(1) / ((drawn @ gram) * drawn).sum(1)
        dealt = dealt[np.isfinite(dealt)] / even
    found: dict[str, float] = {}
    for name, draws in (("null", random), ("dealt", dealt)):
        quantiles = np.quantile(draws, [0.025, 0.5, 0.975]) if len(draws) else np.full(3, np.nan)
        if name == "null":
            found |= {"alignment_null_low": float(quantiles[0]), "alignment_null_high": float(quantiles[2])}
        found |= {
            f"{name}_{part}": float(signal_gap * q)
            for part, q in zip(("low", "median", "high"), quantiles, strict=True)
        }
        p = float((1 + (draws >= own * (1 - 1e-9)).sum()) / (1 + len(draws)))
        found[f"{name}_p"] = p if np.isfinite(signal_gap) else float("nan")
    return found


def head_quantities(moments: Moments, contrast: Contrast) -> dict[str, NDArray[np.float64]]:
    """The ratio of the class difference within each KV head, with the head's channels for the whole space.

    Parameters
    ----------
    moments : Moments
    contrast : Contrast
        Its subspace is left aside: heads are about the difference of means.

    Returns
    -------
    dict of str to array [heads]
        ``ratio``, ``ratio_low``, ``ratio_high``, ``signal_gap`` and ``noise_alignment``, as in :func:`quantities`. NaN where
        the classes cannot be told apart in the head (then ``ratio_low`` is known) or the head has no error.
    """
    heads, n = len(moments.head_e2), moments.tokens
    x, x2, e2 = (sums.reshape(heads, -1) for sums in (moments.x, moments.x2, moments.e2))
    rows = contrast.rows.reshape(len(contrast.rows), heads, -1)
    names = ("ratio", "ratio_low", "ratio_high", "signal_gap", "noise_alignment")
    found = {name: np.full(heads, np.nan) for name in names}
    for head in range(heads):
        own = rows[:, head]
        if not e2[head].sum() > 0 or not (own.astype(np.float64).mean(0) ** 2).sum() > 1e-12 * x2[head].sum() / n:
            continue
        alone = Moments(x[head], x2[head], e2[head], moments.head_e2[head], moments.head_e2[:0], moments.null_e2[:0], n)
        one = quantities(alone, Contrast(contrast.design, own, contrast.dealt, contrast.tried))
        for name in names:
            found[name][head] = one[name]
    return found


def channel_quantities(
    moments: Moments, contrast: Contrast, basis: NDArray[np.float64], defined: bool
) -> dict[str, NDArray[np.float64]]:
    """The ratio of each channel alone: the subspace is the channel's unit vector.

    Parameters
    ----------
    moments : Moments
    contrast : Contrast
    basis : array [channels, k]
        Of the safety subspace.
    defined : bool
        False where the classes coincide; no channel has a ratio then.

    Returns
    -------
    dict of str to array [channels]
        ``ratio`` (NaN for channels in which the 95 % interval of the class difference reaches 0, or without error),
        ``ratio_low`` (its lower bound there and elsewhere), ``magnitude`` (root mean square of x), ``noise`` (root mean
        square of e), ``loading`` (squared component of the safety direction; sums to 1).
    """
    n, design = moments.tokens, contrast.design
    rows = contrast.rows.astype(np.float64)
    gap, variance = design.weights @ rows, np.zeros(rows.shape[1])
    for side in {*design.sign.tolist()}:
        part = rows[design.sign == side]
        variance += part.var(0, ddof=1) / len(part)
    reach = float(student.ppf((1 + COVERAGE) / 2, max(design.fewest - 1, 1))) * np.sqrt(variance)
    full = moments.e2.sum() / moments.x2.sum()
    noise2, signal2 = moments.e2 / n, (gap**2 - variance) / 4
    usable = defined & (full > 0) & (gap**2 / 4 > 1e-12 * moments.x2 / n) & (noise2 > 0)
    ratio, low = np.full((2, len(gap)), np.nan)
    known = usable & (np.abs(gap) > reach)
    ratio[known] = noise2[known] / signal2[known] / full
    low[usable] = noise2[usable] / ((np.abs(gap) + reach)[usable] ** 2 / 4) / full
    return {
        "ratio": ratio,
        "ratio_low": low,
        "magnitude": np.sqrt(moments.x2 / n),
        "noise": np.sqrt(noise2),
        "loading": (basis**2).sum(1) / basis.shape[1],
    }


def random_bases(channels: int, k: int, count: int, seed: int = 0) -> NDArray[np.float64]:
    """Orthonormal bases of uniformly random subspaces (null a).

    Parameters
    ----------
    channels, k, count : int
    seed : int

    Returns
    -------
    array [count, channels, k]
    """
    rng = np.random.default_rng(seed)
    return np.linalg.qr(rng.standard_normal((count, channels, k)))[0]


def above_all(own: float, others: Floats) -> float:
    """One-sided p-value of being above a number of contrasts: the rank among them (null b).

    Parameters
    ----------
    own : float
        ``raw`` of :func:`quantities`.
    others : array [contrasts]
        The same of contrasts of the same kind; infinite where a contrast has no signal, NaN where it is undefined.

    Returns
    -------
    float
        ``(1 + contrasts at or above) / (1 + contrasts)``: if ``own`` were one more contrast of the kind, it would be at most
        ``a`` with probability ``a`` or less.
    """
    defined = others[~np.isnan(others)]
    return float((1 + (defined >= own).sum()) / (1 + len(defined)))
