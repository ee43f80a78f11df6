"""The fix from end to end on tiny models: what it finds, writes, says, and leaves when it is interrupted."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import kvgeom
from kvgeom.cli import main
from kvgeom.errors import InputError
from kvgeom.folders import report_folder
from kvgeom.judges.judge import Judgement
from kvgeom.judges.keyword import KeywordJudge
from kvgeom.models.hf import HFModel
from kvgeom.organisms import Size, plant, tiny_model
from kvgeom.prompts.sets import PromptSet
from kvgeom.report.fix import Fix, check
from kvgeom.report.fix_text import COLUMNS, before_and_after, rules_compared, size_or_direction
from kvgeom.results import plain
from tests.builders.judges import ArbitraryJudge
from tests.builders.mitigation import selection, verification
from tests.builders.pages import Page
from tests.builders.requests import NASTY
from tests.builders.tiny import tiny_model as random_model

pytestmark = pytest.mark.long

TINY = random_model("qwen2", seed=2)

SIZE = Size(3)
PROMPTS, PROOF = SIZE.prompts().take(8), SIZE.prompts("train").take(12)
PROOF = replace(PROOF, harmless=SIZE.prompts("train").harmless[:32])  # fewer could not show that they are kept
HOW: dict[str, Any] = {
    "scheme": "sym-tensor", "bits": 3, "memory": 0.2, "prompts": PROMPTS, "verify_prompts": PROOF, "max_new_tokens": 12,
    "controls": 1, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> HFModel:
    """It loses its refusals to the scale that outliers set in one layer."""
    return plant(tiny_model(SIZE), "outlier-crushes-safety", seed=5, prompts=SIZE.prompts("train").take(24)).model


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fixes") / "new" / "folder"


@pytest.fixture(scope="module")
def fixed(model: HFModel, out: Path) -> Fix:
    return kvgeom.fix(model, out, **HOW)


def test_it_finds_what_was_planted_and_mends_it(fixed: Fix) -> None:
    assert fixed.diagnosis.mode.name == fixed.plan.mode == "outlier-crushes-safety"
    assert fixed.verification.status == "helps"
    assert fixed.verification.meta["source"] == PROOF.name
    assert int(fixed.verification.data.flips.sel(recipe="unmitigated")) == 12
    assert int(fixed.verification.data.flips.sel(recipe="chosen")) == 0
    assert fixed.plan.memory_overhead <= 0.2
    assert fixed.diagnosis.sensitivity is None
    assert fixed.verification.sentence in repr(fixed)
    assert list(fixed.diagnosis.curve.data.bits.values) == [16, 3]


def test_plan_json_has_what_was_promised(fixed: Fix, out: Path) -> None:
    assert sorted(path.name for path in out.iterdir()) == [
        "diagnosis.nc", "fix.json", "journal-harmless.jsonl", "journal.jsonl", "plan.json", "report.html", "verification.nc",
        "verify-harmless.jsonl", "verify.jsonl",
    ]  # fmt: skip
    numbers = json.loads((out / "plan.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert {"mode", "chosen", "paper", "verified"} <= numbers.keys()
    for role in ("chosen", "paper"):
        assert {"name", "recipe", "memory_overhead"} <= numbers[role].keys()
    verified = numbers["verified"]
    assert {"prompts", "flips_before", "flips_after", "recovery", "ci", "perplexity_ratio"} <= verified.keys()
    assert (verified["prompts"], verified["flips_before"], verified["flips_after"]) == (12, 12, 0)
    assert verified["recovery"] == 1.0
    for where in (verified, verified["paper"]):
        assert where["perplexity_ratio_ci"][0] < where["perplexity_ratio"] < where["perplexity_ratio_ci"][1]
    again = kvgeom.Plan.load(out)
    assert again.chosen == fixed.plan.chosen
    assert again.verified == verified


def test_a_fix_can_be_read_back(fixed: Fix, out: Path, tmp_path: Path) -> None:
    again = Fix.load(out)
    assert report_folder(out, "fix") == out  # may be replaced by another fix
    assert again.page() == (out / "report.html").read_text(encoding="utf-8")
    assert again.to_text(out) == fixed.to_text(out)
    assert again.settings == plain(fixed.settings)
    assert again.plan.candidates == fixed.plan.candidates
    assert again.to_frame().equals(fixed.to_frame())
    assert again.provenance() == fixed.provenance()
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        Fix.load(tmp_path)


def test_requests_in_similar_wording_make_a_proof_too_sure(fixed: Fix) -> None:
    """Said where the verdict's reasons are, of either set, and read back with them."""
    assert not [said for said in fixed.sentences if "clusters" in said]
    alike = {**fixed.settings["verification"], "harmful_clusters": 1}
    found = replace(fixed, settings={**fixed.settings, "verification": alike})
    (said,) = [each for each in found.sentences if "cluster" in each]
    assert f"{alike['harmful']} harmful requests make 1 cluster of similar wording." in said
    for text in (found.to_text(), found.page(), found._repr_html_()):
        assert said in text


