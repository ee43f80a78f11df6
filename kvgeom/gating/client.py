"""Asking a server that speaks OpenAI's protocol, and what can be wrong with one."""

from __future__ import annotations

import ipaddress
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import httpx

from kvgeom.errors import InputError, KvgeomError, ServerError, brief

#: Statuses after which the same request may be answered.
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
#: Seconds before a request is sent again: the first time, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
#: Characters of what a server says of an error.
_SAID = 200
#: Most alternatives to a token that servers give.
TOP = 20


def base_url(url: str) -> str:
    """A base URL as it is used: with ``/v1``.

    Raises
    ------
    InputError
        If it is none, or holds a password, which results would repeat.

    Examples
    --------
    >>> base_url("http://localhost:8000/")
    'http://localhost:8000/v1'
    """
    try:
        found = httpx.URL(url.strip())
    except (httpx.InvalidURL, TypeError, AttributeError) as error:
        raise InputError(f"{brief(url)} is no URL: {error}; write it as http://localhost:8000/v1") from error
    if found.scheme not in ("http", "https") or not found.host:
        raise InputError(f"{brief(url)} is no URL of a server; write it as http://localhost:8000/v1")
    if found.userinfo or found.query or found.fragment:
        raise InputError("a URL must be without a password and without options; give a key as api_key or --api-key-env")
    path = found.path.rstrip("/")
    return str(found.copy_with(path=path if path.endswith("/v1") else f"{path}/v1"))


@dataclass(frozen=True)
class Answer:
    """What a server answered to one request; JSON types, as a journal keeps it.

    Attributes
    ----------
    text : str
    reasoning : str or None
        What it has written before the answer, where the server takes that apart.
    finish : str
        Why it ended: ``"stop"``, ``"length"``, ...
    prompt_tokens : int
        -1 where the server does not say.
    tokens : list of str
    logprobs : list of float
        Log-probability of each token (nats); both empty where the server gives none.
    top : dict of str to float
        The most likely first tokens and their log-probabilities.
    seconds : float
        Until it was there.
    """

    text: str
    reasoning: str | None
    finish: str
    prompt_tokens: int
    tokens: list[str]
    logprobs: list[float]
    top: dict[str, float]
    seconds: float


