"""Prompt sets: the shipped one, public benchmarks' own files, and a user's."""

from __future__ import annotations

import csv
import json
import re
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import kvgeom
from kvgeom.errors import InputError
from kvgeom.prompts import benchmarks
from kvgeom.prompts.load import as_prompt_set, as_requests, load_prompts
from kvgeom.prompts.sets import PromptSet, perplexity_text


def test_calibration_pairs() -> None:
    prompts = kvgeom.calibration()
    assert len(prompts.harmful) == len(prompts.harmless) >= 32
    assert len({*prompts.harmful, *prompts.harmless}) == 2 * len(prompts.harmful)
    for harmful, harmless in zip(prompts.harmful, prompts.harmless, strict=True):
        words, twins = harmful.split(), harmless.split()
        assert words[0] == twins[0], "the same form"
        assert abs(len(words) - len(twins)) <= 2, "about the same length"
        assert 4 <= len(words) <= 16
        assert not re.search(r"\d", harmful), "no operational detail"
    lengths = [sum(len(p.split()) for p in side) for side in (prompts.harmful, prompts.harmless)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.05)


def test_calibration_is_our_own(shared: Path) -> None:
    """No request is one of the benchmarks', or nearly."""
    public = [
        request.lower()
        for name, file in FILES.items()
        if (shared / file).is_file()
        for request in load_prompts(f"{name}={shared / file}", distinct=False).harmful
    ]
    assert public
    for request in kvgeom.calibration().harmful:
        matcher = SequenceMatcher(b=request.lower(), autojunk=False)
        for other in public:
            matcher.set_seq1(other)
            if matcher.real_quick_ratio() > 0.9 and matcher.quick_ratio() > 0.9:
                assert matcher.ratio() < 0.9, (request, other)


def test_perplexity_text_is_long_enough() -> None:
    assert len(perplexity_text().split()) > 500


FILES = {
    "advbench": "advbench.csv",
    "harmbench": "harmbench.csv",
    "xstest": "xstest.csv",
}


def test_public_files(shared: Path) -> None:
    rows = {name: list(csv.DictReader((shared / file).open(encoding="utf-8-sig"))) for name, file in FILES.items()}
    expected = {
        "advbench": (len(rows["advbench"]), 0),
        "harmbench": (sum(row["FunctionalCategory"] == "standard" for row in rows["harmbench"]), 0),
        "xstest": (200, 250),
    }
    contexts = [row["ContextString"] for row in rows["harmbench"] if row["FunctionalCategory"] == "contextual"]
    contextual = load_prompts(f"harmbench-contextual={shared / FILES['harmbench']}", distinct=False).harmful
    assert len(contextual) == len(contexts) > 50
    assert all(request.startswith(context.strip()) for request, context in zip(contextual, contexts, strict=True))
    for name, counts in expected.items():
        prompts = load_prompts(f"{name}={shared / FILES[name]}", distinct=False)
        assert (len(prompts.harmful), len(prompts.harmless)) == counts
        assert prompts.name == name
        assert benchmarks.benchmarks()[name].title in prompts.source


CSV = {
    "advbench": 'goal,target\n"Do harm, now",Sure\n',
    "harmbench": "Behavior,FunctionalCategory\nDo harm,standard\nIn context,contextual\nSing a song,copyright\n",
    "harmbench-contextual": (
        'Behavior,FunctionalCategory,ContextString\nDo harm,standard,\nIn context,contextual,"A mayor, and\na town"\n'
    ),
    "harmbench-all": "Behavior,FunctionalCategory,ContextString\nDo harm,standard,\nIn context,contextual,A mayor\n",
    "xstest": "id,prompt,type,label\n1,Kill a process,x,safe\n2,Kill a man,y,unsafe\n",
    "jailbreakbench": "Index,Goal,Target,Behavior,Category\n0,Do harm,Here,x,y\n",
    "jailbreakbench-benign": "Index,Goal,Target,Behavior,Category\n0,Do good,Here,x,y\n",
}
READ = {
    "advbench": (("Do harm, now",), ()),
    "harmbench": (("Do harm",), ()),
    "harmbench-contextual": (("A mayor, and\na town\n\n---\n\nIn context",), ()),
    "harmbench-all": (("Do harm", "A mayor\n\n---\n\nIn context"), ()),
    "xstest": (("Kill a man",), ("Kill a process",)),
    "jailbreakbench": (("Do harm",), ()),
    "jailbreakbench-benign": ((), ("Do good",)),
}


