"""A language model as the rest of kvgeom sees it: geometry, prompts as tokens, forward, decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvgeom.models.cache import Edit, EditedCache

    ResidHook = Callable[[int, Tensor], None]
    RotationHook = Callable[[int, Tensor, Tensor], None]
    QueryHook = Callable[[int, Tensor], None]
    ResidEdit = Callable[[int, Literal["pre", "attn", "post"], Tensor], Tensor]


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


@dataclass(frozen=True)
class AttentionRule:
    """How a layer turns queries and keys into attention scores.

    Attributes
    ----------
    scale : float
        Factor of the inner products.
    window : int or None
        A token attends to itself and the ``window - 1`` before it; None: to all before it.
    softcap : float or None
        Scores become ``softcap * tanh(score / softcap)`` before softmax.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Gradients:
    """A score of the next token, and its derivative with respect to keys and values.

    Attributes
    ----------
    score : float
    x, grad : dict of (layer, site) to Tensor [1, kv_heads, tokens, head_dim]
        The keys (``"k"``) and values (``"v"``) of every layer, and the derivative.
    """

    score: float
    x: dict[tuple[int, Literal["k", "v"]], Tensor]
    grad: dict[tuple[int, Literal["k", "v"]], Tensor]


class Model(Protocol):
    """What every backend offers; everything above ``models/`` uses only this.

    A prompt is always prefilled alone, without padding, so that no number depends on its
    neighbours: rounding turns a last-digit difference of a padded batch into a whole step.
    """

    name: str
    backend: str
    branches_late: bool  # whether a branch may join a pass above layer 0
    geometry: KVGeometry
    fingerprint: str  # of weights as they are held, and chat template
    identity: str  # of weights, in whatever floating-point type they are held
    vocabulary: int
    max_context: int
    stop_tokens: frozenset[int]

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def attention_kernel(self) -> str: ...

    def release(self) -> None:
        """Take the weights out of memory; nothing can be run any more."""
        ...

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

    def attention(self, layer: int) -> AttentionRule:
        """How a layer turns queries and keys into attention scores."""
        ...

    def key_biases(self) -> dict[tuple[int, Literal["k", "v"]], Tensor]:
        """Constant part of every layer's keys; see :meth:`kvgeom.models.hf.HFModel.key_biases`."""
        ...

    def forward(
        self,
        ids: Sequence[int],
        cache: EditedCache | None = None,
        *,
        all_logits: bool = False,
        on_resid: ResidHook | None = None,
        on_rotation: RotationHook | None = None,
        on_query: QueryHook | None = None,
        edit_resid: ResidEdit | None = None,
        start: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """Run one unpadded sequence; see :meth:`kvgeom.models.hf.HFModel.forward`."""
        ...

    def forward_variants(
        self,
        ids: Sequence[int],
        variants: int,
        *,
        edits: Sequence[Edit] | None = None,
        edit_resid: ResidEdit | None = None,
        on_resid: ResidHook | None = None,
        start: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """Run one prompt under several edits at once; see :meth:`kvgeom.models.hf.HFModel.forward_variants`."""
        ...

    def branching_cache(self, edits: Sequence[Edit]) -> EditedCache:
        """An empty cache for :meth:`forward_branches`."""
        ...

    def forward_branches(
        self,
        ids: Sequence[int],
        edits: Sequence[Edit],
        first: Sequence[int],
        *,
        cache: EditedCache | None = None,
        last: int = 1,
        on_resid: ResidHook | None = None,
    ) -> Tensor:
        """Run a prompt and edited branches of it at once; see :meth:`kvgeom.models.hf.HFModel.forward_branches`."""
        ...

    def gradients(
        self, ids: Sequence[int], score: Callable[[Tensor], Tensor], *, where: Literal["cache", "projection"] = "cache"
    ) -> Gradients:
        """Derivative of a score with respect to keys and values; see :meth:`kvgeom.models.hf.HFModel.gradients`."""
        ...

    def generate(
        self,
        caches: Sequence[EditedCache],
        first_tokens: Sequence[int],
        max_new_tokens: int,
        *,
        batch_size: int = 32,
        edit_resid: ResidEdit | None = None,
        stop: Callable[[int, list[int]], bool] | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """Greedy continuation of prefilled prompts; see :meth:`kvgeom.models.hf.HFModel.generate`."""
        ...
