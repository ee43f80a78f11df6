"""Public benchmarks, read from their authors' own files. kvgeom ships and fetches none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvgeom.checks import check_texts
from kvgeom.errors import InputError, brief, unknown
from kvgeom.prompts.sets import SHIPPED
from kvgeom.registry import check_free

_BENCHMARKS: dict[str, Benchmark] = {}
#: The functional categories of HarmBench, which are its subsets.
_CATEGORIES = ("standard", "contextual", "copyright")


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark's own CSV file is read.

    Attributes
    ----------
    title : str
        As its authors write it.
    home : str
        Where to get the file.
    licence : str
    column : str
        Which column holds the request.
    harmful : callable (row) -> bool or None
        Whether the request of a row is harmful; None leaves the row out. All are harmful by default. What it raises, such
        as a :class:`KeyError` for a column that is not there, is told as an error of the row.
    context : str, optional
        Which column holds what the request is about. Where a row has some, it stands before the request as in HarmBench.
    """

    title: str
    home: str
    licence: str
    column: str
    harmful: Callable[[Mapping[str, str]], bool | None] = lambda row: True
    context: str | None = None

    def __post_init__(self) -> None:
        check_texts(
            "a benchmark", self, "title", "home", "licence", "column", *([] if self.context is None else ["context"])
        )
        if not callable(self.harmful):
            raise InputError(
                f"harmful of benchmark {self.title!r} must be a function of a row, got {brief(self.harmful)}"
            )

    def request(self, row: Mapping[str, str]) -> str:
        """The request of a row, behind its context if it has one.

        They are joined as HarmBench joins them where it asks its behaviours as they are
        (``baselines/direct_request/direct_request.py``).

        Raises
        ------
        KeyError
            If the row lacks a column.
        """
        context = row[self.context] if self.context else ""
        return f"{context}\n\n---\n\n{row[self.column]}" if context.strip() else row[self.column]


def register_benchmark(name: str, benchmark: Benchmark) -> Benchmark:
    """Make a benchmark known to :func:`kvgeom.load_prompts`, as ``"name=FILE"``; returns it.

    Raises
    ------
    InputError
        If the name is taken, or reads as a file.

    Examples
    --------
    >>> kept = register_benchmark("my-benchmark", Benchmark("Mine", "example.org/mine.csv", "MIT", "request"))
    >>> kept.harmful({"request": "Do harm"})
    True
    """
    check_free("a benchmark or prompt set named", name, {*_BENCHMARKS, *SHIPPED})
    if not name or set(name) & set("=/."):
        raise InputError(f"the name of a benchmark must be without '=', '/' and '.', got {brief(name)}")
    _BENCHMARKS[name] = benchmark
    return benchmark


def benchmarks() -> dict[str, Benchmark]:
    """All registered benchmarks, by name."""
    return dict(_BENCHMARKS)


def _harmbench(subset: str) -> Benchmark:
    def harmful(row: Mapping[str, str]) -> bool | None:
        category = row["FunctionalCategory"].strip().lower()
        if category not in _CATEGORIES:
            raise unknown("FunctionalCategory", brief(category), _CATEGORIES)
        if subset not in ("all", category):
            return None
        context = row["ContextString"] if category == "contextual" else row.get("ContextString", "")
        if bool(context.strip()) != (category == "contextual"):
            found = "a" if context.strip() else "no"
            raise InputError(f"a {category} behaviour has {found} ContextString; give the file of HarmBench itself")
        return True

    return Benchmark(
        f"HarmBench ({subset})",
        "github.com/centerforaisafety/HarmBench (harmbench_behaviors_text_all.csv)",
        "MIT",
        "Behavior",
        harmful,
        "ContextString" if subset in ("contextual", "all") else None,
    )


def _xstest(row: Mapping[str, str]) -> bool:
    if "label" not in row and "type" in row:  # in the file of its second version
        return row["type"].strip().lower().startswith("contrast_")
    label = row["label"].strip().lower()
    if label not in ("safe", "unsafe"):
        raise InputError(f"label must be safe or unsafe, got {brief(label)}; give the file of XSTest itself")
    return label == "unsafe"


def _jailbreakbench(split: str) -> Benchmark:
    return Benchmark(
        f"JailbreakBench ({split} behaviours)",
        f"huggingface.co/datasets/JailbreakBench/JBB-Behaviors ({split}-behaviors.csv)",
        "MIT",
        "Goal",
        lambda row: split == "harmful",
    )


register_benchmark(
    "advbench", Benchmark("AdvBench", "github.com/llm-attacks/llm-attacks (harmful_behaviors.csv)", "MIT", "goal")
)
# Standard behaviours are plain requests; contextual ones stand behind their context, copyright ones test memory.
register_benchmark("harmbench", _harmbench("standard"))
register_benchmark("harmbench-contextual", _harmbench("contextual"))
register_benchmark("harmbench-copyright", _harmbench("copyright"))
register_benchmark("harmbench-all", _harmbench("all"))
register_benchmark(
    "xstest",
    Benchmark(
        "XSTest",
        "github.com/paul-rottger/xstest (xstest_prompts.csv)",
        "CC-BY-4.0",
        "prompt",
        _xstest,
    ),
)
# The two files have the same columns; which one it is, the user says.
register_benchmark("jailbreakbench", _jailbreakbench("harmful"))
register_benchmark("jailbreakbench-benign", _jailbreakbench("benign"))
