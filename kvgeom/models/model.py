"""A language model as the rest of kvgeom sees it: geometry, prompts as tokens, forward, decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvgeom.models.cache import Edit, EditedCache


@dataclass(frozen=True)
class KVGeometry:
    """Shape of a model's KV cache, read from the model itself.

    Attributes
    ----------
    layers : int
        Number of decoder layers, each with one K and one V.
    query_heads, kv_heads : int
        Attention heads of the queries and of the cache.
    head_dim : int
        Channels of one head; K and V have ``kv_heads * head_dim`` channels each.
    d_model : int
        Width of the residual stream.
    key_bias : bool
        Whether keys are projected with a bias.
    rope : str
        Kind of rotary embedding (``"default"``, ``"llama3"``, ``"yarn"``, ...), ``"none"`` without one.
    sliding_window : int or None
        Window of the layers that attend locally, if any.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    d_model: int
    key_bias: bool
    rope: str
    sliding_window: int | None = None

    @property
    def channels(self) -> int:
        """Channels of K (or V) in one layer: ``kv_heads * head_dim``."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class EncodedPrompt:
    """One request inside the model's chat template.

    Attributes
    ----------
    text : str
        The request as the user wrote it.
    ids : tuple of int
        All prompt tokens, generation prompt included.
    instruction : slice
        The tokens of the request itself; everything after ``instruction.stop`` is template.
    """

    text: str
    ids: tuple[int, ...]
    instruction: slice

    def __len__(self) -> int:
        return len(self.ids)


class Model(Protocol):
    """What every backend offers; everything above ``models/`` uses only this.

    A prompt is always prefilled alone, without padding, so that no number depends on its
    neighbours: rounding turns a last-digit difference of a padded batch into a whole step.
    """

    name: str
    backend: str
    geometry: KVGeometry
    fingerprint: str
    max_context: int

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def attention_kernel(self) -> str: ...

    def encode(self, requests: Sequence[str]) -> list[EncodedPrompt]:
        """Put requests into the chat template and find their tokens."""
        ...

    def tokens(self, text: str) -> list[int]:
        """Tokens of plain text, without template or special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special tokens dropped."""
        ...

    def new_cache(self, edit: Edit | None = None) -> EditedCache:
        """An empty cache that passes all it stores through ``edit``."""
        ...

    def forward(
        self,
        ids: Sequence[int],
        cache: EditedCache | None = None,
        *,
        all_logits: bool = False,
        on_resid: Callable[[int, Tensor], None] | None = None,
        on_rotation: Callable[[int, Tensor, Tensor], None] | None = None,
        start: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """Run one unpadded sequence; see :meth:`kvgeom.models.hf.HFModel.forward`."""
        ...

    def generate(
        self,
        caches: Sequence[EditedCache],
        first_tokens: Sequence[int],
        max_new_tokens: int,
        *,
        batch_size: int = 32,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """Greedy continuation of prefilled prompts; see :meth:`kvgeom.models.hf.HFModel.generate`."""
        ...
