"""Optimizing directions of the residual stream by what they do to refusal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from kvgeom.checks import MOST_DRAWS, as_seed, number, suggests, whole
from kvgeom.errors import InputError, brief
from kvgeom.evaluation.inputs import as_tokens
from kvgeom.evaluation.scores import kl_divergence, margin
from kvgeom.geometry.interventions import ablate, add
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.progress import bar, shown

#: Share of the layers, at both ends, after which nothing is added: too near to the input and to the output tokens.
ENDS = 0.2
#: Prompts on which the layer is chosen, and those on which the start and the end are compared.
FEW, SOME = 4, 16
LOSSES = ("ablation", "addition", "retain")
#: After how many steps it is asked on which side a direction is to lie. Its ablation does not tell, and descent does not cross 0.
TURNS = 10


@dataclass(frozen=True)
class Optimized:
    """A cone, and how it was found.

    Attributes
    ----------
    basis : array [d_model, k]
        Orthonormal; every combination of its columns with coefficients that are not negative is in the cone.
    losses : array [steps, 3]
        Of every step, each before its weight, on the prompts of that step: of the ablation, the addition and what is to stay
        (nats).
    before, after : float
        The weighted loss on the same prompts, of the start and of ``basis``. ``basis`` is the start if no step was better.
    """

    basis: NDArray[np.float64]
    losses: NDArray[np.float64]
    before: float
    after: float


@suggests()
def optimize_cone(
    model: Model,
    harmful: Sequence[EncodedPrompt],
    harmless: Sequence[EncodedPrompt],
    tokens: Any,
    start: NDArray[np.floating],
    layer: int,
    length: float,
    *,
    steps: int = 60,
    batch: int = 4,
    samples: int = 2,
    rate: float = 0.25,
    weights: Sequence[float] = (1.0, 0.2, 1.0),
    seed: int = 0,
    progress: bool = True,
) -> Optimized:
    """Optimize a direction, or a cone of them, in the residual stream by what it does to refusal.

    Three losses are summed, each the mean over directions of the cone and prompts of a step:

    - ablation: ``-log(1 - p(R))`` of a harmful prompt with the direction ablated at every layer and token, with R the tokens
      that refusals begin with: the prompt is to be answered;
    - addition: ``-log p(R)`` of a harmless prompt with the direction added after one layer: it is to be refused;
    - retain: divergence of the next-token distribution of a harmless prompt under the ablation: nothing else is to change.

    The directions are the columns of the basis and, of more than one, ``samples`` random ones between them. Adam descends;
    after every step the columns are made orthonormal again. Costs, per step and prompt of each class, a forward and a
    backward pass for every direction, and another for harmless prompts.

    Parameters
    ----------
    model : Model
    harmful, harmless : sequence of EncodedPrompt
    tokens : iterable of int
        The set R of :func:`kvgeom.evaluation.scores.refusal_tokens`.
    start : array [d_model, k]
        Where to begin; made orthonormal.
    layer : int
        After which a direction is added.
    length : float
        Of what is added.
    steps : int
    batch : int
        Prompts of each class in a step.
    samples : int
    rate : float
        How far a direction may turn in the first step (radians), which makes Adam's learning rate that over the root of
        ``d_model``; it falls to a tenth, as a cosine.
    weights : three numbers
        Of the losses, in this order.
    seed : int
        Of the prompts of each step, and of the directions between the columns.
    progress : bool

    Raises
    ------
    InputError
        Without prompts of both classes or tokens, or for a start, layer or number that cannot be used.

    References
    ----------
    Refusal direction optimization and concept cones, Wollschlaeger et al., arXiv:2502.17420, section 4. There the answers that the
    two interventions are to bring about are texts of 30 tokens, and divergence is taken over another such text. Here the event is
    that a refusal begins, and divergence is that of its first token: no text needs to be generated, and the length of an answer
    does not weigh.
    """
    directions = np.asarray(start, dtype=np.float64)
    width = model.geometry.d_model
    if directions.ndim != 2 or len(directions) != width or not np.isfinite(directions).all():
        raise InputError(f"start must be finite and of shape [{width}, k], got {list(directions.shape)}")
    r = as_tokens(model, tokens)
    if not r or not harmful or not harmless:
        raise InputError(
            "a cone needs the tokens that refusals begin with, harmful and harmless prompts, got "
            f"{len(r)}, {len(harmful)} and {len(harmless)}"
        )
    steps, batch = whole("steps", steps, 1, MOST_DRAWS), whole("batch", batch, 1, MOST_DRAWS)
    samples = whole("samples", samples, 0, MOST_DRAWS)
    layer = whole("layer", layer, 0, model.geometry.layers - 1)
    rate, length = as_positive("rate", rate), as_positive("length", length)
    weighted = as_weights(weights)
    generator = torch.Generator().manual_seed(as_seed(seed))
    basis = torch.linalg.qr(torch.from_numpy(directions).float())[0]
    basis = (basis * torch.sign((basis * torch.from_numpy(directions).float()).sum(0))).to(model.device)
    parts = _Losses(model, r, layer, length)
    rate /= math.sqrt(width)
    optimizer = torch.optim.Adam([basis.requires_grad_()], lr=rate)
    losses = np.zeros((steps, len(LOSSES)))
    start_basis = basis.detach().clone()
    looked_at = [list(prompts[:SOME]) for prompts in (harmful, harmless)]
    size = basis.shape[1]
    between = samples if size > 1 else 0
    with shown(progress), bar("optimizing the cone", steps) as drawn:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * (0.55 + 0.45 * math.cos(math.pi * step / steps))
            mix = _mix(size, between, generator).to(basis.device)
            chosen = [_drawn(prompts, batch, generator) for prompts in (harmful, harmless)]
            if step % TURNS == 0:
                _turn(basis, parts.wrong_sides(basis, chosen[1]), optimizer)
            losses[step], gradient = parts.gradient(basis, mix, chosen[0], chosen[1], weighted)
            # Along a column only its length would change.
            basis.grad = gradient - basis.detach() * (basis.detach() * gradient).sum(0)
            optimizer.step()
            with torch.no_grad():
                basis.copy_(_orthonormal(basis))
            drawn.update(1)
            drawn.set_postfix_str(f"loss {float(losses[step] @ weighted):.3g}")
        fixed = _mix(size, between, torch.Generator().manual_seed(seed)).to(basis.device)
        before, after = (
            float(parts.value(each.detach(), fixed, looked_at[0], looked_at[1]) @ weighted)
            for each in (start_basis, basis)
        )
    kept = basis.detach() if after < before else start_basis
    return Optimized(kept.double().cpu().numpy(), losses, before, min(before, after))


class _Losses:
    """The three losses of directions, and their gradient."""

    def __init__(self, model: Model, tokens: frozenset[int], layer: int, length: float) -> None:
        self.model, self.tokens, self.layer, self.length = model, tokens, layer, length
        self._clean: dict[tuple[int, ...], Tensor] = {}

    def gradient(
        self,
        basis: Tensor,
        mix: Tensor,
        harmful: Sequence[EncodedPrompt],
        harmless: Sequence[EncodedPrompt],
        weights: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], Tensor]:
        """Losses ``[3]`` of a step, and the derivative of their weighted sum by the basis."""
        found, total = np.zeros(len(LOSSES)), torch.zeros_like(basis)
        for prompts, score, edit, rows in self._runs(basis, mix, harmful, harmless):
            for prompt in prompts:
                seen: list[NDArray[np.float64]] = []

                def weighted(
                    logits: Tensor, prompt: EncodedPrompt = prompt, score: Any = score, seen: Any = seen
                ) -> Tensor:
                    losses: Tensor = score(logits, prompt) / len(prompts)  # noqa: B023
                    seen.append(losses.detach().double().cpu().numpy())
                    return (losses * torch.from_numpy(weights).to(losses)).sum()

                _, (gradient,) = self.model.derivatives(prompt.ids, weighted, [basis], variants=rows, edit_resid=edit)
                total += gradient
                found += seen[0]
        return found, total

    @torch.no_grad()
    def value(
        self, basis: Tensor, mix: Tensor, harmful: Sequence[EncodedPrompt], harmless: Sequence[EncodedPrompt]
    ) -> NDArray[np.float64]:
        """Losses ``[3]``, without a gradient."""
        found = np.zeros(len(LOSSES))
        for prompts, score, edit, rows in self._runs(basis, mix, harmful, harmless):
            for prompt in prompts:
                logits = self.model.forward_variants(prompt.ids, rows, edit_resid=edit)
                found += score(logits, prompt).double().cpu().numpy() / len(prompts)
        return found

    @torch.no_grad()
    def wrong_sides(self, basis: Tensor, harmless: Sequence[EncodedPrompt]) -> Tensor:
        """Which columns cause less refusal when they are added than when they are subtracted, ``[k]``."""
        both = self.length * torch.cat([basis, -basis], dim=1).T
        rows = len(both)
        found = torch.zeros(rows, device=basis.device)
        for prompt in harmless:
            logits = self.model.forward_variants(prompt.ids, rows, edit_resid=add(both, self.layer))
            found += softplus(-margin(logits, self.tokens))
        wrong: Tensor = found[: rows // 2] > found[rows // 2 :]
        return wrong

    def _runs(
        self, basis: Tensor, mix: Tensor, harmful: Sequence[EncodedPrompt], harmless: Sequence[EncodedPrompt]
    ) -> list[tuple[Sequence[EncodedPrompt], Any, Any, int]]:
        """Prompts of a class, what is scored of their logits, the edit, and its rows."""
        count = mix.shape[1]
        for prompt in harmless:  # before any edit is in place
            if prompt.ids not in self._clean:
                # A copy: what is computed in inference mode cannot be part of a graph.
                self._clean[prompt.ids] = self.model.forward(prompt.ids)[-1:].clone()

        def units() -> Tensor:
            directions = (basis @ mix).T  # anew for every pass, whose graph is gone after it
            found: Tensor = directions / directions.norm(dim=1, keepdim=True)
            return found

        def ablated(layer: int, point: Literal["pre", "attn", "post"], x: Tensor) -> Tensor:
            return ablate(units())(layer, point, x)

        def both(layer: int, point: Literal["pre", "attn", "post"], x: Tensor) -> Tensor:
            lost = ablate(units())(layer, point, x[:count])
            more = add(self.length * units(), self.layer)(layer, point, x[count:])
            joined: Tensor = torch.cat([lost, more])
            return joined

        def of_harmful(logits: Tensor, prompt: EncodedPrompt) -> Tensor:
            lost = softplus(margin(logits, self.tokens)).mean()
            return torch.stack([lost, torch.zeros_like(lost), torch.zeros_like(lost)])

        def of_harmless(logits: Tensor, prompt: EncodedPrompt) -> Tensor:
            retain = kl_divergence(self._clean[prompt.ids], logits[:count]).mean()
            addition = softplus(-margin(logits[count:], self.tokens)).mean()
            return torch.stack([torch.zeros_like(retain), addition, retain])

        return [(harmful, of_harmful, ablated, count), (harmless, of_harmless, both, 2 * count)]


@torch.no_grad()
def _turn(basis: Tensor, columns: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Turn some columns around, and what Adam remembers of their gradients."""
    sign = torch.where(columns, -1.0, 1.0).to(basis)
    basis.mul_(sign)
    if basis in optimizer.state:
        optimizer.state[basis]["exp_avg"].mul_(sign)


