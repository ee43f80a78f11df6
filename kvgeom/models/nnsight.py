"""The nnsight backend, on this machine or on NDIF."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from kvgeom.errors import InputError, ModelError
from kvgeom.models.backends import from_package, register_backend
from kvgeom.models.cache import EditedCache
from kvgeom.models.hf import HFModel
from kvgeom.models.hooks import during
from kvgeom.models.modules import model_name

if TYPE_CHECKING:
    from kvgeom.models.model import QueryHook, ResidEdit, ResidHook, RotationHook

Remote = bool | Literal["local"]


class NNsightModel(HFModel):
    """An nnsight language model, seen as a :class:`~kvgeom.models.model.Model`.

    Every pass is one trace. The residual stream and rotary angles are saved by the trace, and the cache is one of its
    inputs and comes back with it.

    Parameters
    ----------
    model : nnsight.modeling.transformers.TransformersModel or nnsight.LanguageModel
    remote : {False, True, "local"}
        Where traces run. ``True`` sends them to NDIF, which needs an API key (``nnsight.CONFIG.set_default_api_key``)
        and a model that it serves; kvgeom registers itself, so that its cache exists there. Of the protocol,
        :meth:`forward` with cache edits, residual stream and rotary angles is remote; what needs hooks inside modules
        (rounding at the projection, queries, residual edits, suffix reuse) and derivatives is refused.
        ``"local"`` is nnsight's rehearsal of a remote run.
    name, tokenizer, template, template_options
        As in :class:`~kvgeom.models.lens.LensModel`.
    """

    backend = "nnsight"

    def __init__(
        self,
        model: Any,
        *,
        remote: Remote = False,
        name: str | None = None,
        tokenizer: Any = None,
        template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.nnsight_model = model
        self.remote: Remote = remote
        if remote:
            import nnsight

            nnsight.register(sys.modules["kvgeom"])
        module = model._module
        super().__init__(
            module,
            tokenizer or model.tokenizer,
            name=name or model_name(module),
            template=template,
            template_options=template_options,
        )
        paths = {id(module): path for path, module in module.named_modules()}
        self._envoys = [_envoy(model, paths[id(layer)]) for layer in self._layers]
        self._attending = {layer: _envoy(model, paths[id(found)]) for layer, found in self.decoder.attentions.items()}

    @classmethod
    def around(
        cls,
        hf_model: Any,
        tokenizer: Any,
        *,
        name: str,
        template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        remote: Remote = False,
    ) -> NNsightModel:
        """Wrap a transformers model."""
        try:
            from nnsight.modeling.transformers import TransformersModel
        except ImportError as error:
            raise ModelError(
                f"backend 'nnsight' needs nnsight, which cannot be imported ({error}); pip install 'kvgeom[nnsight]'"
            ) from error
        wrapped = TransformersModel(hf_model, tokenizer=tokenizer, task="text-generation")
        return cls(
            wrapped,
            remote=remote,
            name=name,
            tokenizer=tokenizer,
            template=template,
            template_options=template_options,
        )

    def _joins_late(self) -> bool:
        return self.remote is not True and super()._joins_late()

    def gradients(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`kvgeom.models.model.Model.gradients`; not with ``remote=True``."""
        self._refuse_remote("derivatives")
        return super().gradients(*args, **kwargs)

    def derivatives(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`kvgeom.models.model.Model.derivatives`; not with ``remote=True``."""
        self._refuse_remote("derivatives")
        return super().derivatives(*args, **kwargs)

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
        if cache.edit is not None and cache.edit.where == "projection":
            self._refuse_remote("rounding at the projection")
        inputs = {"attention_mask": mask} if mask is not None else {}
        with during(*self._cache_hooks(cache.edit)):
            rotations, resids = [], []
            with self.nnsight_model.trace(
                {"input_ids": tokens, **inputs},
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
                remote=self.remote,
            ):
                for layer, envoy in enumerate(self._envoys):
                    if on_rotation is not None and layer in self._attending:
                        rotations.append(self._attending[layer].inputs[1].get("position_embeddings").save())
                    if on_resid is not None:
                        resids.append(envoy.output.save())
                filled = self.nnsight_model.output.past_key_values.save()
                logits = self.nnsight_model.output.logits.save()
        _take_over(cache, filled)
        for layer, embedding in zip(self._attending, rotations, strict=False):
            if on_rotation is not None:
                on_rotation(layer, self._rotary.layers[layer].at(embedding, tokens.shape[1], logits).row(0))
        for layer, resid in enumerate(resids):
            if on_resid is not None:
                on_resid(layer, resid[0] if isinstance(resid, tuple) else resid)
        return logits.float()  # type: ignore[no-any-return]

    @contextmanager
    def _observed(
        self, on_query: QueryHook | None, edit_resid: ResidEdit | None, start: tuple[int, Tensor] | None
    ) -> Iterator[None]:
        for given, what in ((on_query, "queries"), (edit_resid, "residual edits"), (start, "suffix reuse")):
            if given is not None:
                self._refuse_remote(what)
        with super()._observed(on_query, edit_resid, start):
            yield

    def _refuse_remote(self, what: str) -> None:
        if self.remote is True:
            raise ModelError(
                f"{what} of {self.name} need hooks inside the model's modules, which remote=True does not allow; load the "
                "model on this machine (remote=False)"
            )


def _envoy(model: Any, path: str) -> Any:
    """Nnsight's stand-in for the module at a dotted path."""
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def _take_over(cache: EditedCache, filled: Any) -> None:
    """Move what a trace has put into its copy of the cache, if it got one, into ours."""
    if filled is cache:
        return
    cache.layers, cache.edit = filled.layers, filled.edit


def _make(
    model: Any,
    tokenizer: Any,
    *,
    name: str | None,
    template: str | None,
    template_options: Mapping[str, Any] | None = None,
    remote: Remote = False,
) -> NNsightModel:
    chat: dict[str, Any] = {"template": template, "template_options": template_options}
    if not of_nnsight(model):
        return NNsightModel.around(model, tokenizer, name=name or model_name(model), remote=remote, **chat)
    from transformers import PreTrainedModel

    if not isinstance(getattr(model, "_module", None), PreTrainedModel):
        raise InputError(
            f"a {type(model).__name__} is no loaded language model; of nnsight, kvgeom takes a TransformersModel or "
            "LanguageModel (with dispatch=True if it was named by its hub id)"
        )
    return NNsightModel(model, tokenizer=tokenizer, name=name, remote=remote, **chat)


of_nnsight = from_package("nnsight")
register_backend("nnsight", wraps=of_nnsight, make=_make, remote=True)
