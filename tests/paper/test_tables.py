"""The tables, against runs that share nothing with them but the model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

import kvgeom.paper
from kvgeom.errors import InputError
from kvgeom.evaluation.evaluate import evaluate
from kvgeom.evaluation.outcomes import Outcomes
from kvgeom.evaluation.respond import Sampler
from kvgeom.judges.keyword import KeywordJudge
from kvgeom.models.cache import EditedCache
from kvgeom.models.hf import HFModel
from kvgeom.paper.attention import by_attention
from kvgeom.paper.memory import cache_bytes
from kvgeom.paper.protection import layer_sets
from kvgeom.paper.protocol import GRIDS, MODES, Protocol
from kvgeom.paper.published import published
from kvgeom.paper.registry import get_table, tables
from kvgeom.paper.study import CriticalLayers, Study, suites_of
from kvgeom.paper.table import ENDING, PaperTable, Row, recovered
from kvgeom.paper.tables.channel_ablation import magnitudes, subsets
from kvgeom.paper.tables.classifier_agreement import drawn
from kvgeom.paper.tables.perplexity import windows
from kvgeom.paper.tables.phase_thresholds import COMPLETE, SAFE, borders
from kvgeom.paper.tables.protocol_validation import fix
from kvgeom.paper.tables.system_prompt import SAFETY
from kvgeom.quant.fake_quantize import fake_quantize
from kvgeom.quant.placement import Placement
from kvgeom.quant.quantizer import Quantizer
from kvgeom.quant.recipe import Recipe
from kvgeom.quant.scheme import Scheme
from tests.builders.paper import ASKED, HARMLESS, RUN, WIDE, straight_line, study
from tests.builders.released import rounded

pytestmark = pytest.mark.long

EVERY = [(layer, site) for layer in range(3) for site in "kv"]


@pytest.fixture(scope="module")
def shared() -> Study:
    """One study for all tests of this file; the mode is part of what is asked of it."""
    return study()


def flips(recipe: Recipe) -> int:
    """Of a faithful run that knows nothing of tables."""
    options = {"judge": RUN.judge, "max_new_tokens": RUN.max_new_tokens, "progress": False}
    found = evaluate(WIDE, {"r": recipe}, ASKED, full_responses=True, **options)
    return int(found.flipped("r").sum())


def measured(table: PaperTable, quantity: str, **at: int | str) -> int:
    """A share as the count that it is of."""
    cell = table.cell(quantity, **at)
    return round(cell["measured"] * cell["n"])


def test_the_model_refuses_some(shared: Study) -> None:
    assert 3 <= len(shared.base().refused) < len(ASKED)


#: In the mode of the released code they take seconds each, and most are measured by hand below.
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=pytest.mark.slow if mode == "released" else ())
        for name in tables()
        for mode in MODES
    ],
)
def test_frames_end_alike_and_tables_can_be_read_back(shared: Study, name: str, mode: str, tmp_path: Path) -> None:
    table = tables()[name].function(shared, mode=mode)
    frame = table.to_frame()
    assert tuple(frame.columns[-6:]) == ENDING
    assert len(frame)
    assert not frame.duplicated([*table.meta["keys"], "quantity"]).any()
    numbers = frame[[isinstance(value, float) for value in frame.measured]]
    known = numbers.dropna(subset=["low"])
    slack = 1e-9
    assert (known.low <= known.measured.astype(float) + slack).all()
    assert (known.measured.astype(float) <= known.high + slack).all()
    assert table.provenance()["judge"] == "arbitrary"
    again = PaperTable.load(table.save(tmp_path / "t.nc"))
    assert again.to_text() == table.to_text()
    assert "<b>PaperTable</b>" in table._repr_html_()
    assert name in table.to_text()
    assert mode in table.to_text()


def test_widths_are_those_of_evaluate(shared: Study) -> None:
    table = tables()["advbench_main"].function(shared)
    assert measured(table, "refused", bits=16) == len(shared.base().refused)
    for bits in (8, 4, 3, 2):
        assert measured(table, "conditional flip", bits=bits) == flips(Recipe.uniform(3, Scheme(bits)))


def test_kinds_of_flips_add_up(shared: Study) -> None:
    table = tables()["custom_all_models"].function(shared)
    for bits in (8, 6, 5, 4, 3, 2):
        kinds = sum(measured(table, f"refusal flip: {kind}", bits=bits) for kind in ("comply", "evade", "broken text"))
        assert kinds == measured(table, "refusal flip", bits=bits)


def test_layers_first_last_and_alone(shared: Study) -> None:
    each, ends = tables()["individual_all"].function(shared), tables()["cumulative"].function(shared)
    scheme = Scheme(3, True, "tensor")
    for layer in range(3):
        assert measured(each, "flip", layer=layer) == flips(Recipe.uniform(3, scheme, layers=[layer]))
    for k in (1, 2, 3):
        for side, layers in (("first", range(k)), ("last", range(3 - k, 3))):
            assert measured(ends, "flip", direction=side, k=k) == flips(Recipe.uniform(3, scheme, layers=layers))
    assert measured(ends, "flip", direction="first", k=3) == measured(ends, "flip", direction="last", k=3)


def test_keys_and_values(shared: Study) -> None:
    table = tables()["kv_asymmetric"].function(shared)
    for bits in (4, 3):
        for part, sites in (("keys", "k"), ("values", "v"), ("both", ("k", "v"))):
            recipe = Recipe.uniform(3, Scheme(bits), sites=sites)  # type: ignore[arg-type]
            assert measured(table, "flip", bits=bits, rounded=part) == flips(recipe)


def test_protection_is_the_uniform_cache_with_layers_kept(shared: Study) -> None:
    table = tables()["protection_sweep"].function(shared)
    base = flips(Recipe.uniform(3, Scheme(4)))
    assert measured(table, "flip", protected="none") == base
    for name in {row["protected"] for row in table.records()} - {"none"}:
        kept = [int(layer) for layer in name.split(",")]
        left = flips(Recipe.uniform(3, Scheme(4)).keep(kept))
        assert measured(table, "flip", protected=name) == left
        assert table.cell("recovery", protected=name)["measured"] == pytest.approx(1 - left / base)
        assert table.cell("layers kept", protected=name)["measured"] == pytest.approx(len(kept) / 3)


def test_the_error_of_keys_and_values_is_that_of_the_cache(shared: Study) -> None:
    """From the cache of transformers itself, rounded token by token."""
    table, scheme, means = tables()["mse_phase"].function(shared), Scheme(3), []
    for prompt in shared.base().prompts:
        cache = EditedCache(3)
        WIDE.forward(prompt.ids, cache)
        stored = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        means.append(float(np.mean([float(((fake_quantize(x, scheme) - x) ** 2).mean()) for x in stored])))
    assert table.cell("KV MSE", bits=3)["measured"] == pytest.approx(np.mean(means), rel=1e-5)
    four = table.cell("KV MSE", bits=4)["measured"]
    assert table.cell("relative MSE", bits=3)["measured"] == pytest.approx(np.mean(means) / four, rel=1e-5)
    assert table.cell("relative MSE", bits=4)["measured"] == 1


# --- the released protocol ---


def by(bits: int, granularity: str, symmetric: bool, size: int = 0, **more: object):  # type: ignore[no-untyped-def]
    return partial(rounded, bits=bits, symmetric=symmetric, granularity=granularity, size=size, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_released_widths_are_plain_arithmetic(shared: Study, bits: int) -> None:
    expected, error = straight_line(shared, dict.fromkeys(EVERY, by(bits, "token", False)))
    table = tables()["custom_all_models"].function(shared, mode="released")
    assert measured(table, "refusal flip", bits=bits) == expected.sum()
    assert table.cell("KV MSE", bits=bits)["measured"] == pytest.approx(error, rel=0.03)


def test_released_layers_and_per_channel_reduction_are_plain_arithmetic(shared: Study) -> None:
    """At each layer, and under the grids in which the paper's code can round."""
    each = tables()["individual_all"].function(shared, mode="released")
    for layer in range(3):
        sites = [(layer, "k"), (layer, "v")]
        expected, _ = straight_line(shared, dict.fromkeys(sites, by(3, "tensor", True)))
        assert measured(each, "flip", layer=layer) == expected.sum()
    table = tables()["pcr_framework"].function(shared, mode="released")
    critical = int(table.cell("critical layer")["measured"])
    sites = [(critical, "k"), (critical, "v")]
    for grid, symmetric in (("symmetric", True), ("clamped asymmetric", False)):
        lost = {}
        for granularity in ("tensor", "channel"):
            lost[granularity], _ = straight_line(shared, dict.fromkeys(sites, by(3, granularity, symmetric)))
            assert measured(table, f"per-{granularity} flip", grid=grid) == lost[granularity].sum()
        pcr = table.cell("PCR", grid=grid)["measured"]
        if lost["tensor"].any():
            assert pcr == pytest.approx(1 - lost["channel"].sum() / lost["tensor"].sum())
        else:
            assert np.isnan(pcr)
    group, _ = straight_line(shared, dict.fromkeys(EVERY, by(3, "group", True, 64)))
    assert measured(table, "group-64 flip, all layers") == group.sum()


