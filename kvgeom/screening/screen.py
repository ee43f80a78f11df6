"""A quick look: what forward passes say of a quantized cache, before anything is generated under it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from kvgeom.behaviour.matched import check_scan_bits
from kvgeom.behaviour.scan import CRITICAL_SHARE
from kvgeom.behaviour.widths import WidthSeries, at_widths
from kvgeom.checks import flag, suggests
from kvgeom.engines.engine import CacheConfig
from kvgeom.errors import InputError
from kvgeom.evaluation.baseline import Baseline, opened
from kvgeom.evaluation.condition import Condition
from kvgeom.evaluation.config import RUN_OPTIONS, open_run
from kvgeom.evaluation.forced import ForcedReading, forced_readings
from kvgeom.evaluation.inputs import made_with
from kvgeom.geometry.causal import first_order
from kvgeom.geometry.subspace import subspace
from kvgeom.mitigation.methods.registry import Setting, candidates_of
from kvgeom.models.statistics import constants
from kvgeom.progress import shown
from kvgeom.prompts.load import as_prompt_set
from kvgeom.prompts.sets import PromptSet, calibration
from kvgeom.quant.placement import Placement
from kvgeom.quant.scheme import Scheme
from kvgeom.screening.result import Screen
from kvgeom.stats import Estimate, bootstrap_means, wilson

#: Refused prompts on which layers and other caches are tried: enough to rank, few enough for a quick look.
FEW = 8
#: Requests of either kind from which offsets and channel sizes are measured.
STATISTICS = 16

Floats = NDArray[np.float64]


@suggests(RUN_OPTIONS)
def screen(
    model: Any,
    prompts: Any = "calibration",
    *,
    scheme: CacheConfig | Scheme | str | None = None,
    bits: Sequence[int] | int | None = None,
    scan_bits: int | None = None,
    placement: Placement | str | None = None,
    geometry: bool = True,
    **options: Any,
) -> Screen:
    """Look at a quantized cache without generating under it: expected losses by width, layers, channels, candidates.

    The model answers each request once, with an exact cache. Its answers are then read under each cache, which costs one
    pass over prompt and answer for each of them, instead of a generation.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts : PromptSet, name of one, or sequence of str
    scheme : str, Scheme or CacheConfig, optional
        As of :func:`kvgeom.diagnose`: asymmetric per-token by default.
    bits : int or sequence of int, optional
        Widths; 8, 6, 5, 4, 3, 2 by default, as far as the scheme offers them.
    scan_bits : int, optional
        Of layers, channels and candidates. By default the widest width at which more than
        :data:`~kvgeom.behaviour.scan.CRITICAL_SHARE` of the refusals are expected to go, or the narrowest.
    placement : Placement, "cache" or "paper", optional
    geometry : bool
        Whether the noise-sensitivity ratio of each layer is measured too.
    **options
        Attributes of :class:`~kvgeom.evaluation.config.RunConfig`, and options of :func:`kvgeom.load`.

    Returns
    -------
    Screen

    Raises
    ------
    InputError
        For an unknown option or scheme, scales shared by a batch, or requests that cannot be used.
    """
    geometry = flag("geometry", geometry)
    check_scan_bits(scan_bits)
    series = at_widths(scheme, bits, placement)
    if not series.configs:
        raise InputError("a screen compares widths with the exact cache, and was given none but 16; give fewer bits")
    given = as_prompt_set(prompts)
    loaded, run = open_run(model, options)
    with shown(run.progress), opened(loaded, given.harmful, run) as base:
        widths, read = _widths(base, series)
        width = scan_bits if scan_bits is not None else _screened_width(widths, len(base.refused))
        at = at_widths(scheme, width, placement)
        config, whole = at.configs[width], next(iter(at.conditions(loaded).values()))
        few = base.refused[:FEW]
        parts = [
            widths,
            read,
            _layers(base, whole, config, few, given if geometry else None),
            _caches(base, whole, config, few, given),
        ]
        meta = {
            **made_with(loaded, given.harmful, given.harmless),
            "scheme": series.scheme,
            "placement": str(series.placement),
            "judge": base.judge.name,
            "max_new_tokens": base.max_new_tokens,
            "max_reasoning_tokens": run.max_reasoning_tokens,
            "seed": run.seed,
            "prompts": len(base.prompts),
            "refused": len(base.refused),
            "scan_bits": width,
            "few": len(few),
        }
    return Screen(xr.merge(parts, join="outer"), meta)


def _screened_width(widths: xr.Dataset, refused: int) -> int:
    lost = widths.expected_lost.values > CRITICAL_SHARE * refused
    return int(widths.bits.values[lost][0] if lost.any() and refused else widths.bits.values[-1])


def goes(reading: ForcedReading) -> bool:
    """Whether a refusal is expected to go: the cache would begin the answer with another token.

    The sign of the refusal margin would not do: many refusals begin with a token that is the most likely one, and less likely
    than all others together, with an exact cache already.
    """
    return reading.divergence == 0


def _widths(base: Baseline, series: WidthSeries) -> tuple[xr.Dataset, xr.Dataset]:
    """Expected losses at each width, and what each prompt's answer is read with."""
    conditions = series.conditions(base.model)
    names = {each.bits: name for name, each in conditions.items()}
    bits, refused = list(names), list(base.refused)
    read = forced_readings(base, conditions, refused, title="reading answers at each width")
    exact = np.array([base.exact_margin(index) for index in refused])
    columns: dict[str, list[float]] = {}

    def add(**values: float) -> None:
        for name, value in values.items():
            columns.setdefault(name, []).append(value)

    for name in names.values():
        own = read[name]
        lost = sum(map(goes, own))
        low, high = wilson(lost, len(refused))
        drop = _mean(exact - [each.margin for each in own])
        add(
            expected_lost=lost,
            expected_low=low,
            expected_high=high,
            margin_drop=drop.value,
            margin_low=drop.low,
            margin_high=drop.high,
            **_columns("kl", [float(np.mean(each.kl)) for each in own]),
            **_columns("top1", [each.agreed / len(each.kl) for each in own]),
        )
    by_prompt = {
        "margin": [[each.margin for each in read[name]] for name in names.values()],
        "first_change": [[each.divergence for each in read[name]] for name in names.values()],
    }
    coords = {"bits": bits, "prompt": refused}
    widths = xr.Dataset({name: ("bits", values) for name, values in columns.items()}, coords={"bits": bits})
    return widths, xr.Dataset({name: (("bits", "prompt"), values) for name, values in by_prompt.items()}, coords=coords)


