"""The channel view on known truth: which site fails, which channels are to blame, and what they do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from kvgeom.errors import InputError
from kvgeom.evaluation.scores import margin
from kvgeom.geometry.channel_damage import ChannelDamage, channel_damage
from kvgeom.geometry.selection import opening_tokens
from kvgeom.models.cache import Edit
from kvgeom.organisms import Organism, Part, Size, plant_blindly, tiny_model
from kvgeom.plots.registry import draw
from kvgeom.quant.fake_quantize import fake_quantize
from kvgeom.quant.scheme import Scheme
from tests.builders.organisms import size_of
from tests.builders.tiny import tiny_model as random_model

TENSOR = Scheme(3, True, "tensor")


class Only:
    """Some channels of one site of one layer, rounded by hand."""

    where = "cache"
    prefill_reads_exact = False
    kind = 0

    def __init__(self, layer: int, site: str, channels: np.ndarray) -> None:
        self._at, self._channels = (layer, site), channels

    def __call__(self, layer: int, site: str, x: torch.Tensor) -> torch.Tensor:
        if (layer, site) != self._at:
            return x
        chosen = torch.from_numpy(self._channels).reshape(x.shape[1], 1, x.shape[3])
        return torch.where(chosen, fake_quantize(x, TENSOR), x)

    def rows(self, rows: torch.Tensor) -> Edit:
        return self  # type: ignore[return-value]


def test_parts_are_what_rounding_them_by_hand_costs() -> None:
    model = random_model("qwen2")
    prompts = model.encode(["open the door", "count to nine", "why?"])
    tokens = [5, 9]
    found = channel_damage(model, prompts, 1, TENSOR, tokens, progress=False)
    for site in ("k", "v"):
        flagged = found.data.outlier.sel(site=site).values
        for part, chosen in (("all", np.ones_like(flagged)), ("outliers", flagged), ("others", ~flagged)):
            for row, prompt in enumerate(prompts):
                clean = margin(model.forward(prompt.ids)[-1], tokens)
                rounded = margin(model.forward(prompt.ids, model.new_cache(Only(1, site, chosen)))[-1], tokens)  # type: ignore[arg-type]
                drop = float(found.data.margin_drop.sel(prompt=row, site=site, part=part))
                assert drop == pytest.approx(float(clean - rounded), abs=1e-4)


def made(outliers: list[float], others: list[float], flagged: int = 1) -> ChannelDamage:
    """Values lose so much, keys nothing."""
    lost = np.stack([np.array(outliers) + others, outliers, others], 1)
    drop = np.stack([np.zeros_like(lost), lost], 1)
    flags = np.zeros((2, 8), dtype=bool)
    flags[1, :flagged] = True
    data = xr.Dataset(
        {
            "margin_drop": (("prompt", "site", "part"), drop),
            "outlier": (("site", "channel"), flags),
            "magnitude": (("site", "channel"), np.where(flags, 9.0, 1.0)),
        },
        coords={"site": ["k", "v"], "part": ["all", "outliers", "others"], "channel": range(8)},
    )
    return ChannelDamage(data, {"layer": 2, "kv_heads": 2, "scheme": "s"})


@pytest.mark.parametrize(
    ("damage", "reading", "said"),
    [
        (made([0.1, 0.0, 0.1], [5, 6, 5.5]), "crush", "crush the others"),
        (made([5, 6, 5.5], [0.1, 0.0, 0.1]), "carry", "carry what is lost"),
        (made([5, 6, 5.5], [5.5, 5.2, 6]), "undetermined", "undetermined"),
        (made([0, 0, 0], [5, 6, 5.5], flagged=0), "no outliers", "No channel of the values"),
        (made([0.1, -0.1, 0.05], [0.1, 0.2, -0.2]), "no loss", "no margin"),
    ],
)
def test_readings(damage: ChannelDamage, reading: str, said: str) -> None:
    assert damage.site == "v"
    assert damage.reading() == reading
    assert said in damage.caption()
    assert damage.channels() == ([0] if reading in ("crush", "carry") else [])
    assert damage.reading("k") == "no loss"
    assert damage.sure == (reading != "no loss")
    figure = draw(damage)
    bars = [trace for trace in figure.data if trace.name == "values"]
    np.testing.assert_allclose(bars[0].y, damage.data.margin_drop.sel(site="v").mean("prompt"))


def test_what_cannot_be_measured_is_refused() -> None:
    model = random_model()
    for wrong in ({"refusal_tokens": ()}, {"prompts": ["one"]}, {"layer": 9}):
        options = {"prompts": ["one", "two"], "layer": 1, "refusal_tokens": [5], **wrong}
        with pytest.raises(InputError):
            channel_damage(model, options.pop("prompts"), options.pop("layer"), TENSOR, progress=False, **options)  # type: ignore[arg-type]


def judged(model, prompts: tuple[str, ...], planted, layer: int, bits: int):  # type: ignore[no-untyped-def]
    """The view of a planted layer; and precision and recall of its channels at the planted sites."""
    tokens = opening_tokens(model, model.encode(prompts), progress=False)
    found = channel_damage(model, prompts, layer, f"int{bits}-sym-tensor", tokens, progress=False)
    scores = {}
    for site in {site for at, site, _ in planted if at == layer}:
        true = {channel for at, own, channel in planted if (at, own) == (layer, site)}
        seen = set(found.channels(site))
        scores[site] = len(true & seen) / max(1, len(seen)), len(true & seen) / len(true)
    return found, scores


READINGS = {
    "outlier-crushes-safety": "crush",
    "outlier-as-safety": "carry",
    "multi-layer dilution": "carry",
}


def test_the_view_points_at_what_was_planted_in_values(organism: Organism) -> None:
    prompts = size_of(organism.mode).prompts("train").harmful[:12]
    if organism.mode == "robust":
        assert organism.planted == ()
        return
    assert {layer for layer, *_ in organism.planted} == set(organism.layers)
    for layer in organism.layers:
        found, scores = judged(organism.model, prompts, organism.planted, layer, organism.bits)
        assert (found.site, found.sure) == ("v", True)
        assert found.reading() == READINGS[organism.mode]
        assert scores["v"] == (1.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(("change", "reading"), [("crush", "crush"), ("outlier", "no outliers")])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_view_points_at_what_was_planted_in_keys(change: str, reading: str, seed: int) -> None:
    """Where nearly all channels are set off, none stands out: nothing is pointed at, and nothing wrong said."""
    size = Size(3, 2, 64, kind="phi3", attends=True)
    model = tiny_model(size, dtype="float64")
    layer = size.layers - 1
    blind = plant_blindly(model, [Part(layer, change, "keys", 0.15)], size.prompts("train").take(16), seed=seed)  # type: ignore[arg-type]
    found, scores = judged(blind.model, size.prompts().harmful[:12], blind.planted, layer, 3)
    assert (found.site, found.sure) == ("k", True)
    assert found.reading() == reading
    precision, recall = scores["k"]
    if change == "crush":
        assert precision == 1
        assert recall >= 0.5
    else:
        assert (precision, recall) == (0, 0)