def test_every_key_of_plan_json_is_documented(out: Path, fixed: Fix) -> None:
    page = Path(__file__).parents[2].joinpath("docs", "mitigation.md").read_text()
    numbers = json.loads((out / "plan.json").read_text())

    def names(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*(names(item) for item in value))
        return {*value}.union(*(names(item) for item in value.values())) if isinstance(value, dict) else set()

    found = set(numbers) | names({key: numbers[key] for key in ("model", "chosen", "verified", "search", "selection")})
    found |= {*numbers["verified"]["paper"]}
    rules = {*fixed.plan.selection.meta["order"]} if fixed.plan.selection else set()
    missing = {
        name for name in found - rules - {*_inner(numbers)} if f"`{name}`" not in page and f"`{name}[]`" not in page
    }
    assert not missing


def _inner(numbers: dict[str, Any]) -> set[str]:
    """Keys of recipes and of names that are data, not layout."""
    return {*numbers["chosen"]["recipe"], *numbers["search"]["meta"]["versions"]}


def test_a_folder_with_a_fix_makes_no_response_again(fixed: Fix, model: HFModel, out: Path) -> None:
    before = {path.name: path.read_bytes() for path in out.glob("*.jsonl")}
    again = kvgeom.fix(model, out, **HOW)
    assert {path.name: path.read_bytes() for path in out.glob("*.jsonl")} == before
    assert plain(again.plan.to_dict()) == plain(fixed.plan.to_dict())


@dataclass
class Impatient:
    """The keyword judge; gives up after some responses."""

    patience: int
    name: str = KeywordJudge().name
    asked: int = 0
    judge: KeywordJudge = field(default_factory=KeywordJudge)

    def label(self, request: str, response: str, likelihood: Callable[[], float]) -> Judgement:
        self.asked += 1
        if self.asked > self.patience:
            raise KeyboardInterrupt
        return self.judge.label(request, response, likelihood)


@pytest.mark.slow
def test_an_interrupted_fix_goes_on(model: HFModel, tmp_path: Path) -> None:
    """Stopped in the search and in the proof it ends as one that was not, and nothing is labelled twice."""
    few = {**HOW, "prompts": PROMPTS.take(2), "verify_prompts": PROOF.take(2), "controls": 0}
    once = Impatient(10**6)
    whole = kvgeom.fix(model, tmp_path / "whole", judge=once, **few)
    stopped, left = tmp_path / "stopped", []
    soon = once.asked // 4
    for patience in (soon, once.asked - soon - 2):
        with pytest.raises(KeyboardInterrupt):
            kvgeom.fix(model, stopped, judge=Impatient(patience), **few)
        left.append(sorted(path.name for path in stopped.glob("[!.]*")))
    assert "verify.jsonl" not in left[0]
    assert "verify.jsonl" in left[1]
    assert not {"plan.json", "report.html"} & {*left[0], *left[1]}
    ended = kvgeom.fix(model, stopped, judge=Impatient(10**6), **few)
    assert plain(ended.plan.to_dict()) == plain(whole.plan.to_dict())
    for journal in (tmp_path / "whole").glob("*.jsonl"):
        once_only, went_on = ((folder / journal.name).read_text() for folder in (journal.parent, stopped))
        assert sorted(went_on.splitlines()) == sorted(once_only.splitlines())


