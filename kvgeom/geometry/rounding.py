"""Rounding the activations of a prompt as a cache rounds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvgeom.engines.engine import CacheConfig
from kvgeom.engines.registry import resolve
from kvgeom.errors import InputError
from kvgeom.evaluation.condition import Condition, with_model_constants
from kvgeom.geometry.activations import Site
from kvgeom.models.model import Model
from kvgeom.models.reading import LayerActivations
from kvgeom.models.rotary import TokenRotation
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme

#: What a user writes for a quantized cache; see :func:`kvgeom.engines.registry.resolve`.
CacheSpec = CacheConfig | Recipe | Scheme | str
#: That of the layer scan in arXiv:2606.09864.
DEFAULT_SCHEME = Scheme(3, symmetric=True, granularity="tensor")


@dataclass(frozen=True)
class Rounding:
    """A recipe with all its constants, under a placement. Made by :meth:`of`.

    Attributes
    ----------
    name : str
        Name of the preset, or the scheme or recipe as a string.
    stored : str
        What keys and values are stored as.
    recipe : Recipe
    placement : Placement

    Notes
    -----
    Scales that tokens share are computed over the tokens that the cache shares them over. Sinks stay exact. A residual
    window is left out: every other token is rounded, as it is once it has left the window.

    The residual stream is not stored in a cache. It is rounded as if it were, with the scheme of the layer's keys, all
    channels and no transform.
    """

    name: str
    stored: str
    recipe: Recipe
    placement: Placement

    @classmethod
    def of(cls, model: Model, spec: CacheSpec, placement: Placement | str | None = None) -> Rounding:
        """Resolve a spec for a model and measure the constants that it needs.

        Parameters
        ----------
        model : Model
        spec : CacheConfig, Recipe, Scheme or str
            Constants that a transform needs and the recipe does not bring are measured: offsets of keys are key biases
            where the model has them; all others come from a pass over the calibration prompts.
        placement : Placement or str, optional
            Instead of the preset's, or of the decode-faithful default.

        Raises
        ------
        InputError
            If the spec cannot be resolved, or is a recipe for another number of layers.
        """
        return cls.each(model, [spec], placement)[0]

    @classmethod
    def each(cls, model: Model, specs: Iterable[CacheSpec], placement: Placement | str | None = None) -> list[Rounding]:
        """The same for several specs; constants that some of them share are measured once."""
        configs = {str(n): resolve(spec, placement=placement) for n, spec in enumerate(specs)}
        layers = model.geometry.layers
        bare = {
            n: Condition(model.geometry.stored(config.recipe(layers), model.name), config.placement)
            for n, config in configs.items()
        }
        whole = with_model_constants(model, bare)
        return [cls(one.name, one.stored, whole[n].recipe, one.placement) for n, one in configs.items()]

    @classmethod
    def at(cls, model: Model, spec: CacheSpec, placement: Placement) -> Rounding:
        """The same for keys and values that were read at a placement: engine presets keep theirs, all else takes it.

        Raises
        ------
        InputError
            As :meth:`of`, or if a preset rounds elsewhere.
        """
        own = resolve(spec)
        keeps = isinstance(spec, CacheConfig) or own.version != ""
        if keeps and own.placement.where != placement.where:
            raise InputError(
                f"{own.name!r} rounds at the {own.placement.where}, but the activations were read at the "
                f"{placement.where}; read them with placement={'cache' if placement.where == 'projection' else 'paper'!r}"
            )
        return cls.of(model, spec, None if keeps else placement)

    @classmethod
    def in_cache(cls, model: Model, spec: CacheSpec, placement: Placement | str | None = None) -> Rounding:
        """The same for what attention reads.

        Raises
        ------
        InputError
            As :meth:`of`, or for a placement at the projection.
        """
        found = cls.of(model, spec, placement)
        if found.placement.where != "cache":
            raise InputError(
                f"attention reads keys as the cache stores them, got a placement at the {found.placement.where}; use "
                "placement='cache'"
            )
        return found

    @property
    def made(self) -> dict[str, str]:
        """What results say of it."""
        return {"scheme": self.stored, "recipe": str(self.recipe), "placement": str(self.placement)}

    def errors(self, found: LayerActivations) -> tuple[Tensor, Tensor]:
        """What rounding adds to the keys and values of a layer, ``[kv_heads, tokens, head_dim]``, float32."""
        k, v = self(found.layer, "k", found.k, found.rotation), self(found.layer, "v", found.v)
        return k[0].float() - found.k[0].float(), v[0].float() - found.v[0].float()

    @property
    def needs_rotation(self) -> bool:
        """Whether keys can only be rounded together with their rotary embedding."""
        return Quantizer(self.recipe, self.placement).needs_rotation

    def scheme(self, layer: int, site: Site) -> Scheme | None:
        """The scheme of a site of a layer; None where it stays exact."""
        if site != "resid":
            return self.recipe.scheme(layer, site)
        keys = self.recipe.scheme(layer, "k")
        return None if keys is None else keys.plain

    def __call__(self, layer: int, site: Site, x: Tensor, rotation: TokenRotation | None = None) -> Tensor:
        """What the cache returns of one prompt's keys, values or residual stream.

        Parameters
        ----------
        layer : int
        site : {"k", "v", "resid"}
        x : Tensor [1, heads, tokens, head_dim]
        rotation : TokenRotation, optional
            Rotary embedding that is in ``x``.
        """
        scheme = self.scheme(layer, site)
        if scheme is None:
            return x
        recipe = self.recipe
        if site == "resid":
            site, recipe = "k", replace(Recipe.uniform(len(recipe), scheme), random_directions=recipe.random_directions)
        quantizer = Quantizer(recipe, self.placement)
        parts = []
        for tokens in _shared(self.placement, scheme, x.shape[2]):
            if rotation is not None and quantizer.needs_rotation:
                quantizer.set_rotation(layer, rotation.tokens(tokens).of_vectors)
            parts.append(quantizer(layer, site, x[:, :, tokens]))
        return torch.cat([x[:, :, : x.shape[2] - sum(part.shape[2] for part in parts)], *parts], dim=2)


def _shared(placement: Placement, scheme: Scheme, tokens: int) -> Sequence[slice]:
    """Tokens of a prompt that are rounded in one call, after the sinks; those that would wait come last."""
    parts, settled = [], -1
    for held in (tokens - 1, tokens) if placement.prefill_reads == "last" else (tokens,):
        start, stop = placement.next_span(settled, held, scheme.spans_tokens)
        parts.append(slice(max(start, settled), stop))
        settled = stop
    parts.append(slice(settled, tokens))
    return [part for part in parts if part.start < part.stop]
