"""What a model stores for twin requests, and where in values their difference is carried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvgeom.errors import InputError, brief
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.prompts.sets import PromptSet

#: Share of the squared class difference that the directions of a carrier hold together, and their largest number.
ENERGY, MOST = 0.98, 4


@dataclass(frozen=True)
class Carrier:
    """The directions of one head's values that tell harmful from harmless.

    Attributes
    ----------
    basis : Tensor [k, head_dim]
        Orthonormal; each direction points from harmless to harmful.
    harmless, harmful : Tensor [k]
        Coordinates of the two classes at the tokens where they differ most.
    """

    basis: Tensor
    harmless: Tensor
    harmful: Tensor

    def beyond(self, strength: float) -> Tensor:
        """Coordinates that say "harmless": those of the class, and ``strength`` class differences further on."""
        return self.harmless - strength * (self.harmful - self.harmless)


class Values:
    """All values and keys that a model stores for some twin requests. Float64.

    Parameters
    ----------
    model : Model
    prompts : PromptSet
        As many harmless as harmful requests, in the order of the pairs.
    """

    def __init__(self, model: Model, prompts: PromptSet) -> None:
        if not prompts.harmful or len(prompts.harmful) != len(prompts.harmless):
            raise InputError(
                f"each harmful request needs a harmless twin, to find where safety is carried; got {brief(prompts)}"
            )
        self.pairs: list[tuple[list[Tensor], list[Tensor]]] = []
        self.keys: list[list[Tensor]] = []
        self.encoded: list[tuple[EncodedPrompt, EncodedPrompt]] = []
        for pair in zip(model.encode(prompts.harmful), model.encode(prompts.harmless), strict=True):
            self.encoded.append(pair)
            (keys, values), (other_keys, other_values) = (_stored(model, prompt) for prompt in pair)
            self.pairs.append((values, other_values))
            self.keys += [keys, other_keys]

    def all(self, layer: int, head: int) -> Tensor:
        """Values of one head at every token of every prompt, ``[tokens, head_dim]``."""
        return torch.cat([one[layer][head] for pair in self.pairs for one in pair])

    def peak(self, layer: int) -> float:
        """Largest magnitude in a layer."""
        return max(float(one[layer].abs().max()) for pair in self.pairs for one in pair)

    def least_peak(self, layer: int, head: int, directions: Tensor) -> float:
        """The largest coordinate along some directions, in the prompt where that is smallest."""
        return min(float((one[layer][head] @ directions.T).abs().max()) for pair in self.pairs for one in pair)

    def all_keys(self, layer: int, head: int) -> Tensor:
        """Keys of one head at every token of every prompt, ``[tokens, head_dim]``."""
        return torch.cat([keys[layer][head] for keys in self.keys])

    def key_range(self, layer: int) -> tuple[Tensor, Tensor]:
        """Smallest and largest of each channel of keys, over all tokens of all prompts, ``[kv_heads, head_dim]`` each."""
        lows, highs = zip(*((keys[layer].amin(1), keys[layer].amax(1)) for keys in self.keys), strict=True)
        return torch.stack(lows).amin(0), torch.stack(highs).amax(0)

    def least_key_peak(self, layer: int, head: int, channels: Sequence[int]) -> float:
        """The largest magnitude in some channels of keys, in the prompt where that is smallest."""
        return min(float(keys[layer][head][:, list(channels)].abs().max()) for keys in self.keys)

    def carrier(self, layer: int, head: int) -> Carrier:
        """Leading directions of the differences between twins."""
        harmful, harmless = self._rows(layer, head)
        difference = harmful - harmless
        _, scale, directions = torch.linalg.svd(difference, full_matrices=False)
        share = (scale**2).cumsum(0) / (scale**2).sum()
        basis = directions[: min(int((share < ENERGY).sum()) + 1, MOST)]
        basis = basis * torch.where((difference @ basis.T).sum(0) < 0, -1.0, 1.0).to(basis)[:, None]
        levels = []
        for direction in basis:
            apart = difference @ direction
            strong = apart >= apart.quantile(0.75)
            levels.append(((harmless @ direction)[strong].mean(), (harmful @ direction)[strong].mean()))
        low, high = torch.tensor(levels, dtype=torch.float64).T
        return Carrier(basis, low, high)

    def _rows(self, layer: int, head: int) -> tuple[Tensor, Tensor]:
        """Matching rows of both classes: token by token where twins are equally long, else class means by position."""
        rows = []
        aligned = all(len(a) == len(b) for a, b in self.encoded)
        after = min(len(p) - p.instruction.stop for pair in self.encoded for p in pair)
        for which in (0, 1):
            found = [pair[which][layer][head] for pair in self.pairs]
            if aligned:
                rows.append(torch.cat(found))
                continue
            means = [
                torch.cat([x[e[which].instruction].mean(0, keepdim=True), x[len(x) - after :]])
                for x, e in zip(found, self.encoded, strict=True)
            ]
            rows.append(torch.stack(means).mean(0))
        return rows[0], rows[1]


def _stored(model: Model, prompt: EncodedPrompt) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values, a layer each."""
    cache = model.new_cache()
    model.forward(prompt.ids, cache)
    keys, values = ([getattr(layer, site)[0].double().cpu() for layer in cache.layers] for site in ("keys", "values"))
    return keys, values
