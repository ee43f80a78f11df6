"""Choosing the refusal direction by what it does when it is taken out of the residual stream, or put in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from kvgeom.checks import as_names, number, suggests, whole
from kvgeom.errors import InputError, brief
from kvgeom.evaluation.config import LOAD_OPTIONS
from kvgeom.evaluation.inputs import as_encoded, as_tokens, made_with, opened
from kvgeom.evaluation.respond import respond
from kvgeom.evaluation.scores import kl_divergence, margin, refusal_tokens
from kvgeom.geometry.estimators import defined_at
from kvgeom.geometry.fitted import FittedSpace
from kvgeom.geometry.interventions import ablate, add
from kvgeom.geometry.methods.mean import difference_of_means
from kvgeom.geometry.steering import label_openings
from kvgeom.judges.judge import Judge
from kvgeom.judges.registry import as_judge
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.progress import bar, shown, track
from kvgeom.results import Result

#: Longest response that is read to find out what refusals begin with.
OPENING = 24


@dataclass(frozen=True, repr=False)
class Selection(Result):
    """What every candidate direction does to refusal, and which one is chosen. Made by :func:`select`.

    ``data`` has the dimensions ``layer`` and ``position`` and the variables

    - ``bypass`` (nats): mean refusal margin of harmful prompts with the candidate ablated; low is good;
    - ``induce`` (nats): mean margin of harmless prompts with the candidate added after its layer; high is good;
    - ``kl`` (nats): mean Kullback-Leibler divergence of the ablated from the clean next-token distribution on harmless
      prompts; low is good;
    - ``filtered``: why a candidate is out of the question, ``""`` if it is not;
    - ``direction`` over (layer, position, channel): the candidates, in the units of the residual stream.

    ``meta`` holds ``chosen`` (layer and position, or None), ``clean_margin_harmful``, ``clean_margin_harmless`` and
    the limits of the filters.

    References
    ----------
    Arditi et al., arXiv:2406.11717, section 2.3 and appendix C. There a candidate is named by the layer that it
    enters, here by the layer that it leaves.
    """

    kind: ClassVar[str] = "selection"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "candidates": ("layer", "position"),
        "channels": ("layer", "position", "channel"),
    }

    @property
    def chosen(self) -> tuple[int, str] | None:
        """Layer and position of the chosen candidate, None if the filters left none."""
        found = self.meta["chosen"]
        return None if found is None else (int(found[0]), str(found[1]))

    @property
    def direction(self) -> NDArray[np.float64]:
        """The chosen direction, ``[d_model]``, in the units of the residual stream.

        Raises
        ------
        InputError
            If the filters left no candidate.
        """
        layer, position = self._chosen()
        found: NDArray[np.float64] = self.data.direction.sel(layer=layer, position=position).values.astype(np.float64)
        return found

    @property
    def layer(self) -> int:
        """After which layer the chosen direction was found."""
        return self._chosen()[0]

    def _chosen(self) -> tuple[int, str]:
        if self.chosen is None:
            reasons = sorted({str(reason) for reason in self.data.filtered.values.ravel()})
            raise InputError(
                f"no direction is chosen: every candidate is filtered out ({'; '.join(reasons)}); "
                "look at .plot(), and relax max_kl, min_induce or last_layers if they are too strict for this model"
            )
        return self.chosen

    def summary(self) -> str:
        kept = int((self.data.filtered == "").sum())
        where = "none chosen" if self.chosen is None else f"chosen layer {self.chosen[0]}, {self.chosen[1]}"
        return f"{self.data.filtered.size} candidates, {kept} pass the filters, {where}"


@suggests(LOAD_OPTIONS)
def select(
    model: Any,
    candidates: NDArray[np.floating],
    positions: Sequence[str],
    harmful: Any,
    harmless: Any,
    refusal_tokens: Iterable[int],
    *,
    max_kl: float = 0.1,
    min_induce: float | None = None,
    last_layers: float = 0.2,
    batch_size: int = 24,
    progress: bool = True,
    **load_options: Any,
) -> Selection:
    """Score every candidate direction by intervention, filter, and choose the best bypass.

    All candidates run through a prompt as rows of one batch. Ablation costs a pass per candidate and prompt of both
    classes, addition the part of one above the candidate's layer.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    candidates : array [layers, positions, d_model]
        Harmful minus harmless, of the residual stream after each layer; rows of zeros or NaN are undefined.
    positions : sequence of str
    harmful, harmless : sequence of EncodedPrompt
        Prompts that the candidates were not computed from.
    refusal_tokens : iterable of int
        The set R of :func:`kvgeom.evaluation.scores.refusal_tokens`.
    max_kl : float
        Limit (nats) of what a candidate may change in harmless prompts.
    min_induce : float, optional
        Margin (nats) that a candidate must bring about in harmless prompts. By default 0, even odds, as Arditi et al.
        have it; or the mean margin of the harmful prompts as they are, where the model refuses even these at less.
    last_layers : float
        Candidates from this share of the layers, the last ones, are filtered: too near to the output tokens.
    batch_size : int
        Candidates in one batch.
    **load_options
        Of :func:`kvgeom.load`.

    Raises
    ------
    InputError
        Without refusal tokens, prompts of both classes, or candidates in the model's shape.
    """
    model, harmful = opened(model, harmful, load_options, progress)
    harmless = as_encoded(model, harmless)
    tokens = as_tokens(model, refusal_tokens)
    max_kl, last_layers = number("max_kl", max_kl, 0), number("last_layers", last_layers, 0, 1)
    min_induce = None if min_induce is None else number("min_induce", min_induce)
    batch_size, layers, width = whole("batch_size", batch_size, 1), model.geometry.layers, model.geometry.d_model
    if not tokens or not harmful or not harmless:
        raise InputError(
            "a selection needs refusal tokens, harmful and harmless prompts, got "
            f"{len(tokens)}, {len(harmful)} and {len(harmless)}"
        )
    if candidates.shape != (layers, len(positions), width):
        raise InputError(
            f"candidates must have shape {(layers, len(positions), width)} (layers, positions, d_model), got "
            f"{candidates.shape}"
        )
    flat = candidates.reshape(-1, width)
    defined = np.isfinite(flat).all(1) & (np.linalg.norm(flat, axis=1) > 0)
    cells = np.flatnonzero(defined)
    bypass, induce, kl = np.zeros((3, len(flat)))
    chunks = [cells[i : i + batch_size] for i in range(0, len(cells), batch_size)]
    clean: dict[str, list[float]] = {"harmful": [], "harmless": []}
    total = (len(harmful) + 2 * len(harmless)) * len(chunks)
    with shown(progress), bar("selecting the refusal direction", total) as drawn:
        for prompt in harmful:
            clean["harmful"].append(float(margin(model.forward(prompt.ids)[-1], tokens)))
            for chunk in chunks:
                logits = _ablated(model, prompt, flat[chunk])
                bypass[chunk] += margin(logits, tokens).double().cpu().numpy() / len(harmful)
                drawn.update(1)
        for prompt in harmless:
            resid: dict[int, Tensor] = {}
            clean_logits = model.forward(prompt.ids, on_resid=resid.__setitem__)[-1]
            clean["harmless"].append(float(margin(clean_logits, tokens)))
            for chunk in chunks:
                found = kl_divergence(clean_logits, _ablated(model, prompt, flat[chunk]))
                kl[chunk] += found.double().cpu().numpy() / len(harmless)
                drawn.update(1)
                for logits, part in _added(model, prompt, flat, chunk // len(positions), chunk, resid):
                    induce[part] += margin(logits, tokens).double().cpu().numpy() / len(harmless)
                drawn.update(1)
    if min_induce is None:
        min_induce = min(0.0, float(np.mean(clean["harmful"])))
    reasons = np.full(len(flat), "", dtype=object)
    late = np.repeat(np.arange(layers), len(positions)) >= (1 - last_layers) * layers
    for failed, reason in (
        (induce <= min_induce, f"induces no refusal (at most {min_induce:.2g} nats)"),
        (kl > max_kl, f"changes harmless prompts (KL above {max_kl:g} nats)"),
        (late, f"in the last {100 * last_layers:.0f} % of the layers"),
        (~defined, "harmful and harmless coincide"),
    ):
        reasons[failed] = [f"{old}; {reason}" if old and defined[i] else reason for i, old in zip(np.flatnonzero(failed), reasons[failed], strict=True)]  # fmt: skip
    kept = np.flatnonzero(reasons == "")
    best = int(kept[np.argmin(bypass[kept])]) if len(kept) else None
    shape = (layers, len(positions))
    scores = {name: np.where(defined, x, np.nan) for name, x in (("bypass", bypass), ("induce", induce), ("kl", kl))}
    data = xr.Dataset(
        {
            **{name: (("layer", "position"), x.reshape(shape)) for name, x in scores.items()},
            "filtered": (("layer", "position"), reasons.reshape(shape)),
            "direction": (("layer", "position", "channel"), candidates.astype(np.float32)),
        },
        coords={"layer": np.arange(layers), "position": list(positions)},
    )
    meta = {
        **made_with(model, [prompt.text for prompt in harmful], [prompt.text for prompt in harmless]),
        "chosen": None if best is None else [best // len(positions), positions[best % len(positions)]],
        "clean_margin_harmful": float(np.mean(clean["harmful"])),
        "clean_margin_harmless": float(np.mean(clean["harmless"])),
        "harmful": len(harmful),
        "harmless": len(harmless),
        "max_kl": max_kl,
        "min_induce": min_induce,
        "last_layers": last_layers,
    }
    return Selection(data, meta)


def _ablated(model: Model, prompt: EncodedPrompt, directions: NDArray[np.floating]) -> Tensor:
    edit = ablate(torch.from_numpy(np.asarray(directions, dtype=np.float32)))
    return model.forward_variants(prompt.ids, len(directions), edit_resid=edit)


def _added(
    model: Model,
    prompt: EncodedPrompt,
    flat: NDArray[np.floating],
    layers: NDArray[np.int64],
    chunk: NDArray[np.int64],
    resid: dict[int, Tensor],
) -> Any:
    """Logits with candidates added: those of a layer in one batch, begun above it."""
    for layer in np.unique(layers):
        part = chunk[layers == layer]
        directions = torch.from_numpy(np.asarray(flat[part], dtype=np.float32))
        # A start hands one residual stream to all rows, so it begins at the layer itself and the edit follows it.
        start = (int(layer), resid[int(layer) - 1]) if layer else None
        edit = add(directions, int(layer))
        yield model.forward_variants(prompt.ids, len(part), edit_resid=edit, start=start), part


@suggests()
def select_direction(
    space: FittedSpace,
    *,
    validation: int = 6,
    positions: Sequence[str] | str | None = None,
    tokens: Iterable[int] | None = None,
    judge: Judge | str | None = None,
    max_kl: float = 0.1,
    min_induce: float | None = None,
    last_layers: float = 0.2,
    batch_size: int = 24,
    progress: bool = True,
) -> Selection:
    """Choose the refusal direction of the residual stream, as Arditi et al. do.

    Harmful prompts whose most likely first token does not begin a refusal, and harmless ones whose does, are left aside:
    what tells them apart is not refusal. The last ``validation`` of the others score the candidates, which come from the rest.

    Parameters
    ----------
    space : Subspace
    validation : int
        Prompts of each class that are kept out of the candidates. The cost grows with it: per prompt a pass for every
        candidate.
    positions : str or sequence of str, optional
        Template tokens to look at; all that the prompts share by default.
    tokens : iterable of int, optional
        First tokens of refusals; found by asking the model the harmful prompts otherwise.
    judge : Judge or str, optional
        Labels those responses.
    max_kl, min_induce, last_layers, batch_size
        As in :func:`select`.

    Raises
    ------
    InputError
        If too few prompts are left for the candidates, for unknown positions, or if the model refuses nothing.

    References
    ----------
    Arditi et al., arXiv:2406.11717, section 2.3 and appendix C. They leave prompts aside by the sign of the margin; a
    model that refuses at the most likely token with less than even odds would lose nearly all of them.
    """
    names = as_names(
        "position",
        [name for name in space.positions if name != "instruction"] if positions is None else positions,
        space.positions,
    )
    model, harmful = space.model, space.is_harmful
    encoded = (*space.harmful, *space.harmless)
    asked_by: dict[str, Any] = {}
    if tokens is None:
        labeller = as_judge(judge)
        asked_by = {"judge": labeller.name, "max_new_tokens": OPENING}
        tokens = opening_tokens(model, space.harmful, labeller, progress)
    else:
        tokens = as_tokens(model, tokens)
    if not tokens:
        raise InputError(
            f"{model.name} refuses none of the {len(space.harmful)} harmful prompts, or so few that no first token predicts it, so "
            "it has no refusal direction; give prompts that it refuses"
        )
    with shown(progress):
        asked = track(encoded, "who is refused", len(encoded))
        openings = np.array([int(model.forward(prompt.ids)[-1].argmax()) for prompt in asked])
    refused = np.isin(openings, list(tokens))
    usable = [np.flatnonzero(rows) for rows in (harmful & refused, ~harmful & ~refused)]
    fewest = min(map(len, usable))
    if not 1 <= whole("validation", validation, 1) <= fewest - 2:
        raise InputError(
            f"validation must be 1 to {max(fewest - 2, 0)}, got {brief(validation)}: {len(usable[0])} harmful prompts are refused and "
            f"{len(usable[1])} harmless ones are not, and the candidates need at least two of each; give more prompts"
        )
    train = np.concatenate([rows[:-validation] for rows in usable])
    index = [space.positions.index(name) for name in names]
    candidates = np.zeros((model.geometry.layers, len(names), model.geometry.d_model))
    for layer in model.geometry.stores:  # those that were read; others have no candidates
        features = space.features(layer, "resid")[train][:, index]
        defined = defined_at(features, harmful[train], space.resolution(layer, "resid")[index])
        candidates[layer, defined] = difference_of_means(features, harmful[train])[defined]
    scored = [[encoded[row] for row in rows[-validation:]] for rows in usable]
    found = select(
        model,
        candidates,
        names,
        scored[0],
        scored[1],
        tokens,
        max_kl=max_kl,
        min_induce=min_induce,
        last_layers=last_layers,
        batch_size=batch_size,
        progress=progress,
    )
    meta = {
        **asked_by,
        "prompt_set": space.prompts.fingerprint,
        "train_harmful": len(usable[0]) - validation,
    }
    return Selection(found.data, {**found.meta, **meta, "train_harmless": len(usable[1]) - validation})


@suggests(LOAD_OPTIONS)
def opening_tokens(
    model: Any,
    prompts: Any,
    judge: Judge | str | None = None,
    progress: bool = True,
    max_new_tokens: int = OPENING,
    **load_options: Any,
) -> frozenset[int]:
    """First tokens of the model's refusals of some prompts (the set R of the margin), found by asking them.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    prompts : EncodedPrompts, requests, or the name of a set
    judge : Judge or str, optional
        Labels the responses; the keyword judge by default.
    progress : bool
    max_new_tokens : int
        Longest response.
    **load_options
        Of :func:`kvgeom.load`.
    """
    model, prompts = opened(model, prompts, load_options, progress)
    with shown(progress), bar("what refusals begin with", 2 * len(prompts)) as drawn:
        found = respond(model, prompts, max_new_tokens, on_done=drawn.update)
    labels = label_openings(model, prompts, found, as_judge(judge))
    return refusal_tokens(found.first_logits.argmax(-1).tolist(), [label == "refused" for _, label in labels])
