"""Public benchmarks, read from their authors' own files. kvgeom ships and fetches none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvgeom.errors import InputError
from kvgeom.prompts.sets import SHIPPED
from kvgeom.registry import check_free

_BENCHMARKS: dict[str, Benchmark] = {}


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
        Whether the request of a row is harmful; None leaves the row out. All are harmful by default.
    """

    title: str
    home: str
    licence: str
    column: str
    harmful: Callable[[Mapping[str, str]], bool | None] = lambda row: True


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
        raise InputError(f"the name of a benchmark must be without '=', '/' and '.', got {name!r}")
    _BENCHMARKS[name] = benchmark
    return benchmark


def benchmarks() -> dict[str, Benchmark]:
    """All registered benchmarks, by name."""
    return dict(_BENCHMARKS)


def _harmbench(subset: str) -> Benchmark:
    return Benchmark(
        f"HarmBench ({subset})",
        "github.com/centerforaisafety/HarmBench (harmbench_behaviors_text_all.csv)",
        "MIT",
        "Behavior",
        lambda row: True if subset in ("all", row.get("FunctionalCategory")) else None,
    )


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
# Standard behaviours are plain requests; contextual ones need their context, copyright ones test memory.
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
        lambda row: row.get("label", "").strip().lower() == "unsafe",
    ),
)
# The two files have the same columns; which one it is, the user says.
register_benchmark("jailbreakbench", _jailbreakbench("harmful"))
register_benchmark("jailbreakbench-benign", _jailbreakbench("benign"))
