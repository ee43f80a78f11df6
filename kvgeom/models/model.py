"""A language model as the rest of kvgeom sees it: geometry, prompts as tokens, forward, decode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from kvgeom.models.shapes import KVGeometry as KVGeometry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvgeom.models.cache import Edit, EditedCache
    from kvgeom.models.decoding import Choose
    from kvgeom.models.gradients import Gradients
    from kvgeom.models.rotary import TokenRotation

    ResidHook = Callable[[int, Tensor], None]
    RotationHook = Callable[[int, TokenRotation], None]
    QueryHook = Callable[[int, Tensor], None]
    ResidEdit = Callable[[int, Literal["pre", "attn", "post"], Tensor], Tensor]


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
    sinks : tuple of float or None
        A score of each query head that takes part in softmax, and that no token gets.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: tuple[float, ...] | None = None


class Model(Protocol):
    """What every backend offers; everything above ``models/`` uses only this.

    :func:`kvgeom.load` takes any object with these members. A prompt is always prefilled alone, without padding, so that
    no number depends on its neighbours: rounding turns a last-digit difference of a padded batch into a whole step.

    Attributes
    ----------
    name : str
        What results and reports call the model.
    backend : str
        What runs it; for backends of kvgeom a name in :func:`kvgeom.models.backends.backends`.
    branches_late : bool
        Whether a branch may join a pass above layer 0 (:meth:`forward_branches`).
    geometry : KVGeometry
    fingerprint : str
        Hash of all that can change an answer: the weights in their present dtype, configuration, tokenizer, stop tokens, chat
        template and its options.
    identity : str
        Hash of weights and configuration, the same in all floating-point types; where there is a point, what follows it is one of
        tokenizer and stop tokens.
    weights : str
        How the weights are stored, for people: ``"float32"``, ``"AWQ 4-bit"``, ``"Q4_K_M (GGUF), dequantized to float32"``.
    vocabulary : int
        Number of logits.
    max_context : int
        Tokens that the model can read.
    stop_tokens : frozenset of int
        Tokens that end a response.
    device, dtype
        Of the weights as the model computes with them.
    attention_kernel : str
        Which attention implementation runs. Kernels differ in the last digits, which rounding amplifies.

    Notes
    -----
    There may also be ``generate_padded`` (:class:`kvgeom.models.padded.Padding`); ``written(ids) -> str``, which is :meth:`decode`
    with all special tokens; ``prompt_end``, what the chat template puts after a request; ``template_options``, what it is told;
    ``reasoning_switch``, the option that switches reasoning off, or None; and ``notes``, what of its files changes answers.
    """

    name: str
    backend: str
    geometry: KVGeometry
    fingerprint: str
    identity: str
    weights: str
    vocabulary: int
    max_context: int
    stop_tokens: frozenset[int]

    @property
    def branches_late(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def attention_kernel(self) -> str: ...

    def release(self) -> None:
        """Take the weights out of memory. Shapes, tokens and text stay; nothing can be run any more."""
        ...

    def encode(self, requests: Sequence[str]) -> list[EncodedPrompt]:
        """Put each request into the chat template and find its tokens.

        Raises
        ------
        InputError
            If a request is empty or, with the template, does not fit the model's context.
        """
        ...

    def tokens(self, text: str) -> list[int]:
        """Tokens of plain text, without template or special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special tokens dropped; a NUL becomes U+FFFD."""
        ...

    def new_cache(self, edit: Edit | None = None) -> EditedCache:
        """An empty cache that passes all it stores through ``edit``."""
        ...

    def attention(self, layer: int) -> AttentionRule:
        """How a layer turns queries and keys into attention.

        Raises
        ------
        ModelError
            If attention that is rebuilt so is not the model's own.
        """
        ...

    def key_biases(self) -> dict[tuple[int, Literal["k", "v"]], Tensor]:
        """Bias of every layer's key projection, ``[kv_heads, head_dim]`` by ``(layer, "k")``; empty without one.

        It is a constant part of all keys (before their rotary embedding), unless they are normalized after.
        """
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
        """Run one sequence, without padding, appending to ``cache``.

        Parameters
        ----------
        ids : sequence of int
            The new tokens.
        cache : EditedCache, optional
            What came before, and the edit that applies; an empty, unedited one by default. With an edit that has
            ``decodes_last_prompt_token``, the last token of a prompt is run on its own, as some engines do; a pass with
            hooks or all logits stays one pass.
        all_logits : bool
            Logits of every new token instead of the last alone.
        on_resid : callable (layer, Tensor[1, new tokens, d_model]) -> None, optional
            Called with the residual stream after each layer (``resid_post``).
        on_rotation : callable (layer, TokenRotation) -> None, optional
            Called before each layer's attention with the rotary embedding of the new tokens, which turns nothing in a
            layer without one.
        on_query : callable (layer, Tensor[1, query_heads, new tokens, head_dim]) -> None, optional
            Called with each layer's queries before their rotary embedding (after their norm, where there is one).
        edit_resid : callable (layer, point, Tensor[1, new tokens, d_model]) -> Tensor, optional
            Returns what to have instead of the residual stream that enters layer 0 (``point`` ``"pre"``), of what
            each layer's attention writes into it (``"attn"``), and of the residual stream after each layer
            (``"post"``).
        start : (layer, Tensor[1, new tokens, d_model]), optional
            Suffix reuse: begin at ``layer`` with this residual stream. The layers below do not run, and
            their part of ``cache`` stays as it is.

        Returns
        -------
        Tensor [new tokens or 1, vocabulary], float32

        Raises
        ------
        ModelError
            With ``on_rotation``, or an edit that needs rotations, if those of a layer are not known.
        """
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
        """Run one prompt several times at once, as a batch: under several cache edits, or residual edits by row.

        Parameters
        ----------
        ids : sequence of int
        variants : int
            Rows of the batch.
        edits : sequence of Edit, optional
            One for each row, all with the same ``where``.
        edit_resid, on_resid
            As in :meth:`forward`, with tensors of ``variants`` rows.
        start : (layer, Tensor[1, tokens, d_model]), optional
            As in :meth:`forward`; the same for all rows.

        Returns
        -------
        Tensor [variants, vocabulary], float32
            Logits of the last token.
        """
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
        """Run one sequence as it is, and branches of it that part from it at some layer, in a single pass.

        Row 0 is unedited. A branch is not run before its ``first`` layer, below which it could be nothing else: there
        it joins the batch as a copy of row 0. All edits of single layers together cost half a pass each.

        Parameters
        ----------
        ids : sequence of int
            The new tokens.
        edits : sequence of Edit
            One for each branch, in ascending order of ``first``.
        first : sequence of int
            The first layer that each edit touches.
        cache : EditedCache, optional
            The one of an earlier call with the same branches, to go on from.
        last : int
            Logits of this many last tokens.
        on_resid : callable (layer, Tensor[1 + branches so far, new tokens, d_model]) -> None, optional

        Returns
        -------
        Tensor [1 + branches, last, vocabulary], float32
        """
        ...

    def gradients(
        self,
        ids: Sequence[int],
        score: Callable[[Tensor], Tensor],
        *,
        where: Literal["cache", "projection"] = "cache",
        added: Mapping[tuple[int, Literal["k", "v"]], Tensor] | None = None,
        heads: bool = False,
        directions: Tensor | None = None,
    ) -> Gradients:
        """Derivative of a score of the next token with respect to every layer's keys and values.

        Costs one forward and one backward pass; weights get no gradient.

        Parameters
        ----------
        ids : sequence of int
        score : callable (Tensor[vocabulary]) -> Tensor[]
            Differentiable, of the last token's logits.
        where : {"cache", "projection"}
            Keys and values as stored (after the rotary embedding) or as projected.
        added : mapping of (layer, site) to Tensor [1, kv_heads, tokens, head_dim], optional
            Constants that are added to keys and values, as rounding errors are; the derivative is taken there.
        heads : bool
            Whether to take the derivative with respect to the outputs of attention heads too.
        directions : Tensor [d_model] or [layers, d_model], optional
            In the residual stream, the same for all layers or one for each; see :class:`~kvgeom.models.gradients.HeadOutputs`.

        Raises
        ------
        InputError
            For directions of another shape.
        ModelError
            With ``heads`` or ``directions``, if the outputs of the heads cannot be found in the model.
        """
        ...

    def derivatives(
        self,
        ids: Sequence[int],
        score: Callable[[Tensor], Tensor],
        inputs: Sequence[Tensor],
        *,
        variants: int = 1,
        edit: Edit | None = None,
        edit_resid: ResidEdit | None = None,
    ) -> tuple[float, tuple[Tensor, ...]]:
        """Derivative of a score of the next token by what edits read. Costs a forward and a backward pass of all rows.

        Parameters
        ----------
        ids : sequence of int
        score : callable (Tensor[variants, vocabulary]) -> Tensor[]
            Differentiable, of the last token's logits.
        inputs : sequence of Tensor
            With ``requires_grad``; what an edit, differentiable in them, reads.
        variants, edit, edit_resid
            As in :meth:`forward_variants` and :meth:`forward`; edits are of all rows.

        Returns
        -------
        (float, tuple of Tensor)
            The score, and its derivative by each of ``inputs``: zeros where it does not depend on one.
        """
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
        choose: Choose | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """Decoding of prefilled prompts, in batches; finished sequences leave their batch.

        Parameters
        ----------
        caches : sequence of EditedCache
            One per prompt, filled by :meth:`forward`; they are not changed.
        first_tokens : sequence of int
            The first response token of each, from the prefill's logits.
        max_new_tokens : int
            Longest response, the first token included.
        batch_size : int
        edit_resid : callable, optional
            As in :meth:`forward`, on all rows alike.
        stop : callable (prompt, its response tokens so far) -> bool, optional
            Asked after every token; True ends that response, which keeps the token.
        choose : callable (prompt, tokens of its response, logits [vocabulary]) -> int, optional
            The next token; the likeliest by default.
        on_done : callable (number of finished prompts) -> None, optional

        Returns
        -------
        list of list of int
            Response tokens, without the token that ended them.
        """


def missing_members(candidate: object) -> list[str]:
    """Members of :class:`Model` that an object lacks; empty for a model."""
    members = {*Model.__annotations__, *(name for name in vars(Model) if not name.startswith("_"))}
    return sorted(name for name in members if not hasattr(candidate, name))
