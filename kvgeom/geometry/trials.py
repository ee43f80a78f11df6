"""Running many interventions on a prompt at once, as rows of few batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvgeom.evaluation.scores import kl_divergence, margin
from kvgeom.geometry.activations import Site
from kvgeom.geometry.bases import along, oriented
from kvgeom.geometry.estimators import estimate
from kvgeom.geometry.fitted import FittedSpace
from kvgeom.geometry.interventions import CacheDirections, CacheSite, Change, ablate_subspaces, add
from kvgeom.geometry.methods.mean import difference_of_means, paired_differences
from kvgeom.models.batching import in_batches, rows_per_batch
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.progress import bar

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """What is done in one layer and site.

    Attributes
    ----------
    basis : array [channels, k]
        Is ablated.
    level : array [channels]
        The harmless mean: what is left along the basis in keys and values.
    shift : array [channels]
        Is added.
    """

    basis: Floats
    level: Floats
    shift: Floats


@dataclass(frozen=True)
class Trial:
    """One intervention, and where its numbers go.

    Attributes
    ----------
    prefix : str
        Of the names of its variables.
    at : tuple of int
        Index in them.
    site : {"k", "v", "resid"}
    parts : mapping of int to Part
        By layer; of the residual stream one.
    """

    prefix: str
    at: tuple[int, ...]
    site: Site
    parts: Mapping[int, Part]


@dataclass
class Outcome:
    """Numbers of trials: by prefix, name and index."""

    clean_margin: Floats
    clean_refuses: Floats
    numbers: dict[tuple[str, str], dict[tuple[int, ...], Floats]] = field(default_factory=lambda: defaultdict(dict))

    def of(self, prefix: str, name: str) -> Iterator[tuple[tuple[int, ...], Floats]]:
        """Index and values of one variable."""
        yield from self.numbers[prefix, name].items()


def parts_of_space(space: FittedSpace, layer: int, site: Site) -> Part | None:
    """The direction of one layer and site of a subspace; None where it is undefined."""
    found = space.directions[layer, site]
    if not found.defined or not found.basis.any():
        return None
    x = space.features(layer, site)[:, space.positions.index(found.position)]
    gap = difference_of_means(x, space.is_harmful)
    shift = (along(gap, found.basis) * float(np.linalg.norm(gap))).astype(np.float64)
    return Part(found.basis, x[~space.is_harmful].mean(0), shift)


def parts_of_heads(space: FittedSpace, layer: int, site: Site) -> list[Part | None] | None:
    """The direction of every KV head alone, found in its channels by the same method; None where it is undefined."""
    found = space.directions[layer, site]
    if not found.defined:
        return None
    x, harmful = space.features(layer, site)[:, space.positions.index(found.position)], space.is_harmful
    method, heads = space.by, space.model.geometry.kv_heads
    size, pairs = x.shape[1] // heads, int(min(harmful.sum(), (~harmful).sum()))
    parts: list[Part | None] = []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        gap = difference_of_means(x[:, own], harmful)
        if method.needs_model:  # what of its directions lies in the head
            basis = oriented(found.basis[own], None)
        else:
            basis = estimate(x[:, own], harmful, method, min(space.k, method.most(1, pairs)))
        if not basis.any() or not gap.any():
            parts.append(None)
            continue
        wide, shift, level = (np.zeros((x.shape[1], *more)) for more in ((basis.shape[1],), (), ()))
        wide[own], shift[own] = basis, along(gap, basis) * float(np.linalg.norm(gap))
        level[own] = x[~harmful, own].mean(0)
        parts.append(Part(wide, level, shift))
    return parts


def random_part(like: Part, k: int, rng: np.random.Generator) -> Part:
    """A random subspace of ``k`` dimensions in the channels that a part touches, added at the same length."""
    channels = np.flatnonzero(like.basis.any(1))
    k = min(k, len(channels))
    basis = np.zeros((len(like.level), k))
    basis[channels] = np.linalg.qr(rng.standard_normal((len(channels), k)))[0]
    return Part(basis, like.level, basis[:, 0] * float(np.linalg.norm(like.shift)))


def dealt_part(like: Part, k: int, rng: np.random.Generator, x: Floats, harmful: NDArray[np.bool_]) -> Part:
    """Differences of means with the labels of half of the pairs swapped, in the channels that a part touches.

    What all pairs have in common cancels; what is left is along directions in which requests differ, by whatever they differ.

    Parameters
    ----------
    like : Part
        Of the same length is what is added.
    k : int
        Such differences, made orthonormal.
    rng : numpy.random.Generator
    x : array [prompts, channels]
    harmful : bool array [prompts]
    """
    differences = paired_differences(x, harmful) * like.basis.any(1)
    pairs = len(differences)
    # More than are needed: of few pairs, two may have the same labels, or the opposite ones.
    signs = np.where(np.argsort(rng.random((4 * k, pairs)), axis=1) < pairs // 2, -1.0, 1.0)
    basis = oriented((signs @ differences).T / pairs, None)[:, :k]
    basis64 = basis.astype(np.float64)
    return Part(basis64, like.level, basis64[:, 0] * float(np.linalg.norm(like.shift)))


def trials_of(
    spaces: Sequence[FittedSpace],
    layers: Sequence[int],
    sites: Sequence[Site],
    heads: bool,
    controls: int,
    control: str,
    seed: int,
) -> Iterator[Trial]:
    """Everything that is tried, each with the variable and the place that its numbers go to."""
    cached = [site for site in sites if site != "resid"]
    rng = np.random.default_rng(seed)
    kv_heads = spaces[0].model.geometry.kv_heads

    def beside(parts: Sequence[Part | None], layer: int, site: Site) -> list[Part]:
        like = next((part for part in parts if part is not None), None)
        if like is None:
            return []
        most = max(part.basis.shape[1] for part in parts if part is not None)
        if control == "random":
            return [random_part(like, most, rng) for _ in range(controls)]
        found = spaces[0].directions[layer, site]
        x = spaces[0].features(layer, site)[:, spaces[0].positions.index(found.position)]
        return [dealt_part(like, most, rng, x, spaces[0].is_harmful) for _ in range(controls)]

    for s, site in enumerate(sites):
        every: list[list[dict[int, Part]]] = [[{} for _ in spaces], [{} for _ in range(controls)]]
        for row, layer in enumerate(layers):
            parts = [parts_of_space(one, layer, site) for one in spaces]
            random = beside(parts, layer, site)
            named: list[tuple[str, Sequence[Part | None]]] = [("", parts), ("control_", random)]
            for kind, (name, some) in enumerate(named):
                for number, part in enumerate(some):
                    if part is not None:
                        every[kind][number][layer] = part
                        yield Trial(name, (number, row, s), site, {layer: part})
            if heads and site != "resid":
                by_head = [parts_of_heads(one, layer, site) for one in spaces]
                for head in range(kv_heads):
                    own = [None if part is None else part[head] for part in by_head]
                    random = beside(own, layer, site)
                    named = [("head_", own), ("head_control_", random)]
                    for name, some in named:
                        for number, part in enumerate(some):
                            if part is not None:
                                yield Trial(name, (number, row, cached.index(site), head), site, {layer: part})
        if site != "resid":
            for name, all_layers in zip(("together_", "together_control_"), every, strict=True):
                for number, together in enumerate(all_layers):
                    if together:
                        yield Trial(name, (number, cached.index(site)), site, together)


def run_trials(
    model: Model,
    prompts: Sequence[EncodedPrompt],
    harmful: int,
    trials: Sequence[Trial],
    tokens: frozenset[int],
    where: str,
) -> Outcome:
    """Ablate in the first ``harmful`` prompts; ablate, and add, in the others.

    Parameters
    ----------
    model : Model
    prompts : sequence of EncodedPrompt
        The harmful ones first.
    harmful : int
    trials : sequence of Trial
    tokens : set of int
        With which refusals begin.
    where : {"cache", "projection"}
        The frame of keys and values.
    """
    count = len(prompts)
    found = Outcome(np.zeros(count), np.zeros(count))
    for trial in trials:
        for name in ("margin", "refuses"):
            found.numbers[trial.prefix, name][trial.at] = np.full(count, np.nan)
        found.numbers[trial.prefix, "kl"][trial.at] = np.array(0.0)
    refusing = torch.tensor(sorted(tokens))
    total = harmful * len(trials) + 2 * (count - harmful) * len(trials)
    with bar("ablating and adding directions", total) as drawn:
        for row, prompt in enumerate(prompts):
            resid: dict[int, Tensor] = {}
            clean = model.forward(prompt.ids, on_resid=resid.__setitem__)[-1]
            found.clean_margin[row] = float(margin(clean, tokens))
            found.clean_refuses[row] = float(int(clean.argmax()) in tokens)
            for adding in (False,) if row < harmful else (False, True):
                for part, logits in _rows(model, prompt, trials, adding, resid, where):
                    margins = margin(logits, tokens).double().cpu().numpy()
                    refuses = torch.isin(logits.argmax(-1).cpu(), refusing).double().numpy()
                    divergence = kl_divergence(clean, logits).double().cpu().numpy()
                    for number, trial in enumerate(part):
                        if row < harmful or adding:
                            found.numbers[trial.prefix, "margin"][trial.at][row] = margins[number]
                            found.numbers[trial.prefix, "refuses"][trial.at][row] = refuses[number]
                        else:
                            found.numbers[trial.prefix, "kl"][trial.at] += divergence[number] / (count - harmful)
                    drawn.update(len(part))
    return found


def _rows(
    model: Model,
    prompt: EncodedPrompt,
    trials: Sequence[Trial],
    adding: bool,
    resid: Mapping[int, Tensor],
    where: str,
) -> Iterator[tuple[Sequence[Trial], Tensor]]:
    """Trials and the logits of their rows, a batch at a time."""
    rows = rows_per_batch(model, len(prompt), 1)
    in_stream = [trial for trial in trials if trial.site == "resid"]
    in_cache = sorted((trial for trial in trials if trial.site != "resid"), key=lambda trial: min(trial.parts))
    if adding:
        for layer in sorted({min(trial.parts) for trial in in_stream}):
            here = [trial for trial in in_stream if min(trial.parts) == layer]
            yield from in_batches(here, rows, _adding(model, prompt, layer, resid))
    else:
        # Subspaces of a batch have as many dimensions.
        for k in sorted({_dimensions(trial) for trial in in_stream}):
            here = [trial for trial in in_stream if _dimensions(trial) == k]
            yield from in_batches(here, rows, _ablating(model, prompt))
    yield from in_batches(in_cache, rows, _caching(model, prompt, adding, where))


def _dimensions(trial: Trial) -> int:
    (part,) = trial.parts.values()
    return int(part.basis.shape[1])


def _ablating(model: Model, prompt: EncodedPrompt) -> Callable[[Sequence[Trial]], Tensor]:
    def run(part: Sequence[Trial]) -> Tensor:
        bases = np.stack([one.basis for trial in part for one in trial.parts.values()])
        edit = ablate_subspaces(torch.from_numpy(bases.astype(np.float32)))
        return model.forward_variants(prompt.ids, len(part), edit_resid=edit)

    return run


def _adding(
    model: Model, prompt: EncodedPrompt, layer: int, resid: Mapping[int, Tensor]
) -> Callable[[Sequence[Trial]], Tensor]:
    def run(part: Sequence[Trial]) -> Tensor:
        shifts = np.stack([one.shift for trial in part for one in trial.parts.values()])
        edit = add(torch.from_numpy(shifts.astype(np.float32)), layer)
        # A start hands one residual stream to all rows, so it begins at the layer itself and the edit follows it.
        start = (layer, resid[layer - 1]) if layer else None
        return model.forward_variants(prompt.ids, len(part), edit_resid=edit, start=start)

    return run


def _caching(model: Model, prompt: EncodedPrompt, adding: bool, where: str) -> Callable[[Sequence[Trial]], Tensor]:
    def run(part: Sequence[Trial]) -> Tensor:
        first = [min(trial.parts) for trial in part]
        # One edit of all rows, the first of which is left as it is: an edit for each would be asked in turn.
        edit = CacheDirections([{}, *(changes_of(trial.site, trial.parts, adding) for trial in part)], where)
        edits = [edit] * len(part)
        return model.forward_branches(prompt.ids, edits, first, cache=model.new_cache(edit))[1:, -1]

    return run


def changes_of(site: Site, parts: Mapping[int, Part], adding: bool) -> dict[tuple[int, CacheSite], Change]:
    """What ablates or adds directions in keys or values, by layer."""
    if site == "resid":
        raise ValueError("the residual stream is in no cache")
    return {
        (layer, site): Change.addition(part.shift) if adding else Change.ablation(part.basis, part.level)
        for layer, part in parts.items()
    }
