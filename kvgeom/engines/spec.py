"""An engine, a model and a cache in one string: ``llamacpp:demo?k=q4_0&v=q4_0``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl

from kvgeom.checks import whole
from kvgeom.engines.engine import Engine
from kvgeom.engines.registry import engines
from kvgeom.engines.runner import Runner
from kvgeom.errors import InputError, brief, unknown

#: Numbers that a spec may have beside the options of the cache, with what they are where it has none.
NUMBERS = {"context": 4096, "parallel": 4, "threads": 0}


@dataclass(frozen=True, repr=False)
class ServerSpec:
    """A server that kvgeom can start; made by :func:`parse_spec`.

    Attributes
    ----------
    engine : Engine
    model : str
        As the user calls it.
    cache : mapping of str to str
        Every option of the cache.
    context : int
        Tokens of prompt and response.
    parallel : int
        Requests answered at the same time.
    threads : int
        Of the processor; 0: as many as there are cores.
    python : str or None
        The interpreter that has the engine.
    """

    engine: Engine
    model: str
    cache: Mapping[str, str]
    context: int = NUMBERS["context"]
    parallel: int = NUMBERS["parallel"]
    threads: int = NUMBERS["threads"]
    python: str | None = None

    @property
    def runner(self) -> Runner:
        """How the engine is run."""
        assert self.engine.runner is not None  # noqa: S101 - parse_spec saw to it
        return self.engine.runner

    def __str__(self) -> str:
        """The same without what changes no answer: interpreter and threads."""
        numbers = {
            name: getattr(self, name) for name in ("context", "parallel") if getattr(self, name) != NUMBERS[name]
        }
        options = "&".join(f"{name}={value}" for name, value in {**self.cache, **numbers}.items())
        return f"{self.engine.name}:{self.model}?{options}"

    def __repr__(self) -> str:
        return f"<ServerSpec {self}>"


def is_spec(text: str) -> bool:
    """Whether a string begins as a spec, and not as a URL."""
    name, colon, rest = text.partition(":")
    return bool(colon) and name.lower() not in ("http", "https") and not rest.startswith("//")


def parse_spec(text: str) -> ServerSpec:
    """What a string says is to be started.

    Parameters
    ----------
    text : str
        ``ENGINE:MODEL``, and after a question mark options of the cache, ``context``, ``parallel``, ``threads`` and ``python``,
        joined by ``&``. Options of the cache that are left out are unquantized.

    Raises
    ------
    InputError
        If the engine is unknown or cannot be started, no model is named, or an option is unknown or has another value.

    Examples
    --------
    >>> str(parse_spec("llamacpp:demo?k=q4_0&v=q4_0"))
    'llamacpp:demo?k=q4_0&v=q4_0'
    >>> str(parse_spec("vllm:demo"))
    'vllm:demo?kv=auto'
    """
    name, colon, rest = text.partition(":")
    known = {engine.name: engine for engine in engines() if engine.runner is not None}
    if not colon:
        raise InputError(
            f"{brief(text)} is no server; give a URL, or an engine and a model such as {next(iter(known))}:demo"
        )
    if name not in known:
        raise unknown("engine that kvgeom starts", name, known)
    engine = known[name]
    model, _, query = rest.partition("?")
    if not model:
        raise InputError(f"{brief(text)} names no model; write {name}:MODEL")
    runner = engine.runner
    caches = runner.caches if runner else {}
    options = _options(text, query)
    for option in options:
        if option not in (*caches, *NUMBERS, "python"):
            raise unknown(f"option of {name}", option, (*caches, *NUMBERS, "python"))
    for option, values in caches.items():
        if options.get(option, values[0]) in values:
            continue
        if runner and runner.other:
            options[option] = runner.other(option, options[option])
        else:
            raise unknown(f"{option} of {name}", options[option], values)
    numbers = {option: _number(option, options[option]) for option in NUMBERS if option in options}
    cache = {option: options.get(option, values[0]) for option, values in caches.items()}
    return ServerSpec(engine, model, cache, **numbers, python=options.get("python"))


def _options(text: str, query: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError as error:
        raise InputError(f"options of {brief(text)} cannot be read; write them as name=value, joined by &") from error
    options = dict(pairs)
    if len(options) < len(pairs):
        raise InputError(f"{brief(text)} has an option twice; give each once")
    return options


def _number(option: str, value: str) -> int:
    return whole(option, int(value) if value.isascii() and value.isdigit() else value, 0 if option == "threads" else 1)
