"""Whether directions are read by one mechanism: what ablating one does to how far the residual stream lies along another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from kvgeom.checks import MOST_DRAWS, as_seed, one_of, suggests, whole
from kvgeom.errors import InputError
from kvgeom.evaluation.config import LOAD_OPTIONS
from kvgeom.evaluation.inputs import made_with, opened
from kvgeom.geometry.activations import tokens_at
from kvgeom.geometry.interventions import ablate
from kvgeom.progress import shown, track
from kvgeom.results import Result


@dataclass(frozen=True, repr=False)
class Independence(Result):
    """How far directions of the residual stream depend on each other. Made by :func:`independence`.

    ``data`` has the dimensions ``direction``, ``ablated``, ``layer`` and ``prompt`` and the variables

    - ``cosine`` over (direction, layer, prompt): of the residual stream after a layer with the direction, at the last token;
    - ``change`` over (ablated, direction, layer, prompt): by how much another direction's ablation moves that cosine;
      ``control_change`` over (draw, direction, layer, prompt): of random directions;
    - ``dependence`` over (ablated, direction): root mean square of ``change`` over layers and requests, relative to that of
      ``cosine``, with a 95 % bootstrap interval over requests; 0 where directions are representationally independent, 1
      where the ablation changes the cosine by as much as there is of it, 2 where it turns it around. ``control`` over
      (direction): the mean over random directions, and ``control_high``, the largest of them;
    - ``between`` over (direction, other): cosine of the directions themselves. Orthogonal ones may depend on each other through
      the layers.

    ``dependence`` of a direction on itself says how much of it its own ablation takes away: 1.

    References
    ----------
    Representational independence, Wollschlaeger et al., arXiv:2502.17420, section 6: two directions are independent if ablating
    either leaves the cosines of the residual stream with the other unchanged in all layers.
    """

    kind: ClassVar[str] = "independence"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "pairs": ("ablated", "direction"),
        "between": ("direction", "other"),
        "directions": ("direction",),
        "cosines": ("direction", "layer", "prompt"),
        "changes": ("ablated", "direction", "layer", "prompt"),
        "controls": ("draw", "direction", "layer", "prompt"),
    }

    def independent(self, one: str, other: str) -> bool | None:
        """Whether neither direction depends on the other more than on any random one; None if the intervals leave it open.

        Raises
        ------
        InputError
            For names that are no directions of this result.
        """
        names = self.data.direction.values.tolist()
        for name in (one, other):
            one_of("direction", name, names)
        found = []
        for ablated, direction in ((one, other), (other, one)):
            cell = self.data.sel(ablated=ablated, direction=direction)
            limit = float(cell.control_high)
            if np.isnan(limit):
                return None
            low, high = float(cell.dependence_low), float(cell.dependence_high)
            found.append(True if high <= limit else False if low > limit else None)
        return False if False in found else None if None in found else True

    def summary(self) -> str:
        return f"{self.data.direction.values.tolist()}, {self.data.sizes['layer']} layers, {self.data.sizes['prompt']} requests"


@suggests(LOAD_OPTIONS)
def independence(
    model: Any,
    directions: Mapping[str, NDArray[np.floating]],
    prompts: Any,
    *,
    layers: Sequence[int] | None = None,
    controls: int = 19,
    progress: bool = True,
    seed: int = 0,
    **load_options: Any,
) -> Independence:
    """Ablate each of several directions of the residual stream, and see what becomes of the others.

    Costs, per request, one pass and one for each direction and each random one.

    Parameters
    ----------
    model : anything that :func:`kvgeom.load` takes
    directions : mapping of str to array [d_model]
        For instance the columns of the basis of a cone, or directions of several methods
        (``space.compare().vectors("resid", method)[n]``, of the layer at place n of ``data.layer``).
    prompts : EncodedPrompts, requests, or the name of a set
    layers : sequence of int, optional
        After which the residual stream is looked at; all by default.
    controls : int
        Random directions that are ablated for comparison.
    seed : int
        Of these.
    **load_options
        Of :func:`kvgeom.load`.

    Raises
    ------
    InputError
        For directions in another shape, of length 0 or fewer than two, or without requests.
    """
    model, encoded = opened(model, prompts, load_options, progress)
    width, controls, seed = model.geometry.d_model, whole("controls", controls, 0, MOST_DRAWS), as_seed(seed)
    if not isinstance(directions, Mapping) or len(directions) < 2:
        raise InputError("independence is that of directions from each other; give two or more, by name")
    rows = []
    for name, direction in directions.items():
        values = np.asarray(direction, dtype=np.float64)
        size = float(np.linalg.norm(values))
        if values.shape != (width,) or not 0 < size < np.inf:
            raise InputError(
                f"direction {name!r} must have shape [{width}], be finite and not be 0, got shape {list(values.shape)}"
            )
        rows.append(values / size)
    if not encoded:
        raise InputError("there are no requests; give at least one")
    units = np.stack(rows)
    chosen = list(range(model.geometry.layers)) if layers is None else [
        whole("layers", layer, 0, model.geometry.layers - 1) for layer in layers
    ]  # fmt: skip
    names, count = list(map(str, directions)), len(units)
    random = np.random.default_rng(seed).standard_normal((controls, width))
    ablated = torch.from_numpy(np.concatenate([units, random]).astype(np.float32))
    cosine = np.zeros((count, len(chosen), len(encoded)))
    change = np.zeros((count + controls, count, len(chosen), len(encoded)))
    with shown(progress):
        for column, prompt in enumerate(track(encoded, "independence of directions", len(encoded))):
            last = tokens_at(prompt, "template-1")
            clean, after = _streams(model, prompt.ids, None, 1, last), _streams(
                model, prompt.ids, ablate(ablated), len(ablated), last
            )  # fmt: skip
            for row, layer in enumerate(chosen):
                cosine[:, row, column] = _cosines(clean[layer], units)[0]
                change[:, :, row, column] = _cosines(after[layer], units) - cosine[None, :, row, column]
    squares, sizes = (change**2).mean(2), (cosine**2).mean(1)  # [ablated, direction, prompt], [direction, prompt]
    share = np.sqrt(squares.mean(-1) / sizes.mean(-1))
    low, high = _intervals(squares[:count], sizes)
    dims = ("ablated", "direction")
    data = xr.Dataset(
        {
            "dependence": (dims, share[:count]),
            "dependence_low": (dims, low),
            "dependence_high": (dims, high),
            "control": ("direction", share[count:].mean(0) if controls else np.full(count, np.nan)),
            "control_high": ("direction", share[count:].max(0) if controls else np.full(count, np.nan)),
            "between": (("direction", "other"), units @ units.T),
            "cosine": (("direction", "layer", "prompt"), cosine),
            "change": ((*dims, "layer", "prompt"), change[:count]),
            "control_change": (("draw", "direction", "layer", "prompt"), change[count:]),
        },
        coords={
            "direction": names,
            "ablated": names,
            "other": names,
            "layer": chosen,
            "prompt": np.arange(len(encoded)),
            "draw": np.arange(controls),
        },
    )
    return Independence(data, {**made_with(model, [prompt.text for prompt in encoded]), "seed": seed})


def _streams(model: Any, ids: Sequence[int], edit: Any, rows: int, at: slice) -> dict[int, NDArray[np.float64]]:
    """The residual stream after each layer at some tokens, ``[rows, d_model]`` by layer."""
    found: dict[int, NDArray[np.float64]] = {}

    def keep(layer: int, x: torch.Tensor) -> None:
        found[layer] = x[:, at].mean(1).double().cpu().numpy()

    model.forward_variants(ids, rows, edit_resid=edit, on_resid=keep)
    return found


def _cosines(x: NDArray[np.float64], units: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine of every row with every direction, ``[rows, directions]``; 0 of rows of length 0."""
    size = np.linalg.norm(x, axis=1, keepdims=True)
    found: NDArray[np.float64] = np.divide(x @ units.T, size, out=np.zeros((len(x), len(units))), where=size > 0)
    return found


def _intervals(squares: NDArray[np.float64], sizes: NDArray[np.float64]) -> tuple[Any, Any]:
    """Bootstrap intervals over prompts of the root of a ratio of means; of one prompt none."""
    count = sizes.shape[-1]
    if count < 2:
        nothing = np.full(squares.shape[:2], np.nan)
        return nothing, nothing
    counts = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=2000) / count
    ratios = np.sqrt(np.einsum("sp,adp->sad", counts, squares) / np.einsum("sp,dp->sd", counts, sizes)[:, None])
    low, high = np.quantile(ratios, [0.025, 0.975], axis=0)
    return low, high