def test_released_channel_subsets_are_plain_arithmetic(shared: Study) -> None:
    """The same channel numbers for keys and values, each subset with its own scale."""
    table = tables()["channel_ablation"].function(shared, mode="released")
    critical = shared.critical(shared.protocol("released")).first
    chosen = subsets(magnitudes(shared, critical, "projection")["k"])
    sites = [(critical, "k"), (critical, "v")]
    for name in ("outliers", "all but the outliers", "random 50 %"):
        expected, _ = straight_line(shared, dict.fromkeys(sites, by(3, "tensor", True, channels=chosen[name])))
        assert measured(table, "flip", channels=name) == expected.sum()


def test_released_kivi_is_plain_arithmetic(shared: Study) -> None:
    table = tables()["kivi"].function(shared, mode="released")
    for bits in (4, 2):
        keys, values = by(bits, "channel", False, lone_by_token=True), by(bits, "group", False, 32)
        expected, _ = straight_line(shared, {(n, site): keys if site == "k" else values for n, site in EVERY})
        assert measured(table, "flip", bits=bits, cache="KIVI, clamped") == expected.sum()


def test_a_residual_window_that_holds_all_recovers_nothing(shared: Study) -> None:
    """It loses nothing either; that is no merit of KIVI. A window of 32 lets most prompts meet rounding."""
    table = tables()["kivi"].function(shared)
    for bits in (4, 2):
        assert measured(table, "flip", bits=bits, cache="KIVI, 128 exact") == 0
        assert table.cell("recovery", bits=bits, cache="KIVI, 128 exact")["measured"] == "nothing is rounded"
        met = table.cell("prompts that meet rounding", bits=bits, cache="KIVI, 32 exact")["measured"]
        longest = [len(shared.base().prompts[index]) + RUN.max_new_tokens - 1 for index in shared.base().refused]
        assert max(longest) < 128
        assert met == sum(length > 32 for length in longest) > 0
        assert isinstance(table.cell("recovery", bits=bits, cache="KIVI, 32 exact")["measured"], float)


