"""The package as a whole: what importing costs, what is public, and that shipped files are there."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import kvgeom

ROOT = Path(__file__).parents[1]


def test_import_is_light() -> None:
    code = "import sys, kvgeom; kvgeom.__version__; dir(kvgeom); print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "numpy", "xarray", "plotly", "sklearn", "pandas", "scipy"} & set(loaded)


def test_public_names_resolve_and_say_what_they_are() -> None:
    for name in kvgeom.__all__:
        thing = getattr(kvgeom, name)
        assert inspect.getdoc(thing), name
    assert set(kvgeom.__all__) <= set(dir(kvgeom))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kvgeom.nothing  # noqa: B018


def test_shipped_files() -> None:
    for package, name in (
        ("kvgeom", "py.typed"),
        ("kvgeom.report", "templates/base.html"),
        ("kvgeom.report", "templates/audit.html"),
        ("kvgeom.report", "templates/fix.html"),
        ("kvgeom.report", "audit.schema.json"),
        ("kvgeom.prompts", "data/calibration.jsonl"),
        ("kvgeom.prompts", "data/perplexity.txt"),
    ):
        assert files(package).joinpath(name).is_file(), name


def test_imports_point_one_way() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_no_pickle_and_no_remote_code() -> None:
    for path in (ROOT / "kvgeom").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "import pickle" not in source, path
        assert "torch.load(" not in source, path
        assert "trust_remote_code=True" not in source, path
