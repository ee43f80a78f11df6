"""Schemes for all layers alike, made from those of the unmitigated cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from operator import mul
from typing import Literal, get_args

from kvgeom.mitigation.candidates import Candidate
from kvgeom.mitigation.methods.registry import Setting
from kvgeom.models.model import KVGeometry
from kvgeom.quant.recipe import Schemes, Site
from kvgeom.quant.scheme import Scheme


def alike(setting: Setting, name: str, family: str, schemes: Schemes, description: str) -> Candidate:
    """A candidate with the same schemes in every layer that the engine rounds, with the measured constants that they use."""
    k, v = schemes
    recipe = setting.constants_for(replace(setting.config, k=k, v=v).recipe(setting.geometry.layers))
    return Candidate(name, family, recipe, setting.config.placement, description)


def transformed(schemes: Schemes, keys: str | None, values: str | None) -> Schemes:
    """The same grids after other transforms; what is transformed already, or not rounded, stays as it is."""

    def one(scheme: Scheme | None, transform: str | None) -> Scheme | None:
        if scheme is None or transform is None or scheme.transform != "none":
            return scheme
        return replace(scheme, transform=transform)

    return one(schemes[0], keys), one(schemes[1], values)


def finer(
    schemes: Schemes,
    granularity: Literal["channel", "group"],
    sites: Iterable[Site],
    geometry: KVGeometry,
    size: int | None = None,
) -> Schemes:
    """The same widths with other scales, on some sites, unless there are as many scales already."""

    def one(site: Site, scheme: Scheme | None) -> Scheme | None:
        if scheme is None or site not in sites or scheme.format != "int":
            return scheme
        if scheme.granularity == "channel-group" or scheme.granularity == granularity == "channel":
            return scheme  # every channel has scales already
        channels, head = (max(of(*geometry.shape(n, site)) for n in geometry.stores) for of in (mul, lambda _, d: d))
        together = {"token": channels, "token-head": head, "group": scheme.group_size}.get(scheme.granularity)
        if size is not None and together is not None and together <= size:
            return scheme
        return replace(scheme, granularity=granularity, group_size=size)

    k, v = (one(site, scheme) for site, scheme in zip(get_args(Site), schemes, strict=True))
    return k, v
