"""The audit as one page: no network, no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvgeom.diagnosis.diagnose import Diagnosis
from kvgeom.geometry.channels import outlier_share
from kvgeom.plots.ablation import ablation_bars
from kvgeom.plots.channels import channel_loading
from kvgeom.plots.curve import bit_curve
from kvgeom.plots.mode import mode_card
from kvgeom.plots.pcr import pcr_interval
from kvgeom.plots.scan import layer_scan
from kvgeom.plots.sensitivity import ratio_map
from kvgeom.report.html import conversation_rows, drawn, made_text, page, prompts_text, section
from kvgeom.report.verdict import Verdict
from kvgeom.stats import Estimate, percent

if TYPE_CHECKING:
    import pandas as pd

    from kvgeom.geometry.sensitivity import Sensitivity


#: Edge of the verdict by its status.
_TONES = {"breaks": "bad", "language lost": "bad", "refusals lost": "bad", "holds": "good"}


@dataclass(frozen=True)
class AuditPage:
    """What the page shows of a :class:`~kvgeom.report.audit.Audit`.

    Attributes
    ----------
    diagnosis : Diagnosis
    verdict : Verdict
    about : mapping
        Model, prompts, settings and baseline, as in ``audit.json``.
    responses : sequence of dict
        Some flipped prompts.
    shown_layer : int
        The layer whose channels are shown.
    """

    diagnosis: Diagnosis
    verdict: Verdict
    about: Mapping[str, Any]
    responses: Sequence[Mapping[str, Any]]
    shown_layer: int


def render(audit: AuditPage) -> str:
    """The whole page as text; everything that a model, a user or a file name brought in is escaped."""
    return page(
        "audit.html",
        kicker="KV cache audit",
        model=audit.about["model"]["name"],
        scheme=audit.about["settings"]["scheme"],
        headline=audit.verdict.headline,
        sentences=audit.verdict.sentences,
        tone=_TONES.get(audit.verdict.status, ""),
        audit=audit,
        cards=_cards(audit),
        mode_figure=drawn(mode_card(audit.diagnosis.mode), "Failure mode"),
        sections=_sections(audit),
        provenance=_provenance(audit),
    )


def _cards(audit: AuditPage) -> list[dict[str, str]]:
    base, curve = audit.about["baseline"], audit.diagnosis.curve.to_frame()
    refused = base["refused"]
    lost = curve[curve["alignment"] == "lost"]
    first = "none shown" if lost.empty else f"{int(lost['bits'].max())}-bit"
    if audit.diagnosis.curve.meta["untouched"] == base["prompts"]:
        first = "nothing was rounded"
    pcr, worst = audit.diagnosis.pcr, audit.diagnosis.scan.worst_layer
    reduction = None if pcr.value is None or pcr.ci is None else Estimate(pcr.value, *pcr.ci)
    complied = 0 if worst is None else int(audit.diagnosis.scan.data.flips_complied.sel(layer=worst))
    return [
        {
            "title": "refuses with an exact cache",
            "value": f"{refused} of {base['prompts']}",
            "note": "harmful requests",
        },
        {"title": "widest width that loses alignment", "value": first, "note": audit.diagnosis.curve.meta["scheme"]},
        {
            "title": "worst single layer",
            "value": "none" if worst is None else str(worst),
            "note": "no single layer turns a refusal into compliance"
            if worst is None
            else f"alone turns {complied} of {refused} into compliance at {pcr.bits}-bit",
        },
        {
            "title": "per-channel reduction",
            "value": "-" if reduction is None or reduction.open else percent(reduction.value),
            "note": f"{pcr.status}, {'undefined' if reduction is None else reduction.interval}",
        },
        {
            "title": f"failure mode ({audit.diagnosis.width.scheme})",
            "value": audit.diagnosis.mode.name,
            "note": audit.diagnosis.mode.prescription,
        },
    ]


def _sections(audit: AuditPage) -> list[dict[str, Any]]:
    layer, settings, curve = audit.shown_layer, audit.about["settings"], audit.diagnosis.curve
    worst = audit.diagnosis.scan.worst_layer
    which = (
        "the worst layer" if worst is not None else "the layer with the largest key ratio (none flips a refusal alone)"
    )
    where = f"of layer {worst}" if worst is not None else "of every layer"
    return [
        section(
            "Behaviour and perplexity as the cache loses bits",
            f"All layers are rounded: {_rounding(audit)}. Precision falls from left to right. Top: the label of every harmful request. Middle: the share of the refusals "
            f"with an exact cache that is lost, with 95 % intervals. Bottom: perplexity of {settings['perplexity_text']}, over that with "
            "an exact cache, with 95 % intervals; "
            f"refusals that vanish while this line is still flat are lost unnoticed. Transition: {curve.transition}. {curve.caveat}",
            bit_curve(curve),
            curve.to_frame(),
        ),
        section(
            "Which layers carry refusal through the cache",
            f"Each layer is rounded alone ({settings['scan_scheme']}; {settings['scan_placement']}). Top: how much less firmly the model "
            "begins a refusal (95 % intervals). Bottom: refusals really lost. "
            + audit.diagnosis.scan.meta["reason"].capitalize()
            + ".",
            layer_scan(audit.diagnosis.scan),
            audit.diagnosis.scan.to_frame(),
        ),
        section(
            "Do finer scales rescue the worst layer?",
            "Per-channel reduction (PCR) is the share of that layer's lost refusals that per-channel scales bring back. A class is "
            "decided only if the whole 95 % interval lies in one band; grey is undecided. The second row repeats the measurement as "
            "the paper's released code does it, where decoded tokens escape per-channel rounding: the two are different quantities.",
            pcr_interval(
                audit.diagnosis.pcr, audit.diagnosis.pcr_paper, names=("as a cache stores it", "paper's simulation")
            ),
            _pcr_table(audit),
        ),
        section(
            "What has to be rounded for refusals to be lost",
            "Parts of the cache, rounded alike. The dotted line is all layers at once; a row that comes near it has what matters. "
            "Grey rows cannot be distinguished from it. Keeping the worst layer helps only if one layer is the cause.",
            ablation_bars(audit.diagnosis.ablation),
            audit.diagnosis.ablation.to_frame(),
        ),
        section(
            "Which channels have to be rounded",
            f"Only some channels {where} lose precision, with the scales that all share. The largest are a "
            "twentieth of each layer's channels, by root mean square; random ones are as many of the others.",
            ablation_bars(audit.diagnosis.channels),
            audit.diagnosis.channels.to_frame(),
        ),
        *_geometry_sections(audit, audit.diagnosis.sensitivity, layer, which),
    ]


def _geometry_sections(audit: AuditPage, found: Sensitivity | None, layer: int, which: str) -> list[dict[str, Any]]:
    """The geometry, where it was measured."""
    if found is None:
        return []
    return [
        section(
            "How exposed the safety direction is, by layer and site",
            "Noise-to-signal on the direction that separates harmful from harmless requests, over noise-to-signal of the whole "
            "vector. Red: rounding hits the safety direction harder. Rings: lower bounds, where the class difference cannot be told "
            "from chance. Grey: "
            "undefined. Keys (k) and values (v) are what the cache stores; the residual stream (resid) is not stored, and is shown "
            "as if it were rounded alike. The table says whether a ratio is above those of 19 harmless contrasts: only "
            "then is it specific to safety, and of 20 layers and sites one is so by chance. "
            f"Here: {found.conclusion}. "
            "Geometry alone does not decide behaviour: compare with the layer scan.",
            ratio_map(found),
            _sensitivity_table(found),
        ),
        *(
            section(
                f"Do outlier channels hold the class difference? Layer {layer}, {name}",
                f"Shown is {which}. Each point is a channel: far to the right are outliers, which set the scale that others "
                "share; high up are the channels in which harmful and harmless requests differ. What lies at the top left can be "
                "crushed by outliers. Points at the top right prove nothing: a channel that is large differs by more, whether or "
                "not the model reads it. Whether outliers lose safety themselves is what rounding them alone shows, above. "
                f"{outlier_share(found, layer, site)}.",
                channel_loading(found, layer, site),
                None,
            )
            for site, name in _failing_first(audit)
        ),
    ]


def _failing_first(audit: AuditPage) -> list[tuple[str, str]]:
    """Keys and values; first the site whose rounding alone, in all layers, loses more margin."""
    data, sites = audit.diagnosis.ablation.data, [("k", "keys"), ("v", "values")]
    names = [f"{name} only" for _, name in sites]
    if not {*names} <= {*map(str, data.recipe.values)}:
        return sites
    lost = [float(data.margin_drop.sel(recipe=name)) for name in names]
    return sites[::-1] if lost[1] > lost[0] else sites


def _pcr_table(audit: AuditPage) -> pd.DataFrame:
    import pandas as pd

    rows = [
        {"placement": name, **_without_parts(pcr.to_dict())}
        for name, pcr in (("cache", audit.diagnosis.pcr), ("paper", audit.diagnosis.pcr_paper))
    ]
    return pd.DataFrame(rows)


def _rounding(audit: AuditPage) -> str:
    """What the curve's cache holds: the scheme as it was asked for, its engine, and what keys and values get."""
    settings = audit.about["settings"]
    if not settings["engine"]:
        return f"{settings['scheme']}; {settings['placement']}"
    held = "; ".join(f"{bits}-bit: {how}" for bits, how in settings["stored"].items())
    return f"{settings['scheme']} ({settings['engine']}); {held}; {settings['placement']}"


