"""A server of transformers with a packed cache: ``python -m kvgeom.gating.transformers_server``, which kvgeom starts.

It speaks as much of OpenAI's protocol as a gate asks for, one request after the other: chats, log-probabilities, and plain
completions that read their prompt (``echo``). It is for measuring a cache, not for serving users.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor

    from kvgeom.engines.engine import CacheConfig
    from kvgeom.models.hf import HFModel

#: Largest body that is read.
_LARGEST = 1 << 26


def cache_config(text: str) -> CacheConfig | None:
    """What is stored, of a plan's file or folder, a preset or a scheme; None for the exact cache.

    Raises
    ------
    InputError
        If it is none of these, or cannot be packed.
    """
    from kvgeom.engines.registry import resolve
    from kvgeom.engines.transformers import is_plan_file
    from kvgeom.models.packed import check_packable

    if text == "exact":
        return None
    if is_plan_file(text):
        from kvgeom.mitigation.plan import Plan

        chosen = Plan.load(text).chosen
        found = resolve(chosen.recipe, placement=chosen.placement)
    else:
        found = resolve(text)
    check_packable(found.recipe(1) if found.per_layer is None else found.per_layer, found.placement)
    return found


class PackedServer:
    """A model that answers with a packed cache.

    Parameters
    ----------
    model : HFModel
    name : str
        What the server calls it.
    cache : CacheConfig or None
        None for the exact cache.
    context : int
        Tokens that prompt and response may have.
    """

    def __init__(self, model: HFModel, name: str, cache: CacheConfig | None, context: int) -> None:
        self.model, self.name, self.cache, self.context = model, name, cache, context

    def new_cache(self) -> Any:
        """An empty cache for one sequence."""
        from kvgeom.models.packed import quantized_cache

        if self.cache is None:
            return self.model.new_cache()
        return quantized_cache(self.model, self.cache.recipe(self.model.geometry.layers), self.cache.placement)

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion."""
        tokenizer = self.model.tokenizer
        text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        tokens, logs = self._answered(ids, body)
        ended = tokens[-1] in self.model.stop_tokens
        top = int(body.get("top_logprobs") or 0)
        content = [
            {"token": self._word(token), "logprob": float(row[token]), "top_logprobs": self._top(row, top)}
            for token, row in zip(tokens, logs, strict=True)
        ]
        return {
            "object": "chat.completion",
            "model": self.name,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": self.model.decode(tokens[:-1] if ended else tokens)},
                    "finish_reason": "stop" if ended else "length",
                    "logprobs": {"content": content} if body.get("logprobs") else None,
                }
            ],
            "usage": {"prompt_tokens": len(ids), "completion_tokens": len(tokens)},
        }

    def _answered(self, ids: list[int], body: Mapping[str, Any]) -> tuple[list[int], list[Tensor]]:
        """As :meth:`_written`, with what a request asks for."""
        import torch

        new = min(int(body.get("max_tokens") or 16), self.context - len(ids))
        if new < 1:
            raise ValueError(f"the prompt has {len(ids)} tokens, and the context is {self.context}")
        torch.manual_seed(int(body.get("seed") or 0))
        return self._written(ids, new, float(body.get("temperature", 0.0)))

    def _written(self, ids: list[int], most: int, temperature: float) -> tuple[list[int], list[Tensor]]:
        """Tokens, with that which ends them, and the log-probabilities of the vocabulary in the place of each.

        Not by transformers' own ``generate``, which puts penalties and the like of a checkpoint's generation_config between the
        cache and the text.
        """
        import torch

        cache, tokens, rows, new = self.new_cache(), list[int](), list[Any](), ids
        with torch.inference_mode():
            while len(tokens) < most and not (tokens and tokens[-1] in self.model.stop_tokens):
                inputs = torch.tensor([new], device=self.model.device)
                found = self.model.hf_model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
                rows.append(found.logits[0, -1].float().log_softmax(-1))
                chances = (rows[-1] / temperature).softmax(-1) if temperature else rows[-1]
                new = [int(chances.multinomial(1) if temperature else chances.argmax())]
                tokens += new
        return tokens, rows

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """A plain completion: goes on from its prompt, or with ``echo`` reads it and writes nothing."""
        import torch

        ids = self.model.tokens(body["prompt"])
        if not body.get("echo"):
            return self._went_on(ids, body)
        if len(ids) > self.context:
            raise ValueError(f"the prompt has {len(ids)} tokens, and the context is {self.context}")
        with torch.inference_mode():
            logits = self.model.hf_model(
                torch.tensor([ids], device=self.model.device), past_key_values=self.new_cache(), use_cache=True
            ).logits[0, :-1]
        rows = [row.float().log_softmax(-1) for row in logits]
        read = {
            "tokens": [self._word(token) for token in ids],
            "token_logprobs": [None, *(float(row[token]) for row, token in zip(rows, ids[1:], strict=True))],
            "top_logprobs": [None, *(self._by_word(row, int(body.get("logprobs") or 1)) for row in rows)],
        }
        return {
            "object": "text_completion",
            "model": self.name,
            "choices": [{"text": body["prompt"], "logprobs": read}],
        }

    def _went_on(self, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        tokens, rows = self._answered(ids, body)
        ended, top = tokens[-1] in self.model.stop_tokens, int(body.get("logprobs") or 0)
        written = {
            "tokens": [self._word(token) for token in tokens],
            "token_logprobs": [float(row[token]) for row, token in zip(rows, tokens, strict=True)],
            "top_logprobs": [self._by_word(row, top) for row in rows],
        }
        choice = {
            **{"index": 0, "text": self.model.decode(tokens[:-1] if ended else tokens)},
            **{"finish_reason": "stop" if ended else "length", "logprobs": written if top else None},
        }
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(tokens)}
        return {"object": "text_completion", "model": self.name, "choices": [choice], "usage": usage}

    def _word(self, token: int) -> str:
        return str(self.model.tokenizer.decode([token]))

    def _top(self, row: Tensor, count: int) -> list[dict[str, Any]]:
        best = row.topk(min(count, len(row)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"token": self._word(token), "logprob": value} for token, value in pairs]

    def _by_word(self, row: Tensor, count: int) -> dict[str, float]:
        """As plain completions have it; of tokens that read alike the likeliest."""
        return {each["token"]: each["logprob"] for each in reversed(self._top(row, count))}


