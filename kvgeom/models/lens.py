"""The TransformerLens backend."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kvgeom.errors import InputError, ModelError
from kvgeom.models.backends import from_package, register_backend
from kvgeom.models.chat import ANY_LENGTH, ChatTemplate
from kvgeom.models.hf import HFModel
from kvgeom.models.identity import Identity, identify
from kvgeom.models.modules import model_name, named_stops


class LensModel(HFModel):
    """A ``TransformerBridge`` of TransformerLens, seen as a :class:`~kvgeom.models.model.Model`.

    Every pass goes through the bridge, so hooks that you have added to it stay in effect; kvgeom adds its own only
    while a pass runs.

    Parameters
    ----------
    bridge : TransformerBridge
    name, template, template_options
        As in :class:`~kvgeom.models.hf.HFModel`; the bridge's own name by default.
    tokenizer : PreTrainedTokenizerBase, optional
        The bridge's own by default.
    identified : tuple of str, optional
        Fingerprint and identity of the model before the bridge was put around it, if they are known.
    """

    backend = "lens"

    def __init__(
        self,
        bridge: Any,
        *,
        name: str | None = None,
        tokenizer: Any = None,
        template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        identified: Identity | None = None,
    ) -> None:
        self.bridge, self._before_bridge = bridge, identified
        super().__init__(
            bridge.original_model,
            tokenizer or bridge.tokenizer,
            name=name or str(bridge.cfg.model_name),
            template=template,
            template_options=template_options,
        )

    @classmethod
    def around(
        cls,
        hf_model: Any,
        tokenizer: Any,
        *,
        name: str,
        template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> LensModel:
        """Put a bridge around a transformers model, which it changes: modules are replaced, attention becomes eager."""
        try:
            from transformer_lens.model_bridge import TransformerBridge
        except ImportError as error:
            raise ModelError(
                f"backend 'lens' needs TransformerLens, which cannot be imported ({error}); pip install 'kvgeom[lens]'"
            ) from error
        if not getattr(hf_model.config, "architectures", None):  # models that were not loaded from a checkpoint
            hf_model.config.architectures = [type(hf_model).__name__]
        ChatTemplate(tokenizer, template, name, ANY_LENGTH, template_options)  # fails before the model is changed
        # Before the bridge splits fused projections, so that a model has one fingerprint on all backends.
        identified = identify(hf_model, tokenizer, named_stops(hf_model, tokenizer, name))
        # The bridge makes a tokenizer with a BOS token out of the one it gets, which must know its own name for that.
        theirs = copy.deepcopy(tokenizer)
        theirs.init_kwargs.setdefault("name_or_path", tokenizer.name_or_path or name)
        try:
            bridge = TransformerBridge.boot_transformers(name, hf_model=hf_model, tokenizer=theirs)
        except (ValueError, KeyError, AttributeError, NotImplementedError) as error:
            raise ModelError(f"TransformerLens cannot wrap {name} ({error}); use backend='hf'") from error
        return cls(
            bridge,
            name=name,
            tokenizer=tokenizer,
            template=template,
            template_options=template_options,
            identified=identified,
        )

    def _identified(self, stop: frozenset[int]) -> Identity:
        before, self._before_bridge = self._before_bridge, None  # which weights that are changed later have not
        return before or super()._identified(stop)

    def _call(self, tokens: Tensor, **inputs: Any) -> Tensor:
        logits: Tensor = self.bridge(tokens, **inputs)
        return logits


def _make(
    model: Any,
    tokenizer: Any,
    *,
    name: str | None,
    template: str | None,
    template_options: Mapping[str, Any] | None = None,
) -> LensModel:
    chat: dict[str, Any] = {"template": template, "template_options": template_options}
    if not of_transformer_lens(model):
        return LensModel.around(model, tokenizer, name=name or model_name(model), **chat)
    if not hasattr(model, "original_model"):
        raise InputError(
            f"a {type(model).__name__} is no TransformerBridge; of TransformerLens, kvgeom takes only that"
        )
    return LensModel(model, tokenizer=tokenizer, name=name, **chat)


of_transformer_lens = from_package("transformer_lens")
register_backend("lens", wraps=of_transformer_lens, make=_make)
