"""Formats of prompts: the whole text of each request, or an error with file and line."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import kvgeom
from kvgeom.errors import InputError, brief
from kvgeom.paths import LARGEST_TEXT
from kvgeom.prompts import benchmarks
from kvgeom.prompts.load import load_prompts
from kvgeom.prompts.sets import PromptSet
from tests.builders.requests import PAIRS
from tests.builders.tiny import tiny_model

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "hello"}


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


#: Name of a file, its content, and its harmful and harmless requests.
WHOLE: dict[str, tuple[str, str | bytes, tuple[str, ...], tuple[str, ...]]] = {
    "separators that end no line": (
        "a.txt",
        "a\u2028b\x0bc\x0cd\x85e\x1cf\rg\n\nh\r\n# no\n",
        ("a\u2028b\x0bc\x0cd\x85e\x1cf\rg", "h"),
        (),
    ),
    "separators in JSON": ("a.jsonl", '{"prompt": "a\u2028b\x85c"}\r\n\r\n{"prompt": "d"}', ("a\u2028b\x85c", "d"), ()),
    "mixed rows": (
        "a.jsonl",
        lines("a", {"goal": "b"}, {"PROMPT": "c", "goal": None}, [USER]),
        ("a", "b", "c", "hi"),
        (),
    ),
    "two columns that agree": ("a.jsonl", lines({"prompt": "a", "messages": [{**USER, "content": "a "}]}), ("a",), ()),
    "a reply": ("a.jsonl", lines({"messages": [{"role": "system", "content": ""}, USER, REPLY]}), ("hi",), ()),
    "parts": ("a.jsonl", lines({"prompt": [{**USER, "content": [{"type": "text", "text": "hi"}]}]}), ("hi",), ()),
    "labels": (
        "a.jsonl",
        lines(*({"text": str(n), "label": c} for n, c in enumerate((1, 0.0, True, "Benign", None)))),
        ("0", "2", "4"),
        ("1", "3"),
    ),
    "a label before a class": ("a.csv", "text,class,label\na,cybercrime,safe\nb,x,\nc,safe,\n", ("b",), ("a", "c")),
    "newlines and quotes": ("a.csv", 'prompt,x\r\n"a ""b"",\r\nc\rd\n\ne",1\r\n', ('a "b",\r\nc\rd\n\ne',), ()),
    "an index of pandas": ("a.csv", ",prompt\n0,a\n\n,\n1,b\n", ("a", "b"), ()),
    "a long field": ("a.csv", f'prompt\n"{"x" * 300_000}"\n', ("x" * 300_000,), ()),
    "tabs": ("a.TSV", 'label\tprompt\nsafe\ta, b\n\t"c\td"\n', ("c\td",), ("a, b",)),
    "a list": (
        "a.json",
        ' [\n"a", {"goal": "b", "label": 0},\n[{"role": "user", "content": "hi"}]]\n',
        ("a", "hi"),
        ("b",),
    ),
    "classes": ("a.json", '{"harmless": ["a"], "harmful": ["b", "c"]}', ("b", "c"), ("a",)),
    "topics beside it": (
        "a.csv",
        "prompt,category,split,target,toxicity,safety\na,harmful,train,Sure,,hate\nb,cybercrime,test,No way,,\n",
        ("a", "b"),
        (),
    ),
    "a label with a mark": ("a.csv", "\ufeffprompt,\u200bLabel\u2060,type\na,harmless,x\nb,1,safe\n", ("b",), ("a",)),
    "a request with a mark": ("a.jsonl", lines({"\ufeffprompt": "safe", "label": "safe"}), (), ("safe",)),
    "escapes": ("a.json", r'["a\ud83d\ude00\u2028\n\/"]', ("a\U0001f600\u2028\n/",), ()),
    "a mark of UTF-8": ("a.csv", "\ufeffprompt\né\n".encode(), ("é",), ()),
    "UTF-16 of Windows": (
        "a.csv",
        "\ufeffprompt\r\né, \U0001f600\r\n".replace("é, ", "é ").encode("utf-16-le"),
        ("é \U0001f600",),
        (),
    ),
    "UTF-16, large end first": ("a.jsonl", '\ufeff{"prompt": "é\u2028"}\n"b"\n'.encode("utf-16-be"), ("é", "b"), ()),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_the_whole_text_is_read(kind: str, tmp_path: Path) -> None:
    name, content, harmful, harmless = WHOLE[kind]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = load_prompts(tmp_path / name)
    assert (found.harmful, found.harmless) == (harmful, harmless)


#: Name of a file, its content, and what the error says; before a |: as which benchmark it is read.
REFUSED: list[tuple[str, str | bytes, str]] = [
    ("few.csv", "id,prompt\n1,a\n2\n", "line 3 .*too few cells"),
    ("many.csv", 'id,prompt\n1,"a\nb"\n\n2,c, d\n', "line 5 .*too many cells.*commas"),
    ("many.tsv", "prompt\na\tb\n", "line 2 .*tabs"),
    ("open.csv", 'prompt\na\n"b\nc\n', "line 3 .*quotes"),
    ("quoted.csv", 'prompt\n"a" b\n', "line 2 .*quotes"),
    ("mac.csv", "prompt\ra\rb\r", "line 1 .*carriage return"),
    ("return.csv", "prompt\na\rb\n", "line 2 .*carriage return"),
    ("unnamed.csv", "id,prompt,\n1,a, b\n", "line 2 .*column without a name"),
    ("twice.csv", "prompt,prompt\na,b\n", "line 1 .*two columns 'prompt'"),
    ("capitals.csv", "prompt,Prompt\na,b\n", "line 2 .*two columns 'prompt'"),
    ("several.csv", "goal,text\na,\na,b\n", r"line 3 .*\(in goal, text\)"),
    ("none.csv", "id;prompt\n1;a\n", "line 2 .*found .'id;prompt'"),
    ("blank.csv", "id,prompt\n1,\n", "line 2 .*no request"),
    ("context.csv", "Behavior,ContextString\na,\nb,c\n", "line 3 .*'contextstring'"),
    ("alpaca.jsonl", lines({"instruction": "Sum up", "input": "all of this"}), "line 1 .*'input'"),
    ("passage.jsonl", lines({"question": "a", "Context_String": ["b"]}), "line 1 .*'context_string'"),
    ("system.jsonl", lines("a", {"prompt": "b", "system": "Be good"}), "line 2 .*'system'"),
    ("repr.csv", "prompt\n\"[{'role': 'user', 'content': 'hi'}]\"\n", "line 2 .*as text"),
    ("repr.jsonl", lines({"messages": json.dumps([USER])}), "line 1 .*as text"),
    ("mac.txt", "a\rb\r", "line 1 .*carriage"),
    ("turns.jsonl", lines({"messages": [USER, REPLY, USER]}), "line 1 .*2 user turns"),
    ("no-turn.jsonl", lines({"messages": [REPLY]}), "line 1 .*0 user turns"),
    ("prompt.jsonl", lines({"prompt": [{"role": "system", "content": "Be good"}, USER]}), "line 1 .*system prompt"),
    ("prefill.jsonl", lines({"prompt": [USER, REPLY]}), "line 1 .*assistant's turn"),
    ("greeting.jsonl", lines({"messages": [REPLY, USER]}), "line 1 .*assistant's turn"),
    ("tool.jsonl", lines({"messages": [USER, {"role": "tool", "content": "1"}]}), "line 1 .*'tool'"),
    ("role.jsonl", lines({"messages": [{"role": ["user"], "content": "a"}]}), "line 1 .*role"),
    ("parts.jsonl", lines({"prompt": [{**USER, "content": [{"type": "image"}]}]}), "line 1 .*must be text"),
    ("strings.jsonl", lines({"prompt": ["a", "b"]}), r"line 1 .*\['a', 'b'\]"),
    ("blank.jsonl", lines({"prompt": "a"}, {"prompt": " ", "id": 1}), "line 2 .*no request"),
    ("empty.jsonl", lines({"prompt": "a"}, ""), "line 2"),
    ("twice.jsonl", '{"prompt": "a", "prompt": "b"}\n', "line 1 .*'prompt' twice"),
    ("two.jsonl", '{"prompt": "a"} {"prompt": "b"}\n', "line 1 .*more after"),
    ("label.jsonl", lines({"prompt": "a", "label": {"x": 1}}), "'label' in line 1 "),
    ("labels.jsonl", lines({"prompt": "a", "label": "harmful", "class": "safe"}), "line 1 .*label and class"),
    ("safe.csv", "prompt,is_safe\na,\nb,1\n", "line 3 .*'is_safe'.*'label'"),
    ("pairs.jsonl", lines({"prompt": "a", "harmful": False}), "line 1 .*'harmful'.*'label'"),
    ("guard.tsv", "prompt\tprompt_harm_label\na\tunharmful\n", "line 2 .*'prompt_harm_label'"),
    ("type.csv", "prompt,type\nkill,harmful\nbake,harmless\n", "line 3 .*'harmless' in 'type'.*'label'"),
    ("category.csv", "prompt,category\nkill,cybercrime\nbake,Benign\n", "line 3 .*'Benign' in 'category'"),
    ("split.tsv", "prompt\tsplit\nbake\t safe\u200b\n", "line 2 .* in 'split'"),
    ("verdict.jsonl", lines({"prompt": "bake", "verdict": "non-harmful"}), "line 1 .* in 'verdict'"),
    ("blank-label.csv", "prompt,label,type\nkill,,harmful\nbake,,harmless\n", "line 3 .*'harmless' in 'type'"),
    ("toxic.csv", "prompt,toxic\nkill,1\nbake,0\n", "line 2 .*'toxic'.*'label'"),
    ("toxicity.jsonl", lines({"prompt": "bake", "toxicity": 0.25}), "line 1 .*'toxicity'"),
    ("is-toxic.csv", "prompt,is_toxic\nbake,no\n", "line 2 .*'is_toxic'"),
    ("is-harmful.csv", "prompt,isHarmful\nbake,0\n", "line 2 .*'isharmful'"),
    ("unsafe.csv", "prompt,unsafe\nbake,0\n", "line 2 .*'unsafe'"),
    ("refuse.jsonl", lines({"prompt": "bake", "should_refuse": False}), "line 1 .*'should_refuse'"),
    ("target.csv", "prompt,target\nbake,0\n", "line 2 .*'target'"),
    ("mark.csv", "prompt,\u200bis_safe\nbake,1\n", "line 2 .*'is_safe'"),
    ("mark-twice.csv", "prompt,label,lab\u200bel\nbake,0,1\n", "line 2 .*two columns 'label'"),
    ("key-twice.json", '{"harmful": ["a"],\n "harmful": ["b"]}', "line 2 .*'harmful' twice"),
    ("class.csv", "prompt,class\na,cybercrime\n", "'class' in line 2 .*cybercrime"),
    ("nan.jsonl", '{"prompt": "a", "score": NaN}\n', "line 1 .*NaN"),
    ("digits.jsonl", f'{{"prompt": "a", "id": {"1" * 5000}}}\n', "line 1 .*digits"),
    ("deep.jsonl", '"a"\n' + "[" * 100_000 + "\n", "line 2 .*nested"),
    ("deep.json", "[\n" + '{"a":' * 100_000, "line 2 .*nested"),
    ("nested.jsonl", lines({"prompt": json.loads("[" * 200 + "]" * 200)}), r"line 1 .*\[\[\[.*\.\.\."),
    ("half.jsonl", '"a"\n{"prompt": "b \\ud800 c"}\n', r"line 2 .*'\\ud800'"),
    ("nul.json", '["a",\n"b\\u0000c"]', "line 2 .*NUL"),
    ("number.json", '["a",\n\n3]', "line 3 .*got 3"),
    ("classes.json", '{"harmful": ["a",\n 3]}', "line 2 .*got 3"),
    ("unknown.json", '{"harmful": ["a"],\n "harmles": ["b"]}', "'harmles'; did you mean 'harmless'.*line 2"),
    ("lines.json", lines({"prompt": "a"}, {"prompt": "b"}), r"line 1 .*\.jsonl file"),
    ("more.json", '["a"]\n["b"]', "line 2 .*more after the list"),
    ("text.json", '"a"', "line 1 .*no list"),
    ("comma.json", '["a",\n]', "line 2 .*not JSON"),
    ("close.json", '["a"\n"b"]', "line 2 .*not JSON"),
    ("name.json", "{1: []}", "line 1 .*not JSON"),
    ("colon.json", '{"harmful" ["a"]}', "line 1 .*not JSON"),
    ("open.json", '{"harmful": ["a"', "line 1 .*not JSON"),
    ("pointer.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    ("objects.txt", lines({"prompt": "a", "label": "harmless"}), r"line 1 .*JSON object.*\.jsonl"),
    ("unseen.txt", "a\n\u200b\n", "line 2 .*nobody sees"),
    ("image.jsonl", lines({"messages": [{**USER, "images": ["x.png"]}]}), "line 1 .*'images' in a chat message"),
    ("call.jsonl", lines({"messages": [USER, {**REPLY, "tool_calls": [{"id": 1}]}]}), "line 1 .*'tool_calls'"),
    ("latin.csv", b"prompt\na\nb \xe9\n", "line 3 .*not UTF-8: byte 11 is 0xe9"),
    ("marked.txt", b"\xef\xbb\xbfa\n\xff", "line 2 .*byte 5 is 0xff"),
    ("odd.txt", "\ufeffa\nb".encode("utf-16-le") + b"c", "line 2 .*not UTF-16-LE: byte 8"),
    ("pair.txt", "\ufeffa\n".encode("utf-16-be") + b"\xd8\x00\x00a", "line 2 .*not UTF-16-BE: byte 6"),
    ("unmarked.txt", "a\nb".encode("utf-16-le"), "line 1 .*NUL at byte 1"),
    ("wide.txt", "\ufeffab".encode("utf-32-le"), "line 1 .*NUL at byte 2"),
    ("wide-too.txt", "\ufeffab".encode("utf-32-be"), "line 1 .*byte 2 is 0xfe"),
    ("p.parquet", b"PAR1", r"\.tsv, \.json or \.jsonl"),
    ("xstest|no-label.csv", "id,prompt\n1,a\n", "line 2 .*no column 'label'"),
    (
        "unlabelled.csv",
        "prompt,type\na,homonyms\nb,contrast_homonyms\n",
        "line 3 .*as files of XSTest have.*xstest=FILE",
    ),
    ("xstest|blank.csv", "prompt,label\na,unsafe\nb,\n", "line 3 .*safe or unsafe, got ''"),
    ("xstest|short.csv", "prompt,label\na,unsafe\nb\n", "line 3 .*too few"),
    ("xstest|nothing.csv", "prompt,label\n,unsafe\n", "line 2 .*no request"),
    ("advbench|commas.csv", "goal,target\na, b,c\n", "line 2 .*too many"),
    ("harmbench|no-category.csv", "Behavior\na\n", "line 2 .*'FunctionalCategory'"),
    ("harmbench|category.csv", "Behavior,FunctionalCategory\na,standart\n", "line 2.*'standard'"),
    ("harmbench|context.csv", "Behavior,FunctionalCategory,ContextString\na,standard,b\n", "line 2.* a ContextString"),
    ("harmbench-all|no-column.csv", "Behavior,FunctionalCategory\na,standard\n", "line 2 .*'ContextString'"),
    ("harmbench-all|no-context.csv", "Behavior,FunctionalCategory\na,contextual\n", "line 2 .*'ContextString'"),
    (
        "harmbench-contextual|blank.csv",
        "Behavior,FunctionalCategory,ContextString\na,contextual,\n",
        "line 2.*no Context",
    ),
    ("jailbreakbench|goal.csv", "Index,goal\n0,a\n", "line 2 .*'Goal'"),
]


@pytest.mark.parametrize(("name", "content", "says"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_what_cannot_be_read_whole_is_refused(name: str, content: str | bytes, says: str, tmp_path: Path) -> None:
    benchmark, _, file = name.rpartition("|")
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=says) as found:
        load_prompts(f"{benchmark}={path}" if benchmark else path)
    assert str(path) in str(found.value)
    assert len(str(found.value)) < 600 + len(str(path)), "however much the file has"
    assert "\n" not in str(found.value)


def test_benchmarks_of_ones_own_are_read_whole_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "_BENCHMARKS", benchmarks.benchmarks())
    of_a_column = benchmarks.Benchmark("Own", "example.org", "MIT", "ask", context="bad")
    (tmp_path / "c.csv").write_text('ask,bad\na,"b\nc"\nd, \n')
    benchmarks.register_benchmark("contexts", of_a_column)
    assert load_prompts(f"contexts={tmp_path / 'c.csv'}").harmful == ("b\nc\n\n---\n\na", "d")
    benchmarks.register_benchmark("misspelt", replace(of_a_column, context="good"))
    with pytest.raises(InputError, match=r"line 2 .*no column 'good'"):
        load_prompts(f"misspelt={tmp_path / 'c.csv'}")
    (tmp_path / "p.csv").write_text("ask,bad\na,1\nb,x\n")
    rules: dict[str, Any] = {
        "fails": (lambda row: bool(int(row["bad"])), "line 3 .*invalid literal"),
        "lacks": (lambda row: row["no"] == "1", "line 2 .*'no'"),
        "says": (lambda row: row["bad"], "line 2.* '1'"),
    }
    for name, (rule, says) in rules.items():
        benchmarks.register_benchmark(name, benchmarks.Benchmark("Own", "example.org", "MIT", "ask", rule))
        with pytest.raises(InputError, match=says):
            load_prompts(f"{name}={tmp_path / 'p.csv'}")


def test_only_regular_files_of_some_size_are_read(tmp_path: Path) -> None:
    large = tmp_path / "large.txt"
    with large.open("wb") as file:
        file.truncate(LARGEST_TEXT + 1)  # takes no room on the disk
    with pytest.raises(InputError, match=r"64.0 MiB, and files of up to 64 MiB"):
        load_prompts(large)
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "link.txt")
    for name, says in (("pipe.txt", "pipe"), ("zero.txt", "device"), ("folder.csv", "folder"), ("link.txt", "read")):
        for spec in (str(tmp_path / name), f"advbench={tmp_path / name}"):
            with pytest.raises(InputError, match=says):
                load_prompts(spec)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("x" * 5000, "too long"),
        ("x" * 300 + ".txt", "too long"),
        ("~nouser-of-this-name/p.txt", "home folder of nobody"),
        ("advbench=~nouser-of-this-name/p.csv", "home folder of nobody"),
        ("a\0b.txt", "must be a path"),
        ("xstest=a\0b.csv", "must be a path"),
        ("my mistyped folder/p.txt", "no such file: my mistyped folder/p.txt"),
        ("/dev/null/p.txt", "no such file"),
        ("advbench=/dev/null/p.csv", "no such file"),
        ("xstest=", "names no file"),
        ("", "folder"),
        ("\ud800.txt", "must be a path"),
    ],
)
def test_paths_that_lead_nowhere(given: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as found:
        load_prompts(given)
    assert len(str(found.value)) < 500


def test_the_limit_of_other_readers_of_csv_stays(tmp_path: Path) -> None:
    import csv

    (tmp_path / "p.csv").write_text(f'prompt\n"{"x" * 200_000}"\n')
    (tmp_path / "bad.csv").write_text('prompt\n"x\n')
    limit, failures = csv.field_size_limit(), []

    def read() -> None:
        for _ in range(20):
            try:
                assert len(load_prompts(tmp_path / "p.csv").harmful[0]) == 200_000
                with pytest.raises(InputError):
                    load_prompts(tmp_path / "bad.csv")
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert csv.field_size_limit() == limit


# --- what is given in Python ---


def test_tables_of_pandas() -> None:
    table = pd.DataFrame({"goal": ["a", "b", "c", "d"], "label": [1, 0, None, 1]}, index=[7, 7, 8, 9])
    table = pd.concat([table, pd.DataFrame({"prompt": [[USER]], "label": [0]})])
    found = load_prompts(table)
    assert (found.harmful, found.harmless) == (("a", "c", "d"), ("b", "hi"))
    for text in (
        pd.Series(["a ", "b\n"], dtype="string"),
        pd.Series(["a", "b"], dtype="category"),
        np.array(["a", "b"]),
    ):
        assert load_prompts(text).harmful == PromptSet("p", text, (), "s").harmful == ("a", "b")
    assert load_prompts(pd.Series([np.array([USER], dtype=object)])).harmful == ("hi",)
    with pytest.raises(InputError, match="one name"):
        load_prompts(pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"]))
    with pytest.raises(InputError, match=r"row 0 .*'context'"):
        load_prompts(pd.DataFrame({"prompt": ["a"], "Context": ["b"]}))
    with pytest.raises(InputError, match="request 1"):
        load_prompts(pd.Series(["a", pd.NA], dtype="string"))


def test_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["harmful", "harmless"])
    features = datasets.Features({"prompt": datasets.Value("string"), "label": names})
    dataset = datasets.Dataset.from_dict({"prompt": ["a", "b", "c\n"], "label": [0, 1, None]}, features=features)
    for given in (dataset, dataset.with_format("numpy"), dataset.with_format("pandas"), dataset.to_iterable_dataset()):
        found = load_prompts(given)
        assert (found.harmful, found.harmless) == (("a", "c"), ("b",)), "0 is the name of the first class"
    assert load_prompts(dataset["prompt"]).harmful == ("a", "b", "c")
    assert PromptSet("p", dataset["prompt"], (), "s").harmful == ("a", "b", "c")
    chats = datasets.Dataset.from_dict({"messages": [[USER, REPLY]], "id": [1]})
    assert load_prompts(chats).harmful == ("hi",)
    with pytest.raises(InputError, match=r"dataset\['train'\]"):
        load_prompts(datasets.DatasetDict({"train": dataset}))
    with pytest.raises(InputError, match=r"row 0 of the dataset.*prompt"):
        load_prompts(dataset.remove_columns("prompt"))


def test_tables_as_a_class_of_requests_are_refused() -> None:
    """Their columns' names would be asked."""
    for table in (pd.DataFrame({"prompt": ["a"]}), {"prompt": ["a"]}):
        with pytest.raises(InputError, match=r"'harmful' of the mapping is a table.*\['prompt'\]"):
            load_prompts({"harmful": table, "harmless": ["b"]})
    assert load_prompts({"harmful": pd.DataFrame({"prompt": ["a"]})["prompt"]}).harmful == ("a",)