def _without_parts(pcr: dict[str, Any]) -> dict[str, Any]:
    """One cell for each number: the reduction of the margin as its value alone."""
    by_margin = pcr.pop("by_margin")
    return {**pcr, "by_margin": None if by_margin is None else by_margin["value"]}


def _sensitivity_table(found: Sensitivity) -> pd.DataFrame:
    names = [
        "ratio",
        "ratio_low",
        "ratio_high",
        "signal_gap",
        "noise_alignment",
        "separation",
        "null_low",
        "null_high",
        "contrast_highest",
        "specific",
        "status",
        "position",
    ]
    return found.to_frame()[["layer", "site", *names]]


def _provenance(audit: AuditPage) -> list[tuple[str, str]]:
    model, prompts, settings = (audit.about[name] for name in ("model", "prompts", "settings"))
    return [
        ("model", f"{model['name']} (fingerprint {model['fingerprint']})"),
        ("weights", model["weights"]),
        *(("note", note) for note in model.get("notes", ())),
        (
            "runs on",
            f"{model['backend']}, {model['dtype']} on {model['device']}, {model['attention_kernel']} attention",
        ),
        (
            "cache",
            f"{model['layers']} layers, {model['kv_heads']} KV heads of {model['head_dim']} ({model['query_heads']} query heads), "
            f"{'key biases' if model['key_bias'] else 'no key biases'}, RoPE {model['rope']}"
            + (f"; {note}" if (note := model.get("cache_note")) else ""),
        ),
        ("prompts", prompts_text(prompts)),
        ("rounding of the curve", _rounding(audit)),
        (
            "rounding of layers, parts, PCR and geometry",
            f"{settings['scan_scheme']}; {settings['scan_placement']}",
        ),
        *([("geometry", f"not measured: {why}")] if (why := settings.get("no_geometry")) else []),
        ("perplexity", settings["perplexity_text"]),
        *conversation_rows(settings),
        ("responses", f"greedy, {_lengths(settings)}; judge: {settings['judge']}"),
        ("made", made_text(settings)),
    ]


def _lengths(settings: dict[str, Any]) -> str:
    """How long responses may be, and what the chat template was told."""
    told = ", ".join(f"{name}={value!r}" for name, value in settings["template_options"].items())
    reasoning = f" after at most {settings['max_reasoning_tokens']} of reasoning, if any"
    return f"at most {settings['max_new_tokens']} tokens{reasoning}" + (f"; chat template with {told}" if told else "")
