"""docs/models.md is what `python benchmarks/architectures.py` writes."""

from __future__ import annotations

import pytest

from benchmarks import architectures


@pytest.mark.slow
def test_the_table_of_architectures_holds() -> None:
    page = architectures.PAGE.read_text(encoding="utf-8")
    assert architectures.table(architectures.rows(sorted(architectures.CAUSAL))) in page
