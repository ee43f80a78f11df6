"""How an engine is run as a server: what it needs, which caches it has, and how it says which it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvgeom.errors import InputError, brief, reason

#: A folder with an environment for each engine, named as the engine: ``$KVGEOM_ENGINES/vllm/bin/python``.
ENVIRONMENTS = "KVGEOM_ENGINES"
#: Where an environment has its interpreter.
_PYTHON = "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
_FIND = """
import importlib.util, json, sys
from importlib.metadata import PackageNotFoundError, version
found = importlib.util.find_spec(sys.argv[1]) is not None
for name in sys.argv[2:]:
    try:
        print(json.dumps([found, version(name)]))
        break
    except PackageNotFoundError:
        pass
else:
    print(json.dumps([found, "unknown"]))
"""


@dataclass(frozen=True)
class Launch:
    """One start of a server.

    Attributes
    ----------
    model : str
        What the engine loads: a file, a folder or a hub id.
    name : str
        What the server shall call it.
    port : int
        On the loopback interface.
    cache : mapping of str to str
        Every option of the cache, with its value.
    context : int
        Tokens that prompt and response may have.
    parallel : int
        Requests that are answered at the same time.
    threads : int
        Of the processor.
    """

    model: str
    name: str
    port: int
    cache: Mapping[str, str]
    context: int
    parallel: int
    threads: int


@dataclass(frozen=True)
class Runner:
    """How an engine is run as a server; part of its :class:`~kvgeom.engines.engine.Engine`.

    Attributes
    ----------
    module : str
        What must be there to be imported.
    packages : tuple of str
        Names under which it is installed.
    install : str
        What installs the version that was run.
    caches : mapping of str to tuple of str
        Options of the cache with their values, the unquantized one first.
    other : callable (option, value) -> str, optional
        For an engine whose options take more than these values: what another one is called, from any folder. Raises
        :class:`~kvgeom.errors.InputError` for what it does not take.
    plan_option : str
        The option that takes a saved plan, for an engine that loses nothing of one.
    find : callable (str) -> str
        What the engine loads for what a user calls the model.

        Raises :class:`~kvgeom.errors.InputError` for what it cannot load.
    name : callable (str, str) -> str
        What the server calls the model, of what a user calls it and what :attr:`find` made of that.
    command : callable (Launch) -> list of str
        Arguments of the Python interpreter.
    environment : callable (Launch) -> mapping of str to str
        Variables that are set for it, unless the user has set them.
    flags : mapping of str to str
        Options of the cache by the flags that :attr:`~kvgeom.engines.engine.Engine.export` writes; empty for one that goes without saying.
    hints : mapping of str to str
        What to do, by a text that the log of a server that died has.
    stated : callable (Launch, str) -> mapping of str to str
        What the running server says its cache is, of :attr:`caches`; from its log.
    """

    module: str
    packages: tuple[str, ...]
    install: str
    caches: Mapping[str, tuple[str, ...]]
    find: Callable[[str], str]
    command: Callable[[Launch], list[str]]
    stated: Callable[[Launch, str], Mapping[str, str]]
    name: Callable[[str, str], str] = lambda model, found: model
    environment: Callable[[Launch], Mapping[str, str]] = lambda launch: {}
    flags: Mapping[str, str] = field(default_factory=dict)
    other: Callable[[str, str], str] | None = None
    plan_option: str = ""
    hints: Mapping[str, str] = field(default_factory=dict)

    def interpreter(self, engine: str, given: str | Path | None = None) -> tuple[str, str]:
        """The Python that has the engine, and the engine's version there.

        Parameters
        ----------
        engine : str
            Its name.
        given : str or Path, optional
            An interpreter; by default this one, or that of ``$KVGEOM_ENGINES/<engine>``, whichever has the engine.

        Raises
        ------
        InputError
            If it is not there, or has not the engine.
        """
        folder = os.environ.get(ENVIRONMENTS)
        own = None if folder is None else Path(folder) / engine / _PYTHON
        tried = [Path(given)] if given is not None else [Path(sys.executable), *([own] if own and own.exists() else [])]
        for python in tried:
            found, version = self._found(python)
            if found:
                return str(python), version
        where = f"{tried[-1]} has no {self.module}"
        raise InputError(
            f"{engine} cannot be started: {where}; {self.install}, or name another interpreter (python=...)"
        )

    def _found(self, python: Path) -> tuple[bool, str]:
        command = [str(python), "-c", _FIND, self.module, *self.packages]
        try:
            answer = subprocess.run(
                command, capture_output=True, text=True, timeout=60, check=True, cwd=tempfile.gettempdir()
            )
            found, version = json.loads(answer.stdout)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise InputError(
                f"{brief(str(python))} is no Python that runs: {reason(error)}; give the path of one, such as venv/bin/python"
            ) from error
        return bool(found), str(version)


def from_any_folder(model: str) -> str:
    """The whole path of what is a path; a hub id, or another name, as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def checkpoint(model: str) -> str:
    """The folder or hub id that a user means, for an engine that loads checkpoints of transformers."""
    from kvgeom.models.demo import DEMOS, demo_model_dir

    return str(demo_model_dir(DEMOS[model])) if model in DEMOS else from_any_folder(model)