def handler(server: PackedServer) -> type[BaseHTTPRequestHandler]:
    """What answers HTTP for a model, one request after the other."""
    one_at_a_time = Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one packet, or each answer waits 40 ms for an acknowledgement

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self.reply(200, {"object": "list", "data": [{"id": server.name, "object": "model"}]})
            else:
                self.reply(404, {"error": {"message": f"there is no {self.path}"}})

        def do_POST(self) -> None:
            answers = {"/v1/chat/completions": server.chat, "/v1/completions": server.completion}
            try:
                length = int(self.headers.get("Content-Length", ""))
                body = json.loads(self.rfile.read(min(length, _LARGEST)))
                answer = answers[self.path]
                with one_at_a_time:
                    found = answer(body)
                self.reply(200, found)
            except KeyError as error:
                self.reply(404 if self.path not in answers else 400, {"error": {"message": f"missing {error}"}})
            except (ValueError, TypeError, AttributeError) as error:
                self.reply(400, {"error": {"message": str(error)}})
            except RuntimeError as error:  # what torch raises, out of memory among it
                self.reply(500, {"error": {"message": str(error)}})

        def reply(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            print(time.strftime("%H:%M:%S"), arguments[0] % arguments[1:], flush=True)

    return Handler


def listening(server: PackedServer, port: int = 0) -> ThreadingHTTPServer:
    """The HTTP server of a model on the loopback interface; a thread a connection, as a gate keeps several open."""
    return ThreadingHTTPServer(("127.0.0.1", port), handler(server))


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the model and answer until the process ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("model", "name", "cache"):
        parser.add_argument(f"--{option}", required=True)
    for number in ("port", "context", "threads"):
        parser.add_argument(f"--{number}", type=int, required=True)
    given = parser.parse_args(arguments)
    import torch

    import kvgeom
    from kvgeom.engines.transformers import STATED

    torch.set_num_threads(given.threads)
    cache = cache_config(given.cache)
    model = cast("HFModel", kvgeom.load(given.model, progress=False))
    server = PackedServer(model, given.name, cache, min(given.context, model.max_context))
    if cache is not None:  # what this model's cache cannot store is known before anybody asks
        server.new_cache()
    print(f"{STATED}{given.cache}", flush=True)
    listening(server, given.port).serve_forever()


if __name__ == "__main__":
    main()
