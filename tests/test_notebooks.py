"""Notebooks and tutorials run from the first cell to the last: the ones on the demo model, the others on tiny models."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [path for folder in ("notebooks", "tutorials") for path in sorted((ROOT / folder).glob("*.ipynb"))]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))


@pytest.mark.real
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVGEOM_NOTEBOOK_PROGRESS", "0")
    monkeypatch.setenv("KVGEOM_NOTEBOOK_PROMPTS", "8" if path.stem == "01_geometry" else "6")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute(cwd=str(path.parent))
    written = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in written if output.output_type == "error"]
    assert any("application/vnd.plotly.v1+json" in output.get("data", {}) for output in written)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_stored_with_what_came_out(path: Path) -> None:
    """So that it reads on a code host: every cell was run, in order, tables and pictures are there, and it ends with exercises."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code)
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert "## Exercises" in notebook.cells[-1].source
    assert path.stat().st_size < 400_000
    for name in re.findall(r"\]\(([^)#]+)\)", " ".join(cell.source for cell in notebook.cells)):
        assert name.startswith("https://") or (path.parent / name).is_file(), name