def test_released_mitigations_are_plain_arithmetic(shared: Study) -> None:
    table = tables()["perchannel_mitigation"].function(shared, mode="released")
    critical = shared.critical(shared.protocol("released")).first
    rest = [(n, site) for n, site in EVERY if n != critical]
    cases = {
        "a scale for each token": dict.fromkeys(EVERY, by(4, "token", False)),
        "a scale for each channel": dict.fromkeys(EVERY, by(4, "channel", False)),
        "group-64": dict.fromkeys(EVERY, by(4, "group", False, 64)),
        "critical layer in 16 bits, others by tensor": dict.fromkeys(rest, by(4, "tensor", False)),
    }
    for name, rounding in cases.items():
        expected, _ = straight_line(shared, rounding)
        assert measured(table, "flip", bits=4, strategy=name) == expected.sum()


def test_protocols_name_their_grids_and_placements() -> None:
    geometry = WIDE.geometry
    ours, theirs = Protocol("faithful", geometry), Protocol("released", geometry)
    assert (str(ours.by_token(4)), str(theirs.by_token(4))) == ("int4-asym-token", "released4-asym-token")
    assert (str(ours.by_tensor(3)), str(theirs.by_tensor(3))) == ("int3-sym-tensor", "released3-sym-tensor")
    assert theirs.placement == Placement.released()
    assert theirs.kivi_placement.alone == "token"
    for protocol in (ours, theirs):
        assert [str(protocol.grid(name, 3, "channel")).split("-", 1)[1] for name in GRIDS] == [
            "sym-channel",
            "asym-channel",
            "asym-channel",
        ]
        assert protocol.grid("clamped asymmetric", 3, "channel").format == "released"
        assert protocol.grid("asymmetric", 3, "channel").format == "int"
    with pytest.raises(InputError, match="did you mean 'released'"):
        Protocol("relesed", geometry)  # type: ignore[arg-type]


# --- parts ---


def test_attention_orders_layers_as_the_models_own_weights_do(shared: Study) -> None:
    peaks, entropies = np.zeros(3), np.zeros(3)
    WIDE.hf_model.set_attn_implementation("eager")
    try:
        for prompt in shared.base().prompts:
            with torch.inference_mode():
                shown = WIDE.hf_model(torch.tensor([prompt.ids]), output_attentions=True).attentions
            for layer, paid in enumerate(shown):
                p = paid[0].double()
                peaks[layer] += float(p.max(-1).values.mean())
                entropies[layer] += float(-(p * torch.where(p > 0, p, 1.0).log()).sum(-1).mean())
    finally:
        WIDE.hf_model.set_attn_implementation("sdpa")
    assert by_attention(shared, "peak") == np.argsort(-peaks).tolist()
    assert by_attention(shared, "entropy") == np.argsort(-entropies).tolist()


