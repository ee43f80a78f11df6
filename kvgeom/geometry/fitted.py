"""Directions that were fitted at every layer and site, and the activations that they were found in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from kvgeom.checks import one_by_one, one_of, suggests, whole
from kvgeom.errors import InputError, brief
from kvgeom.evaluation.inputs import made_with
from kvgeom.geometry.activations import SITES, ActivationStore, Site
from kvgeom.geometry.estimators import (
    Direction,
    as_dataset,
    basis_at,
    defined_at,
    direction_of,
    fit_direction,
    most_dimensions,
    position_of,
)
from kvgeom.geometry.methods.registry import Method, as_method
from kvgeom.geometry.signal import Signal, held_out_signal
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.prompts.load import as_prompt_set
from kvgeom.prompts.sets import PromptSet, fingerprint
from kvgeom.quant.placement import Placement
from kvgeom.results import Result

#: Where classes are compared unless another position is asked for; docs/definitions.md says why.
RULE = "instruction"
#: Asks for the position at which the classes are best separated, of all that the prompts share.
BEST = "best"


@dataclass(frozen=True)
class Source:
    """What a subspace was found in, from which everything else is measured.

    Attributes
    ----------
    activations : ActivationStore
    prompts : PromptSet
        Those of ``activations`` that the subspace tells apart.
    contrasts : dict of str to ActivationStore
        Activations of harmless requests by the fingerprint of their set, shared by all subspaces of one model run.
    """

    activations: ActivationStore
    prompts: PromptSet
    contrasts: dict[str, ActivationStore] = field(default_factory=dict)

    def features(self, layer: int, site: Site) -> NDArray[np.float64]:
        """See :meth:`FittedSpace.features`."""
        one_of("layer", layer, self.activations.model.geometry.stores)
        one_of("site", site, SITES)
        rows = self.activations.indices([*self.prompts.harmful, *self.prompts.harmless])
        at = self.activations.model.geometry.stores.index(layer)
        found: NDArray[np.float64] = self.activations.features(site)[at][rows].astype(np.float64)
        return found

    def resolution(self, layer: int, site: Site) -> NDArray[np.float64]:
        """See :meth:`FittedSpace.resolution`."""
        return self.activations.resolution(layer, site, self.features(layer, site))

    @property
    def is_harmful(self) -> NDArray[np.bool_]:
        """See :attr:`FittedSpace.is_harmful`."""
        return np.repeat([True, False], [len(self.prompts.harmful), len(self.prompts.harmless)])


@dataclass(frozen=True, repr=False)
class FittedSpace(Result):
    """A subspace for every layer and site; the part of :class:`~kvgeom.geometry.subspace.Subspace` that measures build on.

    ``data`` has the dimensions ``layer`` and ``site`` (``"k"``, ``"v"``, ``"resid"``) and the variables

    - ``position``: tokens at which the direction was found (``"instruction"``, ``"template-1"``, ...);
    - ``separation``: cross-validated AUROC of harmful against harmless along the difference of means, and ``effect``, the
      gap over the pooled standard deviation;
    - ``p``: one-sided permutation p-value of the separation, corrected for the number of positions tried; ``p_position``
      is that of the position alone;
    - ``defined``: False where the classes coincide at every position tried.

    ``gap`` (mean harmful minus mean harmless vector) over ``(layer, kv, channel)`` and ``basis`` (orthonormal) over
    ``(layer, kv, channel, dimension)`` describe keys and values; ``resid_gap`` and ``resid_basis`` over
    ``resid_channel`` the residual stream. A basis is NaN in dimensions that the classes do not span there.
    :attr:`directions` has the same by layer and site.

    A subspace that :meth:`load` returns has its directions, and nothing that would need the model: neither activations nor
    prompts, so it cannot measure a sensitivity.
    """

    source: Source | None = field(default=None, compare=False)

    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layers": ("layer", "site"),
        "channels": ("layer", "kv", "channel", "dimension"),
        "resid_channels": ("layer", "resid_channel", "dimension"),
    }

    @classmethod
    def fit(cls, source: Source, k: int, method: str | Method, position: str | None, draws: int = 999) -> Self:
        """Fit directions to activations; raises as :func:`kvgeom.geometry.subspace.subspace`.

        ``draws`` is how often labels are dealt for the p-value of the separation; with 0 there is none.
        """
        by = as_method(method)
        store, prompts, names = source.activations, source.prompts, source.activations.positions
        k = check_prompts(prompts, k, method)
        rule = RULE if position is None else position
        one_of("position", rule, (*names, BEST))
        tried = names if rule == BEST else (rule,)
        # A position that was asked for is the only one that is looked at; the rule leaves the others to be stacked.
        stacked = names if position in (None, BEST) else tried
        pairs = min(len(prompts.harmful), len(prompts.harmless))
        most = most_dimensions(by, len(stacked), pairs)
        if k > most:
            raise InputError(
                f"method {by.name!r} gives at most k={most} with {len(stacked)} positions and {pairs} pairs of requests, got k={brief(k)}; "
                "method='pca' gives one dimension for each pair"
            )
        harmful, geometry = source.is_harmful, store.model.geometry
        bases, notes = by.bases(source, tried, k) if by.needs_model else ({}, {})
        found = {
            (layer, site): fit_direction(
                source.features(layer, site),
                harmful,
                names,
                tried,
                k,
                by,
                source.resolution(layer, site),
                stacked=stacked,
                draws=draws,
                found_before=bases.get((layer, site)),
            )
            for layer in geometry.stores
            for site in SITES
        }
        meta = {
            **made_with(store.model, prompts.harmful, prompts.harmless),
            "placement": str(store.placement),
            "k": k,
            "method": by.name,
            **({"method_options": by.options} if by.options else {}),
            **({"method_notes": notes} if notes else {}),
            "position": rule,
            "tried": list(tried),
            "stacked": list(stacked),
            "kv_heads": geometry.kv_heads,
            "head_dim": geometry.head_dim,
        }
        return cls(as_dataset(found, geometry.stores, len(tried)), meta, source)

    @property
    def k(self) -> int:
        """Dimensions of each subspace."""
        return int(self.meta["k"])

    @property
    def method(self) -> str:
        """How directions were estimated."""
        return str(self.meta["method"])

    @property
    def tried(self) -> tuple[str, ...]:
        """Positions that were looked at."""
        return tuple(self.meta["tried"])

    @property
    def position(self) -> str:
        """The position that was asked for, the rule's by default; ``"best"``: the best separated of :attr:`tried`."""
        return str(self.meta["position"])

    @cached_property
    def directions(self) -> dict[tuple[int, Site], Direction]:
        """The subspace of every layer and site."""
        return {
            (int(layer), site): direction_of(self.data, int(layer), site) for layer in self.data.layer for site in SITES
        }

    def _found_in(self) -> Source:
        if self.source is None:
            raise InputError(
                "this subspace was read from a file and has no activations; find it again with "
                f"kvgeom.subspace({self.meta['model']!r}, prompts) to measure anything"
            )
        return self.source

    @property
    def activations(self) -> ActivationStore:
        """Keys, values and residual stream of the prompts.

        Raises
        ------
        InputError
            For a subspace that was read from a file, as for everything below that needs them.
        """
        return self._found_in().activations

    @property
    def prompts(self) -> PromptSet:
        """The requests that it tells apart."""
        return self._found_in().prompts

    @property
    def model(self) -> Model:
        """The model that it is a subspace of."""
        return self.activations.model

    @property
    def placement(self) -> Placement:
        """Where keys and values were read."""
        return self.activations.placement

    @property
    def positions(self) -> tuple[str, ...]:
        """Positions that the prompts share."""
        return self.activations.positions

    @property
    def harmful(self) -> tuple[EncodedPrompt, ...]:
        """The harmful prompts as tokens."""
        return self.activations.encoded(self.prompts.harmful)

    @property
    def harmless(self) -> tuple[EncodedPrompt, ...]:
        """The harmless prompts as tokens."""
        return self.activations.encoded(self.prompts.harmless)

    def features(self, layer: int, site: Site) -> NDArray[np.float64]:
        """Mean vector of every prompt at every position, ``[prompts, positions, channels]``, harmful prompts first."""
        return self._found_in().features(layer, site)

    def resolution(self, layer: int, site: Site) -> NDArray[np.float64]:
        """Differences of means, ``[positions, channels]``, that may be no more than rounding of the number format."""
        return self._found_in().resolution(layer, site)

    @property
    def is_harmful(self) -> NDArray[np.bool_]:
        """Which rows of :meth:`features` are harmful."""
        return self._found_in().is_harmful

    @suggests()
    def refit(
        self,
        *,
        k: int = 1,
        method: str | Method = "mean",
        concept: str | None = None,
        position: str | None = None,
        prompts: Any = None,
    ) -> Self:
        """Another subspace of the same activations; the model is run again only by a method that needs it (``"cone"``).

        Parameters
        ----------
        k, method, concept, position
            As in :func:`subspace`.
        prompts : anything that :func:`kvgeom.prompts.load.as_prompt_set` takes, optional
            Some of the same requests, perhaps with other labels.

        Raises
        ------
        InputError
            As :func:`subspace`, or for requests that were not run.
        """
        found_in = self._found_in()
        chosen = found_in.prompts if prompts is None else as_prompt_set(prompts)
        return type(self).fit(
            Source(found_in.activations, chosen, found_in.contrasts), k, method, position_of(concept, position)
        )

    def contrasted(self, contrasts: Any, pairs: int | None = None) -> dict[str, Self]:
        """Subspaces of contrasts between harmless requests (null b), found as this one was, by name.

        Others of a name that there is already are numbered: ``"own prompts"``, ``"own prompts 2"``.

        Their prompts are run once, whatever number of contrasts they are part of, and once for all schemes.

        Parameters
        ----------
        contrasts : sequence of prompt sets, or one
            Each anything that :func:`kvgeom.prompts.load.as_prompt_set` takes. The two classes stand in the places of harmful
            and harmless.
        pairs : int, optional
            Use only so many of each; never more than this subspace has.
        """
        sizes = (
            len(self.prompts.harmful),
            len(self.prompts.harmless),
            *(() if pairs is None else (whole("pairs", pairs, 1),)),
        )
        size = min(sizes)
        single = isinstance(contrasts, PromptSet | Mapping)
        small = [as_prompt_set(contrast).take(size) for contrast in ([contrasts] if single else one_by_one(contrasts))]
        requests = tuple(dict.fromkeys(text for contrast in small for text in (*contrast.harmful, *contrast.harmless)))
        if not requests:
            return {}
        key, stores = fingerprint(requests), self._found_in().contrasts
        if key not in stores:
            stores[key] = ActivationStore(self.model, requests, self.placement)
        return {
            name: type(self).fit(Source(stores[key], one), self.k, self._alike, self._asked, draws=0)
            for name, one in _numbered(small).items()
        }

    @property
    def by(self) -> Method:
        """The method itself, with its options."""
        return as_method(self.method, self.meta.get("method_options"))

    @property
    def _alike(self) -> Method:
        """The method by which safety and harmless contrasts are compared."""
        return self.by if self.by.contrast is None else as_method(self.by.contrast)

    @property
    def _asked(self) -> str | None:
        """What to ask for to fit another subspace like this one."""
        return None if self.position == RULE and len(self.meta["stacked"]) > 1 else self.position

    def first(self, pairs: int) -> Self:
        """The same from the first ``pairs`` requests of each class, without p-values; the model is not run again."""
        found_in = self._found_in()
        source = Source(found_in.activations, found_in.prompts.take(pairs), found_in.contrasts)
        return type(self).fit(source, self.k, self._alike, self._asked, draws=0)

    def held_out(self, layer: int, site: Site) -> Signal:
        """Signal within the subspaces of parts of the requests, of the others; see :func:`kvgeom.geometry.signal.held_out_signal`.

        NaN of a method that needs the model: its directions were found in all requests, and to find them anew in parts would
        cost as much again for each.
        """
        if self.by.needs_model:
            return Signal(*[float("nan")] * 4)
        x, harmful = self.features(layer, site), self.is_harmful
        at = list(self.positions).index(self.directions[layer, site].position)
        stacked = defined_at(x, harmful, self.resolution(layer, site)) & np.isin(self.positions, self.meta["stacked"])
        return held_out_signal(
            x[:, at], harmful, lambda rows: basis_at(x[rows], harmful[rows], at, stacked, self.k, self.by)
        )

    def summary(self) -> str:
        defined = self.data.defined.values
        return (
            f"{self.meta['model']}: {self.data.sizes['layer']} layers x {self.data.site.values.tolist()}, k={self.k}, "
            f"{self.method}; defined at {int(defined.sum())} of {defined.size}"
        )


def _numbered(sets: Sequence[PromptSet]) -> dict[str, PromptSet]:
    """Prompt sets by name; a second set of one name gets a number, the same set again is left out."""
    found: dict[str, PromptSet] = {}
    for one in dict.fromkeys(sets):
        names = (one.name if n == 1 else f"{one.name} {n}" for n in count(1))
        found[next(name for name in names if name not in found)] = one
    return found


def check_prompts(prompts: PromptSet, k: int, method: str | Method) -> int:
    """Checks that need no model; returns ``k``."""
    if min(len(prompts.harmful), len(prompts.harmless)) < 2:
        raise InputError(
            f"prompt set {prompts.name!r} has {len(prompts.harmful)} harmful and {len(prompts.harmless)} harmless requests; "
            "a subspace needs at least two of each"
        )
    as_method(method)
    return whole("k", k, 1)
