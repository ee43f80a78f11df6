"""Prompt files of any content: what is written is read back, and what is read is all that is there.

One run tries 2,200 damaged files, 400 values of Python and 200 names.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import unicodedata
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgeom.errors import InputError
from kvgeom.prompts.files import SUFFIXES
from kvgeom.prompts.load import load_prompts
from kvgeom.prompts.sets import PromptSet

try:
    import datasets
except ImportError:  # no dependency of kvgeom
    datasets = None
else:
    datasets.disable_progress_bars()

#: What separates lines or cells somewhere, quotes, or is no letter of ASCII.
ODD = "\n\r\t\x0b\x0c\x1c\x85\u2028\u2029\ufeff,;\"'#\\[]{}: a\xe9\U0001f600"
characters = st.sampled_from(ODD) | st.characters(exclude_categories=["Cs"], exclude_characters="\0")
#: With something that is seen.
requests = st.text(characters, min_size=1, max_size=30).filter(
    lambda text: any(not c.isspace() and unicodedata.category(c) != "Cf" for c in text)
)
Rows = list[tuple[str, bool]]
#: Requests and whether they are harmful, as often as a request comes.
labelled = st.lists(st.tuples(requests, st.booleans()), min_size=1, max_size=8).map(
    lambda rows: [(text, {again.strip(): bad for again, bad in rows}[text.strip()]) for text, _ in rows]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def table(rows: Rows, dialect: str) -> str:
    written = io.StringIO(newline="")
    cells = [(number, text, "harmful" if bad else "safe") for number, (text, bad) in enumerate(rows)]
    csv.writer(written, dialect).writerows([("id", "prompt", "label"), *cells])
    return written.getvalue()


def frame(rows: Rows) -> pd.DataFrame:
    return pd.DataFrame({"prompt": [text for text, _ in rows], "label": [int(bad) for _, bad in rows]})


def records(rows: Rows) -> list[dict[str, Any]]:
    return [{"goal": text} if bad else {"goal": text, "label": "harmless"} for text, bad in rows]


def chats(rows: Rows) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": text}], "class": bad} for text, bad in rows]


def classes(rows: Rows) -> dict[str, list[str]]:
    return {name: [text for text, bad in rows if bad == (name == "harmful")] for name in ("harmful", "harmless")}


def dataset(rows: Rows) -> Any:
    return datasets.Dataset.from_pandas(frame(rows))


def exported(write: Callable[[io.BytesIO], Any]) -> str:
    held = io.BytesIO()
    write(held)
    return held.getvalue().decode()


#: Writers of other programs, by the end of the name of what they write.
WRITERS: dict[str, Callable[[Rows], str]] = {
    "python.csv": lambda rows: table(rows, "excel"),
    "unix.csv": lambda rows: table(rows, "unix"),
    "python.tsv": lambda rows: table(rows, "excel-tab"),
    "pandas.csv": lambda rows: frame(rows).to_csv(lineterminator="\r\n"),
    "pandas.tsv": lambda rows: frame(rows).to_csv(sep="\t", index=False, quoting=csv.QUOTE_ALL),
    "pandas.jsonl": lambda rows: frame(rows).to_json(orient="records", lines=True),
    "pandas.json": lambda rows: frame(rows).to_json(orient="records", indent=2),
    "raw.jsonl": lambda rows: "\n".join(json.dumps(record, ensure_ascii=False) for record in records(rows)),
    "ascii.jsonl": lambda rows: "\r\n".join(json.dumps(record) for record in records(rows)),
    "chats.json": lambda rows: json.dumps(chats(rows)),
    "classes.json": lambda rows: json.dumps(classes(rows), indent=1, ensure_ascii=False),
}
if datasets is not None:
    WRITERS |= {
        "datasets.csv": lambda rows: exported(lambda held: dataset(rows).to_csv(held, lineterminator="\r\n")),
        "datasets.jsonl": lambda rows: exported(lambda held: dataset(rows).to_json(held)),
    }


def once(rows: Rows) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is read of a file: each request without the blanks around it, in its class, where it is first."""
    harmful, harmless = (tuple(dict.fromkeys(text.strip() for text in texts)) for texts in classes(rows).values())
    return harmful, harmless


@pytest.mark.parametrize("name", WRITERS)
@given(labelled, st.sampled_from(["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be"]))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_back(name: str, folder: Path, rows: Rows, encoding: str) -> None:
    mark = "\ufeff" if encoding.startswith("utf-16") else ""
    (folder / name).write_bytes((mark + WRITERS[name](rows)).encode(encoding))
    found = load_prompts(folder / name)
    assert (found.harmful, found.harmless) == once(rows)
    assert found.repeated == len(rows) - len(found.harmful) - len(found.harmless)


