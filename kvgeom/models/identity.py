"""What tells models apart: a hash of everything that can change an answer."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from kvgeom.errors import KvgeomWarning, ModelError
from kvgeom.models.decoder import MOVING_ROPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvgeom.models.chat import ChatTemplate

#: Entries of a tensor that are copied at a time.
PIECE = 1 << 24
#: Entries of a configuration that change with the place or the type of the weights, or with who wrote them.
_PASSING = frozenset({"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"})


class Identified:
    """Part of a backend that runs a transformers model: what tells it apart, as long as nobody changes it.

    Attributes
    ----------
    fingerprint, identity : str
        See :class:`Identity`.
    """

    fingerprint: str
    identity: str
    name: str
    hf_model: Any
    tokenizer: Any
    template_options: dict[str, Any]
    _chat: ChatTemplate
    take_template: Callable[[str, Mapping[str, Any]], None]

    def take_identity(self, stop: frozenset[int]) -> None:
        """Identify the model as it is now; ``stop`` are the tokens that end a response."""
        self._stop, self._checksum = stop, checksum(self.hf_model)
        self._hashes = self._identified(stop)
        self.fingerprint, self.identity = self._hashes.fingerprint(self._chat.signature), self._hashes.identity

    def _identified(self, stop: frozenset[int]) -> Identity:
        return identify(self.hf_model, self.tokenizer, stop)

    def with_template(self, template: str) -> Self:
        """The same model, weights and all, under another chat template with the same options.

        Raises
        ------
        InputError, ModelError
            As where a model is loaded with a template.
        """
        made = copy.copy(self)
        made.take_template(template, self.template_options)
        made.fingerprint = self._hashes.fingerprint(made._chat.signature)
        return made

    def refresh(self) -> None:
        """Notice what was done to the model meanwhile: training mode is left, and with other weights it is another model."""
        self.hf_model.train(False)
        if checksum(self.hf_model) != self._checksum:
            self.take_identity(self._stop)
            warnings.warn(
                f"{self.name} was changed since it was loaded: earlier results, baselines and journals are of another model",
                KvgeomWarning,
                stacklevel=4,
            )


class Identity(NamedTuple):
    """What tells a model with its tokenizer apart: hashes.

    Attributes
    ----------
    exact : str
        Of the weights in their present type, and the configuration.
    coarse : str
        :func:`weights_identity`.
    text : str
        Of the tokenizer and the stop tokens.
    """

    exact: str
    coarse: str
    text: str

    def fingerprint(self, template: str) -> str:
        """Hash of everything that can change an answer, under a chat template with its options."""
        return _hash(self.exact, self.text, template)

    @property
    def identity(self) -> str:
        """Two hashes with a point between them; the same in all floating-point types, and under any chat template."""
        return f"{self.coarse}.{self.text}"


def identify(model: nn.Module, tokenizer: PreTrainedTokenizerBase, stop: frozenset[int]) -> Identity:
    """What tells a model with its tokenizer apart.

    Every bit of every weight is read, as the model holds it now: no file's time or size is believed. Weights in 32 bits
    of a model with half a billion parameters take about as long as five prompts of 40 tokens on one core, and several
    cores share the work.

    Parameters
    ----------
    model : nn.Module
        Hooks, and attributes of modules that were changed by hand, are not seen.
    tokenizer : PreTrainedTokenizerBase
    stop : frozenset of int
        Tokens that end a response.

    Raises
    ------
    ModelError
        If a weight has no values, or NaN or infinity among them.
    """
    return Identity(*_weights(model), _hash(_tokenizer(tokenizer), sorted(stop)))


def weights_identity(model: nn.Module) -> str:
    """Hash of weights and configuration that is the same in all floating-point types.

    Weights that were trained in float32 and stored in float16 alone are an exception: they may differ from those in
    bfloat16.
    """
    return _weights(model)[1]


def _weights(model: nn.Module) -> tuple[str, str]:
    """Weights and configuration, exactly and in what all floating-point types have of them.

    Frequencies of rotary embedding and the like are stored with no weights, and a type that a model was once in is left in
    them: they count for the exact one.
    """
    tensors, computed = dict(_tensors(model)), dict(_computed(model))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_digests, tensors, tensors.values()))
        besides = [exact for exact, _ in pool.map(_digests, computed, computed.values())]
    config: Any = getattr(model, "config", None)
    kept = {} if config is None else _lasting(config.to_dict())
    exact, coarse = ([each[which] for each in digests] for which in (0, 1))
    return _hash(kept, exact, besides), _hash(kept, coarse)


def checksum(model: nn.Module) -> str:
    """Sums over the rows and the columns of every weight, and the configuration: others where a model was changed in place.

    Where a weight only moves (heads that are exchanged, rows that are shuffled) a row or a column changes too. Reads the memory
    twice, a fifth of what :func:`identify` takes. Attributes of modules are not seen.
    """
    config: Any = getattr(model, "config", None)
    sums = [(name, _sums(x)) for found in (_tensors, _computed) for name, x in found(model)]
    return _hash({} if config is None else _lasting(config.to_dict()), sums)


def _sums(x: Tensor) -> str:
    """Hash of the sums of the bits of a tensor's rows and columns, as the widest integers that a row is a whole number of."""
    if x.is_meta or not x.numel():
        return ""
    rows = x.contiguous().reshape(-1, x.shape[-1] if x.dim() > 1 else 1).view(torch.uint8)
    wide = next(
        kind for kind in (torch.int64, torch.int32, torch.int16, torch.uint8) if rows.shape[1] % kind.itemsize == 0
    )
    digest = hashlib.sha256()
    for dim in (1, 0):
        digest.update(rows.view(wide).sum(dim, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and what else of a model is stored with them, such as the integers of quantized weights."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    known = {id(weight) for weight in found.values()}
    stored = model.state_dict(keep_vars=True)
    found |= {name: x for name, x in stored.items() if isinstance(x, Tensor) and id(x) not in known}
    for name, x in sorted(found.items()):
        yield from _plain(name.replace("_original_component.", ""), x.detach())  # as TransformerLens wraps modules


def _computed(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a model computes and does not store, without those that hang on what it has read last."""
    stored = model.state_dict(keep_vars=True)
    moving = set(_moving(model))
    for name, x in sorted(dict(model.named_buffers()).items()):
        if name not in stored and name not in moving:
            yield from _plain(name.replace("_original_component.", ""), x.detach())


def _moving(model: nn.Module) -> Iterator[str]:
    """Frequencies of rotary embedding that follow the longest sequence; what they are made from is in the configuration."""
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        for part, kind in (kinds if isinstance(kinds, dict) else {"": kinds}).items():
            if kind in MOVING_ROPES:
                yield f"{name}.{part}_inv_freq" if part else f"{name}.inv_freq"


def _plain(name: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those that a tensor of another library is made of."""
    if not hasattr(x, "__tensor_flatten__"):
        yield name, x
        return
    for part in x.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{part}", getattr(x, part))


def _digests(name: str, x: Tensor) -> tuple[str, str]:
    if x.is_meta:
        raise ModelError(f"weight {name} has no values (it is on the device meta); load the model into memory")
    shape = f"{name}{tuple(x.shape)}"
    exact, coarse = hashlib.sha256(f"{shape}{x.dtype}".encode()), hashlib.sha256(shape.encode())
    for piece in torch.split(x.reshape(-1), PIECE):
        here = piece.cpu()
        exact.update(_bytes(here))
        wide = here
        if here.is_floating_point():
            wide = _coarse(here)
            _check_numbers(name, wide, here)
        coarse.update(_bytes(wide))
    return exact.hexdigest(), coarse.hexdigest()


def _check_numbers(name: str, coarse: Tensor, x: Tensor) -> None:
    """Refuse NaN and infinity; masks that are stored as buffers may hold -inf."""
    if not coarse.numel() or float(coarse.max()) < torch.inf:  # False of NaN, which max hands on
        return
    if not float(x.float().max()) < torch.inf:  # the largest float32 is infinite when it is rounded
        dtype = str(x.dtype).removeprefix("torch.")
        raise ModelError(
            f"weight {name} holds NaN or infinity in {dtype}; load it with another dtype if its files hold larger numbers than "
            f"{dtype} does, else get them again: they are damaged"
        )


def _bytes(x: Tensor) -> Any:
    return x.contiguous().view(torch.uint8).numpy()


def _coarse(x: Tensor) -> Tensor:
    """What all floating-point types have of numbers: 8 significant bits, and nothing below float16's normal numbers."""
    coarse = x.to(torch.bfloat16)
    return coarse.masked_fill(coarse.abs() < 2.0**-14, 0.0)


def _lasting(config: Any) -> Any:
    """A configuration without what does not change an answer, or what a type of weights brings with it."""
    if isinstance(config, Mapping):
        return {str(key): _lasting(value) for key, value in config.items() if key not in _PASSING}
    return [_lasting(value) for value in config] if isinstance(config, list | tuple) else config


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Vocabulary, merges, normalizer and all else that makes tokens of text and text of tokens."""
    serialized = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        **{
            name: part for name, part in serialized.items() if name not in ("padding", "truncation")
        },  # of the last call
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        **{name: getattr(tokenizer, name, None) for name in ("clean_up_tokenization_spaces", "split_special_tokens")},
    }


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
