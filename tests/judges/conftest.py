"""Tiny classifiers on disk, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders.classifiers import FORCED
from tests.builders.guards import write_guard, write_random


@pytest.fixture(scope="session")
def guards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("guards")
    return {name: write_guard(root / name, *rest) for name, rest in FORCED.items()}


@pytest.fixture(scope="session")
def random_mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("random") / "mistral")