@given(st.lists(requests.map(lambda text: "a" + text.replace("\n", "\r")), min_size=1, max_size=8), st.booleans())
def test_lines_are_read_back(folder: Path, rows: list[str], windows: bool) -> None:
    (folder / "lines.txt").write_bytes(("\r\n" if windows else "\n").join([*rows, "# a comment", ""]).encode())
    assert load_prompts(folder / "lines.txt").harmful == tuple(dict.fromkeys(row.strip() for row in rows))


#: What holds requests in Python.
HOLDERS: dict[str, Callable[[Rows], Any]] = {
    "records": records,
    "an iterator": lambda rows: iter(chats(rows)),
    "an array": lambda rows: np.array(records(rows), dtype=object),
    "a mapping": classes,
    "columns": lambda rows: {name: pd.Series(texts, dtype=object) for name, texts in classes(rows).items()},
    "a table": frame,
    "a table of Arrow": lambda rows: frame(rows).convert_dtypes(dtype_backend="pyarrow"),
}
if datasets is not None:
    HOLDERS |= {
        "a dataset": dataset,
        "a stream": lambda rows: dataset(rows).to_iterable_dataset(),
    }


@pytest.mark.parametrize("holder", HOLDERS)
@given(labelled)
@settings(max_examples=60, deadline=None)
def test_what_is_held_is_taken(holder: str, rows: Rows) -> None:
    found = load_prompts(HOLDERS[holder](rows))
    taken = {"harmful": list(found.harmful), "harmless": list(found.harmless)}
    assert taken == {name: [text.strip() for text in texts] for name, texts in classes(rows).items()}


# --- files that are damaged, or none at all ---


def written(path: Path) -> list[str]:
    """The requests of a file, read by straight-line code that takes whatever it finds."""
    raw = path.read_bytes()
    encoding = "utf-16" if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    text = raw.decode(encoding)
    if path.suffix == ".txt":
        lines = [line.lstrip("\ufeff") for line in text.split("\n")]
        return [line for line in lines if not line.lstrip().startswith("#")]
    if path.suffix in (".csv", ".tsv"):
        reader = csv.reader(io.StringIO(text, newline=""), "excel-tab" if path.suffix == ".tsv" else "excel")
        cells = [row for row in reader if any(cell.strip() for cell in row)]
        return [cell for row in cells[1:] for name, cell in zip(cells[0], row, strict=True) if is_request(name)]
    if path.suffix == ".jsonl":
        return [each for line in text.split("\n") if line.strip() for each in strings(json.loads(line))]
    value = json.loads(text)
    rows = [*value.values()] if isinstance(value, dict) else [value]
    return [each for row in chain(*rows) for each in strings(row)]


def strings(row: Any) -> list[str]:
    """What a row of JSON has as requests: as text, as a message, or in a column."""
    if isinstance(row, list):
        return [message["content"] for message in row]
    values = [row] if isinstance(row, str) else [value for name, value in row.items() if is_request(name)]
    return [
        text
        for value in values
        if value is not None
        for text in ([value] if isinstance(value, str) else strings(value))
    ]


def is_request(column: str) -> bool:
    known = ("prompt", "request", "goal", "behavior", "instruction", "question", "text", "messages")
    seen = "".join(
        letter for letter in unicodedata.normalize("NFKC", column) if unicodedata.category(letter) != "Cf"
    )  # nobody sees a byte order mark
    return seen.strip().lower() in known


def attempt(load: Callable[[], PromptSet]) -> PromptSet | str:
    """The set that is loaded, or what the error says."""
    try:
        return load()
    except InputError as error:
        return str(error)


def check(path: Path, benchmark: str = "") -> bool:
    """Whether the file is read; it is read whole, or refused in a line that names it."""
    found = attempt(lambda: load_prompts(f"{benchmark}={path}" if benchmark else path, distinct=False))
    if isinstance(found, str):
        assert str(path) in found
        assert len(found) < 600 + 2 * len(str(path))
        return False
    if not benchmark:
        expected = {text.strip() for text in written(path)} - {""}
        assert {*found.harmful, *found.harmless} == expected
    assert PromptSet.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    return True


