"""The tour: tiny models whose failure mode was planted, diagnosed and mended beside each other. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from kvgeom.checks import suggests, whole
from kvgeom.diagnosis.diagnose import Diagnosis, diagnose
from kvgeom.diagnosis.taxonomy import FIXABLE, PUBLISHED
from kvgeom.engines.registry import resolve
from kvgeom.evaluation.baseline import baseline, versions
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.folders import report_folder
from kvgeom.geometry.sensitivity import Sensitivity
from kvgeom.geometry.subspace import subspace
from kvgeom.mitigation.candidates import UNMITIGATED, Candidate
from kvgeom.mitigation.decision_tree import advised
from kvgeom.organisms import Organism, Size, plant, tiny_model
from kvgeom.organisms.observed import NEW_TOKENS
from kvgeom.organisms.planting import PlantedMode
from kvgeom.paths import write_whole
from kvgeom.plots.channels import channel_loading
from kvgeom.plots.theme import SITE_NAMES
from kvgeom.plots.tour import fixes_by_model, taxonomy_plane
from kvgeom.progress import bar, shown
from kvgeom.prompts.sets import PromptSet
from kvgeom.quant.placement import Placement
from kvgeom.report.html import page, section
from kvgeom.results import Result
from kvgeom.stats import Estimate, percent
from kvgeom.words import counted, text_table

#: What is shown, in this order: first what holds.
STOPS: tuple[PlantedMode, ...] = (
    "robust",
    "outlier-crushes-safety",
    "outlier-as-safety",
    "multi-layer dilution",
)
#: Requests that plant, that are diagnosed, and that the caches are tried on; no request serves twice.
PLANTING, SEEN, UNSEEN = 24, 32, 32
#: The caches that every model is given: as it is, finer scales, and the worst layer or layers kept in 16 bits.
AS_IT_IS, GROUPS, CHANNELS, ONE, SEVERAL = (
    "as it is",
    "group-64",
    "per-channel",
    "layer kept",
    "layers kept",
)
PRESCRIBES: dict[str, str] = {
    "robust": AS_IT_IS,
    "outlier-crushes-safety": GROUPS,
    "outlier-as-safety": ONE,
    "multi-layer dilution": SEVERAL,
}
PAGE, DATA = "report.html", "tour.nc"


@dataclass(frozen=True, repr=False)
class Tour(Result):
    """Tiny models of each failure mode, what they were diagnosed as, and what each fix does. Made by :func:`kvgeom.tour`.

    ``data`` has the tables

    - ``models``, over ``model`` (what was planted): ``named`` (the mode that was diagnosed), ``likeliest`` and its ``probability``; ``group64``
      and ``kept``, the share of the loss that group-64 scales and keeping the worst layer take away, each with its 95 % interval
      (``_low``, ``_high``), NaN where nothing is lost; ``refused``, of the requests that were diagnosed; ``asked``, of those that the caches
      were tried on; ``layers``, where it was planted, as text;
    - ``caches``, over (``model``, ``cache``): ``lost`` (of ``asked`` refusals, none of which the diagnosis has seen), ``broken`` (of
      these, broken text), ``memory_overhead`` and ``prescribed``, whether the named mode prescribes it.
    """

    kind: ClassVar[str] = "tour"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {"caches": ("model", "cache"), "models": ("model",)}

    def right(self) -> list[str]:
        """The models that got the name of what was planted in them."""
        return [str(name) for name in self.data.model.values if str(self.data.named.sel(model=name).item()) == name]

    def summary(self) -> str:
        return f"{len(self.right())} of {counted(self.data.sizes['model'], 'planted model')} named rightly, {self.meta['scheme']}"

    def to_text(self) -> str:
        """A row a model: what was planted, what was named, and the refusals lost under each cache."""
        rows, named = [], []
        for name in map(str, self.data.model.values):
            one = self.data.sel(model=name)
            found = [
                f"{int(lost)}{'*' if prescribed else ''}"
                for lost, prescribed in zip(one.lost.values, one.prescribed.values, strict=True)
            ]
            said = _said(str(one.named.item()), str(one.likeliest.item()), float(one.probability))
            rows.append([f"{name}, of {int(one.asked)}", *found])
            named.append(f"  {name}: {said.replace(name, 'the same')}")
        table = text_table(["planted", *map(str, self.data.cache.values)], rows)
        return (
            f"Refusals lost in a cache of {self.meta['scheme']}\n\n{table}\n\n* what the diagnosed mode prescribes; the diagnosis has "
            "seen none of these requests\n\nDiagnosed as\n" + "\n".join(named)
        )


@dataclass(frozen=True)
class Stop:
    """One model of the tour, while it is at hand."""

    organism: Organism
    diagnosis: Diagnosis
    geometry: Sensitivity
    caches: dict[str, Candidate]
    lost: dict[str, tuple[int, int]]
    refused: int


@suggests()
def tour(out: str | Path | None = None, *, seed: int = 0, progress: bool = True) -> Tour:
    """Plant each failure mode in a tiny model, diagnose it blindly, and try the fixes. About a minute, and no download.

    The models speak a toy language. They are trained on the first call, in half a minute, and kept on disk.

    Parameters
    ----------
    out : str or Path, optional
        Folder for ``report.html``, which shows the models beside each other, and ``tour.nc``. By default nothing is written.
    seed : int
        Of what is planted, and of random directions.
    progress : bool
        Show progress bars.

    Returns
    -------
    Tour

    Raises
    ------
    InputError
        If the seed or the folder cannot be used.
    ModelError
        If a mode cannot be planted from this seed.
    """
    seed = whole("seed", seed, 0, 2**32 - 1)
    folder = None if out is None else report_folder(out, "tour")
    stops = []
    with bar("touring the failure modes", len(STOPS), progress) as done:
        for mode in STOPS:
            done.set_postfix_str(mode)
            with shown(False):
                stops.append(_visit(mode, seed))
            done.update(1)
    found = _tour_of(stops, seed)
    if folder is not None:
        found.save(folder / DATA)
        write_whole(folder / PAGE, _page(found, stops))
    return found


def _visit(mode: PlantedMode, seed: int) -> Stop:
    """Plant, diagnose on some requests, and try the caches on others."""
    diluted = mode == "multi-layer dilution"
    # Dilution needs a model that still speaks when two layers are lost, and offsets in two layers float64.
    size = Size(4, 2, 64) if diluted else Size(3)
    model = tiny_model(size, dtype="float64" if diluted else "float32")
    train, other = size.prompts("train"), size.prompts()
    organism = plant(model, mode, seed=seed, prompts=train.take(PLANTING))
    harmful, harmless = other.harmful + train.harmful[PLANTING:], other.harmless + train.harmless[PLANTING:]
    seen = PromptSet("seen", harmful[:SEEN], harmless[:SEEN], "toy language")
    found = diagnose(
        organism.model,
        seen,
        bits=(),
        scan_bits=organism.bits,
        geometry=False,
        max_new_tokens=NEW_TOKENS,
        seed=seed,
        progress=False,
    )
    # The harmless contrasts are no words of the toy language.
    geometry = subspace(organism.model, seen, progress=False).sensitivity(
        found.width.scheme, contrasts=(), null_subspaces=2, seed=seed, progress=False
    )
    unmitigated = Candidate(
        UNMITIGATED, UNMITIGATED, resolve(f"int{organism.bits}-sym-tensor").recipe(size.layers), Placement(), ""
    )
    channel = resolve(f"int{organism.bits}-sym-channel").recipe(size.layers)
    caches = {
        AS_IT_IS: unmitigated,
        GROUPS: advised("outlier-crushes-safety", found.scan, unmitigated),
        CHANNELS: Candidate(CHANNELS, "refine", channel, Placement(), ""),
        ONE: advised("outlier-as-safety", found.scan, unmitigated),
        SEVERAL: advised("multi-layer dilution", found.scan, unmitigated),
    }
    unseen = harmful[SEEN : SEEN + UNSEEN]
    base = baseline(organism.model, unseen, max_new_tokens=NEW_TOKENS, seed=seed, progress=False)
    conditions = {name: each.condition() for name, each in caches.items()}
    outcomes = evaluate(None, conditions, base, refused_only=True, progress=False)
    lost = {name: (outcomes.flips(name)["all"], outcomes.flips(name)["degenerate"]) for name in caches}
    return Stop(organism, found, geometry, caches, lost, len(base.refused))


def _tour_of(stops: Sequence[Stop], seed: int) -> Tour:
    models, names = [stop.organism.mode for stop in stops], [*stops[0].caches]

    def over_models(values: Sequence[Any], dtype: Any = float) -> tuple[str, Any]:
        return "model", np.array(values, dtype=dtype)

    def over_caches(values: Sequence[Sequence[Any]], dtype: Any = float) -> tuple[tuple[str, str], Any]:
        return ("model", "cache"), np.array(values, dtype=dtype)

    data = xr.Dataset(
        {
            "named": over_models([stop.diagnosis.mode.name for stop in stops], object),
            "likeliest": over_models([stop.diagnosis.mode.likeliest[0] for stop in stops], object),
            "probability": over_models([stop.diagnosis.mode.likeliest[1] for stop in stops]),
            **_shares("group64", [stop.diagnosis.evidence.group64 for stop in stops]),
            **_shares("kept", [stop.diagnosis.evidence.worst_kept for stop in stops]),
            "refused": over_models([stop.diagnosis.evidence.refused for stop in stops], int),
            "asked": over_models([stop.refused for stop in stops], int),
            "layers": over_models([", ".join(map(str, stop.organism.layers)) or "none" for stop in stops], object),
            "lost": over_caches([[stop.lost[name][0] for name in names] for stop in stops]),
            "broken": over_caches([[stop.lost[name][1] for name in names] for stop in stops]),
            "memory_overhead": over_caches([_overheads(stop) for stop in stops]),
            "prescribed": over_caches(
                [[name == PRESCRIBES.get(stop.diagnosis.mode.name) for name in names] for stop in stops], bool
            ),
        },
        coords={"model": np.array(models, dtype=object), "cache": np.array(names, dtype=object)},
    )
    bits = {stop.organism.bits for stop in stops}
    meta = {
        "model": "tiny models with a planted failure mode",
        "scheme": f"{' or '.join(map(str, sorted(bits)))} bits, symmetric, one scale for a tensor",
        "placement": str(Placement()),
        "rescue": PUBLISHED.rescue,
        "seed": seed,
        "judge": stops[0].diagnosis.curve.meta["judge"],
        "max_new_tokens": NEW_TOKENS,
        "max_reasoning_tokens": stops[0].diagnosis.curve.meta["max_reasoning_tokens"],
        "versions": versions(),
    }
    return Tour(data, meta)


def _said(named: str, likeliest: str, probability: float) -> str:
    """A mode as it was named, with what was likeliest where none was."""
    return f"{named} ({percent(probability) if named == likeliest else f'{likeliest} {percent(probability)}'})"


def _shares(name: str, found: Sequence[Estimate | None]) -> dict[str, tuple[str, Any]]:
    """A share of each model, with its interval."""
    rows = [(np.nan,) * 3 if each is None else (each.value, each.low, each.high) for each in found]
    return {
        f"{name}{end}": ("model", np.array([row[n] for row in rows], dtype=float))
        for n, end in enumerate(("", "_low", "_high"))
    }


def _overheads(stop: Stop) -> list[float]:
    geometry = stop.organism.model.geometry
    sizes = [each.bytes_per_token(geometry) for each in stop.caches.values()]
    return [size / sizes[0] - 1 for size in sizes]


def _page(found: Tour, stops: Sequence[Stop]) -> str:
    """The models beside each other, as one page."""
    right, unsure = len(found.right()), int((found.data.named.values == "undetermined").sum())
    return page(
        "tour.html",
        kicker="A tour of the failure modes",
        model=f"{len(stops)} tiny models",
        scheme=found.meta["scheme"],
        tone="good" if right == len(stops) else "",
        headline="A rounded cache takes refusals away in different ways, and each has another fix",
        sentences=[
            "Each model refuses every harmful request of a toy language while its cache is exact. In three of them something was planted that "
            "changes no answer until the cache is rounded.",
            f"The diagnosis sees {SEEN} requests and nothing of what was planted. It named {right} of {len(stops)} modes rightly, and said of "
            f"{unsure} that it does not know.",
            f"The caches are tried on {UNSEEN} other requests.",
        ],
        cards=[_card(stop) for stop in stops],
        sections=[
            section(
                "Which fix works where",
                "Refusals lost on requests that the diagnosis has not seen, all caches of the same width. The green frame is what the diagnosed "
                "mode prescribes.",
                fixes_by_model(found),
                found.to_frame("caches"),
            ),
            section(
                "The modes as regions",
                "What two fixes take away of the loss, with 95 % intervals, on the requests that were diagnosed. A mode is what its fix does: "
                "right of the line finer scales rescue the model; left of it, above, one layer in 16 bits does; below, neither does.",
                taxonomy_plane(found),
                found.to_frame("models"),
            ),
            *_channel_sections(stops),
        ],
        sentences_of=[(stop.organism.mode, stop.organism.edits, stop.diagnosis.mode.evidence) for stop in stops],
    )


def _card(stop: Stop) -> dict[str, str]:
    found, lost = stop.diagnosis.mode, stop.lost[AS_IT_IS][0]
    best = PRESCRIBES.get(found.name, AS_IT_IS)
    note = f"loses {lost} of {stop.refused} refusals"
    if found.name in FIXABLE:
        note += f"; {best}: {stop.lost[best][0]}"
    return {
        "title": f"planted: {stop.organism.mode}",
        "value": _said(found.name, *stop.diagnosis.mode.likeliest),
        "note": note,
    }


def _channel_sections(stops: Sequence[Stop]) -> list[dict[str, Any]]:
    """The channels in which something was planted."""
    found = []
    for stop in stops:
        if not stop.organism.planted:
            continue
        layer, site, _ = stop.organism.planted[0]
        channels = sorted(channel for at, where, channel in stop.organism.planted if (at, where) == (layer, site))
        found.append(
            section(
                f"What was planted: {stop.organism.mode}",
                f"Each point is a channel of the {SITE_NAMES[site]} of layer {layer}. Channels {channels} were made outliers. "
                "Far to the right are outliers, which set the scale that others share; high up are channels in which "
                "harmful and harmless requests differ.",
                channel_loading(stop.geometry, layer, site),
            )
        )
    return found