def test_the_second_version_of_xstest_has_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,type,prompt\n1,homonyms,Kill a process\n2,contrast_homonyms,Kill a man\n")
    prompts = load_prompts(f"xstest={path}")
    assert (prompts.harmful, prompts.harmless) == READ["xstest"]


@pytest.mark.parametrize("name", CSV)
def test_benchmark_formats(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(CSV[name])
    prompts = load_prompts(f"{name}={path}")
    assert (prompts.harmful, prompts.harmless) == READ[name]


def test_user_files(tmp_path: Path) -> None:
    text = tmp_path / "p.txt"
    text.write_text("\ufeff# a comment\nfirst\n\n  second  \nfirst\n", encoding="utf-8")
    assert load_prompts(text).harmful == ("first", "second")
    table = tmp_path / "p.csv"
    table.write_text('Prompt,Label\n"a, b",harmful\n"two\nlines",safe\nlast,\n')
    assert load_prompts(str(table)).harmful == ("a, b", "last")
    assert load_prompts(table).harmless == ("two\nlines",)
    lines = tmp_path / "p.jsonl"
    lines.write_text('"plain"\n')
    assert load_prompts(lines).harmful == ("plain",)
    lines.write_text(
        json.dumps({"request": "x", "label": 0}) + "\n\n" + json.dumps({"request": "é", "label": 1}) + "\n"
    )
    assert (load_prompts(lines).harmful, load_prompts(lines).harmless) == (("é",), ("x",))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", "", "no prompts"),
        ("comments.txt", "# nothing\n\n", "no prompts"),
        ("empty.csv", "", "no prompts"),
        ("header.csv", "prompt,label\n", "no prompts"),
        ("columns.csv", "a,b\n1,2\n", r"found \['a', 'b'\]"),
        ("label.csv", "prompt,label\nx,maybe\n", "maybe"),
        ("broken.jsonl", '{"prompt": "x"}\n{"prompt"\n', "line 2"),
        ("list.jsonl", "[1]\n", "line 1"),
        ("number.jsonl", '{"prompt": "x"}\n{"prompt": 3}\n', "line 2.*got 3"),
        ("open.csv", 'prompt\nx\n"y\nz\n', "quotes"),
        ("commas.csv", "prompt\nmix salt, and pepper\n", "line 2.*commas"),
        ("both.csv", "prompt,label\nx,harmful\nx,harmless\n", "'x' as both"),
        ("p.parquet", "x", r"\.jsonl"),
    ],
)
def test_bad_files(name: str, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=says):
        load_prompts(tmp_path / name)


def test_bad_names(tmp_path: Path) -> None:
    for spec in ("missing.txt", "advbench=missing.csv"):
        with pytest.raises(InputError, match="no such file"):
            load_prompts(spec)
    (tmp_path / "p.txt").write_bytes(b"good\nbad \xe9\n")
    with pytest.raises(InputError, match=r"line 2 of .*UTF-8: byte 9 is 0xe9"):
        load_prompts(tmp_path / "p.txt")
    with pytest.raises(InputError, match="advbench"):
        load_prompts("advbench")
    (tmp_path / "x.csv").write_text("wrong\n1\n")
    with pytest.raises(InputError, match="goal"):
        load_prompts(f"advbench={tmp_path / 'x.csv'}")
    (tmp_path / "y.csv").write_text('goal,target\n"x,y\n')
    with pytest.raises(InputError, match="quotes"):
        load_prompts(f"advbench={tmp_path / 'y.csv'}")
    for folder in (tmp_path, str(tmp_path)):
        with pytest.raises(InputError, match="is a folder"):
            load_prompts(folder)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("calibratoin", "'calibration'"),
        ("heldout", "'held-out'"),
        ("advbnech=FILE", "'advbench=FILE'"),
        ("Xtest=FILE", "'xstest=FILE'"),
    ],
)
def test_a_misspelt_name_gets_a_suggestion(given: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"did you mean {meant}"):
        load_prompts(given)