# --- the page ---


def test_the_page_stands_alone_and_shows_every_part(fixed: Fix, out: Path) -> None:
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert not page.reaches_out("plan.json")
    words = " ".join(" ".join(page.text).split())
    assert re.findall("<h2>(.*?)</h2>", (out / "report.html").read_text(encoding="utf-8")) == [
        "Before and after", "What each candidate keeps, and what it costs", "How much is recovered on other prompts",
        "Which layers are worth 16 bits", "Memory", "Why this cache", "The failure mode: outlier-crushes-safety", "How to run it",
        "What this does not mean", "How it was made",
    ]  # fmt: skip
    assert words.index(fixed.verification.sentence) < words.index("Before and after")
    assert "show responses (they may offend)" in words
    assert size_or_direction(fixed.verification) in words
    assert [attributes.get("class") for _, attributes in page.tags].count("plotly-graph-div") == 5
    assert all(reason in words for reason in fixed.plan.reasons)
    assert "plan.cache(model)" in words
    assert "weights float32" in words


def test_figures_follow_the_width_of_the_page(fixed: Fix, out: Path) -> None:
    text = (out / "report.html").read_text(encoding="utf-8")
    body = text[text.index("<body>") :]
    assert body.count('"responsive": true') == 5
    assert body.count('class="plotly-graph-div" style="height:100%; width:100%;"') == 5
    assert not re.search(r'"layout":\{[^{}]*"width":', body)


def test_text_from_outside_is_escaped(fixed: Fix) -> None:
    said = {"text": NASTY, "label": "refused"}
    meta = {
        **fixed.verification.meta,
        "examples": [{"request": NASTY, "exact": said, "unmitigated": said, "chosen": said}],
    }
    plan = replace(fixed.plan, model=NASTY, reasons=(NASTY,), paper=replace(fixed.plan.paper, name=NASTY))
    proof = type(fixed.verification)(fixed.verification.data, meta)
    settings = {**fixed.settings, "calibration": {**fixed.settings["calibration"], "name": NASTY, "source": NASTY}}
    nasty = replace(fixed, plan=plan, verification=proof, settings=settings)
    text = nasty.page()
    head, body = text.split("<body>")
    for part in (body, head.split("<script>")[0]):
        assert "<script>alert" not in part
        assert "<img src=x" not in part
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in part
    assert "{{ 7*7 }}" in body, "shown as it was written"
    assert "<td>16 bits</td>" in fixed._repr_html_()
    assert html.escape(fixed.sentences[0]) in fixed._repr_html_()


def test_a_plan_that_does_not_help_is_called_so(tmp_path: Path) -> None:
    """A random model with an arbitrary judge: nothing there could be mitigated."""
    prompts = PromptSet("letters", tuple("abcdefghijkl"), ("one", "two"), "")
    proof = PromptSet("numbers", tuple(f"{n} apples" for n in range(40)), (), "")
    found = kvgeom.fix(
        TINY, tmp_path, bits=2, prompts=prompts, verify_prompts=proof, judge=ArbitraryJudge(), max_new_tokens=4, controls=0,
        memory=0.0, progress=False,
    )  # fmt: skip
    assert found.verification.meta["judge"] == "arbitrary"
    assert found.verification.status in ("does not help", "undetermined")
    words = " ".join(" ".join(Page((tmp_path / "report.html").read_text()).text).split())
    assert "not shown to help" in words
    assert "No controls were run" in words
    assert "not asked" in words, "the set has no harmless requests"


