"""Seeing keys, values and residual stream of prompts as vectors of channels, keys freed of their position."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.models.rope import unrotate
from kvgeom.progress import track
from kvgeom.quant.placement import Placement

SITES = ("k", "v", "resid")
Site = Literal["k", "v", "resid"]
Seen = Callable[[int, Site, Tensor, Callable[[Tensor], Tensor]], None]

#: A recording may take this share of the disk space that is free.
DISK_SHARE = 0.25


class _Tap:
    """An edit that changes nothing and remembers what passes the projections."""

    where = "projection"
    prefill_reads_exact = False

    def __init__(self, seen: dict[str, Tensor]) -> None:
        self._seen = seen

    def __call__(self, layer: int, site: Literal["k", "v"], x: Tensor) -> Tensor:
        self._seen[f"{site}.{layer}"] = x
        return x

    @property
    def kind(self) -> int:
        return id(self)

    def rows(self, rows: Tensor) -> _Tap:
        return self

    @staticmethod
    def stack(parts: Sequence[Any]) -> _Tap:
        first: _Tap = parts[0]
        return first


def observe(model: Model, prompt: EncodedPrompt, placement: Placement) -> dict[str, Tensor]:
    """Run one prompt and keep what every layer holds. Costs one forward pass.

    Returns
    -------
    dict
        For each layer n ``"k.n"`` and ``"v.n"``, ``[1, heads, tokens, head_dim]``, as stored in the cache or as
        projected; ``"resid.n"``, ``[1, 1, tokens, d_model]``, the residual stream after the layer; and, where stored
        keys are rotated, ``"cos.n"`` and ``"sin.n"``, ``[tokens, rotary_dim]``.
    """
    seen: dict[str, Tensor] = {}
    at_projection = placement.where == "projection"

    def rotation(layer: int, cos: Tensor, sin: Tensor) -> None:
        seen[f"cos.{layer}"], seen[f"sin.{layer}"] = cos, sin

    cache = model.new_cache(_Tap(seen) if at_projection else None)
    model.forward(
        prompt.ids,
        cache,
        on_resid=lambda layer, x: seen.__setitem__(f"resid.{layer}", x[None]),
        on_rotation=None if at_projection else rotation,
    )
    if not at_projection:
        for layer, stored in enumerate(cache.layers):
            seen[f"k.{layer}"], seen[f"v.{layer}"] = stored.keys, stored.values
    return seen


def show(get: Callable[[str], Tensor], names: Sequence[str] | Mapping[str, Any], layers: int, see: Seen) -> None:
    """Hand on what :func:`observe` found, layer by layer.

    Parameters
    ----------
    get : callable (name) -> Tensor
    names : collection of str
        What there is.
    layers : int
    see : callable (layer, site, x, flat) -> None
        ``x`` is what rounding would be applied to, ``[1, heads, tokens, head_dim]`` (one head of ``d_model`` for
        the residual stream after the layer). ``flat(y)`` turns ``x``, or anything in its shape and frame such as
        a rounding error, into vectors ``[tokens, channels]``, and takes the rotary embedding out of stored keys:
        position turns a key without changing its content, and would blur the class means.
    """
    for layer in range(layers):
        flat = _vectors
        if f"cos.{layer}" in names:
            cos, sin = get(f"cos.{layer}"), get(f"sin.{layer}")
            flat = lambda y, c=cos, s=sin: _vectors(unrotate(y, c, s))  # type: ignore[misc]  # noqa: E731
        see(layer, "k", get(f"k.{layer}"), flat)
        see(layer, "v", get(f"v.{layer}"), _vectors)
        see(layer, "resid", get(f"resid.{layer}"), _vectors)


def _vectors(x: Tensor) -> Tensor:
    return rearrange(x[0], "h t d -> t (h d)").float()


class Tape:
    """Some prompts, run once: what :func:`observe` finds is kept on disk, and any number of measures read it again.

    The memory it takes does not grow with the number of prompts. Where the disk has no room (a recording may take a
    quarter of what is free in the folder of temporary files, which the variable ``TMPDIR`` moves), prompts are run
    again instead. The recording is deleted with the last object that uses it.

    Parameters
    ----------
    model : Model
    requests : sequence of str
    placement : Placement

    Attributes
    ----------
    prompts : tuple of EncodedPrompt
    positions : tuple of str
        Positions that all prompts share; see :func:`positions`.
    """

    def __init__(self, model: Model, requests: Sequence[str], placement: Placement) -> None:
        self.model = model
        self.placement = placement
        self.prompts = tuple(model.encode(requests))
        self.positions = tuple(positions(self.prompts))
        self._rows = {prompt.text: row for row, prompt in enumerate(self.prompts)}
        self._folder = Path(tempfile.mkdtemp(prefix="kvgeom-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._room = DISK_SHARE * shutil.disk_usage(self._folder).free
        self._features: dict[str, NDArray[np.float32]] | None = None

    def rows(self, requests: Sequence[str]) -> NDArray[np.int64]:
        """Numbers of some of the prompts."""
        return np.array([self._rows[request] for request in requests], dtype=np.int64)

    def play(self, row: int, see: Seen) -> None:
        """Show one prompt to ``see`` (see :func:`show`): one forward pass the first time, a file afterwards."""
        file, layers = self._folder / f"{row}.safetensors", self.model.geometry.layers
        if file.exists():
            with safe_open(file, "pt", device=str(self.model.device)) as recorded:
                show(recorded.get_tensor, recorded.keys(), layers, see)
            return
        seen = observe(self.model, self.prompts[row], self.placement)
        size = sum(x.numel() * x.element_size() for x in seen.values())
        if size <= self._room:
            self._room -= size
            # Copies: layers share their rotation, and a file of tensors that share memory is refused.
            copy = torch.contiguous_format
            save_file({name: x.clone(memory_format=copy) for name, x in seen.items()}, file)
        show(seen.__getitem__, seen, layers, see)

    def features(self, site: str, progress: bool = True) -> NDArray[np.float32]:
        """Mean vector of every prompt at every position, ``[layers, prompts, positions, channels]``, on disk."""
        if self._features is None:
            self._features = self._summarised(progress)
        return self._features[site]

    def _summarised(self, progress: bool) -> dict[str, NDArray[np.float32]]:
        shape = (self.model.geometry.layers, len(self.prompts), len(self.positions))
        found = {site: self._array(site, (*shape, site_width(self.model, site))) for site in SITES}
        for row, prompt in enumerate(track(self.prompts, "reading the geometry", len(self.prompts), progress)):

            def see(layer: int, site: str, x: Tensor, flat: Any, row: int = row, prompt: Any = prompt) -> None:
                found[site][layer, row] = stack_positions(flat(x), prompt, self.positions).cpu().numpy()

            self.play(row, see)
        return found

    def _array(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        size = 4 * int(np.prod(shape))
        if size > self._room:
            return np.empty(shape, dtype=np.float32)
        self._room -= size
        return np.memmap(self._folder / f"{name}.f32", dtype=np.float32, mode="w+", shape=shape)


def positions(prompts: Sequence[EncodedPrompt]) -> list[str]:
    """Names of the token positions that all prompts share: the instruction, and the template tokens after it.

    ``"template-1"`` is the last prompt token, ``"template-2"`` the one before, ...
    """
    after = min(len(prompt) - prompt.instruction.stop for prompt in prompts)
    return ["instruction", *(f"template-{back}" for back in range(after, 0, -1))]


def tokens_at(prompt: EncodedPrompt, position: str) -> slice:
    """The tokens of a prompt at a position named by :func:`positions`."""
    if position == "instruction":
        return prompt.instruction
    token = len(prompt) - int(position.removeprefix("template-"))
    return slice(token, token + 1)


def site_width(model: Model, site: str) -> int:
    """Channels of a site."""
    return model.geometry.d_model if site == "resid" else model.geometry.channels


def stack_positions(x: Tensor, prompt: EncodedPrompt, names: Sequence[str]) -> Tensor:
    """Mean vector at each position: ``[tokens, channels]`` to ``[positions, channels]``."""
    return torch.stack([x[tokens_at(prompt, name)].mean(0) for name in names])