def _mix(size: int, samples: int, generator: torch.Generator) -> Tensor:
    """Coefficients ``[k, k + samples]``: every column alone, and random directions between them."""
    some = torch.randn(size, samples, generator=generator).abs()
    return torch.cat([torch.eye(size), some], dim=1)


def _drawn(prompts: Sequence[EncodedPrompt], count: int, generator: torch.Generator) -> list[EncodedPrompt]:
    return [prompts[int(index)] for index in torch.randperm(len(prompts), generator=generator)[:count]]


def _orthonormal(basis: Tensor) -> Tensor:
    """Columns made orthonormal one after the other, each on its own side."""
    q, r = torch.linalg.qr(basis.detach())
    signed: Tensor = q * torch.sign(torch.diagonal(r))
    return signed


def as_positive(name: str, value: Any) -> float:
    """A positive and finite number; raises for what is none."""
    found = number(name, value)
    if not 0 < found < math.inf:
        raise InputError(f"{name} must be a positive number, got {brief(value)}")
    return found


def as_weights(given: Any) -> NDArray[np.float64]:
    """Weights of the three losses; raises where they are none."""
    try:
        found = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        found = np.zeros(0)
    if found.shape != (len(LOSSES),) or not (np.isfinite(found) & (found >= 0)).all() or not found.any():
        raise InputError(
            f"weights must be {len(LOSSES)} numbers, not negative, for {', '.join(LOSSES)}, got {brief(given)}"
        )
    return found