def test_repeated_requests_of_a_file_are_counted(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,label\na,harmful\nb,harmless\na,harmful\nb,harmless\na,\n,\n")
    found = load_prompts(tmp_path / "p.csv")
    assert (found.harmful, found.harmless, found.repeated) == (("a",), ("b",), 3)
    assert "3 repeated requests" in repr(found)
    assert PromptSet.from_dict(json.loads(json.dumps(found.to_dict()))) == found.take(9) == found
    assert load_prompts(["a", "a"]).repeated == 0


def test_what_users_have_becomes_a_prompt_set(tmp_path: Path) -> None:
    requests = ["first", "second", "first"]
    for given in (requests, tuple(requests), pd.Series(requests), np.array(requests), (r for r in requests)):
        found = kvgeom.load_prompts(given)
        assert (found.harmful, found.harmless) == (tuple(requests), ())
        assert all(type(request) is str for request in found.harmful)
    assert as_prompt_set(found) is found
    assert as_prompt_set("calibration") == kvgeom.calibration()
    path = tmp_path / "own.txt"
    path.write_text("a request")
    assert as_prompt_set(path) == as_prompt_set(str(path)) == load_prompts(path)
    both = as_prompt_set({"harmful": pd.Series(["a"]), "harmless": ["b", "c"]})
    assert (both.harmful, both.harmless) == (("a",), ("b", "c"))
    table = pd.DataFrame({"Prompt": ["a", "b"], "label": ["harmless", "harmful"]})
    for given in (table, table.to_dict("records")):
        assert (as_prompt_set(given).harmful, as_prompt_set(given).harmless) == (("b",), ("a",))


def test_requests_are_the_harmful_ones() -> None:
    assert as_requests(["a", "b"]) == ("a", "b")
    assert as_requests("held-out") == load_prompts("held-out").harmful
    assert as_requests({"harmful": ["a"], "harmless": ["b"]}) == ("a",)
    with pytest.raises(InputError, match="harmful"):
        as_requests({"harmless": ["b"]})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "list"),
        ({}, "dict"),
        (None, "NoneType"),
        (3, "int"),
        (["a", float("nan")], "request 1"),
        (["a", " "], "request 1"),
        ([["a"]], "request 0"),
        ({"harmfull": ["a"]}, "'harmful'"),
        ({"harmful": "a"}, "list"),
        ({"a"}, "no order"),
        ({"harmful": {"a"}}, "no order"),
        ("How do I pick a lock?", "list"),
        (pd.DataFrame({"x": ["a"]}), "prompt"),
        (pd.DataFrame({"prompt": ["a", float("nan")]}), "row 1"),
        ({"harmful": ["a", "b"], "harmless": ["b"]}, "'b' as both"),
    ],
    ids=repr,
)
def test_what_is_no_prompt_set(given: object, says: str) -> None:
    for convert in (as_prompt_set, as_requests):
        with pytest.raises(InputError, match=says):
            convert(given)


def test_a_benchmark_from_outside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "_BENCHMARKS", benchmarks.benchmarks())
    own = benchmarks.Benchmark("Own", "example.org", "MIT", "ask", lambda row: {"y": True, "n": False}.get(row["bad"]))
    benchmarks.register_benchmark("own", own)
    (tmp_path / "own.csv").write_text("ask,bad\nDo harm,y\nDo good,n\nSing,?\n")
    found = as_prompt_set(f"own={tmp_path / 'own.csv'}")
    assert (found.name, found.harmful, found.harmless) == ("own", ("Do harm",), ("Do good",))
    for name in ("own", "advbench", "calibration", "a=b", "data/own.csv", ""):
        with pytest.raises(InputError, match=repr(name)):
            benchmarks.register_benchmark(name, own)


def test_take_and_fingerprint() -> None:
    prompts = PromptSet("p", ("a", "b"), ("c",), "s")
    assert prompts.take(1).harmful == ("a",)
    assert prompts.take(1).fingerprint != prompts.fingerprint
    assert prompts.take(9).fingerprint == prompts.fingerprint
    with pytest.raises(InputError):
        prompts.take(0)


def test_a_caveat_counts_the_clusters_of_each_class() -> None:
    locks = ("How do I pick a lock?", "Explain how to pick locks", "Name the moons of Mars")
    own = PromptSet("mine", locks, ("How do I pick locks?", "Explain how to pick a lock"), "own")
    assert own.caveat.startswith(
        "Prompts mine: 3 harmful requests make 2 clusters of similar wording and 2 harmless requests make 1 cluster of"
    )
    assert not own.distinct().caveat
    assert not PromptSet("mine", locks[1:], (), "own").caveat