def test_statistics_of_keys_are_those_of_the_projection(shared: Study) -> None:
    table = tables()["activation_stats"].function(shared, mode="released")
    layer = int(table.records()[0]["layer"])
    kept: list[torch.Tensor] = []
    module = WIDE.hf_model.model.layers[layer].self_attn.k_proj
    handle = module.register_forward_hook(lambda _module, _args, output: kept.append(output[0].detach().clone()))
    try:
        for prompt in shared.base().prompts:
            with torch.inference_mode():
                WIDE.hf_model(torch.tensor([prompt.ids]))
    finally:
        handle.remove()
    keys = torch.cat(kept).numpy()
    size = np.abs(keys)
    border = abs(keys.mean()) + 3 * keys.std(ddof=1)
    step = size.max() / 3
    expected = {
        "largest value": size.max(),
        "mean of the outliers": size[size > border].mean() if (size > border).any() else np.nan,
        "outliers": (size > border).mean(),
        "MSE at 3 bits": ((np.clip(np.round(keys / step), -4, 3) * step - keys) ** 2).mean(),
        "channels": keys.shape[1],
        "channels on one side of 0": ((keys > 0).all(0) | (keys < 0).all(0)).mean(),
    }
    for quantity, value in expected.items():
        assert table.cell(quantity)["measured"] == pytest.approx(value, rel=1e-3, nan_ok=True), quantity


def test_perplexity_is_that_of_the_windows(shared: Study) -> None:
    """From the model's own losses: labels that a window does not score are left out, as transformers does it."""
    table, ids = tables()["perplexity"].function(shared), torch.tensor([WIDE.tokens(shared.run.text)])
    means, longest, before = [], WIDE.max_context, 0
    for begin in range(0, ids.shape[1], 512):
        end = min(begin + longest, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - before)] = -100
        before = end
        with torch.inference_mode():
            means.append(float(WIDE.hf_model(ids[:, begin:end], labels=labels).loss))
        if end == ids.shape[1]:
            break
    assert longest == 512
    cell = table.cell("perplexity", bits=16)
    assert cell["n"] == len(means) > 3
    assert cell["measured"] == pytest.approx(np.exp(np.mean(means)), rel=1e-4)
    assert table.cell("memory", bits=4)["measured"] == 0.25
    assert table.cell("memory with scales", bits=4)["measured"] > 0.25
    two = table.cell("perplexity ratio", bits=2)
    assert two["low"] <= two["measured"]
    assert two["measured"] == pytest.approx(table.cell("perplexity", bits=2)["measured"] / cell["measured"])


@given(st.integers(2, 9000), st.sampled_from([512, 700, 2048]))
def test_windows_score_every_token_once(tokens: int, longest: int) -> None:
    """All but the first, which nothing predicts, and with windows no longer than the stride the first of each."""
    scored: list[int] = []
    for begin, end, count in windows(tokens, longest):
        assert end - begin <= longest
        scored += range(end - count, end)
    assert len({*scored}) == len(scored)
    lost = set(range(tokens)) - {*scored}
    assert lost == ({0} if longest > 512 else {*range(0, tokens, 512)})


@pytest.mark.parametrize("mode", MODES)
def test_the_protocol_tries_the_fix_that_it_names(mode: str) -> None:
    own = study()
    table = tables()["protocol_validation"].function(own, mode=mode)
    tree = tables()["decision_tree"].function(own, mode=mode)
    taken = next(row for row in tree.records() if row["measured"] == "applies")
    fixes = {
        "outlier-as-safety": "layer",
        "mixed": "by channel",
        "outlier-crushes-safety": "group-64 in every layer",
        "multi-layer dilution": "layers",
        "hyper-vulnerable": "whole cache in 16 bits",
    }
    assert fixes[taken["mode"]] in table.cell("fix")["measured"]
    if taken["mode"] == "hyper-vulnerable":
        assert table.cell("flip with the fix")["measured"] == 0
        assert table.cell("layers kept")["measured"] == 1


@pytest.mark.parametrize("mode", MODES)
def test_fixes_of_all_modes(mode: str) -> None:
    protocol = Protocol(mode, WIDE.geometry)  # type: ignore[arg-type]
    critical = CriticalLayers((2, 0, 1), {layer: np.ones(2, bool) for layer in range(3)})
    form = "int" if mode == "faithful" else "released"
    expected = {
        "outlier-as-safety": (f"{form}4-asym-token in layers 0-1", [2]),
        "outlier-crushes-safety": (f"{form}4-asym-group64", []),
        "mixed": (f"{form}4-asym-group64 in layers 0-1 + {form}4-asym-channel in layers 2", []),
        "multi-layer dilution": (f"{form}4-asym-token in layers 1", [0, 2]),
        "hyper-vulnerable": ("exact", [0, 1, 2]),
    }
    for name, (recipe, kept) in expected.items():
        _, layers, condition = fix(protocol, name, critical, 4)
        assert (str(condition.recipe), layers) == (recipe, kept)


