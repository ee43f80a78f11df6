"""Does a measure predict damage beyond others? Partial rank correlation over layers, heads or channels, and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from scipy.stats import t as student

from kvgeom.checks import MOST_DRAWS, as_seed, suggests, whole
from kvgeom.errors import InputError

#: What is left of a measure beside the controls must vary by more than this share, or nothing is said of it.
LEFT = 1e-6


@suggests()
@dataclass(frozen=True)
class Units:
    """What was measured of the layers, heads or channels of one model.

    Attributes
    ----------
    predictor : array [units] or [units, prompts]
        What is to predict; with prompts, their mean counts.
    damage : array [units] or [units, other prompts]
        What rounding a unit does.
    controls : sequence of array [units] or [units, prompts]
        What could be said without the predictor. With prompts, they are those of the predictor.
    clusters : array [units], optional
        Units that came together, such as those of one planted model, have the same number here and are drawn together.

    Raises
    ------
    InputError
        For arrays that do not go together.
    """

    predictor: NDArray[np.float64]
    damage: NDArray[np.float64]
    controls: Sequence[NDArray[np.float64]] = ()
    clusters: NDArray[np.int64] | None = None
    _members: list[NDArray[np.int64]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        own = [np.asarray(x, dtype=float) for x in (self.predictor, self.damage, *self.controls)]
        sizes = {len(x) if x.ndim in (1, 2) else -1 for x in own}
        if len(sizes) != 1 or -1 in sizes:
            raise InputError(
                f"measures of units must have shape [units] or [units, prompts], got {[x.shape for x in own]}"
            )
        prompts = {x.shape[1] for x in (own[0], *own[2:]) if x.ndim == 2}
        if len(prompts) > 1:
            raise InputError(
                f"a predictor and its controls must be measured on the same prompts, got {sorted(prompts)}"
            )
        units = sizes.pop()
        clusters = np.arange(units) if self.clusters is None else np.asarray(self.clusters)
        if clusters.shape != (units,):
            raise InputError(f"clusters must be one number for each of {units} units, got shape {list(clusters.shape)}")
        object.__setattr__(self, "predictor", own[0])
        object.__setattr__(self, "damage", own[1])
        object.__setattr__(self, "controls", tuple(own[2:]))
        object.__setattr__(self, "_members", [np.flatnonzero(clusters == one) for one in np.unique(clusters)])

    def means(self, rng: np.random.Generator | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Means of the predictor and the controls, ``[1 + controls, units]``, and of the damage, of all or of prompts drawn anew."""

        def drawn(count: int) -> NDArray[np.int64]:
            return np.arange(count) if rng is None else rng.integers(count, size=count)

        seen = drawn(next((x.shape[1] for x in (self.predictor, *self.controls) if x.ndim == 2), 1))
        beside = [x if x.ndim == 1 else x[:, seen].mean(1) for x in (self.predictor, *self.controls)]
        damage = self.damage if self.damage.ndim == 1 else self.damage[:, drawn(self.damage.shape[1])].mean(1)
        return np.stack(beside), damage

    def draw(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """As many clusters, drawn anew."""
        return np.concatenate([self._members[one] for one in rng.integers(len(self._members), size=len(self._members))])


@dataclass(frozen=True)
class PartialCorrelation:
    """Spearman's rank correlation of a predictor with damage, with the controls taken out of both.

    Attributes
    ----------
    value, low, high : float
        NaN where the controls leave nothing of one side.
    plain : float
        The correlation without controls.
    units, clusters : int
        Of all models together.
    controls : int
    """

    value: float
    low: float
    high: float
    plain: float
    units: int
    clusters: int
    controls: int

    @property
    def beyond(self) -> bool:
        """Whether the whole interval lies above 0."""
        return bool(self.low > 0)  # NaN is not

    def __str__(self) -> str:
        if not np.isfinite(self.value):
            return f"undetermined (plain {self.plain:.2f})"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] (plain {self.plain:.2f})"


