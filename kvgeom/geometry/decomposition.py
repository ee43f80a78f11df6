"""The margin that a rounded cache loses, as a sum of what each layer, site, KV head and group of channels contributes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from kvgeom.checks import suggests, whole
from kvgeom.errors import InputError
from kvgeom.evaluation.config import LOAD_OPTIONS
from kvgeom.evaluation.inputs import as_tokens, made_with, opened
from kvgeom.evaluation.scores import margin
from kvgeom.geometry.rounding import DEFAULT_SCHEME, CacheSpec, Rounding
from kvgeom.models.batching import in_batches, rows_per_batch
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.models.reading import read
from kvgeom.models.rotary import TokenRotation
from kvgeom.progress import bar, shown
from kvgeom.quant.placement import Placement
from kvgeom.quant.scheme import MOST_CHANNELS
from kvgeom.results import Result

Where = tuple[int, Literal["k", "v"]]
SITES: tuple[Literal["k", "v"], ...] = ("k", "v")
#: A prompt that loses less (nats) is taken for one that loses so much, where what is left over is compared with it.
LEAST = 0.1


@dataclass(frozen=True, repr=False)
class Decomposition(Result):
    """The margin lost to a rounded cache, as a sum. Made by :func:`decompose`.

    ``data`` has the dimensions ``prompt``, ``layer``, ``site`` (``"k"``, ``"v"``), ``head`` (KV head), ``group`` (of
    neighbouring channels of a head, by its first channel) and ``channel`` (of all heads, laid end to end), and the variables

    - ``contribution`` (nats) over (prompt, layer, site, head, group): margin lost through these errors. All of a prompt add up
      to ``exact_margin - rounded_margin - remainder``;
    - ``channel_contribution`` (nats) over (layer, site, channel): the same by channel, mean of the prompts;
    - ``exact_margin``, ``rounded_margin`` (nats) over (prompt): with nothing and with the whole cache rounded;
    - ``remainder`` (nats) over (prompt): what the numerical integral leaves over;
    - ``change`` (nats) over (prompt): how much the contribution of any layer and site moved, at most, when each stretch of the
      path was halved for the last time;
    - ``points`` over (prompt): at how many points of the path the gradient was taken;
    - ``settled`` over (prompt): whether what all stretches leave over, and the change, are each at most ``meta["tolerance"]``
      of the margin lost;
    - ``from_exact``, ``from_rounded`` (nats) over (prompt, layer, site): the same errors times the gradient at one end of the
      path alone, at the exact and at the rounded cache;
    - ``alone``, ``restored`` (nats) over (prompt, layer, site), NaN unless asked for: margin lost when this site of this layer
      is all that is rounded, and margin regained when it is all that is kept exact. Neither adds up.
    """

    kind: ClassVar[str] = "decomposition"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "parts": ("prompt", "layer", "site", "head", "group"),
        "sites": ("prompt", "layer", "site"),
        "channels": ("layer", "site", "channel"),
        "prompts": ("prompt",),
    }

    @property
    def margin_drop(self) -> xr.DataArray:
        """Margin lost to the whole cache (nats), by prompt."""
        drop: xr.DataArray = self.data.exact_margin - self.data.rounded_margin
        return drop

    @property
    def by_site(self) -> xr.DataArray:
        """Contributions (nats) by prompt, layer and site."""
        found: xr.DataArray = self.data.contribution.sum(("head", "group"))
        return found

    @property
    def by_layer(self) -> xr.DataArray:
        """Contributions (nats) by prompt and layer, of keys and values together."""
        found: xr.DataArray = self.by_site.sum("site")
        return found

    def summary(self) -> str:
        lost, left = float(self.margin_drop.mean()), float(self.data.remainder.mean())
        settled = int(self.data.settled.sum())
        return (
            f"{lost:.2f} nats lost under {self.meta['scheme']}, {left:+.2f} of them left over; settled for {settled} of "
            f"{self.data.sizes['prompt']} prompts"
        )


@suggests(LOAD_OPTIONS)
def decompose(
    model: Any,
    prompts: Any,
    scheme: CacheSpec = DEFAULT_SCHEME,
    refusal_tokens: Iterable[int] = (),
    *,
    placement: Placement | str | None = None,
    group_size: int = 16,
    tolerance: float = 0.05,
    points: int = 65,
    patch: bool = False,
    progress: bool = True,
    **load_options: Any,
) -> Decomposition:
    """Say which layers, sites, heads and channels lose the margin that a wholly rounded cache loses.

    The errors of a rounded run are kept as they are, layer by layer, with what rounding below has done to each, and added to
    an exact run scaled by a number that goes from 0 to 1. At 0 that is the exact run, at 1 the rounded one. The derivative of the
    margin along this path is a sum over all errors; so is its integral, which is the margin lost.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts : EncodedPrompts, requests, or the name of a set
    scheme : CacheConfig, Recipe, Scheme or str
        Anything that :func:`kvgeom.engines.registry.resolve` takes; see :class:`~kvgeom.geometry.rounding.Rounding`.
        3-bit symmetric per-tensor by default.
    refusal_tokens : iterable of int
        Must not be empty: the margin is what is decomposed.
    placement : Placement or {"cache", "paper"}, optional
        Instead of the preset's, or of the decode-faithful default.
    group_size : int
        Neighbouring channels of a head that are put together.
    tolerance : float
        The path is halved where it is worst until, as a share of the margin lost (or of 0.1 nats, if that is more), what its
        stretches leave over is no more than this, and no layer and site has moved by more.
    points : int
        Most points of the path, 3 or more. Each costs one forward and one backward pass.
    patch : bool
        Whether to measure ``alone`` and ``restored`` too, which takes about three passes for each layer.
    **load_options
        Of :func:`kvgeom.load`.

    Raises
    ------
    InputError
        Without refusal tokens or prompts, for an option out of its range, or if ``scheme`` cannot be resolved.

    Notes
    -----
    Integrated gradients (Sundararajan et al., 2017, arXiv:1703.01365), here from the exact to the rounded cache: the
    Aumann-Shapley values of the errors. The integral is taken by Simpson's rule over stretches of the path. The scores at the ends
    of a stretch say what is lost along it, so that what the rule leaves over there is known, and not estimated.

    Every token but sinks is rounded, and read rounded, as a later token would: of a placement whose prompt reads exact
    values or that has a residual window, this is not the margin of the first token. The error of a site depends on what
    is rounded below it, so that ``alone``, where nothing is, is about other errors.

    Examples
    --------
    >>> found = decompose("demo", requests, "int3-sym-tensor", tokens)  # doctest: +SKIP
    >>> found.by_layer.mean("prompt")  # doctest: +SKIP
    >>> found.plot("channel_groups", layer=0)  # doctest: +SKIP
    """
    group_size, points = whole("group_size", group_size, 1, MOST_CHANNELS), whole("points", points, 3)
    if not isinstance(tolerance, int | float) or not 0 < tolerance < 1:
        raise InputError(f"tolerance must be a number between 0 and 1, got {tolerance!r}")
    model, prompts = opened(model, prompts, load_options, progress)
    tokens = as_tokens(model, refusal_tokens)
    if not tokens or not prompts:
        raise InputError(
            f"a decomposition needs prompts that the model refuses and the tokens that refusals begin with, got {len(prompts)} "
            f"prompts and {len(tokens)} refusal tokens"
        )
    rounding = Rounding.of(model, scheme, placement)
    geometry = model.geometry
    geometry.check_alike(model.name)
    shape = (len(geometry.stores), len(SITES), geometry.kv_heads, geometry.head_dim)
    starts = np.arange(0, geometry.head_dim, group_size)
    rows: list[dict[str, Any]] = []
    channels = np.zeros(shape)
    with shown(progress), bar("margin lost by part", len(prompts)) as drawn:
        for prompt in prompts:
            path = Path(model, prompt, rounding, lambda logits: margin(logits, tokens))
            by_channel, found = integrate(partial(path.by_channel, shape=shape), tolerance, points)
            channels += by_channel / len(prompts)
            alone, restored = path.patched() if patch else (np.full(shape[:2], np.nan),) * 2
            grouped = np.add.reduceat(by_channel, starts, axis=-1)
            rows.append({"contribution": grouped, **found, "alone": alone, "restored": restored})
            drawn.update(1)
    dims = {
        "contribution": ("layer", "site", "head", "group"),
        **dict.fromkeys(("from_exact", "from_rounded", "alone", "restored"), ("layer", "site")),
    }
    data = xr.Dataset(
        {
            **{name: (("prompt", *dims.get(name, ())), np.stack([row[name] for row in rows])) for name in rows[0]},
            "channel_contribution": (("layer", "site", "channel"), channels.reshape(*shape[:2], -1)),
        },
        coords={
            "prompt": np.arange(len(prompts)),
            "layer": list(geometry.stores),
            "site": list(SITES),
            "head": np.arange(geometry.kv_heads),
            "group": starts,
            "channel": np.arange(geometry.channels),
        },
    )
    meta = {
        **made_with(model, [prompt.text for prompt in prompts]),
        **rounding.made,
        "head_dim": geometry.head_dim,
        "group_size": group_size,
        "tolerance": float(tolerance),
    }
    return Decomposition(data, meta)


class Path:
    """The straight path of one prompt from the exact to the rounded cache.

    Parameters
    ----------
    model : Model
    prompt : EncodedPrompt
    rounding : Rounding
    score : callable (Tensor[vocabulary]) -> Tensor[]
        Differentiable, of the last token's logits.

    Attributes
    ----------
    errors : dict of (layer, site) to Tensor [1, kv_heads, tokens, head_dim], float32
        Of the run in which all is rounded.
    rounded : float
        The score of that run.
    """

    def __init__(
        self, model: Model, prompt: EncodedPrompt, rounding: Rounding, score: Callable[[Tensor], Tensor]
    ) -> None:
        self.model, self.prompt, self.score = model, prompt, score
        self._where = rounding.placement.where
        rotations = (
            {one.layer: one.rotation for one in read(model, prompt, self._where)} if rounding.needs_rotation else {}
        )
        places = {(layer, site) for layer in model.geometry.stores for site in SITES if rounding.scheme(layer, site)}
        self._edit = partial(_Rounded, rounding, rotations)
        whole = self._edit(frozenset(places))
        self.rounded = self._run(whole)
        self.errors = whole.errors

    def at(self, share: float) -> tuple[float, dict[Where, Tensor]]:
        """The score where a share of all errors is added, and its gradient there. Costs one forward and one backward pass."""
        added = {place: share * error for place, error in self.errors.items()} if share else None
        found = self.model.gradients(self.prompt.ids, self.score, where=self._where, added=added)
        return found.score, found.grad

    def by_channel(self, share: float, shape: tuple[int, ...]) -> tuple[float, NDArray[np.float64]]:
        """The score there, and minus gradient times error, ``[layers, 2, heads, head_dim]``: what it loses by unit of share."""
        score, grad = self.at(share)
        cells = np.zeros(shape)
        for (layer, site), error in self.errors.items():
            lost = -(grad[layer, site].float() * error)[0].double().sum(1)
            cells[self.model.geometry.stores.index(layer), SITES.index(site)] = lost.cpu().numpy()
        return score, cells

    def patched(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Exactly, by layer and site: what is lost where it alone is rounded, and regained where it alone is exact."""
        stores = self.model.geometry.stores
        alone, restored = np.zeros((2, len(stores), len(SITES)))
        cells = [(stores.index(layer), SITES.index(site)) for layer, site in self.errors]
        places = list(self.errors)

        def run(part: Sequence[Where]) -> Tensor:
            edits = [self._edit(frozenset({place})) for place in part]
            return self.model.forward_branches(self.prompt.ids, edits, [layer for layer, _ in part])[:, -1]

        scored: list[float] = []
        for _, logits in in_batches(places, rows_per_batch(self.model, len(self.prompt), 1), run):
            clean, *rest = (float(self.score(row)) for row in logits)
            scored += [clean - one for one in rest]
        for cell, place, lost in zip(cells, places, scored, strict=True):
            alone[cell] = lost
            restored[cell] = self._run(self._edit(frozenset(places) - {place})) - self.rounded
        return alone, restored

    def _run(self, edit: _Rounded) -> float:
        return float(self.score(self.model.forward(self.prompt.ids, self.model.new_cache(edit))[-1]))


