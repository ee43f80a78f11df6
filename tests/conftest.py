from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # a process on each core: threads of one would stand in the way of the others
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
from hypothesis import settings

from kvgeom.models.hf import HFModel
from kvgeom.models.model import Model
from kvgeom.organisms import MODES, Organism, Size, plant, tiny_model
from tests.builders.organisms import size_of, trained_for
from tests.builders.tiny import tiny_hf_model, tiny_tokenizer, write_tiny_gguf

# A property that takes long once, because torch warms up, has not failed.
settings.register_profile("kvgeom", deadline=None, print_blob=True)
settings.load_profile("kvgeom")

#: Public benchmarks beside a checkout, where there are any; never part of the repository.
SHARED = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What uses the demo model is marked so, before markers choose what is run."""
    for item in items:
        if "demo" in getattr(item, "fixturenames", ()):
            item.add_marker("real")


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


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer on disk."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_hf_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for one test."""
    monkeypatch.setenv("KVGEOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def trained() -> HFModel:
    """Trained on first use, in half a minute, and kept on disk."""
    return tiny_model(Size(3))


@pytest.fixture(
    scope="session",
    params=[pytest.param(mode, marks=pytest.mark.slow if mode == "multi-layer dilution" else ()) for mode in MODES],
)
def organism(request: pytest.FixtureRequest) -> Organism:
    """A trained model with each mode planted in turn."""
    mode = request.param
    return plant(trained_for(mode), mode, seed=8, prompts=size_of(mode).prompts("train").take(24))