@suggests()
def partial_rank_correlation(
    units: Units | Sequence[Units], *, level: float = 0.95, samples: int = 500, seed: int = 0
) -> PartialCorrelation:
    """Correlate a predictor with damage beyond what controls say.

    All are ranked among the units of a model, and what is linear in the ranks of the controls is taken out of both sides. The
    interval treats units and prompts as samples.

    Parameters
    ----------
    units : Units, or one for each of several models
        Ranks and controls are those within a model; what is left of them is put together.
    level : float
        Of the interval. For several predictors of one damage, ``1 - 0.05 / predictors`` keeps the family at 5 % (Bonferroni).
    samples : int
        Of the bootstrap.
    seed : int

    Raises
    ------
    InputError
        Without units, or for a level that is none.

    Notes
    -----
    In each sample clusters and both sets of prompts are drawn anew, independently. The spread of Fisher's z of the samples is
    the standard error, or that of normal samples of as many clusters, ``1.06 / (clusters - 3 - controls)``
    (Fieller et al., 1957), where it is more; Student's t with ``clusters - 2 - controls`` degrees of freedom makes the
    interval. Controls are fitted for each model. It is about what is measured with so many prompts: noise of few prompts makes
    correlations smaller.
    """
    parts = [units] if isinstance(units, Units) else list(units)
    if not parts or not all(isinstance(part, Units) for part in parts):
        raise InputError("a correlation needs the units of at least one model; give Units(predictor, damage, controls)")
    if not isinstance(level, int | float) or not 0 < level < 1:
        raise InputError(f"level must be a number between 0 and 1, got {level!r}")
    samples, rng = whole("samples", samples, 2, MOST_DRAWS), np.random.default_rng(as_seed(seed))
    controls = max(len(part.controls) for part in parts)
    clusters = sum(len(part._members) for part in parts)
    count = sum(len(part.damage) for part in parts)
    value, plain = _together(parts, None), _together(parts, None, controlled=False)
    spent = sum(1 + len(part.controls) for part in parts)
    free = clusters - 1 - spent
    nan = float("nan")
    if not np.isfinite(value) or free < 2:
        return PartialCorrelation(nan, nan, nan, plain, count, clusters, controls)
    drawn = np.array([_together(parts, rng) for _ in range(samples)])
    if not np.isfinite(drawn).mean() >= 0.5:
        return PartialCorrelation(nan, nan, nan, plain, count, clusters, controls)
    ends = 1 - 1e-6
    spread = float(np.nanvar(np.arctanh(np.clip(drawn, -ends, ends)), ddof=1))
    error = np.sqrt(max(spread, 1.06 / max(free - 1, 1)))
    reach = student.ppf((1 + level) / 2, free) * error
    low, high = np.tanh(np.arctanh(np.clip(value, -ends, ends)) + np.array([-reach, reach]))
    return PartialCorrelation(value, float(low), float(high), plain, count, clusters, controls)


def _together(parts: Sequence[Units], rng: np.random.Generator | None, controlled: bool = True) -> float:
    """The correlation of what is left on both sides, over the units of all models."""
    products = np.zeros(3)
    for part in parts:
        beside, damage = part.means(rng)
        chosen = np.arange(len(damage)) if rng is None else part.draw(rng)
        left = residuals(beside[0, chosen], damage[chosen], beside[1:, chosen] if controlled else beside[1:1])
        if left is not None:
            x, y = left
            products += [x @ y, x @ x, y @ y]
    across, one, other = products
    return float(across / np.sqrt(one * other)) if one > 0 and other > 0 else float("nan")


def residuals(
    predictor: ArrayLike, damage: ArrayLike, controls: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Ranks of two sides, from -1/2 to 1/2, without what is linear in the ranks of the controls; None if one side has none left.

    Parameters
    ----------
    predictor, damage : array [units]
    controls : array [controls, units]
    """
    sides = np.stack([np.asarray(x, dtype=float) for x in (predictor, damage)])
    ranked = _ranks(np.concatenate([sides, np.asarray(controls, dtype=float).reshape(-1, sides.shape[1])]))
    basis = np.vstack([np.ones(sides.shape[1]), ranked[2:]]).T
    left = ranked[:2] - (basis @ np.linalg.lstsq(basis, ranked[:2].T, rcond=None)[0]).T
    size = (ranked[:2] ** 2).sum(1)
    return None if ((left**2).sum(1) <= LEFT * np.maximum(size, LEFT)).any() else (left[0], left[1])


def _ranks(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks along the last axis from -1/2 to 1/2, ties in the middle."""
    ranks = np.asarray(rankdata(x, axis=-1), dtype=float)
    centred: NDArray[np.float64] = (ranks - (x.shape[-1] + 1) / 2) / x.shape[-1]
    return centred
