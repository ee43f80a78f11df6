from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from kvgeom.models.model import Model

# A property that takes long once, because torch warms up, has not failed.
settings.register_profile("kvgeom", deadline=None, print_blob=True)
settings.load_profile("kvgeom")

#: Public benchmarks beside a checkout, where there are any; never part of the repository.
SHARED = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session")
def demo() -> Model:
    """The real demo model, fetched on first use."""
    import kvgeom

    return kvgeom.load("demo", progress=False)


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("no benchmark files beside this checkout")
    return SHARED
