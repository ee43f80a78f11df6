"""Choosing the refusal direction by what it does when it is taken out of the residual stream, or put in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from kvgeom.errors import InputError
from kvgeom.evaluation.margin import margin
from kvgeom.evaluation.respond import Responses, respond
from kvgeom.judges.judge import LABELS, Judge, KeywordJudge
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.progress import bar
from kvgeom.results import Result
from kvgeom.stats import wilson

if TYPE_CHECKING:
    from kvgeom.models.model import ResidEdit

Point = Literal["pre", "attn", "post"]


def ablate(directions: Tensor) -> ResidEdit:
    """Take a direction out of everything that the residual stream receives, at every layer and token.

    Parameters
    ----------
    directions : Tensor [rows, d_model] or [d_model]
        One for each row of the batch, or one for all; scaled to unit length here.

    References
    ----------
    Directional ablation, Arditi et al., arXiv:2406.11717, section 2.4.
    """
    unit = (directions / directions.norm(dim=-1, keepdim=True)).reshape(-1, 1, directions.shape[-1])

    def edit(layer: int, point: Point, x: Tensor) -> Tensor:
        r = unit.to(x.device, x.dtype)
        ablated: Tensor = x - (x * r).sum(-1, keepdim=True) * r
        return ablated

    return edit


def add(directions: Tensor, layers: int | Sequence[int]) -> ResidEdit:
    """Add a direction, as long as it is, to the residual stream after a layer, at every token.

    Parameters
    ----------
    directions : Tensor [rows, d_model] or [d_model]
    layers : int or sequence of int
        After which layer; one for each row, or one for all.

    References
    ----------
    Activation addition, Arditi et al., arXiv:2406.11717, section 2.4.
    """
    rows = directions.reshape(-1, 1, directions.shape[-1])
    after = torch.as_tensor([layers] if isinstance(layers, int) else list(layers))

    def edit(layer: int, point: Point, x: Tensor) -> Tensor:
        here = after == layer
        if point != "post" or not here.any():
            return x
        changed: Tensor = x + (rows * here[:, None, None]).to(x.device, x.dtype)
        return changed

    return edit


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
                f"the chosen direction was asked, but every candidate is filtered out ({'; '.join(reasons)}); "
                "look at .plot(), and relax max_kl, min_induce or last_layers if they are too strict for this model"
            )
        return self.chosen

    def summary(self) -> str:
        kept = int((self.data.filtered == "").sum())
        where = "none chosen" if self.chosen is None else f"chosen layer {self.chosen[0]}, {self.chosen[1]}"
        return f"{self.data.filtered.size} candidates, {kept} pass the filters, {where}"


def select(
    model: Model,
    candidates: NDArray[np.floating],
    positions: Sequence[str],
    harmful: Sequence[EncodedPrompt],
    harmless: Sequence[EncodedPrompt],
    refusal_tokens: Iterable[int],
    *,
    max_kl: float = 0.1,
    min_induce: float | None = None,
    last_layers: float = 0.2,
    batch_size: int = 24,
    progress: bool = True,
) -> Selection:
    """Score every candidate direction by intervention, filter, and choose the best bypass.

    All candidates run through a prompt as rows of one batch. Ablation costs a pass per candidate and prompt of both
    classes, addition the part of one above the candidate's layer.

    Parameters
    ----------
    model : Model
    candidates : array [layers, positions, d_model]
        Harmful minus harmless, of the residual stream after each layer; rows of zeros or NaN are undefined.
    positions : sequence of str
    harmful, harmless : sequence of EncodedPrompt
        Prompts that the candidates were not computed from.
    refusal_tokens : iterable of int
        The set R of :func:`kvgeom.evaluation.margin.refusal_tokens`.
    max_kl : float
        Limit (nats) of what a candidate may change in harmless prompts.
    min_induce : float, optional
        Margin (nats) that a candidate must bring about in harmless prompts. By default 0, even odds, as Arditi et al.
        have it; or the mean margin of the harmful prompts as they are, where the model refuses even these at less.
    last_layers : float
        Candidates from this share of the layers, the last ones, are filtered: too near to the output tokens.
    batch_size : int
        Candidates in one batch.

    Raises
    ------
    InputError
        Without refusal tokens, prompts of both classes, or candidates in the model's shape.
    """
    tokens = frozenset(refusal_tokens)
    layers, width = model.geometry.layers, model.geometry.d_model
    if not tokens or not harmful or not harmless:
        raise InputError(
            f"a selection was asked with {len(tokens)} refusal tokens, {len(harmful)} harmful and {len(harmless)} "
            "harmless prompts; it needs some of each: a model that refuses, and prompts of both kinds"
        )
    if candidates.shape != (layers, len(positions), width):
        raise InputError(
            f"candidates of shape {candidates.shape} were given; {(layers, len(positions), width)} is needed "
            "(layers, positions, d_model)"
        )
    flat = candidates.reshape(-1, width)
    defined = np.isfinite(flat).all(1) & (np.linalg.norm(flat, axis=1) > 0)
    cells = np.flatnonzero(defined)
    bypass, induce, kl = np.zeros((3, len(flat)))
    chunks = [cells[i : i + batch_size] for i in range(0, len(cells), batch_size)]
    clean: dict[str, list[float]] = {"harmful": [], "harmless": []}
    with bar("selecting the refusal direction", (len(harmful) + 2 * len(harmless)) * len(chunks), progress) as shown:
        for prompt in harmful:
            clean["harmful"].append(float(margin(model.forward(prompt.ids)[-1], tokens)))
            for chunk in chunks:
                logits = _ablated(model, prompt, flat[chunk])
                bypass[chunk] += margin(logits, tokens).double().cpu().numpy() / len(harmful)
                shown.update(1)
        for prompt in harmless:
            resid: dict[int, Tensor] = {}
            log_p = model.forward(prompt.ids, on_resid=resid.__setitem__)[-1].log_softmax(-1)
            clean["harmless"].append(float(margin(log_p, tokens)))
            for chunk in chunks:
                log_q = _ablated(model, prompt, flat[chunk]).log_softmax(-1)
                kl[chunk] += (log_p.exp() * (log_p - log_q)).sum(-1).double().cpu().numpy() / len(harmless)
                shown.update(1)
                for logits, part in _added(model, prompt, flat, chunk // len(positions), chunk, resid):
                    induce[part] += margin(logits, tokens).double().cpu().numpy() / len(harmless)
                shown.update(1)
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
        "model": model.name,
        "fingerprint": model.fingerprint,
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


@dataclass(frozen=True, repr=False)
class Steering(Result):
    """What a model answers with a direction taken out or put in. Made by :func:`steer`.

    ``data`` has the dimensions ``intervention`` (``"none"``, ``"ablate"``, ``"add"``) and ``prompt``, and the variables
    ``label``, ``text``, and ``harmful`` and ``request`` over (prompt). Where an intervention was not run (``"add"`` on
    harmful prompts, ``"ablate"`` on harmless ones) the label is ``""``.
    """

    kind: ClassVar[str] = "steering"

    def refusals(self, intervention: str, harmful: bool) -> tuple[int, int, tuple[float, float]]:
        """Refusals, prompts, and the Wilson 95 % interval of the rate."""
        labels = self.data.label.sel(intervention=intervention).values[self.data.harmful.values == harmful]
        refused, count = int((labels == "refused").sum()), int((labels != "").sum())
        return refused, count, wilson(refused, count)

    def table(self) -> Any:
        """Labels by intervention and kind of prompt, as a pandas frame with intervals of the refusal rate."""
        import pandas as pd

        rows = []
        for harmful, intervention in ((True, "none"), (True, "ablate"), (False, "none"), (False, "add")):
            labels = self.data.label.sel(intervention=intervention).values[self.data.harmful.values == harmful]
            refused, count, (low, high) = self.refusals(intervention, harmful)
            rows.append(
                {
                    "prompts": "harmful" if harmful else "harmless",
                    "direction": {"none": "as it is", "ablate": "ablated", "add": "added"}[intervention],
                    **{str(label): int((labels == label).sum()) for label in LABELS},
                    "refusal rate": refused / count if count else float("nan"),
                    "low": low,
                    "high": high,
                }
            )
        return pd.DataFrame(rows)

    def summary(self) -> str:
        parts = [
            f"{name} {self.refusals(before, harmful)[0]} -> {self.refusals(after, harmful)[0]} of {self.refusals(after, harmful)[1]}"
            for name, harmful, before, after in (
                ("ablation: refusals of harmful prompts", True, "none", "ablate"),
                ("addition: refusals of harmless prompts", False, "none", "add"),
            )
        ]
        return "; ".join(parts)


def steer(
    model: Model,
    direction: NDArray[np.floating],
    layer: int,
    harmful: Sequence[EncodedPrompt],
    harmless: Sequence[EncodedPrompt],
    *,
    scale: float = 1.0,
    judge: Judge | None = None,
    max_new_tokens: int = 24,
    progress: bool = True,
) -> Steering:
    """Generate with the direction ablated on harmful prompts, and added on harmless ones.

    Parameters
    ----------
    model : Model
    direction : array [d_model]
        For instance ``selection.direction``, in the units of the residual stream.
    layer : int
        After which layer it is added.
    harmful, harmless : sequence of EncodedPrompt
        Prompts that neither found nor chose the direction.
    scale : float
        Multiplies what is added.
    judge : Judge, optional
    max_new_tokens : int
    """
    judge = judge or KeywordJudge()
    r = torch.from_numpy(np.asarray(direction, dtype=np.float32))
    if r.shape != (model.geometry.d_model,) or not float(r.norm()) > 0:
        raise InputError(
            f"a direction of shape {tuple(r.shape)} was given; one of [{model.geometry.d_model}] that is not 0 is needed"
        )
    prompts = [*harmful, *harmless]
    runs: list[tuple[str, Sequence[EncodedPrompt], ResidEdit | None]] = [
        ("none", prompts, None),
        ("ablate", harmful, ablate(r)),
        ("add", harmless, add(scale * r, layer)),
    ]
    names = [name for name, _, _ in runs]
    labels = np.full((len(runs), len(prompts)), "", dtype=object)
    texts = np.full((len(runs), len(prompts)), "", dtype=object)
    with bar("responses with the direction", 2 * sum(len(asked) for _, asked, _ in runs), progress) as shown:
        for number, (name, asked, edit) in enumerate(runs):
            found = respond(model, asked, max_new_tokens, edit_resid=edit, on_done=shown.update)
            first = len(harmful) if name == "add" else 0
            for index, text, label in judged(model, asked, found, judge):
                labels[number, first + index], texts[number, first + index] = label, text
    dims = ("intervention", "prompt")
    data = xr.Dataset(
        {
            "label": (dims, labels),
            "text": (dims, texts),
            "harmful": ("prompt", np.arange(len(prompts)) < len(harmful)),
            "request": ("prompt", np.array([prompt.text for prompt in prompts], dtype=object)),
        },
        coords={"intervention": names, "prompt": np.arange(len(prompts))},
    )
    meta = {"model": model.name, "fingerprint": model.fingerprint, "layer": layer, "scale": scale, "judge": judge.name}
    return Steering(data, meta)


def judged(
    model: Model, prompts: Sequence[EncodedPrompt], responses: Responses, judge: Judge
) -> list[tuple[int, str, str]]:
    """Number, text and label of each response; their likelihood is that of the model as it is."""
    found: list[tuple[int, str, str]] = []
    for index, (prompt, tokens) in enumerate(zip(prompts, responses.tokens, strict=True)):
        text = model.decode(tokens)

        def likelihood(prompt: EncodedPrompt = prompt, tokens: list[int] = tokens) -> float:
            if not tokens:
                return float("nan")
            logits = model.forward([*prompt.ids, *tokens[:-1]], all_logits=True)[len(prompt) - 1 :]
            return float(logits.log_softmax(-1)[torch.arange(len(tokens)), list(tokens)].mean())

        found.append((index, text, judge.label(prompt.text, text, likelihood).label))
    return found
