"""Directions found by gradient: what they do when they are ablated and added is optimized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kvgeom.checks import MOST_DRAWS, as_seed, one_of, whole, whole_numbers
from kvgeom.errors import InputError
from kvgeom.evaluation.inputs import as_tokens
from kvgeom.geometry.activations import at_site, stack_positions, vectors
from kvgeom.geometry.cones import LOSSES, SOME, adding_layer, as_positive, as_weights, optimize_cone
from kvgeom.geometry.interventions import ablate_subspaces
from kvgeom.geometry.methods.mean import difference_of_means
from kvgeom.geometry.methods.registry import Bases, Floats, Method, register_method
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.models.reading import read


@dataclass(frozen=True)
class Cone(Method):
    """A refusal cone: directions of the residual stream optimized to remove refusal when ablated, and cause it when added.

    One basis serves all layers of the residual stream. In keys and values of a layer a direction is what they lose, in the mean
    of the harmful requests, when that direction is ablated in the residual stream.

    Attributes
    ----------
    steps, batch, samples, rate, weights, seed
        As in :func:`kvgeom.geometry.cones.optimize_cone`.
    start : {"mean", "random"}
        Whether the first direction starts from the difference of means at the layer after which directions are added
        (:func:`kvgeom.geometry.cones.adding_layer`), or all at random.
    tokens : tuple of int, optional
        First tokens of refusals; found by asking the model the harmful requests otherwise.

    References
    ----------
    Wollschlaeger et al., arXiv:2502.17420.
    """

    name = "cone"
    needs_model = True
    contrast = "mean"  # harmless requests are not refused, so that a contrast between them has no cone
    steps: int = 60
    batch: int = 4
    samples: int = 2
    rate: float = 0.25
    weights: tuple[float, float, float] = (1.0, 0.2, 1.0)
    start: Literal["mean", "random"] = "mean"
    tokens: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("start", self.start, ("mean", "random"))
        checked = {
            **{
                name: whole(name, getattr(self, name), low, MOST_DRAWS)
                for name, low in (("steps", 1), ("batch", 1), ("samples", 0))
            },
            "rate": as_positive("rate", self.rate),
            "weights": tuple(map(float, as_weights(self.weights))),
            "tokens": None if self.tokens is None else tuple(whole_numbers("tokens", self.tokens)),
            "seed": as_seed(self.seed),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def most(self, positions: int, pairs: int) -> int:
        return pairs

    def bases(self, source: Any, positions: Sequence[str], k: int) -> tuple[Bases, dict[str, Any]]:
        store = source.activations
        model, stores = store.model, store.model.geometry.stores
        harmful, harmless = store.encoded(source.prompts.harmful), store.encoded(source.prompts.harmless)
        tokens = self._tokens(model, harmful)
        # Where the answer begins from, if it may be looked at.
        at = store.positions.index(positions[-1])
        gaps = np.zeros((model.geometry.layers, model.geometry.d_model))
        for layer in stores:
            gaps[layer] = difference_of_means(source.features(layer, "resid")[:, at], source.is_harmful)
        layer = adding_layer(model, gaps, harmless, tokens)
        length = float(np.linalg.norm(gaps[layer]))
        first = np.random.default_rng(self.seed).standard_normal((model.geometry.d_model, k))
        if self.start == "mean":
            first[:, 0] = gaps[layer] / length * np.sqrt(len(first))
        found = optimize_cone(
            model, harmful, harmless, tokens, first, layer, length,
            steps=self.steps, batch=self.batch, samples=self.samples, rate=self.rate, weights=self.weights, seed=self.seed,
        )  # fmt: skip
        notes = {
            "layer": layer,
            "length": length,
            "tokens": sorted(tokens),
            "loss_before": found.before,
            "loss_after": found.after,
            "losses": {name: found.losses[:, column].tolist() for column, name in enumerate(LOSSES)},
        }
        bases: Bases = {
            (layer, "resid"): np.repeat(found.basis[None], len(store.positions), axis=0) for layer in stores
        }
        return {**bases, **_images(store, harmful[:SOME], found.basis)}, notes

    def _tokens(self, model: Model, harmful: Sequence[EncodedPrompt]) -> frozenset[int]:
        if self.tokens is not None:
            return as_tokens(model, self.tokens)
        from kvgeom.geometry.selection import opening_tokens  # which is built on subspaces

        found = opening_tokens(model, harmful)
        if not found:
            raise InputError(
                f"{model.name} refuses none of the {len(harmful)} harmful prompts, or so few that no first token predicts it, so "
                "that there is no refusal to optimize for; give prompts that it refuses, or Cone(tokens=...)"
            )
        return found


def _images(store: Any, prompts: Sequence[EncodedPrompt], basis: NDArray[np.float64]) -> Bases:
    """What keys and values lose when each direction is ablated, ``[positions, channels, k]`` by layer and site."""
    model = store.model
    sites: tuple[Literal["k", "v"], ...] = ("k", "v")
    found: dict[tuple[int, Literal["k", "v"]], Floats] = {}
    columns = torch.from_numpy(basis).float()
    for number, edit in enumerate([None, *(ablate_subspaces(column[None, :, None]) for column in columns.T)]):
        for prompt in prompts:
            for one in read(model, prompt, store.placement.where, edit_resid=edit):
                for site in sites:
                    x = stack_positions(vectors(one, site, at_site(one, site)), prompt, store.positions)
                    values = x.double().cpu().numpy() / len(prompts)
                    if (one.layer, site) not in found:
                        found[one.layer, site] = np.zeros((*values.shape, basis.shape[1]))
                    if number == 0:
                        found[one.layer, site] += values[..., None]
                    else:
                        found[one.layer, site][..., number - 1] -= values
    return dict(found.items())


register_method(Cone())