@dataclass
class Client:
    """Sends requests to one server, again where that may help; may be used by several threads.

    Parameters
    ----------
    url : str
        As :func:`base_url` has it.
    key : str, optional
        Sent as a bearer token; it stands in no error and no result.
    timeout : float
        Seconds for one answer.
    retries : int
        How often a request is sent again.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    retries: int = 4

    def __post_init__(self) -> None:
        headers = {"User-Agent": "kvgeom"}
        if self.key is not None:
            if not (self.key.isascii() and self.key.isprintable() and self.key) or " " in self.key:
                raise InputError("the API key is empty, or has characters that no key has; give another")
            headers["Authorization"] = f"Bearer {self.key}"
        self._http = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(self.timeout, connect=min(10.0, self.timeout)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=not _is_loopback(self.url),
        )
        self._stopped = threading.Event()
        self._not_before = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def stop(self) -> None:
        """Send nothing again from now on: what is under way may still be answered."""
        self._stopped.set()

    def models(self) -> list[str]:
        """Names of the models that the server has."""
        found = self._json(self._sent("GET", "/models", None))
        try:
            return [str(each["id"]) for each in found["data"]]
        except (KeyError, TypeError) as error:
            raise self._no_server("its list of models is none") from error

    def metrics(self) -> str:
        """What the server says of itself at ``/metrics``; empty if nothing."""
        try:
            answer = self._http.get(self.url.removesuffix("/v1") + "/metrics", timeout=min(self.timeout, 10.0))
        except httpx.HTTPError:
            return ""
        return answer.text if answer.status_code == 200 else ""

    def answer(self, body: Mapping[str, Any]) -> Answer:
        """What the server answers to a chat, or to the prompt of a completion.

        Raises
        ------
        InputError
            If it refuses the request or the key, or is no such server.
        ServerError
            If it does not answer, also when asked again.
        """
        begin = time.monotonic()
        kind, path, read = (
            ("completion", "/completions", _read_completion)
            if "prompt" in body
            else ("chat completion", "/chat/completions", _read)
        )
        found = self._json(self._sent("POST", path, body))
        seconds = time.monotonic() - begin
        try:
            return read(found, seconds)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise self._no_server(f"its answer is no {kind} ({brief(found)})") from error

    def completion(self, body: Mapping[str, Any]) -> Any:
        """What the server answers to a plain prompt, as it is; raises as :meth:`answer` does."""
        return self._json(self._sent("POST", "/completions", body))

    def _sent(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        pause = _FIRST_PAUSE
        for left in range(self.retries, -1, -1):
            self._wait()
            try:
                answer = self._http.request(method, self.url + path, json=body)
            except httpx.TimeoutException as error:
                failed: KvgeomError = ServerError(
                    f"{self.url} did not answer within {self.timeout:g} s ({type(error).__name__}); give it more time "
                    "(timeout), or less to do at once (concurrency)"
                )
            except httpx.HTTPError as error:
                failed = ServerError(
                    f"{self.url} does not answer: {self._clean(str(error)) or type(error).__name__}; see whether it runs"
                )
            else:
                if answer.status_code == 200:
                    return answer
                failed = self._refused(answer)
                if answer.status_code not in _AGAIN:
                    raise failed
                pause = max(pause, _retry_after(answer))
            if left == 0 or self._stopped.is_set():
                raise failed
            # All threads wait: a server that has too much to do is not asked by the others meanwhile.
            self._not_before = max(
                self._not_before, time.monotonic() + min(pause, _LONGEST_PAUSE) * random.uniform(0.8, 1.2)
            )
            pause *= 2
        raise AssertionError("unreachable")

    def _wait(self) -> None:
        pause = self._not_before - time.monotonic()
        if pause > 0:
            self._stopped.wait(pause)

    def _refused(self, answer: httpx.Response) -> KvgeomError:
        """The error for another status than 200."""
        status = answer.status_code
        if status in (401, 403):  # what it says may repeat the key
            have = "refuses the API key" if self.key else "wants an API key"
            return InputError(
                f"{self.url} {have} (status {status}); name the variable that holds a valid one (--api-key-env)"
            )
        said = self._said(answer)
        if status == 404:
            return InputError(
                f"{self.url} has no such model or path (status 404{said}); check the URL and the model's name"
            )
        if status in _AGAIN:
            return ServerError(
                f"{self.url} failed (status {status}{said}); see its log, then run the same command again"
            )
        if 300 <= status < 400:
            return self._no_server(f"it sends elsewhere (status {status})")
        return InputError(f"{self.url} refuses the request (status {status}{said}); change what it names")

    def _said(self, answer: httpx.Response) -> str:
        try:
            found = answer.json()
            found = found.get("error", found)
            text = found.get("message", found) if isinstance(found, dict) else found
        except (ValueError, AttributeError):
            text = answer.text
        text = " ".join(self._clean(str(text)).split())[:_SAID]
        return f": {text}" if text else ""

    def _clean(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text

    def _json(self, answer: httpx.Response) -> Any:
        try:
            return answer.json()
        except ValueError as error:
            raise self._no_server(f"it answers {brief(self._clean(answer.text))}") from error

    def _no_server(self, why: str) -> InputError:
        return InputError(
            f"{self.url} does not speak OpenAI's protocol: {self._clean(why)}; give the base URL of a server"
        )


def _read(found: Any, seconds: float) -> Answer:
    """The parts of a chat completion that are kept."""
    choice = found["choices"][0]
    message, usage = choice["message"], found.get("usage") or {}
    content = (choice.get("logprobs") or {}).get("content") or []
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    text = str(message["content"] or "")
    if reasoning is None:
        content = _said_tokens(content, text)
    return Answer(
        text=text,
        reasoning=None if not reasoning else str(reasoning),
        finish=str(choice.get("finish_reason") or ""),
        prompt_tokens=int(usage.get("prompt_tokens", -1)),
        tokens=[str(each["token"]) for each in content],
        logprobs=[float(each["logprob"]) for each in content],
        top=_likeliest(content[0].get("top_logprobs") or []) if content else {},
        seconds=seconds,
    )


def _likeliest(top: list[dict[str, Any]]) -> dict[str, float]:
    """Log-probabilities by token; of tokens that read alike, as parts of characters do, the likeliest."""
    return {str(each["token"]): float(each["logprob"]) for each in sorted(top, key=lambda each: float(each["logprob"]))}


def _read_completion(found: Any, seconds: float) -> Answer:
    """The parts of a plain completion that are kept; log-probabilities as OpenAI's old format has them, or as chats do."""
    choice = found["choices"][0]
    given, usage = choice.get("logprobs") or {}, found.get("usage") or {}
    content = given.get("content")
    if content is None:
        tops = given.get("top_logprobs") or []
        content = [
            {
                "token": token,
                "logprob": logprob,
                "top_logprobs": [{"token": word, "logprob": value} for word, value in (top or {}).items()],
            }
            for token, logprob, top in zip(
                given.get("tokens") or [],
                given.get("token_logprobs") or [],
                tops or [{}] * len(given.get("tokens") or []),
                strict=True,
            )
        ]
    message = {"content": choice["text"]}
    whole = {**choice, "message": message, "logprobs": {"content": content}}
    return _read({"choices": [whole], "usage": usage}, seconds)


def _said_tokens(content: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The tokens of a text; for those that do not spell it the likeliest of each place, if these do.

    MLX-LM (0.32) names the first of its alternatives, which are in no order.
    """

    def spells(tokens: list[dict[str, Any]]) -> bool:
        return "".join(str(each["token"]) for each in tokens).strip().startswith(text.strip())

    if spells(content) or not all(each.get("top_logprobs") for each in content):
        return content
    likeliest = [{**each, **max(each["top_logprobs"], key=lambda other: float(other["logprob"]))} for each in content]
    return likeliest if spells(likeliest) else content


def _retry_after(answer: httpx.Response) -> float:
    """Seconds that a server asks for before the next request; 0 if it does not say."""
    said = answer.headers.get("Retry-After", "")
    return float(said) if said.isascii() and said.isdigit() else 0.0


def _is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