def test_what_cannot_be_used_is_said_before_anything_is_written(tmp_path: Path) -> None:
    class Untouchable:
        def __getattr__(self, name: str) -> Any:
            pytest.fail("the model was touched")

    same = kvgeom.calibration()
    for how, says in (
        ({"memory": -0.1}, "must be a number, 0 or more, got -0.1"),
        ({"memory": float("nan")}, "must be a number, 0 or more, got nan"),
        ({"controls": -1}, "got -1"),
        ({"bits": 16}, "got 16"),
        ({"bits": 9}, "got 9"),
        ({"scheme": "nothing"}, "presets"),
        ({"scheme": "int3-asym-group64", "bits": 4}, "has 3"),
        ({"scheme": "kivi", "bits": 8}, "2, 4"),
        ({"prompts": PromptSet("p", (), ("a",), "")}, "no harmful requests"),
        ({"verify_prompts": PromptSet("p", (), ("a",), "")}, "no harmful requests"),
        ({"verify_prompts": same}, "64 of the requests of 'calibration' are also in 'calibration'"),
    ):
        with pytest.raises(InputError, match=re.escape(says)):
            kvgeom.fix(Untouchable(), tmp_path / "o", **how)  # type: ignore[arg-type]
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("scheme", "asked", "bits"),
    [
        ("asym-token", None, 4), ("sym-tensor", 3, 3), ("int3-asym-group64", None, 3), ("int3-asym-group64", 3, 3),
        ("kivi", None, 4), ("kivi", 2, 2), ("vllm-fp8-e5m2", None, 8), ("hqq4-group64", None, 4), ("q4_0+hadamard", None, 4),
    ],
)  # fmt: skip
def test_width_of_a_scheme(scheme: str, asked: int | None, bits: int) -> None:
    assert check(asked, scheme, 0.0).bits == bits


@pytest.mark.slow
def test_a_preset_is_mitigated_at_the_width_that_was_asked(model: HFModel) -> None:
    found = kvgeom.fix(
        model, scheme="kivi", bits=4, prompts=PROMPTS.take(2), verify_prompts=PROOF.take(2), max_new_tokens=9, controls=0,
        progress=False,
    )  # fmt: skip
    assert {str(scheme) for scheme in found.plan.unmitigated.recipe.layers[0]} == {
        "int4-asym-channel-group32/f16", "int4-asym-group32/f16",
    }  # fmt: skip
    assert found.plan.placement.residual == 128
    assert "plan.cache" in found.page()


def test_a_model_that_refuses_nothing() -> None:
    with pytest.raises(InputError, match="refuses none of the 2 prompts"):
        kvgeom.fix(random_model(), bits=3, prompts=PromptSet("p", ("a", "b"), (), ""), max_new_tokens=2, progress=False)


# --- words ---


def test_the_table_counts_what_the_verification_counted() -> None:
    rows = before_and_after(verification())
    assert all(len(row) == len(COLUMNS) for row in rows)
    columns = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))
    assert columns["cache"] == ("16 bits", "unmitigated", "chosen: center", "paper: group-64 everywhere")
    assert columns["lost"] == ("0 of 16", "13 of 16", "3 of 16", "9 of 16")
    assert columns["comply"] == ("0", "4", "1", "3")
    assert columns["break down"] == ("0", "9", "2", "6")
    assert columns["random lose"] == ("-", "1 to 2", "2 to 4", "-")
    assert columns["memory"] == ("+255.6%", "+0.0%", "+0.0%", "+11.1%")
    assert columns["of 16-bit"] == ("100.0%", "28.1%", "28.1%", "31.2%")
    assert columns["recovery"][2:] == ("77% [47%, 92%]", "31% [1%, 46%]")
    assert columns["perplexity"] == ("1.00x", "3.50x [3.10, 4.00]", "1.02x [0.99, 1.05]", "2.40x [2.20, 2.60]")
    assert columns["harmless refused"] == ("1 of 24", "0 of 24", "1 of 24", "0 of 24")