@dataclass
class _Rounded:
    """An edit that rounds some sites of some layers, all of their tokens but sinks, and keeps the errors."""

    rounding: Rounding
    rotations: Mapping[int, TokenRotation | None]
    places: frozenset[Where]
    errors: dict[Where, Tensor] = field(default_factory=dict)
    prefill_reads_exact: bool = False

    @property
    def where(self) -> str:
        return self.rounding.placement.where

    @property
    def kind(self) -> Hashable:
        return id(self)

    def __call__(self, layer: int, site: Literal["k", "v"], x: Tensor) -> Tensor:
        if (layer, site) not in self.places:
            return x
        rounded = self.rounding(layer, site, x, self.rotations.get(layer) if site == "k" else None)
        self.errors[layer, site] = rounded.float() - x.float()
        return rounded

    def rows(self, rows: Tensor) -> _Rounded:
        return self

    @staticmethod
    def stack(parts: Sequence[Any]) -> Any:
        raise NotImplementedError("each belongs to the one sequence that it rounds")


@dataclass(frozen=True)
class _Stretch:
    """A part of the path, with Simpson's rule over its ends and its middle.

    Attributes
    ----------
    start, stop : float
    parts : array [layers, 2, heads, head_dim]
        What is lost along it, by error.
    left : float
        What is lost along it by the scores at its ends, less the sum of that.
    moved : array [layers, 2]
        By how much this half of a longer stretch changed what that one said; NaN of the whole path.
    """

    start: float
    stop: float
    parts: NDArray[np.float64]
    left: float
    moved: NDArray[np.float64]

    @property
    def middle(self) -> float:
        return (self.start + self.stop) / 2


