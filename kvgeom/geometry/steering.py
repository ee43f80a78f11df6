"""What a model answers when a direction is taken out of its residual stream, keys or values, or put in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from kvgeom.checks import at_coordinates, flag, one_of, suggests, whole
from kvgeom.errors import InputError, brief
from kvgeom.evaluation.config import LOAD_OPTIONS
from kvgeom.evaluation.inputs import as_encoded, made_with, opened
from kvgeom.evaluation.reader import Reader
from kvgeom.evaluation.respond import Responses, respond
from kvgeom.evaluation.scores import mean_log_likelihood
from kvgeom.geometry.activations import SITES, Site, site_width
from kvgeom.geometry.interventions import CacheDirections, Change, ablate, add
from kvgeom.judges.judge import LABELS, Judge
from kvgeom.judges.registry import as_judge
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.progress import bar, shown
from kvgeom.prompts.load import as_prompt_set
from kvgeom.prompts.sets import PromptSet
from kvgeom.results import Result
from kvgeom.stats import wilson

if TYPE_CHECKING:
    from kvgeom.models.cache import Edit
    from kvgeom.models.model import ResidEdit


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
        at_coordinates(self.data, intervention=intervention)
        labels = self.data.label.sel(intervention=intervention).values[
            self.data.harmful.values == flag("harmful", harmful)
        ]
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


@suggests(LOAD_OPTIONS)
def steer(
    model: Any,
    direction: NDArray[np.floating],
    layer: int,
    harmful: Any,
    harmless: Any,
    *,
    site: Site = "resid",
    level: NDArray[np.floating] | None = None,
    scale: float = 1.0,
    judge: Judge | str | None = None,
    max_new_tokens: int = 24,
    max_reasoning_tokens: int = 1024,
    progress: bool = True,
    **load_options: Any,
) -> Steering:
    """Generate with the direction ablated on harmful prompts, and added on harmless ones.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    direction : array [d_model], or [channels] of keys or values
        For instance ``selection.direction``, in the units of its site. Of keys, without their rotary embedding.
    layer : int
        After which layer it is added; in the residual stream it is ablated everywhere. In keys and values, the layer in which
        it is ablated and added.
    harmful, harmless : EncodedPrompts, requests, or a set of prompts or its name
        Prompts that neither found nor chose the direction. Of a set the requests of that class.
    site : {"resid", "k", "v"}
    level : array [channels], optional
        Of keys and values, what has along the direction what ablated tokens are to have: mostly the harmless mean
        (``features(layer, site)[~is_harmful]`` of a subspace). 0 by default.
    scale : float
        Multiplies what is added.
    judge : Judge or str, optional
    max_new_tokens : int
        Longest answer.
    max_reasoning_tokens : int
        Longest reasoning before it, of models that reason.
    **load_options
        Of :func:`kvgeom.load`.

    Raises
    ------
    InputError
        For a layer that the model does not have, a direction or scale that cannot be added, fewer than one new token, or a
        set without requests of its class.
    """
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    if not math.isfinite(scale):
        raise InputError(f"scale must be a finite number, got {brief(scale)}")
    model, harmful = opened(model, harmful, load_options, progress)
    harmless = as_encoded(model, _harmless(harmless))
    labeller, layer = as_judge(judge), whole("layer", layer, 0, model.geometry.layers - 1)
    reader = Reader(model, labeller, max_new_tokens, whole("max_reasoning_tokens", max_reasoning_tokens, 1))
    one_of("site", site, SITES)
    r = _direction("a direction", direction, site_width(model, site))
    prompts = [*harmful, *harmless]
    runs: list[tuple[str, Sequence[EncodedPrompt], ResidEdit | None, Edit | None]] = [("none", prompts, None, None)]
    if site == "resid":
        runs += [("ablate", harmful, ablate(r), None), ("add", harmless, add(scale * r, layer), None)]
    else:
        model.geometry.check_stores([layer], model.name)
        kept = np.zeros(len(r)) if level is None else _direction("level", level, len(r), may_be_0=True).numpy()
        u = (r / r.norm())[:, None].numpy()
        for name, asked, change in (
            ("ablate", harmful, Change.ablation(u, kept)),
            ("add", harmless, Change.addition(scale * r.numpy())),
        ):
            runs.append((name, asked, None, CacheDirections({(layer, site): change})))
    names = [name for name, *_ in runs]
    labels = np.full((len(runs), len(prompts)), "", dtype=object)
    texts = np.full((len(runs), len(prompts)), "", dtype=object)
    total = 2 * sum(len(asked) for _, asked, *_ in runs)
    with shown(progress), bar("responses with the direction", total) as drawn:
        for number, (name, asked, edit, of_cache) in enumerate(runs):
            found = respond(
                model,
                asked,
                max(map(reader.longest, asked), default=max_new_tokens),
                caches=[model.new_cache(of_cache) for _ in asked],
                edit_resid=edit,
                stop=reader.watch(asked, to_end=True),
                on_done=drawn.update,
            )
            first = len(harmful) if name == "add" else 0
            for index, (text, label) in enumerate(label_responses(reader, asked, found), start=first):
                labels[number, index], texts[number, index] = label, text
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
    meta = {
        **made_with(model, [prompt.text for prompt in harmful], [prompt.text for prompt in harmless]),
        "layer": layer,
        "site": site,
        "scale": scale,
        "judge": labeller.name,
        "max_new_tokens": max_new_tokens,
        "max_reasoning_tokens": reader.max_reasoning_tokens,
    }
    return Steering(data, meta)


def _direction(name: str, given: Any, channels: int, may_be_0: bool = False) -> Tensor:
    values = torch.from_numpy(np.array(given, dtype=np.float32))
    size = float(values.norm())
    if values.shape != (channels,) or not (may_be_0 or size > 0) or not math.isfinite(size):
        more = "" if may_be_0 else " and not be 0"
        raise InputError(f"{name} must have shape [{channels}], be finite{more}, got shape {list(values.shape)}")
    return values


def _harmless(given: Any) -> Any:
    """The harmless requests of what holds requests of both classes; anything else as it is."""
    is_table = hasattr(given, "columns") or hasattr(given, "column_names")
    if not (isinstance(given, PromptSet | Mapping | str | Path) or is_table):
        return given
    found = as_prompt_set(given)
    if not found.harmless:
        raise InputError(f"prompt set {found.name!r} has no harmless requests; give some")
    return found.harmless


def label_responses(reader: Reader, prompts: Sequence[EncodedPrompt], responses: Responses) -> list[tuple[str, str]]:
    """Text and label of each response. The judge may ask for its likelihood under the model without intervention."""
    found: list[tuple[str, str]] = []
    for prompt, tokens in zip(prompts, responses.tokens, strict=True):

        def likelihood(read: Sequence[int], begin: int, prompt: EncodedPrompt = prompt) -> float:
            logits = reader.model.forward([*prompt.ids, *read[:-1]], all_logits=True)[len(prompt) - 1 + begin :]
            return mean_log_likelihood(logits, read[begin:])

        found.append((reader.text(tokens), reader.judged(prompt, tokens, likelihood).label))
    return found


def label_openings(
    model: Model, prompts: Sequence[EncodedPrompt], responses: Responses, judge: Judge
) -> list[tuple[str, str]]:
    """Text and label of responses whose first tokens are to stand for their labels.

    Raises
    ------
    InputError
        If responses begin with reasoning: their first tokens say nothing of refusal.
    """
    reader = Reader(model, judge, max(map(len, responses.tokens), default=1), 1)
    if any(reader.begin(tokens) != 0 for tokens in responses.tokens):
        raise InputError(
            f"responses of {model.name} begin with reasoning, whose first token says nothing of refusal; load the model so that "
            "it does not reason (template_options), or give tokens"
        )
    return label_responses(reader, prompts, responses)