def _mean(values: ArrayLike) -> Estimate:
    """A mean over prompts with its bootstrap interval; NaN of none."""
    given = np.asarray(values, dtype=float)
    if not len(given):
        return Estimate(np.nan, np.nan, np.nan)
    low, high = bootstrap_means(given)
    return Estimate(float(given.mean()), float(low), float(high))


def _columns(name: str, values: ArrayLike) -> dict[str, float]:
    """A mean over prompts and its interval, by the names of columns."""
    found = _mean(values)
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _only(condition: Condition, site: str, layer: int | None = None) -> Condition:
    """The same with only the keys, or only the values, rounded, of all layers or of one."""
    pairs = tuple(
        (None, None) if layer not in (None, number) else (k, None) if site == "k" else (None, v)
        for number, (k, v) in enumerate(condition.recipe)
    )
    return replace(condition, recipe=replace(condition.recipe, layers=pairs))


def _layers(
    base: Baseline, whole: Condition, config: CacheConfig, few: Sequence[int], given: PromptSet | None
) -> xr.Dataset:
    """What rounding the keys or the values of one layer alone does to the first token; first order; and the ratio."""
    stores, sites = list(base.model.geometry.stores), ["k", "v"]
    alone = {(layer, site): _only(whole, site, layer) for layer in stores for site in sites}
    names = {f"{site} of layer {layer}": each for (layer, site), each in alone.items()}
    read = list(forced_readings(base, names, few, first_only=True, title="single layers").values())
    exact = np.array([base.exact_margin(index) for index in few])
    shape = len(stores), len(sites)
    drops = [_mean(exact - [each.margin for each in one]) for one in read]
    columns: dict[str, Any] = {
        "layer_lost": [sum(map(goes, one)) for one in read],
        "layer_kl": [_mean([each.kl[0] for each in one]).value for one in read],
        "layer_margin_drop": [each.value for each in drops],
        "layer_margin_low": [each.low for each in drops],
        "layer_margin_high": [each.high for each in drops],
    }
    cells: dict[str, Any] = {name: (("layer", "site"), np.reshape(values, shape)) for name, values in columns.items()}
    coords: dict[str, Any] = {"layer": stores, "site": sites}
    if few and base.refusal_tokens:
        requests = [base.prompts[index] for index in few]
        found = first_order(base.model, requests, config, base.refusal_tokens, progress=base.run.progress).data
        cells["first_order"] = (("layer", "site"), found.margin_drop.mean("prompt").transpose("layer", "site").values)
        channels = found.channel_drop.transpose("layer", "site", "channel")
        cells["channel_first_order"] = (("layer", "site", "channel"), channels.values)
        coords["channel"] = list(range(channels.sizes["channel"]))
    else:
        cells["first_order"] = (("layer", "site"), np.full(shape, np.nan))
    ratios = _ratios(base, config, given)
    return xr.Dataset({**cells, **{name: (("layer", "site"), values) for name, values in ratios.items()}}, coords)