Lost = Callable[[float], tuple[float, NDArray[np.float64]]]


def integrate(lost: Lost, tolerance: float, most: int) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """What is lost along a path from 0 to 1, by error, where it is refined until it settles; and all else about it.

    Parameters
    ----------
    lost : callable (share) -> score, array [layers, 2, heads, head_dim]
        The score at a point of the path, and what it loses there for each unit of share, by error.
    tolerance : float
        See :func:`decompose`.
    most : int
        Most points, 3 or more.
    """
    seen: dict[float, tuple[float, NDArray[np.float64]]] = {}

    def at(share: float) -> tuple[float, NDArray[np.float64]]:
        if share not in seen:
            seen[share] = lost(share)
        return seen[share]

    def stretch(start: float, stop: float) -> _Stretch:
        (first, a), (_, b), (last, c) = (at(share) for share in (start, (start + stop) / 2, stop))
        parts = (stop - start) / 6 * (a + 4 * b + c)
        return _Stretch(start, stop, parts, first - last - float(parts.sum()), np.full(parts.shape[:2], np.nan))

    parts = [stretch(0.0, 1.0)]
    drop = at(0.0)[0] - at(1.0)[0]
    allowed = tolerance * max(abs(drop), LEAST)
    while True:
        change = float(np.sum([part.moved for part in parts], axis=0).max())
        # Stretches may be off in opposite directions: their sizes count, not their sum.
        settled = sum(abs(part.left) for part in parts) <= allowed and change <= allowed
        if settled or len(seen) + 2 > most:
            break
        worst = max(parts, key=lambda part: np.nanmax([abs(part.left), np.max(part.moved)]))
        halves = stretch(worst.start, worst.middle), stretch(worst.middle, worst.stop)
        moved = np.abs(halves[0].parts + halves[1].parts - worst.parts).sum((2, 3)) / 2
        parts = [part for part in parts if part is not worst] + [replace(half, moved=moved) for half in halves]
    found = np.sum([part.parts for part in parts], axis=0)
    return found, {
        "from_exact": seen[0.0][1].sum((2, 3)),
        "from_rounded": seen[1.0][1].sum((2, 3)),
        "exact_margin": seen[0.0][0],
        "rounded_margin": seen[1.0][0],
        "remainder": drop - float(found.sum()),
        "change": change,
        "points": len(seen),
        "settled": settled,
    }
