"""Sums of rounding errors over the tokens of prompts, for any number of contrasts between these prompts at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvgeom.geometry.activations import SITES, Site, at_site, site_width, tokens_at, vectors
from kvgeom.geometry.fitted import FittedSpace
from kvgeom.geometry.ratio import Contrast, Moments
from kvgeom.geometry.rounding import Rounding
from kvgeom.geometry.signal import Design
from kvgeom.progress import track

Place = tuple[int, Site, str]


class NoiseSums:
    """What the ratio needs of one subspace: units of its contrast, and sums of rounding errors along them.

    Parameters
    ----------
    space : FittedSpace
    pairs : int, optional
        Take rounding errors from the first so many prompts of each class; from all by default.
    nulls : mapping of width to array [subspaces, width, k], optional
        Random subspaces; with them, heads and all positions are measured too.
    seed : int
        Of the labels that chance deals.
    """

    def __init__(
        self,
        space: FittedSpace,
        pairs: int | None = None,
        nulls: Mapping[int, NDArray[np.float64]] | None = None,
        seed: int = 0,
    ) -> None:
        self.space, self._nulls = space, nulls
        self.design = Design.of(space.is_harmful)
        self._dealt = self.design.dealt(seed=seed)
        self._rows: dict[Place, NDArray[np.float32]] = {}
        self.moments: dict[Place, Moments] = {}
        chosen = [*space.prompts.harmful[:pairs], *space.prompts.harmless[:pairs]]
        self.prompts = frozenset(map(int, space.activations.indices(chosen)))
        names = space.positions
        subspaces = len(next(iter(nulls.values()))) if nulls else 0
        self._places: dict[tuple[int, Site], tuple[str, ...]] = {}
        for (layer, site), direction in space.directions.items():
            units = self.design.rows(space.features(layer, site)).astype(np.float32)
            self._places[layer, site] = names if nulls is not None else (direction.position,)
            for name in self._places[layer, site]:
                own = nulls is not None and name == direction.position
                heads = space.model.geometry.kv_heads if own and site != "resid" else 0
                self._rows[layer, site, name] = units[:, names.index(name)]
                self.moments[layer, site, name] = Moments.zero(
                    site_width(space.model, site), len(units), subspaces if own else 0, heads
                )

    @property
    def plain(self) -> bool:
        """Whether the subspace is the difference of means itself."""
        return self.space.method == "mean" and self.space.k == 1

    def add(self, layer: int, site: Site, name: str, x: NDArray[np.float64], e: NDArray[np.float64]) -> None:
        """Add tokens at a position, exact and their rounding errors, ``[tokens, channels]``."""
        direction, moments = self.space.directions[layer, site], self.moments[layer, site, name]
        null = self._nulls[x.shape[1]] if self._nulls is not None and len(moments.null_e2) else None
        basis = None if self.plain or name != direction.position else direction.basis
        moments.add(x, e, self._rows[layer, site, name], basis, null)

    def places(self, layer: int, site: Site) -> tuple[str, ...]:
        """Positions at which a site is measured."""
        return self._places[layer, site]

    def of(self, layer: int, site: Site, position: str | None = None) -> tuple[Moments, Contrast]:
        """Sums and contrast at one layer and site; those of the difference of means at a ``position`` that is given."""
        direction = self.space.directions[layer, site]
        name = direction.position if position is None else position
        rows, moments = self._rows[layer, site, name], self.moments[layer, site, name]
        if position is not None:
            return moments, Contrast(self.design, rows, self._dealt)
        tried = len(self.space.tried)
        if self.plain or not direction.defined:
            return moments, Contrast(self.design, rows, self._dealt, tried)
        held_out = self.space.held_out(layer, site)
        return moments, Contrast(self.design, rows, self._dealt, tried, direction.basis, held_out)


def add_noise(members: Sequence[NoiseSums], rounding: Rounding, title: str) -> None:
    """Round every prompt of some subspaces once, and add its errors to all that it is part of.

    Parameters
    ----------
    members : sequence of NoiseSums
        Subspaces of the same activations.
    rounding : Rounding
    title : str
        Of the progress bar.
    """
    if not members:
        return
    store = members[0].space.activations
    wanted = sorted(frozenset[int]().union(*(one.prompts for one in members)))
    for index in track(wanted, title, len(wanted)):
        prompt, own = store.prompts[index], [one for one in members if index in one.prompts]
        for activations in store.layers(index):
            layer = activations.layer
            for site in SITES:
                x = at_site(activations, site)
                rounded = rounding(layer, site, x, activations.rotation if site == "k" else None)
                # In float32 whatever the model computes in: a difference of half-precision numbers is mostly rounding.
                error = rounded.float() - x.float()
                exact, noise = (vectors(activations, site, y).double().cpu().numpy() for y in (x, error))
                for one in own:
                    for name in one.places(layer, site):
                        at = tokens_at(prompt, name)
                        one.add(layer, site, name, exact[at], noise[at])
