"""Activations of prompts: keys, values and residual stream as vectors of channels, keys without rotary embedding."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Literal

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from kvgeom.errors import InputError
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.models.reading import LayerActivations, Prefix, read, read_prefix
from kvgeom.models.rotary import TokenRotation
from kvgeom.paths import not_written
from kvgeom.progress import track
from kvgeom.quant.placement import Placement

Site = Literal["k", "v", "resid"]
SITES: tuple[Site, ...] = ("k", "v", "resid")

#: A store may take this share of the disk space that is free.
DISK_SHARE = 0.25
#: Two keys of one vector at two positions, stored and turned back, are at most so many roundings apart (1.2 each).
ROUNDINGS = 2.5


def at_site(layer: LayerActivations, site: Site) -> Tensor:
    """What rounding is applied to: ``[1, heads, tokens, head_dim]``; the residual stream has one head of ``d_model``."""
    x: Tensor = getattr(layer, site)
    return x


def vectors(layer: LayerActivations, site: Site, x: Tensor) -> Tensor:
    """Vectors ``[tokens, channels]`` of ``x``, which is what :func:`at_site` returns or has its shape and frame.

    The rotary embedding is taken out of keys: a token's position rotates a key without changing its content, and would
    blur the class means.
    """
    return rearrange((layer.unrotated(x) if site == "k" else x)[0], "h t d -> t (h d)").float()


class ActivationStore:
    """Activations of some prompts: the model is run once, and any number of measures read them from disk.

    Memory does not grow with the number of prompts. The store takes at most a quarter of the space that is free in the
    folder of temporary files (the variable ``TMPDIR`` moves it); prompts that find no room are run again when they are
    read. The files have no names: they are gone with the last object that uses the store, or with the process, however it
    ends.

    Parameters
    ----------
    model : Model
    requests : sequence of str
    placement : Placement

    Raises
    ------
    InputError
        If there is no folder for temporary files that can be written.
    ModelError
        If keys and values of the model differ in shape, or are no keys and values (``KVGeometry.check_alike``).

    Attributes
    ----------
    prompts : tuple of EncodedPrompt
    positions : tuple of str
        Positions that all prompts share; see :func:`positions`.
    """

    def __init__(self, model: Model, requests: Sequence[str], placement: Placement) -> None:
        model.geometry.check_alike(model.name)
        self.model = model
        self.placement = placement
        self.prompts = tuple(model.encode(requests))
        self.positions = tuple(positions(self.prompts))
        self._indices = {prompt.text: index for index, prompt in enumerate(self.prompts)}
        try:
            self._file: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # as long as the store
            self._room = DISK_SHARE * shutil.disk_usage(tempfile.gettempdir()).free
        except OSError as error:
            raise not_written("a temporary file", error, "set TMPDIR to another folder") from error
        #: Of each prompt, the layers, where they begin in the file, and how long they are.
        self._kept: dict[int, list[tuple[int, int, int]]] = {}
        self._features: dict[Site, NDArray[np.float32]] | None = None
        self._planes: dict[int, Tensor] = {}
        self._prefix: Prefix | None = None

    def indices(self, requests: Sequence[str]) -> NDArray[np.int64]:
        """Where some requests are in :attr:`prompts`.

        Raises
        ------
        InputError
            For a request that is not there.
        """
        missing = next((request for request in requests if request not in self._indices), None)
        if missing is not None:
            raise InputError(f"no activations of the request {missing[:40]!r}; choose from the requests that were run")
        return np.array([self._indices[request] for request in requests], dtype=np.int64)

    def encoded(self, requests: Sequence[str]) -> tuple[EncodedPrompt, ...]:
        """Some of the prompts, by their requests."""
        return tuple(self.prompts[index] for index in self.indices(requests))

    def layers(self, index: int) -> Iterator[LayerActivations]:
        """Activations of one prompt, in every layer that stores keys and values: from a forward pass the first time, from a file afterwards."""
        if index in self._kept:
            for layer, begin, size in self._kept[index]:
                self._file.seek(begin)
                stored = load(self._file.read(size))
                k, v, resid, *rotation = (stored[name].to(self.model.device) for name in _PARTS if name in stored)
                yield LayerActivations(layer, k, v, TokenRotation(*rotation) if rotation else None, resid)
            return
        if self._prefix is None and len(self.prompts) > 1:
            self._prefix = read_prefix(self.model, self.prompts, self.placement.where)
        found = list(read(self.model, self.prompts[index], self.placement.where, resid=True, after=self._prefix))
        tensors = {
            one.layer: {
                name: x
                for name, x in zip(_PARTS, (one.k, one.v, one.resid, *_parts(one.rotation)), strict=False)
                if x is not None
            }
            for one in found
        }
        size = sum(x.numel() * x.element_size() for one in tensors.values() for x in one.values())
        if size <= self._room:
            self._room -= size
            self._keep(index, tensors)
        yield from found

    def _keep(self, index: int, tensors: Mapping[int, dict[str, Tensor]]) -> None:
        begin, kept = self._file.seek(0, os.SEEK_END), []
        for layer, one in tensors.items():
            # Copies: tensors that share memory are refused.
            content = save({name: x.clone(memory_format=torch.contiguous_format) for name, x in one.items()})
            try:
                written = self._file.write(content)
            except OSError:
                written = 0
            if written < len(content):  # the disk has less room than it said; what is not kept is computed again
                self._file.truncate(begin)
                self._room = 0
                return
            kept.append((layer, self._file.tell() - len(content), len(content)))
        self._kept[index] = kept

    def features(self, site: Site) -> NDArray[np.float32]:
        """Mean vector of every prompt at every position, ``[layers, prompts, positions, channels]``, on disk.

        Of the layers that store keys and values, in their order.
        """
        if self._features is None:
            self._features = self._mean_vectors()
        return self._features[site]

    def resolution(self, layer: int, site: Site, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """Differences of means that may be no more than rounding of the model's number format.

        A rounding is relative to the number, and to both numbers of a pair that a rotary embedding has turned.

        Parameters
        ----------
        layer, site
        features : array [prompts, positions, channels]
            Some of :meth:`features` of the layer.

        Returns
        -------
        array [positions, channels]
        """
        squares = (features.astype(np.float64) ** 2).mean(0)
        if site == "k" and len(planes := self._planes.get(layer, torch.empty(0, 2))):
            heads = squares.reshape(len(squares), -1, self.model.geometry.head_dim)
            heads[..., planes.cpu().numpy()] = heads[..., planes.cpu().numpy()].sum(-1, keepdims=True)
        found: NDArray[np.float64] = ROUNDINGS * torch.finfo(self.model.dtype).eps * np.sqrt(squares)
        return found

    def _mean_vectors(self) -> dict[Site, NDArray[np.float32]]:
        shape = (len(self.model.geometry.stores), len(self.prompts), len(self.positions))
        found = {site: self._array((*shape, site_width(self.model, site))) for site in SITES}
        for index, prompt in enumerate(track(self.prompts, "reading the geometry", len(self.prompts))):
            for row, activations in enumerate(self.layers(index)):
                if activations.rotation is not None:
                    self._planes[activations.layer] = activations.rotation.planes
                for site, means in found.items():
                    x = vectors(activations, site, at_site(activations, site))
                    means[row, index] = stack_positions(x, prompt, self.positions).cpu().numpy()
        return found

    def _array(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        size = 4 * int(np.prod(shape))
        if size > self._room:
            return np.empty(shape, dtype=np.float32)
        self._room -= size
        try:
            with tempfile.TemporaryFile() as file:
                if hasattr(os, "posix_fallocate"):  # or a disk that fills up ends the process as the array is written
                    os.posix_fallocate(file.fileno(), 0, size)
                return np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
        except OSError:
            return np.empty(shape, dtype=np.float32)


#: Names of the tensors of a layer.
_PARTS = ("k", "v", "resid", "cos", "sin", "planes")


def _parts(rotation: TokenRotation | None) -> tuple[Tensor, ...]:
    return () if rotation is None else (rotation.cos, rotation.sin, rotation.planes)


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


def site_width(model: Model, site: Site) -> int:
    """Channels of a site."""
    return model.geometry.d_model if site == "resid" else model.geometry.channels


def stack_positions(x: Tensor, prompt: EncodedPrompt, names: Sequence[str]) -> Tensor:
    """Mean vector at each position: ``[tokens, channels]`` to ``[positions, channels]``."""
    return torch.stack([x[tokens_at(prompt, name)].mean(0) for name in names])