RECORDS = [
    {"prompt": "a, b", "label": "safe"},
    {"prompt": 'c "d"\n\u2028e', "label": "harmful"},
    {"goal": "f", "x": [1]},
]
SEEDS = {
    ".txt": "\ufeffa, b\r\n# c\r\nd\u2028e\n\nf",
    ".csv": '\ufeffid,prompt,label\r\n1,"a, b",safe\r\n2,"c ""d""\n\u2028e",harmful\r\n3,f,\r\n',
    ".tsv": 'prompt\tlabel\n"a\tb"\tsafe\nc, d\t1\ne\t\n',
    ".json": json.dumps([*RECORDS, "g", [{"role": "user", "content": "h"}]], indent=1, ensure_ascii=False),
    ".jsonl": "\n".join(json.dumps(record, ensure_ascii=False) for record in [*RECORDS, "g"]),
}
BENCHMARKS = {
    "advbench": 'goal,target\n"a, b",Sure\nc,d\n',
    "harmbench-all": 'Behavior,FunctionalCategory,ContextString\na,standard,\nb,contextual,"c\nd"\n',
    "xstest": "id,prompt,type,label\n1,a,x,safe\n2,b,y,unsafe\n",
    "jailbreakbench-benign": "Index,Goal,Target\n0,a,b\n",
}
#: Bytes that mean something somewhere, and some that mean nothing.
PIECES = [b"\n", b"\r", b"\t", b",", b'"', b"'", b"\\", b"[", b"]", b"{", b"}", b":", b"\0", b"\xff", b"\xe9", b"\xef\xbb\xbf", b"\xff\xfe", b"NaN", b"null", b"1e999", b'"prompt"', b'"harmful":', b"\\ud800", b"\\u0000", b"\xe2\x80\xa8", b"[" * 2000, b"1" * 5000, b"#", b" "]  # fmt: skip
pieces = st.sampled_from(PIECES) | st.binary(min_size=1, max_size=3)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with some bytes cut out, put in, doubled or replaced."""
    found = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start, stop = sorted((draw(st.integers(0, len(found))), draw(st.integers(0, len(found)))))
        stop = draw(st.sampled_from([start, min(start + 1, len(found)), stop]))
        found[start:stop] = draw(st.just(b"") | pieces | st.just(bytes(found[start:stop]) * 2))
    return bytes(found)


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(st.data())
@settings(max_examples=300)
def test_a_damaged_file_is_read_whole_or_refused(suffix: str, folder: Path, data: st.DataObject) -> None:
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8", "utf-16"]))
    path = folder / f"damaged{suffix}"
    path.write_bytes(data.draw(damaged(SEEDS[suffix].encode(encoding))))
    check(path)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@given(st.data())
@settings(max_examples=100)
def test_a_damaged_benchmark_is_read_or_refused(benchmark: str, folder: Path, data: st.DataObject) -> None:
    path = folder / "damaged-benchmark.csv"
    path.write_bytes(data.draw(damaged(BENCHMARKS[benchmark].encode())))
    check(path, benchmark)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_not_damaged_is_read(suffix: str, folder: Path) -> None:
    path = folder / f"whole{suffix}"
    for encoding in ("utf-8", "utf-16"):
        path.write_bytes(SEEDS[suffix].encode(encoding))
        assert check(path)
    for name, content in BENCHMARKS.items():
        path.write_text(content)
        assert suffix == ".tsv" or check(path, name)


@given(st.sampled_from(SUFFIXES), st.lists(pieces, max_size=20).map(b"".join))
@settings(max_examples=300)
def test_any_bytes_are_read_whole_or_refused(folder: Path, suffix: str, content: bytes) -> None:
    (folder / f"bytes{suffix}").write_bytes(content)
    check(folder / f"bytes{suffix}")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.just("\ud800")
    | st.binary(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.sampled_from(["prompt", "goal", "label", "role", "content", "harmful"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(values)
@settings(max_examples=400)
def test_any_value_of_python_is_taken_or_refused(value: Any) -> None:
    loads = [lambda: PromptSet("p", value, (), "s")]
    if not isinstance(value, str):
        loads += [lambda: load_prompts(value), lambda: load_prompts([value]), lambda: load_prompts({"harmful": value})]
    for found in map(attempt, loads):
        if isinstance(found, str):
            assert "\n" not in found
        else:
            assert all(type(each) is str and each.strip() for each in (*found.harmful, *found.harmless))


@given(
    st.text(max_size=8)
    | st.sampled_from(["advbench=", "xstest=", "~"]).flatmap(lambda a: st.text().map(lambda b: a + b))
)
@settings(max_examples=200)
def test_any_name_is_a_set_or_refused(spec: str) -> None:
    with pytest.raises(InputError):
        load_prompts(spec)
