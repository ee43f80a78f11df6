"""The plain transformers backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgeom.models import hooks
from kvgeom.models.attention import attention_rule, check_attention
from kvgeom.models.backends import register_backend
from kvgeom.models.cache import BatchedEdit, Edit, EditedCache
from kvgeom.models.decoder import find_decoder, max_context
from kvgeom.models.decoding import Choose, decode
from kvgeom.models.derivatives import Differentiable
from kvgeom.models.gradients import Gradients, Places, gradients
from kvgeom.models.identity import Identified
from kvgeom.models.model import AttentionRule
from kvgeom.models.modules import (
    Projection,
    key_bias,
    model_name,
    named_stops,
    projections,
    read_geometry,
    stop_tokens,
)
from kvgeom.models.notes import notes_of
from kvgeom.models.padded import Padding
from kvgeom.models.rotary import RotaryEmbedding
from kvgeom.models.sanity import REQUEST, check_kind, check_runs, check_vocabulary, embedding_rows
from kvgeom.models.texts import Texts
from kvgeom.models.weights import drop_weights, weights_stored

if TYPE_CHECKING:
    from kvgeom.models.model import QueryHook, ResidEdit, ResidHook, RotationHook


class HFModel(Texts, Identified, Differentiable, Padding):
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
    template_options : mapping, optional
        Variables that are handed to the template, such as ``{"enable_thinking": False}``.

    Raises
    ------
    InputError
        If the template does not use an option, or the model has no language-model head or no embedding of a token of it.
    ModelError
        If the model has no decoder layers or no cache that kvgeom can reach, or no chat template; if it is not causal, its
        weights are not in memory, or it computes NaN.
    """

    backend = "hf"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        check_kind(model, name)
        self.hf_model: Any = model
        self.hf_model.train(False)
        self.tokenizer = tokenizer
        self.name = name
        self._config: Any = model.config.get_text_config()
        self.max_context = max_context(self._config)
        self.take_template(template, template_options)
        self._rows = embedding_rows(model)
        check_vocabulary(self._rows, tokenizer, name)
        prompt = list(self._chat.prompt(REQUEST).ids)
        self._check(prompt, "a plain request")
        self.vocabulary = check_runs(model, prompt, name)
        named = named_stops(model, tokenizer, name)
        self.stop_tokens, cannot_stop = stop_tokens(named, self.vocabulary)
        self._own_notes = (*cannot_stop, *notes_of(model, tokenizer, prompt))
        self.notes = (*self._chat.notes, *self._own_notes)
        self.decoder = find_decoder(model, name)
        self._layers = self.decoder.layers
        self.geometry = read_geometry(model, self.decoder)
        self._rotary = RotaryEmbedding(model, self.decoder)
        # Found out when they are asked for.
        self._rules: dict[int, AttentionRule] | None = None
        self._projecting: dict[int, dict[str, Projection]] | None = None
        self._heads: dict[int, nn.Module] | None = None
        self._late: bool | None = None
        self.weights = weights_stored(model)
        self.take_identity(named)

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
        return str(self.hf_model.config._attn_implementation)

    def release(self) -> None:
        drop_weights(self.hf_model)
        clear_device_cache(garbage_collection=True)

    def __repr__(self) -> str:
        g = self.geometry
        return f"<{type(self).__name__} {self.name}: {g}, {self.dtype}>"

    # --- running ---

    def new_cache(self, edit: Edit | None = None) -> EditedCache:
        return self.decoder.new_cache(edit)

    def attention(self, layer: int) -> AttentionRule:
        if self._rules is None:
            rules = {
                index: attention_rule(module, self._config, self.geometry, index)
                for index, module in self.decoder.attentions.items()
            }
            check_attention(self.hf_model, self.decoder, self._projections, self._rotary, rules)
            self._rules = rules
        return self._rules[layer]

    def key_biases(self) -> dict[tuple[int, Literal["k", "v"]], Tensor]:
        if not self.geometry.key_bias:
            return {}
        found = {index: key_bias(self.decoder.attentions[index], one["k"]) for index, one in self._projections.items()}
        return {(index, "k"): bias for index, bias in found.items() if bias is not None}

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
        cache = self.new_cache() if cache is None else cache
        past = cache.tokens_at(start[0] if start else 0)
        watched = all_logits or any((on_resid, on_rotation, on_query, edit_resid, start))
        if past > 0 and len(ids) > 1 and self.geometry.stepwise:  # as in decoding
            observers: dict[str, Any] = {
                "on_resid": on_resid,
                "on_rotation": on_rotation,
                "on_query": on_query,
                "edit_resid": edit_resid,
            }
            each = [self.forward([token], cache, start=start, **observers) for token in ids]
            return torch.cat(each) if all_logits else each[-1]
        tokens = torch.tensor([list(ids)], device=self.device)
        if past == 0 and len(ids) > 1 and not watched and getattr(cache.edit, "decodes_last_prompt_token", False):
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
        cache = self.new_cache(None if edits is None else BatchedEdit(tuple(edits)))
        tokens = torch.tensor([list(ids)], device=self.device).expand(variants, -1)
        positions = torch.arange(tokens.shape[1], device=self.device).expand(variants, -1)
        if start is not None and self.geometry.shares:
            start = None  # layers above read what those below store
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
        cache = self.branching_cache(edits) if cache is None else cache
        past = cache.get_seq_length()
        tokens = torch.tensor([list(ids)], device=self.device)
        positions = torch.arange(past, past + tokens.shape[1], device=self.device)[None]
        late = Counter(layer for layer in first if any(first) and self.branches_late)
        if not late:
            tokens, positions = (x.expand(1 + len(first), -1) for x in (tokens, positions))
        with hooks.during(hooks.join_branches(self._layers, late)):
            return self._run(tokens, cache, positions, None, last, on_resid=on_resid)

    def branching_cache(self, edits: Sequence[Edit]) -> EditedCache:
        return self.new_cache(BatchedEdit((None, *edits)))

    def gradients(
        self,
        ids: Sequence[int],
        score: Callable[[Tensor], Tensor],
        *,
        where: Literal["cache", "projection"] = "cache",
        added: Places | None = None,
        heads: bool = False,
        directions: Tensor | None = None,
    ) -> Gradients:
        return gradients(self, ids, score, where, added, heads, directions)

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
        choose: Choose | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        with self._observed(None, edit_resid, None):
            return decode(
                partial(self._run, logits_to_keep=1),
                caches,
                first_tokens,
                max_new_tokens,
                self.stop_tokens,
                batch_size=1 if self.decoder.alone(caches, max_new_tokens) else batch_size,
                device=self.device,
                stop=stop,
                choose=choose,
                on_done=on_done,
            )

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
            hooks.watch_rotation(self.decoder.attentions, self._rotary.layers, on_rotation) if on_rotation else (),
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
            hooks.pass_rotations(self.decoder.attentions, self._rotary.layers, edit) if edit else (),
            hooks.edit_projections(self._projections, edit) if edit and edit.where == "projection" else (),
        )

    # No cached_property: nnsight pickles this class, and one holds a lock before Python 3.12.
    @property
    def _projections(self) -> dict[int, dict[str, Projection]]:
        if self._projecting is None:
            with torch.inference_mode(False):  # channels are used where derivatives are taken, too
                self._projecting = projections(self.hf_model, self.decoder, self.geometry)
        return self._projecting

    @property
    def branches_late(self) -> bool:
        if self._late is None:
            self._late = self._joins_late()
        return self._late

    @torch.inference_mode()
    def _joins_late(self) -> bool:
        """Whether a copy of a sequence that joins the batch at a layer comes out as the sequence itself.

        Layers of some models are bound to the batch that has entered the model, by a mask or by ALiBi's biases.
        """
        if self.geometry.shares:  # a layer that reads what another has stored needs all rows there
            return False
        tokens = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        positions = torch.arange(2, device=self.device)[None]
        try:
            with hooks.during(hooks.join_branches(self._layers, {len(self._layers) - 1: 1})):
                logits = self._run(tokens, self.new_cache(), positions, None, 1)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
        return len(logits) == 2 and torch.allclose(logits[0], logits[1], atol=1e-3 * float(logits.abs().max()))

    @contextmanager
    def _observed(
        self, on_query: QueryHook | None, edit_resid: ResidEdit | None, start: tuple[int, Tensor] | None
    ) -> Iterator[None]:
        skipping = hooks.skip_below(self._layers, *start) if start else nullcontext()
        queries = hooks.watch_queries(self.decoder.attentions, self._projections, on_query) if on_query else ()
        edits = hooks.edit_stream(self._layers, edit_resid) if edit_resid else ()
        with skipping, hooks.during(queries, edits):
            yield


def _make(
    model: Any,
    tokenizer: Any,
    *,
    name: str | None,
    template: str | None,
    template_options: Mapping[str, Any] | None = None,
) -> HFModel:
    own = name or model_name(model)
    return HFModel(model, tokenizer, name=own, template=template, template_options=template_options)


register_backend("hf", wraps=lambda model: isinstance(model, PreTrainedModel), make=_make)