def test_a_transform_of_a_dataset_is_not_dropped() -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"prompt": ["a"]})
    with pytest.raises(InputError, match=r"has a transform.*dataset\.map"):
        load_prompts(dataset.with_transform(lambda batch: {"prompt": [f"{text}!" for text in batch["prompt"]]}))


def test_names_of_files_are_not_asked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("kill\n")
    for named in (str(tmp_path / "a.txt"), tmp_path / "a.txt"):
        with pytest.raises(InputError, match="is the name of a file"):
            load_prompts(["b", named])
    assert load_prompts(["b", str(tmp_path / "none.txt")]).harmful[1].endswith("none.txt")


def test_files_that_were_put_together(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa\n\ufeff# a comment\n\ufeffb\n".encode())
    assert load_prompts(tmp_path / "p.txt").harmful == ("a", "b")


def test_sequences_of_anything() -> None:
    given = ["a", {"goal": "b", "label": "safe"}, [USER], {"request": "c"}]
    for each in (given, tuple(given), iter(given), np.array(given, dtype=object)):
        found = load_prompts(each)
        assert (found.harmful, found.harmless) == (("a", "hi", "c"), ("b",))


@pytest.mark.parametrize(
    "harmful",
    [
        "abc",
        b"abc",
        3,
        None,
        np.array("a"),
        ["a", 3],
        [10**5000],
        ["a", " \n"],
        ["a", "\ud800"],
        ["a\0b"],
        [["a"]],
        [None],
    ],
    ids=brief,
)
def test_a_set_holds_texts(harmful: Any) -> None:
    for make in (lambda: PromptSet("p", harmful, (), "s"), lambda: PromptSet("p", (), harmful, "s")):
        with pytest.raises(InputError, match=r"harmless|text|list|NUL|half"):
            make()
    if not isinstance(harmful, str):
        with pytest.raises(InputError):
            load_prompts(harmful)


def test_blanks_around_a_request_change_nothing() -> None:
    """What Python reads line by line has the ends of lines; the model is asked without them."""
    model = tiny_model()
    given = PromptSet("p", [f"\t{request} \n" for request in PAIRS.harmful], PAIRS.harmless, "s")
    assert (given.harmful, given.fingerprint) == (PAIRS.harmful, PAIRS.fingerprint)
    found, wanted = (
        kvgeom.subspace(model, prompts, progress=False).sensitivity(contrasts=(), progress=False).data.ratio_low.values
        for prompts in (given, PAIRS)
    )
    np.testing.assert_array_equal(found, wanted)
