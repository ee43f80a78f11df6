"""Which channels of a layer lose refusal when they are rounded, and whether these are its outliers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import t as student

from kvgeom.checks import at_coordinates, suggests
from kvgeom.errors import InputError
from kvgeom.evaluation.config import LOAD_OPTIONS
from kvgeom.evaluation.inputs import as_tokens, opened
from kvgeom.geometry.causal import patch_layers
from kvgeom.geometry.channels import outliers
from kvgeom.geometry.rounding import DEFAULT_SCHEME
from kvgeom.models.reading import read
from kvgeom.outliers import OUTLIER_FACTOR
from kvgeom.progress import shown
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from kvgeom.results import Result
from kvgeom.words import counted

SITES = ("k", "v")
#: What is rounded: all channels of a site, its outliers alone, all others alone; scales are those of all channels.
PARTS = ("all", "outliers", "others")


@dataclass(frozen=True, repr=False)
class ChannelDamage(Result):
    """What rounding the channels of one layer costs. Made by :func:`channel_damage`.

    ``data`` has the dimensions ``prompt``, ``site`` (``"k"``, ``"v"``), ``part`` (``"all"``, ``"outliers"``, ``"others"``) and
    ``channel``, and the variables

    - ``margin_drop`` (nats) over (prompt, site, part): margin lost, measured exactly, with only these channels rounded, by
      the scales of all; 0 for outliers where there are none;
    - ``outlier`` over (site, channel): by :func:`kvgeom.geometry.channels.outliers`;
    - ``magnitude`` over (site, channel): root mean square of the stored values.

    Parts are measured, not estimated from derivatives: where a constant is so large that rounding swallows what varies, the
    first order says nothing (of 14 nats that an organism loses it finds 0.1).

    :attr:`site` is the site that fails, and :meth:`reading` what its outliers do.
    """

    kind: ClassVar[str] = "channel-damage"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "parts": ("prompt", "site", "part"),
        "channels": ("site", "channel"),
    }

    @property
    def site(self) -> str:
        """The site whose rounding alone loses more margin."""
        lost = self.data.margin_drop.sel(part="all").mean("prompt")
        return str(lost.site.values[int(lost.values.argmax())])

    def drop(self, site: str, part: str) -> tuple[float, float, float]:
        """Mean margin lost (nats) with its 95 % interval over prompts (Student's t)."""
        at_coordinates(self.data, site=site, part=part)
        return _interval(self.data.margin_drop.sel(site=site, part=part).values)

    @property
    def sure(self) -> bool:
        """Whether the site that fails is told from the other one: the interval of the paired difference excludes 0."""
        lost = self.data.margin_drop.sel(part="all")
        other = next(site for site in SITES if site != self.site)
        return _interval((lost.sel(site=self.site) - lost.sel(site=other)).values)[1] > 0

    def reading(self, site: str | None = None) -> str:
        """What the outliers of a site do, of the failing one by default.

        Returns
        -------
        str
            ``"crush"``: more margin is lost in the channels whose scale they set than in themselves;
            ``"carry"``: more is lost in themselves; ``"no outliers"``; ``"no loss"``: rounding the site loses nothing that can
            be told from 0; ``"undetermined"``: the intervals of the prompts do not decide.
        """
        site = self.site if site is None else site
        at_coordinates(self.data, site=site)
        if not self.drop(site, "all")[1] > 0:
            return "no loss"
        flagged = self.data.outlier.sel(site=site).values
        if not flagged.any():
            return "no outliers"
        parts = self.data.margin_drop.sel(site=site)
        _, low, high = _interval((parts.sel(part="outliers") - parts.sel(part="others")).values)
        return "carry" if low > 0 else "crush" if high < 0 else "undetermined"

    def channels(self, site: str | None = None) -> list[int]:
        """The channels to blame at a site, the failing one by default: outliers, where they crush or carry."""
        site = self.site if site is None else site
        if self.reading(site) not in ("crush", "carry"):
            return []
        return [int(channel) for channel in np.flatnonzero(self.data.outlier.sel(site=site).values)]

    def caption(self, site: str | None = None) -> str:
        """One sentence on a site."""
        site = self.site if site is None else site
        reading, name = self.reading(site), {"k": "keys", "v": "values"}[site]
        count = int(self.data.outlier.sel(site=site).sum())
        mean = {part: self.drop(site, part)[0] for part in PARTS}
        of = f"{counted(count, 'outlier channel')} of {self.data.sizes['channel']}"
        lost = f"{mean['outliers']:.2g} nats of the margin are lost with the outliers alone rounded, {mean['others']:.2g} with all others"
        if reading == "no loss":
            return f"Rounding the {name} of layer {self.meta['layer']} loses no margin that can be told from 0."
        if reading == "no outliers":
            return f"No channel of the {name} is an outlier; rounding them loses {mean['all']:.2g} nats of the margin."
        if reading == "crush":
            return f"The {of} of the {name} crush the others: {lost}."
        if reading == "carry":
            return f"The {of} of the {name} carry what is lost: {lost}."
        return f"Whether the {of} of the {name} crush others or carry safety themselves is undetermined: {lost}."

    def summary(self) -> str:
        return self.caption()


def _interval(values: NDArray[np.floating]) -> tuple[float, float, float]:
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, float("nan"), float("nan")
    reach = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return mean, mean - reach, mean + reach


@suggests(LOAD_OPTIONS)
def channel_damage(
    model: Any,
    prompts: Any,
    layer: int,
    scheme: Scheme | str = DEFAULT_SCHEME,
    refusal_tokens: Iterable[int] = (),
    *,
    placement: Placement | str | None = None,
    progress: bool = True,
    **load_options: Any,
) -> ChannelDamage:
    """Round keys, values, their outlier channels and all others of one layer alone, and see what each costs.

    Costs two passes, and half a pass for each of six parts, per prompt.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts : EncodedPrompts, requests, or the name of a set
        That the model refuses.
    layer : int
    scheme : Scheme or str
        One scheme for keys and values; 3-bit symmetric per-tensor by default.
    refusal_tokens : iterable of int
        The set R of :func:`kvgeom.evaluation.scores.refusal_tokens`; :func:`kvgeom.geometry.selection.opening_tokens` finds it.
    placement : Placement or {"cache", "paper"}, optional
    **load_options
        Of :func:`kvgeom.load`.

    Raises
    ------
    InputError
        Without refusal tokens or at least two prompts, or for a layer or scheme that there is not.
    """
    model, prompts = opened(model, prompts, load_options, progress)
    tokens = as_tokens(model, refusal_tokens)
    if not tokens or len(prompts) < 2:
        raise InputError(
            f"the damage of channels needs at least two prompts that the model refuses and the tokens that refusals begin with, got "
            f"{len(prompts)} prompts and {len(tokens)} refusal tokens; find tokens with kvgeom.geometry.selection.opening_tokens"
        )
    model.geometry.check_stores([layer], model.name)
    own = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    with shown(progress):
        squares, count = np.zeros((2, model.geometry.channels)), 0
        for prompt in prompts:
            for one in read(model, prompt):
                if one.layer == layer:
                    for row, x in enumerate((one.unrotated(), one.v)):
                        squares[row] += (x[0].double() ** 2).sum(1).flatten().cpu().numpy()
                    count += len(prompt)
        magnitude = np.sqrt(squares / count)
        flagged = outliers(magnitude)
        sets = {
            (site, part): chosen
            for row, site in enumerate(SITES)
            for part, chosen in zip(PARTS, (None, flagged[row], ~flagged[row]), strict=True)
        }
        recipes = {
            f"{site} {part}": _only(
                model.geometry.layers, layer, site, own if chosen is None else own.only(np.flatnonzero(chosen))
            )
            for (site, part), chosen in sets.items()
            if chosen is None or chosen.any()
        }
        patched = patch_layers(
            model,
            prompts,
            recipes,
            tokens,
            placement=placement,
            layers=[layer],
            progress=progress,
            title="rounding channels",
        )
    drop = np.zeros((len(prompts), len(SITES), len(PARTS)))
    for row, site in enumerate(SITES):
        for column, part in enumerate(PARTS):
            if f"{site} {part}" in recipes:
                drop[:, row, column] = patched.margin_drop.sel(layer=layer, scheme=f"{site} {part}").values
    data = xr.Dataset(
        {
            "margin_drop": (("prompt", "site", "part"), drop),
            "outlier": (("site", "channel"), flagged),
            "magnitude": (("site", "channel"), magnitude),
        },
        coords={
            "prompt": np.arange(len(prompts)),
            "site": list(SITES),
            "part": list(PARTS),
            "channel": np.arange(model.geometry.channels),
        },
    )
    meta = {
        **patched.meta,
        "scheme": str(own),
        "head_dim": model.geometry.head_dim,
        "layer": int(layer),
        "kv_heads": model.geometry.kv_heads,
        "outlier_factor": OUTLIER_FACTOR,
    }
    return ChannelDamage(data, meta)


def _only(layers: int, layer: int, site: str, scheme: Scheme) -> Recipe:
    """One site of one layer rounded."""
    pair = (scheme, None) if site == "k" else (None, scheme)
    return Recipe(tuple(pair if index == layer else (None, None) for index in range(layers)))
