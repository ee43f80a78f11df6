"""What directions do when they are taken out or put in, on requests that did not find them, beside random directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from kvgeom.checks import MOST_DRAWS, as_names, as_seed, one_of, suggests, whole, whole_numbers
from kvgeom.errors import InputError
from kvgeom.evaluation.inputs import as_tokens, made_with
from kvgeom.geometry.activations import SITES, Site
from kvgeom.geometry.fitted import FittedSpace
from kvgeom.geometry.methods.registry import Method
from kvgeom.geometry.trials import Outcome, run_trials, trials_of
from kvgeom.progress import shown
from kvgeom.prompts.load import as_prompt_set
from kvgeom.prompts.sets import held_out
from kvgeom.results import Result
from kvgeom.stats import bootstrap_means, wilson

if TYPE_CHECKING:
    pass

Floats = NDArray[np.float64]
#: What directions are compared with.
CONTROLS = ("random", "dealt")
#: Names of the numbers of every cell: of the ablation in harmful requests, and of the addition in harmless ones.
SIDES = {"lost": True, "induced": False}


@dataclass(frozen=True, repr=False)
class Effects(Result):
    """What directions do to refusal, on requests that did not find them. Made by :func:`effects`.

    ``data`` has the dimensions ``estimator`` (the method), ``layer``, ``site`` and ``prompt`` and the variables

    - ``margin`` (nats): refusal margin of a harmful request with the direction ablated, of a harmless one with it added, and
      ``clean_margin`` over (prompt) without; ``refuses`` and ``clean_refuses``: whether the most likely first token
      begins a refusal; ``harmful`` and ``request`` over (prompt);
    - ``lost`` and ``induced`` over (estimator, layer, site): the margin that ablation takes from harmful requests, and that
      addition gives harmless ones, means with 95 % bootstrap intervals over requests (``lost_low``, ...);
    - ``lost_p``, ``induced_p``: share of random directions that do as much, the direction counted in; with 19 draws it is 0.05
      where none does;
    - ``kl`` (nats): divergence of the next token of harmless requests under the ablation, mean;
    - ``control_margin``, ``control_refuses`` and ``control_kl`` over (draw, ...): the same of random directions, of the kind
      that ``meta["control"]`` says: of as many dimensions as the largest subspace, added at the same length.

    Of keys and values there is also what the directions of all layers do together: ``together_margin``, ``together_refuses``
    over (estimator, kv, prompt), ``together_kl``, and their controls. With ``heads=True``, what the direction of every KV head
    alone does: ``head_margin``, ``head_refuses`` over (estimator, layer, kv, head, prompt), ``head_lost``, ``head_induced`` and
    their ``_p``, and the controls, which are random directions in the head's channels.

    Where a direction is undefined everything is NaN. :meth:`overview` has a row for each method and site.
    """

    kind: ClassVar[str] = "effects"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layers": ("estimator", "layer", "site"),
        "prompts": ("estimator", "layer", "site", "prompt"),
        "controls": ("draw", "layer", "site"),
        "control_prompts": ("draw", "layer", "site", "prompt"),
        "together": ("estimator", "kv"),
        "together_prompts": ("estimator", "kv", "prompt"),
        "together_controls": ("draw", "kv", "prompt"),
        "heads": ("estimator", "layer", "kv", "head"),
        "head_prompts": ("estimator", "layer", "kv", "head", "prompt"),
        "head_controls": ("draw", "layer", "kv", "head", "prompt"),
        "requests": ("prompt",),
    }

    def overview(self) -> pd.DataFrame:
        """The methods at a glance: a row for each method and site.

        The layer is chosen on one half of the requests and looked at on the other, and the other way round: the best of many
        layers on the requests that chose it would look better than it is. Random directions are treated alike.

        Returns
        -------
        pandas.DataFrame
            ``lost`` and ``induced`` (nats) with ``_low``, ``_high`` (bootstrap over requests), ``_random`` (mean of the random
            directions) and ``_p`` (share of them that do as much, the direction counted in); ``refused`` and
            ``refused_ablated`` of harmful requests, ``refused_harmless`` and ``refused_added`` of harmless ones: shares whose most
            likely first token begins a refusal, with Wilson intervals of those under intervention; of keys and values
            ``together_lost`` and ``together_induced``, all layers at once.
        """
        rows = []
        for method in self.data.estimator.values:
            for site in self.data.site.values:
                row: dict[str, Any] = {"method": str(method), "site": str(site)}
                for side in SIDES:
                    row |= self._overview(side, str(method), str(site))
                rows.append(row)
        return pd.DataFrame(rows)

    def _overview(self, side: str, method: str, site: str) -> dict[str, Any]:
        of_class = self.data.harmful.values == SIDES[side]
        sign = -1.0 if SIDES[side] else 1.0
        before = self.data.clean_margin.values[of_class]
        clean = self.data.clean_refuses.values[of_class]

        def seen(part: xr.Dataset, prefix: str = "") -> tuple[Floats, Floats]:
            margin = part[f"{prefix}margin"].transpose("layer", "prompt").values[:, of_class]
            refuses = part[f"{prefix}refuses"].transpose("layer", "prompt").values[:, of_class]
            return cross_fitted(sign * (margin - before), refuses)

        change, refuses = seen(self.data.sel(estimator=method, site=site))
        controls = [
            float(seen(self.data.sel(site=site).isel(draw=draw), "control_")[0].mean())
            for draw in range(self.data.sizes["draw"])
        ]
        low, high = bootstrap_means(change) if len(change) else (np.nan, np.nan)
        mean = float(change.mean()) if len(change) else float("nan")
        share = "refused_ablated" if SIDES[side] else "refused_added"
        refused, of = int(np.nansum(refuses)), int(np.isfinite(refuses).sum())
        share_low, share_high = wilson(refused, of)
        found: dict[str, Any] = {
            side: mean,
            f"{side}_low": float(low),
            f"{side}_high": float(high),
            f"{side}_random": float(np.mean(controls)) if controls else float("nan"),
            f"{side}_p": p_of(mean, np.array(controls)),
            "refused" if SIDES[side] else "refused_harmless": float(np.mean(clean)) if len(clean) else float("nan"),
            share: refused / of if of else float("nan"),
            f"{share}_low": share_low,
            f"{share}_high": share_high,
        }
        together = float("nan")
        if site != "resid":
            after = self.data.together_margin.sel(estimator=method, kv=site).values[of_class]
            together = float((sign * (after - before)).mean()) if len(after) else float("nan")
        return {**found, f"together_{side}": together}

    def summary(self) -> str:
        sizes = self.data.sizes
        return (
            f"{self.data.estimator.values.tolist()}, {sizes['layer']} layers x {self.data.site.values.tolist()}, "
            f"{sizes['prompt']} requests, {sizes['draw']} random directions beside each"
        )


def cross_fitted(change: Floats, refuses: Floats) -> tuple[Floats, Floats]:
    """Changes of each prompt at the layer where the other half of the prompts changes most.

    Parameters
    ----------
    change : array [layers, prompts]
        Higher is a larger effect; rows of NaN are left out.
    refuses : array [layers, prompts]

    Returns
    -------
    change, refuses : array [prompts]
        NaN where no layer is defined.
    """
    prompts = change.shape[1]
    defined = np.isfinite(change).all(1)
    found, kept = np.full(prompts, np.nan), np.full(prompts, np.nan)
    if not defined.any() or prompts < 2:
        return found, kept
    half = np.arange(prompts) % 2 == 0
    for test in (half, ~half):
        layer = int(np.argmax(np.where(defined, change[:, ~test].mean(1), -np.inf)))
        found[test], kept[test] = change[layer, test], refuses[layer, test]
    return found, kept


def p_of(value: float, controls: Floats) -> float:
    """Share of the controls that are at least as large, the value counted in; NaN without any."""
    if not len(controls) or not np.isfinite(value):
        return float("nan")
    return float((1 + (controls >= value).sum()) / (1 + len(controls)))


@suggests()
def effects(
    space: FittedSpace,
    methods: Sequence[str | Method] | str | Method | None = None,
    *,
    prompts: Any = None,
    k: int = 1,
    layers: Sequence[int] | int | None = None,
    sites: Sequence[Site] | Site | None = None,
    heads: bool = False,
    controls: int = 19,
    control: Literal["random", "dealt"] = "random",
    tokens: Iterable[int] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Effects:
    """Ablate and add directions on requests that did not find them, and measure the refusal margin.

    - In the residual stream a direction is ablated at every layer and token, and added after its own layer (Arditi et al.).
    - In keys and values it is ablated or added in its own layer alone, at every token, in the channels as they are without
      their rotary embedding. What is ablated is replaced by what harmless requests have along it, for keys have an offset
      along nearly any direction that all tokens share.
    - A subspace of several dimensions is ablated whole. What is added is the direction in it that lies nearest to the class
      difference, as long as that difference is, whatever the method: so is every random direction.

    Costs, per request, a pass for every method, random direction, layer and site of the residual stream, about half of one in
    keys and values, and nearly twice as much for harmless requests; nothing is generated (see
    :func:`kvgeom.geometry.steering.steer`). Give fewer layers where that is too much.

    Parameters
    ----------
    space : Subspace
        Whose requests find the directions, at the position that it was asked for or at the best one.
    methods : str, Method or sequence of these, optional
        That of the space by default.
    prompts : anything that :func:`kvgeom.prompts.load.as_prompt_set` takes, optional
        Other requests than those of the space; the held-out ones that come with kvgeom by default.
    k : int
        Dimensions of those methods that have several, as far as each has them.
    layers : int or sequence of int, optional
        All by default.
    sites : sequence of {"k", "v", "resid"}, optional
        All by default.
    heads : bool
        Try the direction of every KV head alone, too.
    controls : int
        Random directions beside each layer and site.
    control : {"random", "dealt"}
        Directions of any kind, or such along which requests differ: differences of means with the labels of half of the
        pairs swapped. The second is the harder to beat.
    tokens : iterable of int, optional
        First tokens of refusals; found by asking the model the harmful requests of the space otherwise.
    seed : int
        Of the random directions.

    Raises
    ------
    InputError
        If requests found the directions themselves, if there are too few or the model refuses nothing, or for methods, layers or
        sites that do not exist.
    """
    from kvgeom.geometry.directions import as_methods
    from kvgeom.geometry.selection import opening_tokens

    own = space.by
    chosen = as_methods(own if methods is None else methods)
    model, geometry = space.model, space.model.geometry
    asked = held_out() if prompts is None else as_prompt_set(prompts)
    known = {*space.prompts.harmful, *space.prompts.harmless}
    seen = [text for text in (*asked.harmful, *asked.harmless) if text in known]
    if seen:
        raise InputError(
            f"{len(seen)} of the requests found the directions themselves, such as {seen[0][:40]!r}; give others, which did not"
        )
    if min(len(asked.harmful), len(asked.harmless)) < 2:
        raise InputError(
            f"prompt set {asked.name!r} has {len(asked.harmful)} harmful and {len(asked.harmless)} harmless requests; "
            "effects need at least two of each"
        )
    k, controls, seed = whole("k", k, 1), whole("controls", controls, 0, MOST_DRAWS), as_seed(seed)
    one_of("control", control, CONTROLS)
    at = list(geometry.stores) if layers is None else sorted({*whole_numbers("layers", layers, 0, geometry.layers - 1)})
    if not at:
        raise InputError("effects need at least one layer, got none; leave layers out for all")
    geometry.check_stores(at, model.name)
    where: list[Any] = list(SITES) if sites is None else [*dict.fromkeys(as_names("site", sites, SITES))]
    with shown(progress):
        r = opening_tokens(model, space.harmful) if tokens is None else as_tokens(model, tokens)
        if not r:
            raise InputError(
                f"{model.name} refuses none of the {len(space.harmful)} harmful requests, or so few that no first token predicts it; "
                "give requests that it refuses, or tokens"
            )
        pairs, tried = int(min(space.is_harmful.sum(), (~space.is_harmful).sum())), space.tried
        position = tried[0] if len(tried) == 1 else None
        spaces = [
            type(space).fit(space.source, min(k, method.most(len(tried), pairs)), method, position)  # type: ignore[arg-type]
            for method in chosen
        ]
        trials = list(trials_of(spaces, at, where, heads, controls, control, seed))
        encoded = [*model.encode(asked.harmful), *model.encode(asked.harmless)]
        found = run_trials(model, encoded, len(asked.harmful), trials, r, space.placement.where)
    names = [method.name for method in chosen]
    coords = {
        "estimator": names,
        "layer": at,
        "site": where,
        "kv": [site for site in where if site != "resid"],
        "draw": np.arange(controls),
        "prompt": np.arange(len(encoded)),
        **({"head": np.arange(geometry.kv_heads)} if heads else {}),
    }
    harmful = np.arange(len(encoded)) < len(asked.harmful)
    data = _dataset(found, coords, heads)
    data = data.assign(
        clean_margin=("prompt", found.clean_margin),
        clean_refuses=("prompt", found.clean_refuses),
        harmful=("prompt", harmful),
        request=("prompt", np.array([prompt.text for prompt in encoded], dtype=object)),
    )
    data = _summarized(data, "")
    if heads:
        data = _summarized(data, "head_")
    meta = {
        **made_with(model, asked.harmful, asked.harmless),
        "placement": str(space.placement),
        "directions_from": space.prompts.fingerprint,
        "k": k,
        "tried": list(tried),
        "tokens": sorted(r),
        "control": control,
        "seed": seed,
        "head_dim": geometry.head_dim,
    }
    return Effects(data, meta)


#: Dimensions of the numbers by the prefix of their names.
_DIMS = {
    "": ("estimator", "layer", "site"),
    "control_": ("draw", "layer", "site"),
    "together_": ("estimator", "kv"),
    "together_control_": ("draw", "kv"),
    "head_": ("estimator", "layer", "kv", "head"),
    "head_control_": ("draw", "layer", "kv", "head"),
}


def _dataset(found: Outcome, coords: Mapping[str, Any], heads: bool) -> xr.Dataset:
    variables: dict[str, Any] = {}
    for prefix, dims in _DIMS.items():
        if "head" in dims and not heads:
            continue
        shape = tuple(len(coords[dim]) for dim in dims)
        for name in ("margin", "refuses", "kl"):
            more = () if name == "kl" else (len(coords["prompt"]),)
            values = np.full((*shape, *more), np.nan)
            for index, value in found.of(prefix, name):
                values[index] = value
            variables[f"{prefix}{name}"] = ((*dims, *(("prompt",) if more else ())), values)
    return xr.Dataset(variables, coords=dict(coords))


def _summarized(data: xr.Dataset, prefix: str) -> xr.Dataset:
    """With means, intervals and shares of random directions."""
    control = f"{prefix}control_"
    found: dict[str, Any] = {}
    for side, harmful in SIDES.items():
        of_class = data.harmful.values == harmful
        sign = -1.0 if harmful else 1.0
        change = sign * (data[f"{prefix}margin"] - data.clean_margin).isel(prompt=of_class)
        random = sign * (data[f"{control}margin"] - data.clean_margin).isel(prompt=of_class)
        mean = change.mean("prompt", skipna=False)
        low, high = bootstrap_means(change.transpose("prompt", ...).values)
        dims = mean.dims
        found[f"{prefix}{side}"] = mean
        found[f"{prefix}{side}_low"], found[f"{prefix}{side}_high"] = (dims, low), (dims, high)
        as_much = (random.mean("prompt", skipna=False) >= mean).sum("draw") + 1
        p = (as_much / (data.sizes["draw"] + 1)).where(np.isfinite(mean) & (data.sizes["draw"] > 0))
        found[f"{prefix}{side}_p"] = p.transpose(*dims)
    return data.assign(found)