@given(st.integers(20, 400), st.integers(0, 10**6))
def test_subsets_are_what_the_borders_say(n: int, seed: int) -> None:
    largest = np.random.default_rng(seed).random(n)
    found = subsets(largest)
    assert sorted(found["outliers"] + found["all but the outliers"]) == list(range(n))
    assert min(largest[found["outliers"]]) > max(largest[found["all but the outliers"]])
    assert len(found["low magnitude"]) == min(100, -(-n // 2))
    for share in (1, 5, 10, 25, 50):
        assert len(found[f"random {share} %"]) == int(n * share / 100)
        assert len({*found[f"random {share} %"]}) == len(found[f"random {share} %"])
    again = subsets(largest)
    assert again == found


@given(st.dictionaries(st.sampled_from([8, 6, 5, 4, 3, 2]), st.integers(0, 30), min_size=1), st.integers(1, 30))
def test_borders_of_widths(found: dict[int, int], refused: int) -> None:
    counts = {bits: min(count, refused) for bits, count in found.items()}
    safe, begins, complete = borders(counts, refused)
    unsafe = [bits for bits in counts if counts[bits] / refused >= SAFE - 1e-12]
    assert begins == max(unsafe, default=None)
    assert safe == min((bits for bits in counts if not unsafe or bits > max(unsafe)), default=None)
    assert complete == max((bits for bits in counts if counts[bits] / refused >= COMPLETE - 1e-12), default=None)


@given(st.integers(1, 40), st.integers(0, 10**6))
def test_protected_sets_are_those_of_the_released_code(layers: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(layers).tolist()
    critical = CriticalLayers(tuple(order), {layer: np.zeros(3, bool) for layer in range(layers)})
    sets = layer_sets(critical, range(layers))
    assert all(name == ",".join(map(str, kept)) for name, kept in sets.items())
    assert all(len(kept) < layers for kept in sets.values())
    if layers > 9:
        first = order[0]
        wanted = [[first], *(sorted(order[:k]) for k in range(2, 6))]
        wanted += [list(range(k)) for k in (range(2, 9) if first <= 2 else range(first + 1, first + 5)) if k < layers]
        assert {tuple(each) for each in wanted} == {tuple(each) for each in sets.values()}


def test_two_of_28_layers_are_a_fifth_more_bytes() -> None:
    """The paper's 7 % of memory. A token has 512 channels of 4 bits, a scale and an offset of 32."""
    from kvgeom.evaluation.condition import Condition
    from kvgeom.models.shapes import KVGeometry

    geometry = KVGeometry(28, 28, 4, 128, 3584, True, "default", None)
    uniform = Recipe.uniform(28, "int4-asym-token")
    more = cache_bytes(Condition(uniform.keep([0, 1])), geometry) / cache_bytes(Condition(uniform), geometry) - 1
    bits = 4 + 2 * 32 / 512
    assert more == pytest.approx((16 - bits) / bits * 2 / 28)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_recovery_is_paired_and_undefined_where_nothing_is_lost(pairs: list[tuple[bool, bool]]) -> None:
    before, after = np.array(pairs).T
    row = recovered({}, "recovery", before, after)
    if before.any():
        assert row.measured == pytest.approx(1 - after.sum() / before.sum())
        assert row.low <= row.measured <= row.high  # type: ignore[operator]
    else:
        assert np.isnan(row.measured)  # type: ignore[arg-type]


# --- what was published, and the registry ---


def test_published_values_stand_beside_those_of_the_same_model() -> None:
    qwen = study(name="Qwen/Qwen2.5-7B-Instruct")
    cell = tables()["pcr_framework"].function(qwen).cell("PCR", grid="symmetric")
    assert (cell["published"], cell["source"]) == (0.15, "release (result)")
    clamped = tables()["pcr_framework"].function(qwen).cell("PCR", grid="clamped asymmetric")
    assert np.isnan(clamped["published"])
    assert clamped["source"] == "not in the paper"
    eight = tables()["advbench_main"].function(qwen).cell("conditional flip", bits=8)
    assert eight["published"] == 0.002
    assert "inferred" in eight["source"]
    three = tables()["advbench_main"].function(qwen).cell("conditional flip", bits=3)
    assert three["source"] == "not public"
    assert "(paper: 0.2 %)" in tables()["advbench_main"].function(qwen).to_text()
    assert tables()["taxonomy"].function(qwen).cell("mode")["published"] == "outlier-as-safety"


def test_a_model_that_is_not_the_papers_has_nothing_published_beside_it(shared: Study) -> None:
    sources = set(tables()["pcr_framework"].function(shared).to_frame().source)
    assert sources == {"not a model of the paper", "not in the paper"}


def test_a_study_measures_nothing_twice(tmp_path: Path) -> None:
    with study(tmp_path).opened() as first:
        for name in ("advbench_main", "pcr_framework"):
            tables()[name].function(first, mode="released")
        known = first.base().journal.known  # type: ignore[attr-defined]
        tables()["taxonomy"].function(first, mode="released")
        assert first.base().journal.known == known  # type: ignore[attr-defined]
        text = tables()["advbench_main"].function(first, mode="released").to_text()
    with study(tmp_path).opened() as again:
        assert tables()["advbench_main"].function(again, mode="released").to_text() == text
        assert again.base().journal.known == known  # type: ignore[attr-defined]


def test_tables_are_functions_of_a_model_too(shared: Study) -> None:
    found = kvgeom.paper.advbench_main(
        WIDE, prompts=ASKED, judge=RUN.judge, max_new_tokens=RUN.max_new_tokens, progress=False
    )
    assert found.to_frame().equals(tables()["advbench_main"].function(shared).to_frame())
    with pytest.raises(InputError, match="did you mean 'prompts'"):
        kvgeom.paper.advbench_main(WIDE, promts=ASKED)
    with pytest.raises(AttributeError, match="no table 'advbench'"):
        kvgeom.paper.advbench  # noqa: B018


def test_tables_are_found_by_the_papers_labels() -> None:
    assert get_table("cumulative_yi").name == "cumulative"
    assert get_table("qwen_protection_sweep").name == "protection_sweep"
    with pytest.raises(InputError, match="does not measure"):
        get_table("ifeval")
    with pytest.raises(InputError, match="did you mean"):
        get_table("cumulativ")


def test_rows_of_another_place_are_looked_up_there() -> None:
    assert Row({"bits": 4}, "flip", 0.5).coordinates == {"bits": 4}
    assert Row({"bits": 4}, "flip", 0.5, published_at={}).coordinates == {}
    assert Row({"bits": 4}, "flip", 0.5, published_at=None).coordinates is None


def test_a_rotation_is_that_of_the_scheme(shared: Study) -> None:
    table = tables()["rotation"].function(shared)
    for bits in (4, 3):
        for cache, text in (("plain", f"int{bits}-asym-token"), ("rotated", f"int{bits}-asym-token+hadamard")):
            assert measured(table, "flip", bits=bits, cache=cache) == flips(Recipe.uniform(3, Scheme.parse(text)))
    own, other = table.cell("PCR", bits=3), tables()["pcr_framework"].function(shared).cell("PCR", grid="symmetric")
    assert own["measured"] == other["measured"] or (
        own["measured"] != own["measured"] and other["measured"] != other["measured"]
    )


def test_layers_under_two_quantizers(shared: Study) -> None:
    table = tables()["scheme_transfer"].function(shared)
    for section, text in (("section 4", "int3-sym-tensor"), ("section 5", "int3-asym-token")):
        for layer in range(3):
            expected = flips(Recipe.uniform(3, Scheme.parse(text), layers=[layer]))
            assert measured(table, f"flip, {section}", layer=str(layer)) == expected


def test_the_rank_correlation_of_two_columns(shared: Study) -> None:
    table = tables()["scheme_transfer"].function(shared)
    one, other = (
        [table.cell(f"flip, section {n}", layer=str(layer))["measured"] for layer in range(3)] for n in (4, 5)
    )
    seen = table.cell("rank correlation, as seen")["measured"]
    if len({*one}) == 1 or len({*other}) == 1:
        assert np.isnan(seen)
    else:
        assert seen == pytest.approx(np.corrcoef(rankdata(one), rankdata(other))[0, 1], abs=1e-9)
    row = table.cell("rank correlation")
    assert np.isnan(row["low"]) or -1 <= row["low"] <= row["measured"] <= row["high"] <= 1


def test_caches_of_vllm_are_its_presets(shared: Study) -> None:
    table = tables()["vllm_fp8"].function(shared)
    for cache, text in (("fp8_e5m2", "fp8_e5m2"), ("fp8_e4m3", "fp8_e4m3"), ("simulated 8 bits", "int8-asym-token")):
        assert measured(table, "conditional flip", cache=cache) == flips(Recipe.uniform(3, Scheme.parse(text)))
    row = published().find("vllm_fp8", "conditional flip", "qwen7b", {"cache": "fp8_e5m2"})
    assert row is not None
    assert row.value == 0.303


def test_a_draft_changes_nothing(shared: Study) -> None:
    table = tables()["speculative"].function(shared)
    for bits in (8, 4, 3):
        assert measured(table, "responses that differ", bits=bits) == 0
        plain, drafted = (measured(table, f"flip, {how}", bits=bits) for how in ("token by token", "with a draft"))
        assert plain == drafted == flips(Recipe.uniform(3, Scheme(bits)))


def test_stored_codes_give_what_the_simulation_gives(shared: Study) -> None:
    table = tables()["real_dtype"].function(shared)
    n = len(shared.base().refused)
    for text in ("int8-asym-token", "fp8_e4m3", "int4-asym-token"):
        assert measured(table, "labels that agree", cache=text) == n
        assert measured(table, "flip, stored", cache=text) == flips(Recipe.uniform(3, Scheme.parse(text)))
    sizes = [table.cell("bytes of a token", cache=text)["measured"] for text in ("int8-asym-token", "int4-asym-token")]
    assert sizes[1] < sizes[0]


# --- the same requests in a conversation, harmless requests, two judges ---


def alone(conversation: list[dict[str, str]], requests: list[str], bits: tuple[int, ...]) -> Outcomes:
    """Responses in a conversation, of a run that knows nothing of tables, and of a model that was loaded so."""
    model = kvgeom.load(WIDE.hf_model, tokenizer=WIDE.tokenizer, name="w", conversation=conversation or None)
    recipes = {str(width): Recipe.uniform(3, Scheme(width)) for width in bits}
    return evaluate(
        model,
        recipes,
        requests,
        full_responses=True,
        judge=RUN.judge,
        max_new_tokens=RUN.max_new_tokens,
        progress=False,
    )


@pytest.mark.parametrize(
    ("name", "key", "setting", "conversation", "bits"),
    [
        ("system_prompt", "system prompt", "safety", [{"role": "system", "content": SAFETY}], (4, 3, 2)),
        ("multi_turn", "turns before", "2", kvgeom.conversation(turns=2), (8, 6, 4, 3)),
    ],
)
def test_requests_in_a_conversation(
    shared: Study, name: str, key: str, setting: str, conversation: list[dict[str, str]], bits: tuple[int, ...]
) -> None:
    table = tables()[name].function(shared)
    first = "none" if name == "system_prompt" else "0"
    runs = {first: alone([], ASKED, bits), setting: alone(conversation, ASKED, bits)}
    labels = {where: run.data.label for where, run in runs.items()}
    refused = {where: found.sel(recipe="exact").values == "refused" for where, found in labels.items()}
    assert not np.array_equal(labels[first].values, labels[setting].values)
    for where in runs:
        assert measured(table, "refused", bits=16, **{key: where}) == refused[where].sum()
    for width in bits:
        lost = {where: labels[where].sel(recipe=str(width)).values != "refused" for where in runs}
        for where in runs:
            assert measured(table, "flip", bits=width, **{key: where}) == (lost[where] & refused[where]).sum()
        both = refused[first] & refused[setting]
        cell = table.cell("more flips, of what both refuse", bits=width, **{key: setting})
        assert cell["n"] == both.sum()
        if both.any():
            assert cell["measured"] == pytest.approx((lost[setting][both].sum() - lost[first][both].sum()) / both.sum())
            assert cell["low"] <= cell["measured"] <= cell["high"]


def test_a_long_text_fits_the_context(shared: Study) -> None:
    table = tables()["long_context"].function(shared)
    tokens = table.cell("tokens before", bits=16, **{"text before": "harmless"})["measured"]
    longest = max(len(prompt) for prompt in WIDE.encode(ASKED))
    assert 0.2 * (WIDE.max_context - longest) < tokens <= WIDE.max_context - longest - RUN.max_new_tokens
    assert table.cell("flip", bits=3, **{"text before": "harmless"})["n"] > 0


def test_conversations_are_journalled_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with study(tmp_path).opened() as made:
        table = tables()["system_prompt"].function(made)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jsonl")) == [
        "advbench.jsonl",
        "system-prompt-safety/advbench.jsonl",
    ]
    with study(tmp_path).opened() as again:
        monkeypatch.setattr(HFModel, "generate", None)
        assert tables()["system_prompt"].function(again).to_text() == table.to_text()


def test_harmless_requests_are_counted(shared: Study) -> None:
    table = tables()["xstest"].function(shared)
    for kind, requests in (("harmful", ASKED), ("harmless", HARMLESS)):
        found = alone([], requests, (8, 6, 5, 4, 3, 2)).data.label
        exact = found.sel(recipe="exact").values
        assert measured(table, "refused", bits=16, requests=kind) == (exact == "refused").sum()
        for width in (8, 6, 5, 4, 3, 2):
            now = found.sel(recipe=str(width)).values
            assert measured(table, "refused", bits=width, requests=kind) == (now == "refused").sum()
            newly = measured(table, "newly refused", bits=width, requests=kind)
            assert newly == ((now == "refused") & (exact != "refused")).sum()
    with pytest.raises(InputError, match="xstest needs harmless requests"):
        tables()["xstest"].function(Study(WIDE, RUN, suites_of(ASKED, None)))


def test_the_ratio_is_that_of_the_subspace(shared: Study) -> None:
    table = tables()["geometry"].function(shared)
    prompts = kvgeom.PromptSet("t", tuple(ASKED), tuple(HARMLESS), "")
    found = kvgeom.subspace(WIDE, prompts, progress=False).sensitivity("int3-sym-tensor", contrasts=(), progress=False)
    for site in "kv":
        for layer in range(3):
            cell = found.data.sel(layer=layer, site=site)
            row = table.cell("ratio", layer=str(layer), site=site)
            np.testing.assert_allclose([row["measured"], row["low"]], [cell.ratio, cell.ratio_low])
        surely = int((found.data.ratio_low.sel(site=site) > 100).sum())
        assert measured(table, "above 100", layer="all", site=site) == surely


def test_sampled_responses_by_hand(shared: Study) -> None:
    table, base = tables()["temperature"].function(shared), shared.base("advbench")
    assert table.meta["mode"] == "faithful"
    refused = {}
    for bits in (16, 4):
        for seed in (0, 1, 2):
            edit = None if bits == 16 else Quantizer(Recipe.uniform(3, Scheme(bits)), Placement.cache())
            labels = []
            for index, prompt in enumerate(base.prompts):
                cache, tokens, sampler = WIDE.new_cache(edit), list[int](), Sampler(0.6, 0.9, seed)
                logits = WIDE.forward(prompt.ids, cache)[-1]
                for made in range(RUN.max_new_tokens):
                    token = sampler(index, made, logits)
                    if token in WIDE.stop_tokens:
                        break
                    tokens.append(token)
                    logits = WIDE.forward([token], cache)[-1]
                labels.append(base.judged(index, tokens)[1] == "refused")
            refused[bits, seed] = np.array(labels)
            assert measured(table, "refusal", bits=bits, seed=str(seed)) == sum(labels)
    for seed in (0, 1, 2):
        flips = (refused[16, seed] & ~refused[4, seed]).sum()
        assert measured(table, "flip", bits=4, seed=str(seed)) == flips


def test_two_judges(shared: Study) -> None:
    """Cohen's kappa as it is defined; the arbitrary judge of this run has little to do with words."""
    table = tables()["classifier_agreement"].function(shared)
    cell = table.cell("Cohen's kappa", bits="all")
    agree = table.cell("agreement", bits="all")
    assert agree["n"] == 3 * len(ASKED)
    found = alone([], ASKED, (4, 3))
    one = (found.data.label.values == "refused").ravel()
    words = KeywordJudge()
    other = np.array(
        [
            words.label(ASKED[n], str(text), lambda: -1.0).label == "refused"
            for own in found.data.text.values
            for n, text in enumerate(own)
        ]
    )
    assert agree["measured"] == pytest.approx((one == other).mean())
    if len({*other}) == 2:
        chance = one.mean() * other.mean() + (1 - one.mean()) * (1 - other.mean())
        assert cell["measured"] == pytest.approx(((one == other).mean() - chance) / (1 - chance))
    else:
        assert np.isnan(cell["measured"])


@given(st.lists(st.lists(st.booleans(), max_size=40), min_size=1, max_size=4), st.integers(1, 60), st.integers(0, 99))
def test_samples_of_responses_are_stratified(refused: list[list[bool]], size: int, seed: int) -> None:
    found = drawn([np.array(own, dtype=bool) for own in refused], size, seed)
    assert sum(map(len, found)) == min(size, sum(map(len, refused)))
    counts = []
    for rows, own in zip(found, refused, strict=True):
        assert len({*rows}) == len(rows)
        counts += [(sum(own[row] == label for row in rows), own.count(label)) for label in (True, False)]
    least = min((taken for taken, there in counts if taken < there), default=None)
    if least is not None:  # whoever could give more gives as many as anybody, but for what division leaves
        assert all(taken in (least, least + 1) or taken == there <= least + 1 for taken, there in counts)
