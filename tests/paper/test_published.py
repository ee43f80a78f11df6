"""The published facts: whole, sourced, and the same wherever they stand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvgeom.diagnosis.mode import MODES
from kvgeom.errors import InputError
from kvgeom.models.zoo import MODELS, in_zoo, zoo_model
from kvgeom.paper.published import MODELS as TAXONOMY
from kvgeom.paper.published import Published, published, published_table

#: The labels of the paper's tables in the order of its sections, as the released code names them.
LABELS = [
    "custom_all_models",
    "advbench_main",
    "multi_model_ppl",
    "std_metrics_mistral",
    "mistral_mse_phase",
    "phase_thresholds",
    "cross_suite_compare",
    "mistral_seeds",
    "multi_seeds",
    "mitigation_main",
    "specdecode_flip",
    "72b_alignment",
    "individual_layer_sensitivity",
    "qwen_individual_all",
    "llama_individual_all",
    "cross_model_layer_summary",
    "cumulative_qwen",
    "cumulative_deepseek",
    "cumulative_mistral",
    "cumulative_yi",
    "cumulative_phi35",
    "deepseek_asymmetry",
    "causal_vs_attention",
    "channel_ablation_all",
    "pcr_framework",
    "activation_stats",
    "taxonomy",
    "decision_tree",
    "qwen_protection_sweep",
    "llama_protection_sweep",
    "phi35_protection_sweep",
    "msmall_protection_sweep",
    "protection_comparison",
    "perchannel_mitigation",
    "protocol_validation",
    "protocol_vs_attention",
]


def test_all_tables_are_there_and_every_value_has_a_source() -> None:
    found = published()
    assert sorted(found.tables) == sorted(LABELS)
    assert len(LABELS) == 36
    for value in found.every_value():
        assert value.source in found.sources
        assert value.model is None or zoo_model(value.model)
        assert value.unit
        if value.kind == "claim":
            assert isinstance(value.value, str)
    assert {value.source for value in found.every_value()} == {*found.sources}


def test_a_share_is_a_share() -> None:
    for value in published().every_value():
        if value.unit.startswith("share"):
            ends = value.value if isinstance(value.value, tuple) else (value.value,)
            assert all(0 <= float(end) <= 1 for end in ends), value


def test_the_same_fact_has_one_value() -> None:
    """A number that stands in several tables is the same in each."""
    known: dict[tuple[object, ...], object] = {}
    for value in published().every_value():
        if value.kind == "example" or not value.model:
            continue
        key = (value.quantity, value.model, *sorted(value.at.items()), value.source)
        if value.quantity in ("pattern", "mode", "PCR", "critical layer", "recovery", "perplexity ratio"):
            assert known.setdefault(key, value.value) == value.value, key


def test_the_zoo_says_what_the_tables_say() -> None:
    for value in published().every_value():
        if value.model and value.quantity == "critical layer":
            assert zoo_model(value.model).critical_layer == value.value
        if value.model and value.quantity == "mode":
            assert zoo_model(value.model).mode == value.value
    assert len(MODELS) == 12
    assert all(model.critical_layer < model.layers for model in MODELS)
    assert [model.gigabytes for model in MODELS] == sorted(model.gigabytes for model in MODELS)


def test_no_value_is_filled_in() -> None:
    """Tables whose cells are in no public source have none."""
    empty = {label for label, table in published().tables.items() if not table.values}
    assert {"cumulative_qwen", "channel_ablation_all", "activation_stats", "cross_suite_compare"} <= empty
    assert published().find("pcr_framework", "per-tensor flip", "qwen7b") is None
    assert published().find("custom_all_models", "flip", None, {"bits": 4}) is None  # an example is no result


@pytest.mark.parametrize(("name", "quantity", "model", "at", "value"), [
    ("advbench_main", "conditional flip", "mistral7b", {"bits": 4}, 0.152),
    ("pcr_framework", "PCR", "deepseek7b", {}, 0.97),
    ("taxonomy", "mode", "yi9b", {}, "outlier-crushes-safety"),
    ("phase_thresholds", "width of the temperature run", "qwen7b", {}, 6),
])  # fmt: skip
def test_values_are_found_by_their_coordinates(name, quantity, model, at, value) -> None:  # type: ignore[no-untyped-def]
    found = published().find(name, quantity, model, at)
    assert found is not None
    assert found.value == value


def test_the_taxonomy_is_made_of_the_facts() -> None:
    assert len(TAXONOMY) == 8
    assert all(row.mode in MODES and row.named() == row.mode for row in TAXONOMY)
    by_name = {row.name: row for row in TAXONOMY}
    assert by_name["Gemma-2-9B"].pcr == 1.0
    assert by_name["Qwen-2.5-7B"].group64 == (0.0, 0.36)


def test_models_are_known_by_hub_id_folder_and_name() -> None:
    for model in MODELS:
        for name in (model.name, model.hub_id, f"/models/{model.hub_id.split('/')[1]}/", model.hub_id.upper()):
            assert in_zoo(name) == model
    assert in_zoo("Qwen/Qwen2.5-0.5B-Instruct") is None
    with pytest.raises(InputError, match="did you mean 'qwen7b'"):
        zoo_model("qwen7")
    with pytest.raises(InputError, match="unknown table of the paper"):
        published_table("table_9")


def test_the_file_is_read_strictly(tmp_path: Path) -> None:
    record = json.loads(published().model_dump_json())
    record["tables"]["taxonomy"]["values"][0]["valeu"] = 1
    from kvgeom.sealed import checked_json

    with pytest.raises(InputError, match="valeu"):
        checked_json(json.dumps(record).encode(), Published)


def test_the_facts_agree_with_those_beside_the_checkout(shared: Path) -> None:
    """An independent list of the same facts has the same numbers."""
    theirs = json.loads((shared / "published.json").read_text())
    assert {*theirs["tables"]} == {*published().tables}
    assert {*theirs["experiments_without_table_label"]} == {*published().experiments}
    assert {(m["short"], m["hf_id"], m["layers"], tuple(m["critical_layers_default"])) for m in theirs["models"]} == {
        (m.name, m.hub_id, m.layers, m.critical_layers) for m in MODELS
    }
    numbers = {
        row[key]
        for table in (*theirs["tables"].values(), *theirs["experiments_without_table_label"].values())
        for row in table["rows"]
        for key in (
            "pcr",
            "conditional_flip",
            "perplexity_ratio",
            "pass_strict",
            "cond_flip",
            "recovery",
            "recovery_max",
        )
        if key in row
    }
    ours = {value.value for value in published().every_value() if isinstance(value.value, float | int)}
    assert numbers <= ours
