"""The plain transformers backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgeom.errors import InputError, ModelError
from kvgeom.models import hooks
from kvgeom.models.cache import Edit, EditedCache, Leaves, Together
from kvgeom.models.model import AttentionRule, EncodedPrompt, Gradients
from kvgeom.models.modules import (
    Projection,
    attention_rule,
    decoder_layers,
    key_bias,
    projections,
    read_geometry,
    stop_tokens,
    weights_fingerprint,
    weights_identity,
)

if TYPE_CHECKING:
    from kvgeom.models.model import QueryHook, ResidEdit, ResidHook, RotationHook

_REQUEST_MARK = "\u2063kvgeom-request\u2063"


class HFModel:
    """A loaded transformers model and its tokenizer, seen as a :class:`~kvgeom.models.model.Model`.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder-only causal language model. It is used as it is: nothing in it is replaced.
    tokenizer : PreTrainedTokenizerBase
        A fast tokenizer.
    name : str
        How results and reports call the model.
    template : str, optional
        A Jinja chat template, for models without one of their own (or to replace it).

    Raises
    ------
    ModelError
        If the model has no decoder layers or no cache that kvgeom can reach, or no chat template.
    """

    backend = "hf"
    branches_late = True

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, template: str | None = None
    ) -> None:
        self.hf_model: Any = model
        self.hf_model.train(False)
        self.tokenizer = tokenizer
        self.name = name
        self.template = template or tokenizer.chat_template
        if not self.template:
            raise ModelError(
                f"{name} was asked, but its tokenizer has no chat template; give one: --template FILE, or load(template=...)"
            )
        if not tokenizer.is_fast:
            raise ModelError(f"{name} was asked, but its tokenizer is a slow one; kvgeom needs a fast (tokenizers) one")
        self._config: Any = model.config.get_text_config()
        self._layers = decoder_layers(model, int(self._config.num_hidden_layers), name)
        self.geometry = read_geometry(model, self._config, self._layers, name)
        self.fingerprint = weights_fingerprint(model, self.template)
        self.identity = weights_identity(model)
        self.vocabulary = int(self._config.vocab_size)
        self.max_context = int(getattr(self._config, "max_position_embeddings", None) or 2**31)
        self.stop_tokens = stop_tokens(model, tokenizer)
        self._prefix, self._suffix = self._render(_REQUEST_MARK).split(_REQUEST_MARK)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.hf_model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.hf_model.dtype
        return dtype

    @property
    def attention_kernel(self) -> str:
        """Which attention implementation runs; comparisons across kernels differ once rounding amplifies them."""
        return str(self.hf_model.config._attn_implementation)

    def release(self) -> None:
        """Take the weights out of memory. Shapes, tokens and text stay; nothing can be run any more."""
        self.hf_model.to("meta")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __repr__(self) -> str:
        g = self.geometry
        return f"<{type(self).__name__} {self.name}: {g.layers} layers, {g.kv_heads} KV heads x {g.head_dim}, {self.dtype}>"

    # --- text and tokens ---

    def encode(self, requests: Sequence[str]) -> list[EncodedPrompt]:
        """Put each request into the chat template and find its tokens.

        Raises
        ------
        InputError
            If a request is empty or, with the template, does not fit the model's context.
        """
        return [self._encode_one(request.strip()) for request in requests]

    def _encode_one(self, text: str) -> EncodedPrompt:
        if not text:
            raise InputError("an empty request was given; every prompt needs some text")
        encoding = self.tokenizer(
            self._prefix + text + self._suffix, add_special_tokens=False, return_offsets_mapping=True
        )
        ids = encoding["input_ids"]
        if len(ids) >= self.max_context:
            raise InputError(
                f"a prompt of {len(ids)} tokens was given ({text[:40]!r}...), but {self.name} has a context of "
                f"{self.max_context}; shorten or drop it"
            )
        start, stop = len(self._prefix), len(self._prefix) + len(text)
        inside = [i for i, (a, b) in enumerate(encoding["offset_mapping"]) if a < stop and b > start and b > a]
        return EncodedPrompt(text=text, ids=tuple(ids), instruction=slice(inside[0], inside[-1] + 1))

    def _render(self, request: str) -> str:
        try:
            rendered: Any = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": request}],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # a template is a program of the user's; whatever it raises is bad input
            raise ModelError(f"the chat template of {self.name} fails on a plain request: {error}") from error
        if rendered.count(request) != 1:
            raise ModelError(
                f"the chat template of {self.name} shows a request {rendered.count(request)} times; it must show it once"
            )
        return str(rendered)

    def tokens(self, text: str) -> list[int]:
        """Tokens of plain text, without template or special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special tokens dropped; a NUL, which many files cannot hold, becomes U+FFFD."""
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        return text.replace("\0", "\ufffd").strip()

    # --- running ---

    def new_cache(self, edit: Edit | None = None) -> EditedCache:
        """An empty cache; ``edit`` sees, and may change, all keys and values on their way into it."""
        return EditedCache(self.geometry.layers, edit)

    def attention(self, layer: int) -> AttentionRule:
        """Scale, window and soft cap of a layer's attention scores."""
        return attention_rule(self._layers[layer], self._config, self.geometry)

    def key_biases(self) -> dict[tuple[int, Literal["k", "v"]], Tensor]:
        """Bias of every layer's key projection, ``[kv_heads, head_dim]`` by ``(layer, "k")``; empty without one.

        It is a constant part of all keys (before their rotary embedding), unless they are normalized after.
        """
        found = (key_bias(layer, self.geometry, self.name) for layer in self._layers)
        return {(index, "k"): bias for index, bias in enumerate(found) if bias is not None}

    @torch.inference_mode()
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
            What came before, and the edit that applies; an empty, unedited one by default. An edit may ask
            (``last_apart``) that the last token of a prompt is run on its own, as some engines do; a pass that is watched
            or edited by one of the hooks below, or asked for all logits, stays one pass.
        all_logits : bool
            Logits of every new token instead of the last alone.
        on_resid : callable (layer, Tensor[1, new tokens, d_model]) -> None, optional
            Called with the residual stream after each layer (``resid_post``).
        on_rotation : callable (layer, cos, sin) -> None, optional
            Called before each layer's attention with its rotary embedding, ``[new tokens, rotary_dim]`` each;
            not called in models without one.
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
        """
        cache = self.new_cache() if cache is None else cache
        past = cache.layers[start[0] if start else 0].get_seq_length()
        watched = all_logits or any((on_resid, on_rotation, on_query, edit_resid, start))
        tokens = torch.tensor([list(ids)], device=self.device)
        if past == 0 and len(ids) > 1 and not watched and getattr(cache.edit, "last_apart", False):
            self._run(tokens[:, :-1], cache, torch.arange(len(ids) - 1, device=self.device)[None], None, 1)
            past, tokens = len(ids) - 1, tokens[:, -1:]
        positions = torch.arange(past, past + tokens.shape[1], device=self.device)[None]
        with self._observed(on_query, edit_resid, start):
            return self._run(
                tokens, cache, positions, None, 0 if all_logits else 1, on_resid=on_resid, on_rotation=on_rotation
            )[0]

    @torch.inference_mode()
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
        cache = self.new_cache(None if edits is None else Together(tuple(edits)))
        tokens = torch.tensor([list(ids)], device=self.device).expand(variants, -1)
        positions = torch.arange(tokens.shape[1], device=self.device).expand(variants, -1)
        if start is not None:
            start = (start[0], start[1].expand(variants, -1, -1))
        with self._observed(None, edit_resid, start):
            return self._run(tokens, cache, positions, None, 1, on_resid=on_resid)[:, -1]

    @torch.inference_mode()
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
        cache = self.branching_cache(edits) if cache is None else cache
        past = cache.get_seq_length()
        tokens = torch.tensor([list(ids)], device=self.device)
        positions = torch.arange(past, past + tokens.shape[1], device=self.device)[None]
        with hooks.during(hooks.join_branches(self._layers, Counter(first))):
            return self._run(tokens, cache, positions, None, last, on_resid=on_resid)

    def branching_cache(self, edits: Sequence[Edit]) -> EditedCache:
        """An empty cache for :meth:`forward_branches`."""
        return self.new_cache(Together((None, *edits)))

    def gradients(
        self, ids: Sequence[int], score: Callable[[Tensor], Tensor], *, where: Literal["cache", "projection"] = "cache"
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
        """
        leaves = Leaves(where)
        tokens = torch.tensor([list(ids)], device=self.device)
        with torch.enable_grad():
            logits = self._run(
                tokens, self.new_cache(leaves), torch.arange(tokens.shape[1], device=self.device)[None], None, 1
            )
            value = score(logits[0, -1])
            found = torch.autograd.grad(value, list(leaves.leaves.values()))
        return Gradients(
            score=float(value.detach()),
            x=leaves.seen,
            grad=dict(zip(leaves.leaves, (g.detach() for g in found), strict=True)),
        )

    @torch.inference_mode()
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
        """Greedy decoding of prefilled prompts, in batches; finished sequences leave their batch.

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
        on_done : callable (number of finished prompts) -> None, optional

        Returns
        -------
        list of list of int
            Response tokens, without the token that ended them.
        """
        with self._observed(None, edit_resid, None):
            responses: list[list[int]] = []
            for begin in range(0, len(caches), batch_size):
                chunk = slice(begin, begin + batch_size)
                ends = None if stop is None else lambda row, tokens, begin=begin: stop(begin + row, tokens)
                responses += self._generate_batch(list(caches[chunk]), list(first_tokens[chunk]), max_new_tokens, ends)
                if on_done is not None:
                    on_done(len(caches[chunk]))
            return responses

    def _generate_batch(
        self,
        caches: list[EditedCache],
        first: list[int],
        max_new_tokens: int,
        stop: Callable[[int, list[int]], bool] | None,
    ) -> list[list[int]]:
        lengths = torch.tensor([cache.get_seq_length() for cache in caches], device=self.device)
        cache = EditedCache.stack(caches)
        longest = int(lengths.max())
        mask = (torch.arange(longest, device=self.device)[None] >= (longest - lengths)[:, None]).long()
        responses: list[list[int]] = [[] for _ in caches]
        rows = list(range(len(caches)))
        token = torch.tensor(first, device=self.device)
        for step in range(max_new_tokens):
            alive = [i for i, t in enumerate(token.tolist()) if t not in self.stop_tokens]
            for i in alive:
                responses[rows[i]].append(int(token[i]))
            if stop is not None:
                alive = [i for i in alive if not stop(rows[i], responses[rows[i]])]
            if not alive or step == max_new_tokens - 1:
                break
            if len(alive) < len(rows):
                keep = torch.tensor(alive, device=self.device)
                cache.keep(keep)
                rows, token, lengths, mask = [rows[i] for i in alive], token[keep], lengths[keep], mask[keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = self._run(token[:, None], cache, lengths[:, None] + step, mask, 1)
            token = logits[:, -1].argmax(-1)
        return responses

    def _run(
        self,
        tokens: Tensor,
        cache: EditedCache,
        positions: Tensor,
        mask: Tensor | None,
        logits_to_keep: int,
        *,
        on_resid: ResidHook | None = None,
        on_rotation: RotationHook | None = None,
    ) -> Tensor:
        """Call the model once. Backends differ here, and in nothing else."""
        watching = (
            hooks.watch_resid(self._layers, on_resid) if on_resid else (),
            hooks.watch_rotation(self._layers, on_rotation) if on_rotation else (),
        )
        with hooks.during(*watching, *self._cache_hooks(cache.edit)):
            logits = self._call(
                tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            )
        return logits.float()

    def _call(self, tokens: Tensor, **inputs: Any) -> Tensor:
        logits: Tensor = self.hf_model(input_ids=tokens, **inputs).logits
        return logits

    def _cache_hooks(self, edit: Edit | None) -> tuple[Iterable[RemovableHandle], ...]:
        """What the edit of a cache needs beside the cache."""
        return (
            hooks.tell_turning(self._layers, edit) if edit else (),
            hooks.edit_projections(self._projections(), edit) if edit and edit.where == "projection" else (),
        )

    def _projections(self) -> Iterator[Mapping[str, Projection]]:
        return (projections(module, self.geometry, self.name) for module in self._layers)

    @contextmanager
    def _observed(
        self, on_query: QueryHook | None, edit_resid: ResidEdit | None, start: tuple[int, Tensor] | None
    ) -> Iterator[None]:
        skipping = hooks.skip_below(self._layers, *start) if start else nullcontext()
        queries = hooks.watch_queries(self._layers, self._projections(), on_query) if on_query else ()
        edits = hooks.edit_stream(self._layers, edit_resid) if edit_resid else ()
        with skipping, hooks.during(queries, edits):
            yield
