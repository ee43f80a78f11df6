"""The plain transformers backend."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvgeom.errors import InputError, ModelError
from kvgeom.models.cache import Edit, EditedCache
from kvgeom.models.model import EncodedPrompt, KVGeometry

ResidHook = Callable[[int, Tensor], None]
RotationHook = Callable[[int, Tensor, Tensor], None]

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
        self._layers = _decoder_layers(model, name)
        self.geometry = _read_geometry(model, self._layers, name)
        self.fingerprint = _fingerprint(model, self.template)
        config = model.config.get_text_config()
        self.max_context = int(getattr(config, "max_position_embeddings", None) or 2**31)
        self._stop_tokens = _stop_tokens(model, tokenizer)
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

    def __repr__(self) -> str:
        g = self.geometry
        return f"<HFModel {self.name}: {g.layers} layers, {g.kv_heads} KV heads x {g.head_dim}, {self.dtype}>"

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
        """Text of tokens, special tokens dropped."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    # --- running ---

    def new_cache(self, edit: Edit | None = None) -> EditedCache:
        """An empty cache; ``edit`` sees, and may change, all keys and values on their way into it."""
        return EditedCache(self.geometry.layers, edit)

    @torch.inference_mode()
    def forward(
        self,
        ids: Sequence[int],
        cache: EditedCache | None = None,
        *,
        all_logits: bool = False,
        on_resid: ResidHook | None = None,
        on_rotation: RotationHook | None = None,
        start: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """Run one sequence, without padding, appending to ``cache``.

        Parameters
        ----------
        ids : sequence of int
            The new tokens.
        cache : EditedCache, optional
            What came before, and the edit that applies; an empty, unedited one by default.
        all_logits : bool
            Logits of every new token instead of the last alone.
        on_resid : callable (layer, Tensor[new tokens, d_model]) -> None, optional
            Called with the residual stream after each layer (``resid_post``).
        on_rotation : callable (layer, cos, sin) -> None, optional
            Called before each layer's attention with its rotary embedding, ``[new tokens, rotary_dim]`` each;
            not called in models without one.
        start : (layer, Tensor[new tokens, d_model]), optional
            Suffix reuse: begin at ``layer`` with this residual stream. The layers below do not run, and
            their part of ``cache`` stays as it is.

        Returns
        -------
        Tensor [new tokens or 1, vocabulary], float32
        """
        cache = self.new_cache() if cache is None else cache
        past = cache.layers[start[0] if start else 0].get_seq_length()
        tokens = torch.tensor([list(ids)], device=self.device)
        positions = torch.arange(past, past + tokens.shape[1], device=self.device)[None]
        with ExitStack() as stack:
            if start is not None:
                stack.enter_context(self._skip_below(*start))
            for handle in self._resid_hooks(on_resid) if on_resid else ():
                stack.callback(handle.remove)
            for handle in self._rotation_hooks(on_rotation) if on_rotation else ():
                stack.callback(handle.remove)
            return self._run(tokens, cache, positions, None, 0 if all_logits else 1)[0]

    @torch.inference_mode()
    def generate(
        self,
        caches: Sequence[EditedCache],
        first_tokens: Sequence[int],
        max_new_tokens: int,
        *,
        batch_size: int = 32,
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
        on_done : callable (number of finished prompts) -> None, optional

        Returns
        -------
        list of list of int
            Response tokens, without the token that ended them.
        """
        responses: list[list[int]] = []
        for begin in range(0, len(caches), batch_size):
            chunk = slice(begin, begin + batch_size)
            responses += self._generate_batch(list(caches[chunk]), list(first_tokens[chunk]), max_new_tokens)
            if on_done is not None:
                on_done(len(caches[chunk]))
        return responses

    def _generate_batch(self, caches: list[EditedCache], first: list[int], max_new_tokens: int) -> list[list[int]]:
        lengths = torch.tensor([cache.get_seq_length() for cache in caches], device=self.device)
        cache = EditedCache.stack(caches)
        longest = int(lengths.max())
        mask = (torch.arange(longest, device=self.device)[None] >= (longest - lengths)[:, None]).long()
        responses: list[list[int]] = [[] for _ in caches]
        rows = list(range(len(caches)))
        token = torch.tensor(first, device=self.device)
        for step in range(max_new_tokens):
            alive = [i for i, t in enumerate(token.tolist()) if t not in self._stop_tokens]
            for i in alive:
                responses[rows[i]].append(int(token[i]))
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
        self, tokens: Tensor, cache: EditedCache, positions: Tensor, mask: Tensor | None, logits_to_keep: int
    ) -> Tensor:
        with ExitStack() as stack:
            for handle in self._projection_hooks(cache.edit):
                stack.callback(handle.remove)
            output = self.hf_model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            )
        logits: Tensor = output.logits.float()
        return logits

    # --- hooks: each generator sets them, and whoever asks takes the handles away again ---

    def _resid_hooks(self, on_resid: ResidHook) -> Iterator[RemovableHandle]:
        def hook(layer: int) -> Callable[..., None]:
            return lambda _module, _args, output: on_resid(layer, _hidden(output)[0])

        for layer, module in enumerate(self._layers):
            yield module.register_forward_hook(hook(layer))

    def _rotation_hooks(self, on_rotation: RotationHook) -> Iterator[RemovableHandle]:
        def hook(layer: int) -> Callable[..., None]:
            def before(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
                rotation = kwargs.get("position_embeddings")
                if rotation is not None:
                    on_rotation(layer, rotation[0][0], rotation[1][0])

            return before

        for layer, module in enumerate(self._layers):
            yield _attention(module).register_forward_pre_hook(hook(layer), with_kwargs=True)

    def _projection_hooks(self, edit: Edit | None) -> Iterator[RemovableHandle]:
        if edit is None or edit.where != "projection":
            return
        for layer, module in enumerate(self._layers):
            for projection, start, site in _projections(module, self.geometry, self.name):
                yield projection.register_forward_hook(_projection_hook(edit, layer, site, start, self.geometry))

    @contextmanager
    def _skip_below(self, layer: int, resid: Tensor) -> Iterator[None]:
        """Replace what enters ``layer`` by ``resid``, and let the layers below pass their input on."""

        def replace(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return (resid[None], *args[1:]), kwargs

        below = self._layers[:layer]
        saved = [module.__dict__.get("forward") for module in below]
        handle = self._layers[layer].register_forward_pre_hook(replace, with_kwargs=True)
        try:
            for module in below:
                module.forward = lambda hidden_states, *args, **kwargs: hidden_states
            yield
        finally:
            handle.remove()
            for module, forward in zip(below, saved, strict=True):
                if forward is None:
                    del module.__dict__["forward"]
                else:  # e.g. accelerate's wrapper of a model spread over devices
                    module.forward = forward


def _projection_hook(edit: Edit, layer: int, site: Literal["k", "v"], start: int, geometry: KVGeometry) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        part = slice(start, start + geometry.channels)
        heads = rearrange(output[..., part], "b t (h d) -> b h t d", h=geometry.kv_heads)
        edited = output.clone()
        edited[..., part] = rearrange(edit(layer, site, heads), "b h t d -> b t (h d)")
        return edited

    return hook


def _projections(layer: nn.Module, geometry: KVGeometry, name: str) -> list[tuple[nn.Module, int, Literal["k", "v"]]]:
    """The modules that project keys and values, and where in their output each begins."""
    attention = _attention(layer)
    if hasattr(attention, "k_proj") and hasattr(attention, "v_proj"):
        return [(attention.k_proj, 0, "k"), (attention.v_proj, 0, "v")]
    if hasattr(attention, "qkv_proj"):
        keys = geometry.query_heads * geometry.head_dim
        return [(attention.qkv_proj, keys, "k"), (attention.qkv_proj, keys + geometry.channels, "v")]
    raise ModelError(
        f"rounding at the projection was asked, but {type(attention).__name__} of {name} has no k_proj/v_proj or "
        "qkv_proj; use the cache placement"
    )


def _decoder_layers(model: PreTrainedModel, name: str) -> list[nn.Module]:
    wanted = int(model.config.get_text_config().num_hidden_layers)
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    found = [m for m in found if all(_attention(layer) is not None for layer in m)]
    if not found:
        raise ModelError(f"{name} was asked, but kvgeom finds no list of {wanted} decoder layers with attention in it")
    return list(found[-1])


def _attention(layer: nn.Module) -> Any:
    return next((child for child in layer.children() if "attention" in type(child).__name__.lower()), None)


@torch.inference_mode()
def _read_geometry(model: PreTrainedModel, layers: list[nn.Module], name: str) -> KVGeometry:
    """Run one token and look at what the cache then holds: the shapes are the model's own."""
    config = model.config.get_text_config()
    cache = EditedCache(len(layers))
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{name} was asked, but it does not run with a transformers cache: {error}") from error
    shapes = {tuple(t.shape) for layer in cache.layers for t in (layer.keys, layer.values) if t is not None}
    if len(shapes) != 1 or not all(layer.is_initialized for layer in cache.layers):
        raise ModelError(
            f"{name} was asked, but its layers do not each store keys and values of one shape (found {sorted(shapes)})"
        )
    _, kv_heads, _, head_dim = shapes.pop()
    attention = _attention(layers[0])
    projection = next(
        (m for n in ("k_proj", "qkv_proj", "query_key_value", "c_attn") if (m := getattr(attention, n, None))), None
    )
    return KVGeometry(
        layers=len(layers),
        query_heads=int(config.num_attention_heads),
        kv_heads=kv_heads,
        head_dim=head_dim,
        d_model=int(config.hidden_size),
        key_bias=getattr(projection, "bias", None) is not None,
        rope=_rope_kind(config, model),
        sliding_window=getattr(config, "sliding_window", None) if _slides(config) else None,
    )


def _slides(config: Any) -> bool:
    types = getattr(config, "layer_types", None)
    return "sliding_attention" in types if types else getattr(config, "sliding_window", None) is not None


def _rope_kind(config: Any, model: PreTrainedModel) -> str:
    if not any("rotary" in type(m).__name__.lower() for m in model.modules()):
        return "none"
    parameters = getattr(config, "rope_parameters", None) or {}
    # Models whose layer types have their own rotary embeddings nest the parameters by layer type.
    kinds = {p.get("rope_type", "default") for p in parameters.values() if isinstance(p, dict)}
    return "+".join(sorted(kinds)) if kinds else str(parameters.get("rope_type", "default"))


def _fingerprint(model: PreTrainedModel, template: str) -> str:
    """Hash of configuration, template and a sample of every weight: tells models apart in seconds, not minutes."""
    digest = hashlib.sha256(template.encode())
    for parameter_name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy()
        digest.update(f"{parameter_name}{tuple(weight.shape)}{weight.dtype}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None)


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
