"""Derivatives with respect to what edits of a pass read, of models that run in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvgeom.models.cache import Edit
    from kvgeom.models.model import ResidEdit


class Differentiable:
    """Part of a backend that runs torch modules: :meth:`kvgeom.models.model.Model.derivatives`."""

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
        """As :meth:`kvgeom.models.model.Model.derivatives`."""
        own: Any = self
        tokens = torch.tensor([list(ids)], device=own.device).expand(variants, -1)
        positions = torch.arange(tokens.shape[1], device=own.device).expand(variants, -1)
        with torch.enable_grad(), own._observed(None, edit_resid, None):
            logits = own._run(tokens, own.new_cache(edit), positions, None, 1)
            value = score(logits[:, -1])
            found = torch.autograd.grad(value, list(inputs), allow_unused=True)
        return float(value.detach()), tuple(
            torch.zeros_like(x) if g is None else g.detach() for x, g in zip(inputs, found, strict=True)
        )