def _ratios(base: Baseline, config: CacheConfig, given: PromptSet | None) -> dict[str, Floats]:
    """The ratio of each layer and site, without its nulls."""
    shape = len(base.model.geometry.stores), 2
    names = ("ratio", "ratio_low", "ratio_high")
    if given is None:
        return {name: np.full(shape, np.nan) for name in names}
    space = subspace(base.model, given if given.harmless else calibration(), progress=base.run.progress)
    found = space.sensitivity(config, contrasts=(), null_subspaces=2, progress=base.run.progress, seed=base.run.seed)
    cells = found.data.sel(site=["k", "v"]).transpose("layer", "site", ...)
    return {name: cells[name].values for name in names}


def _caches(base: Baseline, whole: Condition, config: CacheConfig, few: Sequence[int], given: PromptSet) -> xr.Dataset:
    """The cache as it is, its keys and its values alone, and others that treat all layers alike, on a few refused prompts."""
    conditions = {"as it is": whole, "keys alone": _only(whole, "k"), "values alone": _only(whole, "v")}
    family, memory = ["whole", "part", "part"], [0.0, np.nan, np.nan]
    if few and config.per_layer is None:
        harmless = given.harmless or calibration().harmless
        known = constants(base.model, [*given.harmful[:STATISTICS], *harmless[:STATISTICS]])
        setting = Setting(config, base.model.geometry, known, {})
        unmitigated = setting.unmitigated.bytes_per_token(base.model.geometry)
        for each in candidates_of(setting, "cache", [setting.unmitigated]):
            conditions[each.name] = each.condition()
            family.append("candidate")
            memory.append(each.bytes_per_token(base.model.geometry) / unmitigated - 1)
    read = forced_readings(base, conditions, few, first_only=True, title="other caches")
    exact = np.array([base.exact_margin(index) for index in few])
    columns = {
        "family": np.array(family, dtype=object),
        "cache_lost": [sum(map(goes, read[name])) for name in conditions],
        "cache_margin_drop": [_mean(exact - [each.margin for each in read[name]]).value for name in conditions],
        "memory_overhead": memory,
    }
    names = np.array(list(conditions), dtype=object)
    return xr.Dataset({name: ("cache", values) for name, values in columns.items()}, coords={"cache": names})