@pytest.mark.parametrize(
    ("drawn", "says"),
    [
        ((1, 2, 2, 0, 1, 1, 2, 0), "the direction of the error"),
        ((13, 12, 14, 13, 13, 12, 15, 16), "at this size the direction of the error does not matter"),
        ((1, 13, 1, 1, 1, 1, 1, 1), "matters is undetermined."),
        ((1, 2, 2), "undetermined, and takes 8 draws (--controls)"),
        ((), "No controls"),
    ],
)
def test_controls_in_words(drawn: tuple[int, ...], says: str) -> None:
    """13 of 16 has the Wilson interval 57 to 93 %: 9.1 to 14.9 of 16."""
    assert says in size_or_direction(verification(controls=((), drawn)))


def test_controls_of_few_flips_decide_nothing() -> None:
    assert "undetermined" in size_or_direction(verification((2, 0, 0), controls=((), (0, 0, 0))))
    assert "nothing for controls" in size_or_direction(verification((0, 0, 0), controls=((), (0, 1, 0))))


@pytest.mark.parametrize(
    ("attention", "says"),
    [
        (8, "worse than the causal rule"),
        (2, "against the paper's claim"),
        (4, "neither supports"),
        (5, "neither supports"),
    ],
)
def test_the_rules_of_selection_are_compared_as_they_came_out(attention: int, says: str) -> None:
    assert says in rules_compared(selection(attention=attention))


# --- the command ---


def test_the_command(model: HFModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, out = tmp_path / "model", tmp_path / "out"
    # Without the biases that were planted in single layers, which the configuration of a saved model cannot name.
    weights = {name: x for name, x in model.hf_model.state_dict().items() if not name.endswith("proj.bias")}
    model.hf_model.save_pretrained(checkpoint, state_dict=weights)
    model.tokenizer.save_pretrained(checkpoint)
    capsys.readouterr()
    sets = []
    for name, prompts in (("choose", PROMPTS), ("prove", PROOF)):
        rows = [{"prompt": p, "label": label} for label in ("harmful", "harmless") for p in getattr(prompts, label)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        sets.append(str(tmp_path / f"{name}.jsonl"))
    asked = [
        "fix", str(checkpoint), "--out", str(out), "--prompts", sets[0], "--verify-prompts", sets[1], "--bits", "3", "--scheme",
        "sym-tensor", "--memory", "0.2", "--max-new-tokens", "12", "--controls", "0", "--limit", "6", "--quiet",
    ]  # fmt: skip
    assert main(asked) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    numbers = json.loads((out / "plan.json").read_text())
    assert numbers["verified"]["sentence"] in captured.out
    assert numbers["verified"]["prompts"] == 6
    for column in COLUMNS:
        assert column in captured.out
    for part in (str(out / "plan.json"), str(out / "report.html"), f'kvgeom.Plan.load("{out}")', "plan.cache(model)"):
        assert part in captured.out
    assert all(reason in captured.out for reason in numbers["reasons"])
    assert main(asked) == 0
    assert capsys.readouterr().err == ""
    assert main([*asked, "--memory", "0.3"]) == 0
    assert f"replaced {out}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bits", "16"], "got 16"),
        (["--bits", "1"], "got 1"),
        (["--memory", "-1"], "must be a number, 0 or more, got -1.0"),
        (["--verify-prompts", "calibration"], "are also in"),
        (["--verify-prompts", "missing.txt"], "no such file"),
        (["--scheme", "q4_0", "--bits", "3"], "q4_0"),
        (["--max-new-tokens", "0"], "positive"),
        (["--limit", "2", "--max-new-tokens", "2"], "refuses none of the 2 prompts"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], says: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fix", str(checkpoint), "--out", str(tmp_path / "o"), "--quiet", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("kvgeom: ")
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert not captured.out
    assert not list(tmp_path.rglob("plan.json"))
