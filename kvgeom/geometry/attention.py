"""What rounding keys and values does to attention: the errors that it can see, next to those that it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from kvgeom.checks import at_coordinates, suggests
from kvgeom.evaluation.config import LOAD_OPTIONS
from kvgeom.evaluation.inputs import made_with, opened
from kvgeom.geometry.rounding import DEFAULT_SCHEME, CacheSpec, Rounding
from kvgeom.models.attention import scores, seen, weights
from kvgeom.models.model import AttentionRule
from kvgeom.models.reading import read
from kvgeom.progress import shown, track
from kvgeom.quant.placement import Placement
from kvgeom.results import Result

VARIABLES = ("key_mse", "value_mse", "score_error", "attended_score_error", "attended_value_error")


@dataclass(frozen=True, repr=False)
class AttentionError(Result):
    """Rounding error of keys and values as attention sees it. Made by :func:`attention_error`.

    ``data`` has the dimensions ``layer``, ``head`` (query head) and ``queries`` (``"all"`` tokens, or the ``"last"``
    alone, from which the first response token is predicted) and the variables

    - ``key_mse``, ``value_mse``: sum of squared errors over sum of squares, of the KV head that the query head reads;
    - ``score_error`` (nats): root mean variance of the error of the attention scores over the tokens that a query
      attends to. A shift of all scores of a query is no error: softmax does not see it;
    - ``attended_score_error`` (nats): the same with tokens weighted by their attention. Half its square is, to leading
      order, the KL divergence of the rounded attention from the exact one;
    - ``attended_value_error``: squared error of the head's output when values alone are rounded (errors averaged
      under the exact attention), over the squared output.
    """

    kind: ClassVar[str] = "attention-error"

    def by_layer(self, queries: str = "all") -> xr.Dataset:
        """Every variable by layer: root mean square of score errors, mean of relative errors, over heads."""
        at_coordinates(self.data, queries=queries)
        data = self.data.sel(queries=queries)
        squares = {name: np.sqrt((data[name] ** 2).mean("head")) for name in VARIABLES if "score" in name}
        means = {name: data[name].mean("head") for name in VARIABLES if "score" not in name}
        return xr.Dataset({**means, **squares})

    def summary(self) -> str:
        return f"{self.data.sizes['layer']} layers x {self.data.sizes['head']} query heads under {self.meta['scheme']}"


@suggests(LOAD_OPTIONS)
def attention_error(
    model: Any,
    prompts: Any,
    scheme: CacheSpec = DEFAULT_SCHEME,
    *,
    placement: Placement | str | None = None,
    progress: bool = True,
    **load_options: Any,
) -> AttentionError:
    """Measure the error of attention scores and outputs under rounding. Costs one forward pass a prompt.

    Every layer's exact queries meet its exact keys and values, and those rounded as a cache stores them; errors do not
    add up from layer to layer. Sites that a recipe leaves exact have no error.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts : EncodedPrompts, requests, or the name of a set
    scheme : CacheConfig, Recipe, Scheme or str
        Anything that :func:`kvgeom.engines.registry.resolve` takes; see :class:`~kvgeom.geometry.rounding.Rounding`.
        3-bit symmetric per-tensor by default.
    placement : Placement or {"cache"}, optional
        Instead of the preset's, or of the decode-faithful default.
    **load_options
        Of :func:`kvgeom.load`.

    Raises
    ------
    InputError
        Without prompts, if ``scheme`` cannot be resolved, or for a placement at the projection.
    """
    model, prompts = opened(model, prompts, load_options, progress)
    rounding = Rounding.in_cache(model, scheme, placement)
    geometry = model.geometry
    shape = (len(geometry.stores), geometry.query_heads, 2)
    sums = {name: np.zeros(shape) for name in (*VARIABLES, "k2", "v2", "out2", "queries")}
    with shown(progress):
        for prompt in track(prompts, "attention error", len(prompts)):
            for row, found in enumerate(read(model, prompt, queries=True)):
                layer = found.layer
                k_error, v_error = rounding.errors(found)
                exact = (found.queries, found.k[0].float(), found.v[0].float())
                for name, values in errors(*exact, k_error, v_error, model.attention(layer)).items():
                    sums[name][row] += values
    with np.errstate(divide="ignore", invalid="ignore"):
        means = {
            "key_mse": sums["key_mse"] / sums["k2"],
            "value_mse": sums["value_mse"] / sums["v2"],
            "score_error": np.sqrt(sums["score_error"] / sums["queries"]),
            "attended_score_error": np.sqrt(sums["attended_score_error"] / sums["queries"]),
            "attended_value_error": sums["attended_value_error"] / sums["out2"],
        }
    data = xr.Dataset(
        {name: (("layer", "head", "queries"), values) for name, values in means.items()},
        coords={
            "layer": list(geometry.stores),
            "head": np.arange(geometry.query_heads),
            "queries": ["all", "last"],
        },
    )
    meta = {
        **made_with(model, [prompt.text for prompt in prompts]),
        **rounding.made,
        "prompts": len(prompts),
        "kv_heads": geometry.kv_heads,
    }
    return AttentionError(data, meta)


@suggests(LOAD_OPTIONS)
def attention_to_request(model: Any, prompts: Any, **load_options: Any) -> NDArray[np.float64]:
    """Attention that the last prompt token, which begins the response, pays to the tokens of the request, by layer.

    Costs one forward pass a prompt.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts : EncodedPrompts, requests, or the name of a set
    **load_options
        Of :func:`kvgeom.load`.

    Returns
    -------
    array [layers that store keys and values]
        Share of the attention, mean over query heads and prompts.

    Raises
    ------
    InputError
        Without prompts.
    """
    model, prompts = opened(model, prompts, load_options)
    shares = np.zeros(len(model.geometry.stores))
    for prompt in prompts:
        for row, found in enumerate(read(model, prompt, queries=True)):
            q, k, rule = found.queries[:, -1:].float(), found.k[0].float(), model.attention(found.layer)
            paid = weights(scores(q, k.repeat_interleave(q.shape[0] // k.shape[0], 0), rule), rule)[:, 0]
            shares[row] += float(paid[:, prompt.instruction].sum(-1).mean())
    return shares / len(prompts)


def errors(
    q: Tensor, k: Tensor, v: Tensor, k_error: Tensor, v_error: Tensor, rule: AttentionRule
) -> dict[str, NDArray[np.float64]]:
    """Sums over the queries of one prompt at one layer, over all of them and for the last.

    Parameters
    ----------
    q : Tensor [query_heads, tokens, head_dim]
        In the frame of ``k``.
    k, v, k_error, v_error : Tensor [kv_heads, tokens, head_dim]
    rule : AttentionRule

    Returns
    -------
    dict of str to array [query_heads, 2]
        Squared errors ``key_mse``, ``value_mse`` with their denominators ``k2``, ``v2`` (over the tokens);
        variances ``score_error``, ``attended_score_error`` with the number of ``queries``; ``attended_value_error``
        with ``out2``.
    """
    group = q.shape[0] // k.shape[0]
    k, v, k_error, v_error = (x.repeat_interleave(group, 0) for x in (k, v, k_error, v_error))
    exact = scores(q, k, rule)
    error = scores(q, k + k_error, rule) - exact
    paid = weights(exact, rule)
    output, output_error = paid @ v, paid @ v_error
    even = seen(q.shape[1], q.shape[1], rule).to(exact)
    even = even / even.sum(-1, keepdim=True)

    def both(x: Tensor) -> NDArray[np.float64]:
        """[heads, tokens] -> [heads, 2]: sum of all, and the last."""
        values = x.double()
        return torch.stack([values.sum(-1), values[:, -1]], -1).cpu().numpy()

    def plain(x: Tensor) -> NDArray[np.float64]:
        total = (x**2).double().sum((1, 2))
        return torch.stack([total, total], -1).cpu().numpy()

    return {
        "key_mse": plain(k_error),
        "value_mse": plain(v_error),
        "k2": plain(k),
        "v2": plain(v),
        "score_error": both(variance(even, error, rule)),
        "attended_score_error": both(variance(paid, error, rule)),
        "queries": both(torch.ones(q.shape[:2], device=q.device)),
        "attended_value_error": both((output_error**2).sum(-1)),
        "out2": both((output**2).sum(-1)),
    }


def variance(paid: Tensor, x: Tensor, rule: AttentionRule) -> Tensor:
    """Variance of ``x`` over the last axis under attention; what sinks get has 0."""
    mean = (paid * x).sum(-1, keepdim=True)
    around = (paid * (x - mean) ** 2).sum(-1)
    if rule.sinks is None:  # what is left of 1 is rounding then
        return around
    return around + (1 - paid.sum(-1)) * mean[..., 0] ** 2