def adding_layer(
    model: Model, gaps: NDArray[np.floating], harmless: Sequence[EncodedPrompt], tokens: frozenset[int]
) -> int:
    """The layer after which adding the class difference brings about most refusal, not too near to either end.

    Parameters
    ----------
    model : Model
    gaps : array [layers, d_model]
        Class differences of the residual stream after each layer.
    harmless : sequence of EncodedPrompt
    tokens : set of int
    """
    layers = model.geometry.layers
    low, high = math.ceil(ENDS * layers), max(math.floor((1 - ENDS) * layers), math.ceil(ENDS * layers) + 1)
    candidates = [layer for layer in range(low, min(high, layers)) if np.linalg.norm(gaps[layer]) > 0]
    candidates = candidates or [layer for layer in range(layers) if np.linalg.norm(gaps[layer]) > 0]
    if not candidates:
        raise InputError(
            "harmful and harmless requests coincide in the residual stream of all layers; give other requests"
        )
    shifts = torch.from_numpy(np.asarray(gaps[candidates], dtype=np.float32))
    induced = torch.zeros(len(candidates), dtype=torch.float64)
    for prompt in harmless[:FEW]:
        logits = model.forward_variants(prompt.ids, len(candidates), edit_resid=add(shifts, candidates))
        induced += margin(logits, tokens).double().cpu()
    return candidates[int(induced.argmax())]
