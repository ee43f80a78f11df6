"""Arithmetic of the noise-sensitivity ratio: sums over tokens, and every quantity that follows from them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

#: A channel is an outlier if its root mean square is more than so many times that of the layer's median channel.
OUTLIER_FACTOR = 5.0


@dataclass
class Moments:
    """Sums over the tokens at one layer, site and position, from which every quantity follows; no token is kept.

    Attributes
    ----------
    tokens : int
    x, x2, e2 : array [channels]
        Sums of the stored vectors, of their squares, and of the squared rounding errors.
    safety_e2 : float
        Sum of the squared projections of the error on the safety subspace.
    null_e2 : array [subspaces]
        The same for random subspaces.
    head_e2 : array [heads]
        The same within each head, on the part of the safety subspace that lies there.
    """

    x: NDArray[np.float64]
    x2: NDArray[np.float64]
    e2: NDArray[np.float64]
    null_e2: NDArray[np.float64]
    head_e2: NDArray[np.float64]
    tokens: int = 0
    safety_e2: float = field(default=0.0)

    @classmethod
    def zero(cls, channels: int, subspaces: int = 0, heads: int = 0) -> Moments:
        """Before the first token."""
        return cls(np.zeros(channels), np.zeros(channels), np.zeros(channels), np.zeros(subspaces), np.zeros(heads))

    def add(
        self,
        x: NDArray[np.float64],
        e: NDArray[np.float64],
        basis: NDArray[np.float64],
        null: NDArray[np.float64] | None = None,
        heads: NDArray[np.float64] | None = None,
    ) -> None:
        """Add tokens.

        Parameters
        ----------
        x, e : array [tokens, channels]
        basis : array [channels, k]
        null : array [subspaces, channels, k], optional
        heads : array [heads, head_dim, k], optional
            See :func:`head_bases`.
        """
        self.tokens += len(x)
        self.x += x.sum(0)
        self.x2 += (x**2).sum(0)
        self.e2 += (e**2).sum(0)
        self.safety_e2 += float(((e @ basis) ** 2).sum())
        if null is not None and len(null):
            projected = e @ null.transpose(1, 0, 2).reshape(len(basis), -1)
            self.null_e2 += (projected**2).reshape(len(e), len(null), -1).sum((0, 2))
        if heads is not None and len(heads):
            within = e.reshape(len(e), len(heads), -1).transpose(1, 0, 2) @ heads
            self.head_e2 += (within**2).sum((1, 2))


def head_bases(basis: NDArray[np.float64], heads: int) -> NDArray[np.float64]:
    """The part of a subspace that lies in each head's channels, made orthonormal again.

    Parameters
    ----------
    basis : array [channels, k]
    heads : int

    Returns
    -------
    array [heads, head_dim, k]
        Zero for a head that the subspace does not touch.
    """
    parts = basis.reshape(heads, -1, basis.shape[1])
    u, s, _ = np.linalg.svd(parts, full_matrices=False)
    found = np.zeros_like(parts)
    found[..., : u.shape[2]] = u * (s > 1e-9)[:, None, :]
    return found


def quantities(
    moments: Moments, gap: NDArray[np.float64], basis: NDArray[np.float64], null: NDArray[np.float64] | None = None
) -> dict[str, float]:
    """Ratio and decomposition from sums; infinite or NaN only where the subspace has no signal.

    Parameters
    ----------
    moments : Moments
    gap : array [channels]
        Mean harmful minus mean harmless vector.
    basis : array [channels, k]
        Orthonormal basis of the safety subspace.
    null : array [subspaces, channels, k], optional
        Orthonormal bases of random subspaces, those that ``moments`` was summed with.

    Notes
    -----
    ``ratio = NSR_U / NSR_full`` with ``NSR_full = sum |e|^2 / sum |x|^2`` and
    ``NSR_U = mean |U'e|^2 / (|U'gap|^2 / 4)``, the between-class variance. This is the project's definition
    (docs/definitions.md): arXiv:2606.09864 reports a ratio of 10^2 to 10^3 without defining it.
    """
    channels, k = basis.shape
    n = moments.tokens
    x2, e2 = moments.x2.sum(), moments.e2.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        signal = ((gap @ basis) ** 2).sum() / 4
        nsr_full = e2 / x2
        nsr_safety = moments.safety_e2 / n / signal
        centered = x2 - (moments.x**2).sum() / n
        found = {
            "ratio": nsr_safety / nsr_full,
            "ratio_centered": nsr_safety / (e2 / centered),
            "nsr_safety": nsr_safety,
            "nsr_full": nsr_full,
            "signal_gap": (x2 / n / channels) / (signal / k),
            "noise_alignment": (moments.safety_e2 / k) / (e2 / channels),
        }
        if null is None:
            return found
        null_signal = (np.einsum("c,sck->sk", gap, null) ** 2).sum(-1) / 4
        null_ratio = moments.null_e2 / n / null_signal / nsr_full
        null_alignment = moments.null_e2 / k / (e2 / channels)
        low, median, high = np.quantile(null_ratio, [0.025, 0.5, 0.975])
        return {
            **found,
            "null_low": low,
            "null_median": median,
            "null_high": high,
            # Isotropic subspaces see k/C of the noise and, on average, k/C of the signal.
            "null_closed": (x2 / n) / ((gap**2).sum() / 4),
            "alignment_null_low": np.quantile(null_alignment, 0.025),
            "alignment_null_high": np.quantile(null_alignment, 0.975),
        }


def head_quantities(
    moments: Moments, gap: NDArray[np.float64], heads: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Ratio and decomposition within each KV head, NaN where a head has no signal or no error.

    Parameters
    ----------
    moments : Moments
    gap : array [channels]
    heads : array [heads, head_dim, k]
        See :func:`head_bases`.

    Returns
    -------
    dict of str to array [heads]
        ``ratio``, ``signal_gap`` and ``noise_alignment``, defined as in :func:`quantities` with the head's channels
        for the full space.
    """
    count, size, k = heads.shape
    x2, e2 = (sums.reshape(count, size).sum(1) for sums in (moments.x2, moments.e2))
    signal = (np.einsum("hd,hdk->hk", gap.reshape(count, size), heads) ** 2).sum(-1) / 4
    with np.errstate(divide="ignore", invalid="ignore"):
        signal_gap = (x2 / moments.tokens / size) / (signal / k)
        alignment = (moments.head_e2 / k) / (e2 / size)
        defined = (signal > 1e-12 * x2 / moments.tokens) & (e2 > 0)
        found = {"ratio": signal_gap * alignment, "signal_gap": signal_gap, "noise_alignment": alignment}
    return {name: np.where(defined, values, np.nan) for name, values in found.items()}


def channel_quantities(
    moments: Moments, gap: NDArray[np.float64], basis: NDArray[np.float64], defined: bool
) -> dict[str, NDArray[np.float64]]:
    """The same for each channel alone: the subspace is the channel's unit vector.

    Parameters
    ----------
    moments : Moments
    gap : array [channels]
    basis : array [channels, k]
    defined : bool
        False where the classes coincide; no channel has a ratio then.

    Returns
    -------
    dict of str to array [channels]
        ``ratio`` (NaN for channels without class difference or error), ``magnitude`` (root mean square of x), ``noise``
        (root mean square of e), ``loading`` (squared component of the safety direction; sums to 1).
    """
    n = moments.tokens
    signal = gap**2 / 4
    nsr_full = moments.e2.sum() / moments.x2.sum()
    has_ratio = defined & (signal > 1e-12 * moments.x2 / n) & (nsr_full > 0)
    ratio = np.full(len(signal), np.nan)
    ratio[has_ratio] = moments.e2[has_ratio] / n / signal[has_ratio] / nsr_full
    return {
        "ratio": ratio,
        "magnitude": np.sqrt(moments.x2 / n),
        "noise": np.sqrt(moments.e2 / n),
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
