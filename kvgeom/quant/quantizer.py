"""Quantization of keys and values on their way into a cache: a Recipe and a Placement at work."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvgeom.errors import InputError
from kvgeom.quant.fake_quantize import (
    Encoded,
    Scales,
    decode,
    encode,
    in_random_directions,
    last_scales,
    only_channels,
    own_channels,
    working,
)
from kvgeom.quant.formats.base import get_format
from kvgeom.quant.packing import Packed
from kvgeom.quant.placement import Placement
from kvgeom.quant.recipe import Recipe, Site
from kvgeom.quant.scheme import Scheme
from kvgeom.quant.transforms import Frame, Key, Rotation, frame


class Quantizer:
    """Quantizes keys and values on their way into a cache; the edit of a :class:`~kvgeom.models.cache.EditedCache`.

    It remembers the scales that a prompt has set, so it belongs to one cache: make a new one for each.

    Parameters
    ----------
    recipe : Recipe
    placement : Placement
    prompt_tokens : int, optional
        How many tokens, from the first call on, are the prompt; all of the first call by default. Only they set
        scales that tokens share. With it, one teacher-forced pass over prompt and response rounds as the
        step-by-step cache does.

    Raises
    ------
    InputError
        If ``prompt_tokens`` is given with a placement that has a residual window.
    """

    def __init__(self, recipe: Recipe, placement: Placement | None = None, prompt_tokens: int | None = None) -> None:
        self.recipe = recipe
        self.placement = placement or Placement()
        self.prompt_tokens = prompt_tokens
        self._scales: dict[Key, Scales] = {}
        self._seen: dict[Key, int] = {}
        self._rotations: dict[int, Rotation] = {}
        self._stored: dict[Key, int] = {}
        self._quantized: dict[Key, int] = {}
        self._offsets: dict[Key, Tensor] = {}
        if prompt_tokens is not None and self.has_residual:
            raise InputError(
                f"prompt_tokens={prompt_tokens} does not go with '{self.placement}', which reads tokens exactly before it rounds "
                "them; leave it out and feed the response token by token"
            )

    @property
    def where(self) -> str:
        """``"cache"`` or ``"projection"``."""
        return self.placement.where

    @property
    def prefill_reads_exact(self) -> bool:
        """Whether the prompt's own attention reads unrounded values."""
        return self.placement.prefill_reads != "rounded"

    @property
    def decodes_last_prompt_token(self) -> bool:
        """Whether the last prompt token is run on its own, as the first step of decoding, after the prompt is quantized."""
        return self.placement.prefill_reads == "last"

    @property
    def windowed(self) -> bool:
        """Whether some tokens are kept in full precision, so that :meth:`flush` says what is stored."""
        return self.placement.windowed

    @property
    def has_residual(self) -> bool:
        """Whether new tokens wait in a residual window, where they are read exactly."""
        return self.placement.residual > 0

    @property
    def needs_rotation(self) -> bool:
        """Whether :meth:`set_rotation` must be called in every layer before its keys come."""
        offsets = self.recipe.offsets
        return self.where == "cache" and offsets is not None and offsets.rotary

    def set_rotation(self, layer: int, rotation: Rotation) -> None:
        """Set how rotary embedding turns a vector ``[kv_heads, head_dim]`` at the positions of the next tokens."""
        self._rotations[layer] = rotation

    @property
    def kind(self) -> Hashable:
        """Recipe and placement: what is done to a sequence, whatever the scales that its prompt has set."""
        return id(self) if self.windowed else (self.recipe, self.placement)

    def __call__(self, layer: int, site: Site, x: Tensor) -> Tensor:
        """What the cache holds of ``x``, ``[batch, kv_heads, new tokens, head_dim]``, in ``layer``."""
        scheme = self.recipe.scheme(layer, site)
        return x if scheme is None else self._fake_quantized((layer, site), x, scheme, None)

    def pack(self, layer: int, site: Site, x: Tensor, start: int | None = None) -> list[Packed]:
        """Codes and scales of ``x``, which decode to what :meth:`__call__` (or :meth:`flush`) returns of it.

        Parameters
        ----------
        layer, site, x
            As in :meth:`__call__`.
        start : int, optional
            The first of the tokens, where :meth:`advance` has named them.

        Raises
        ------
        InputError
            If only some channels are rounded, or errors are moved to random directions: there are no codes of that.
        """
        scheme = self.recipe.scheme(layer, site)
        if self.recipe.random_directions is not None:
            raise InputError(
                f"a recipe with random_directions={self.recipe.random_directions} is a control and has no codes; pack the "
                "recipe itself"
            )
        if scheme is None or scheme.channels is not None:
            raise InputError(
                f"layer {layer}, {site} has scheme {scheme} and no codes; give one that quantizes all channels"
            )
        found, parts = self._encode((layer, site), scheme, x, start)
        return [Packed.of(encoded, scheme, found, y, x.dtype) for y, encoded in parts]

    def packs(self, layer: int, site: Site) -> bool:
        """Whether a site is quantized at all."""
        return self.recipe.scheme(layer, site) is not None

    # --- the residual window and sink tokens ---

    def flush(self, layer: int, site: Site, stored: Tensor, new: int) -> Tensor:
        """What the cache holds of ``stored``, one sequence's tokens so far, of which the last ``new`` have just come."""
        start, stop = self.advance(layer, site, new)
        scheme = self.recipe.scheme(layer, site)
        if start == stop or scheme is None:
            return stored
        before = stored.shape[2] - self._stored[layer, site]  # padding, or tokens that another edit has quantized
        head, span, tail = stored.tensor_split((before + start, before + stop), dim=2)
        return torch.cat([head, self._fake_quantized((layer, site), span, scheme, start), tail], dim=2)

    def advance(self, layer: int, site: Site, new: int) -> tuple[int, int]:
        """Count ``new`` tokens, and return which tokens ``start:stop`` are quantized now."""
        key, scheme = (layer, site), self.recipe.scheme(layer, site)
        stored = self._stored[key] = self._stored.get(key, 0) + new
        if scheme is None:
            return stored, stored
        if scheme.constants == "offsets":
            offset = self._offset(key, new)
            self._offsets[key] = torch.cat([self._offsets[key], offset], dim=2) if key in self._offsets else offset
        start, stop = self.placement.next_span(self._quantized.get(key, -1), stored, scheme.spans_tokens)
        self._quantized[key] = stop
        return start, stop

    # --- the arithmetic ---

    def _encode(
        self, key: Key, scheme: Scheme, x: Tensor, start: int | None
    ) -> tuple[Frame, list[tuple[Tensor, Encoded]]]:
        """Codes of ``x`` in the coordinates of the transform, in as many parts as have their own scales."""
        constant, needed = None, scheme.constants
        if needed == "offsets":
            tokens = x.shape[2]
            constant = self._offset(key, tokens) if start is None else self._offsets[key][:, :, start : start + tokens]
        elif needed == "factors":
            constant = self._factors(key)
        found = frame(scheme.transform, constant, x)
        y = own_channels(found.enter(working(x)), scheme)
        if self.has_residual or not (
            scheme.spans_tokens or get_format(scheme.format).couples_tokens
        ):  # what is quantized together shares scales
            return found, [(y, encode(y, scheme))]
        return found, self._encode_by_prompt(key, scheme, y, start or 0)

    def _encode_by_prompt(self, key: Key, scheme: Scheme, y: Tensor, start: int) -> list[tuple[Tensor, Encoded]]:
        """The prompt sets scales; later tokens use them, or (``scales="call"``, or none to use) come one by one."""
        seen = self._seen.get(key, 0)
        self._seen[key] = seen + y.shape[2]
        prompt = y.shape[2]
        if self.prompt_tokens is not None:
            # If the prompt is all sinks, the first token after them sets the scales.
            prompt = max(self.prompt_tokens - max(start, seen), 0 if seen else 1)
        remembers = self.placement.scales == "prompt" and not get_format(scheme.format).couples_tokens
        if not remembers:
            cuts = [y[:, :, :prompt], *torch.split(y[:, :, prompt:], 1, dim=2)]
            return [(part, encode(part, self._scheme_of(part, scheme))) for part in cuts if part.shape[2]]
        parts = []
        if key not in self._scales:
            parts.append((y[:, :, :prompt], encode(y[:, :, :prompt], scheme)))
            self._scales[key] = last_scales(parts[0][1].scales, scheme)
            y = y[:, :, prompt:]
        if y.shape[2]:
            parts.append((y, encode(y, scheme, self._scales[key])))
        return parts

    def _scheme_of(self, part: Tensor, scheme: Scheme) -> Scheme:
        """The scheme of tokens that come together, which is another for a single one where the placement says so."""
        lone = self.placement.alone == "token" and part.shape[2] == 1
        return replace(scheme, granularity="token", group_size=None) if lone else scheme

    def _fake_quantized(self, key: Key, x: Tensor, scheme: Scheme, start: int | None) -> Tensor:
        found, parts = self._encode(key, scheme, x, start)
        values = [decode(encoded, scheme, y) for y, encoded in parts]
        rounded = found.leave(values[0] if len(values) == 1 else torch.cat(values, dim=2))
        rounded = only_channels(x, rounded.to(x.dtype), scheme)
        seed = self.recipe.random_directions
        return rounded if seed is None else x + in_random_directions(rounded - x, seed, *key)

    def _factors(self, key: Key) -> Tensor | None:
        """Factors of a layer and site, ``[kv_heads, 1, head_dim]``; None where there are Statics, but none for it."""
        statics = self.recipe.factors
        if statics is None:
            raise InputError(
                f"{self.recipe.scheme(*key)} needs a recipe with factors; use recipe.with_statics(factors=...)"
            )
        vector = statics.vectors.get(key)
        return None if vector is None else vector[:, None]

    def _offset(self, key: Key, tokens: int) -> Tensor:
        """Offsets of the tokens that come now, ``[batch or 1, kv_heads, tokens, head_dim]``."""
        statics = self.recipe.offsets
        if statics is None:
            raise InputError(
                f"{self.recipe.scheme(*key)} needs a recipe with offsets; use recipe.with_statics(offsets=...)"
            )
        vector = statics.vectors.get(key)
        if vector is None:
            return torch.zeros(1, 1, tokens, 1)
        if key[1] == "v" or not self.needs_rotation:
            return vector[None, :, None].expand(1, -1, tokens, -1)
        if key[0] not in self._rotations:
            raise InputError(
                f"{self.recipe.scheme(*key)} needs the rotary embedding of the keys that layer {key[0]} stores; call "
                "set_rotation(layer, rotation) first, as the models' own passes do"
            )
        return self._rotations[key[0]](vector)

    # --- batches ---

    def rows(self, rows: Tensor) -> Quantizer:
        """The quantizer of some sequences of the batch."""
        return self._with({key: scales.rows(rows) for key, scales in self._scales.items()})

    @staticmethod
    def stack(parts: Sequence[Quantizer]) -> Quantizer:
        """One quantizer for the sequences of several, which must follow the same recipe.

        Not with a residual window or sinks, which each sequence has for itself: put those side by side.
        """
        first = parts[0]
        return first._with({key: Scales.stack([part._scales[key] for part in parts]) for key in first._scales})

    def _with(self, scales: dict[Key, Scales]) -> Quantizer:
        new = Quantizer(self.recipe, self.placement, None if self.has_residual else 0)
        new._scales, new._seen = scales, dict(self._seen)
        new._stored, new._quantized, new._offsets = dict(self._stored), dict(self._quantized), dict(self._offsets)
        return new
