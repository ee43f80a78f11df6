"""The two that are compared: servers at a URL, servers that kvgeom starts, or answers that are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvgeom.checks import as_path
from kvgeom.engines.serve import serve
from kvgeom.engines.spec import ServerSpec, is_spec, parse_spec
from kvgeom.engines.vllm import cache_of
from kvgeom.errors import InputError, brief, unknown
from kvgeom.gating.client import Client, base_url
from kvgeom.paths import read_whole

#: The file with the answers of each of the two.
FILES = {"baseline": "baseline.jsonl", "candidate": "candidate.jsonl"}


@dataclass(frozen=True)
class Target:
    """One of the two, before it runs.

    Attributes
    ----------
    name : str
        What results call it: a URL, a spec, or what kept answers are of.
    url : str or None
    spec : ServerSpec or None
    kept : Path or None
        A file with answers of an earlier run.
    about : mapping
        What those are of: server, its model, and the version of its engine.
    """

    name: str
    url: str | None = None
    spec: ServerSpec | None = None
    kept: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Opened:
    """One of the two while it runs.

    Attributes
    ----------
    client : Client
    model : str
        What the server calls the model.
    about : mapping of str to str
        ``engine`` and ``version``, where kvgeom has started it.
    stated : mapping of str to str
        What it says of its cache; empty if nothing.
    """

    client: Client
    model: str
    about: Mapping[str, str] = field(default_factory=dict)
    stated: Mapping[str, str] = field(default_factory=dict)


def target(role: str, given: Any) -> Target:
    """What a user means by one of the two.

    Parameters
    ----------
    role : {"baseline", "candidate"}
    given : str, Path or ServerSpec
        A base URL, an engine's spec, or, of the baseline, the folder or file that has the answers of an earlier gate.

    Raises
    ------
    InputError
        If it is none of these.
    """
    if isinstance(given, ServerSpec):
        return Target(str(given), spec=given)
    if isinstance(given, str) and "://" in given:
        url = base_url(given)
        return Target(url, url=url)
    if isinstance(given, str) and is_spec(given) and not Path(given).exists():
        spec = parse_spec(given)
        return Target(str(spec), spec=spec)
    path = as_path(role, given)
    if role == "baseline" and path.exists():
        path = path / FILES[role] if path.is_dir() else path
        about = {name: value for name, value in _header(path).items() if name in ("server", "version", "served_model")}
        return Target(str(about["server"]), kept=path, about=about)
    raise InputError(
        f"{role} {brief(str(given))} is no server; give a URL (http://localhost:8000/v1) or an engine and a model "
        "(llamacpp:demo?k=q8_0&v=q8_0)" + ("" if role == "candidate" else ", or the folder of an earlier gate")
    )


def _header(path: Path) -> dict[str, Any]:
    """The first line of a journal, which says what it is about."""
    try:
        found = json.loads(read_whole(path).partition(b"\n")[0])
    except ValueError as error:
        raise InputError(
            f"{path} has no answers of an earlier gate; give the folder that kvgeom gate wrote (--out)"
        ) from error
    if not isinstance(found, dict) or "server" not in found:
        raise InputError(f"{path} has no answers of an earlier gate; give the folder that kvgeom gate wrote (--out)")
    return found


@contextmanager
def opened(
    found: Target,
    *,
    key: str | None,
    served_model: str | None,
    python: str | Path | None,
    log: Path | None,
    timeout: float,
    retries: int,
) -> Iterator[Opened]:
    """Start a server if it is to be started, and be sure that it has the model.

    Raises
    ------
    InputError, ServerError
        As :func:`~kvgeom.engines.serve.serve` and :class:`~kvgeom.gating.client.Client` do; and if the model is not there.
    """
    if found.spec is not None:
        with serve(found.spec, python=python, log=log) as server, Client(server.url, None, timeout, retries) as client:
            about = {"engine": found.spec.engine.name, "version": server.version}
            yield Opened(client, server.model, about, server.stated)
        return
    if found.url is None:
        raise InputError(
            f"the answers in {found.kept} are not all that is asked; ask the same as then (--no-noise if it was asked once, --text with the text that it read), or give the server itself"
        )
    with Client(found.url, key, timeout, retries) as client:
        yield Opened(client, _model(client, served_model), {}, cache_of(client.metrics()))


def _model(client: Client, wanted: str | None) -> str:
    """The model to ask: the one that was named, or the only one."""
    models = client.models()
    if wanted is not None and wanted not in models:
        raise unknown(f"model at {client.url}", wanted, models)
    if wanted is None and len(models) != 1:
        raise InputError(
            f"{client.url} has {len(models)} models ({', '.join(models[:8])}); name one of them (served_model)"
        )
    return models[0] if wanted is None else wanted
