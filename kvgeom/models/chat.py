"""From a request to tokens: a model's chat template, and where in it the request lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvgeom.errors import InputError, ModelError
from kvgeom.models.model import EncodedPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REQUEST_MARK = "\u2063kvgeom-request\u2063"


class ChatTemplate:
    """A chat template with its tokenizer.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        A fast tokenizer.
    text : str or None
        Jinja text of the template; the tokenizer's own by default.
    name : str
        Of the model, for messages.
    max_context : int
        Tokens that the model can read.

    Attributes
    ----------
    text : str
        Jinja text of the template.

    Raises
    ------
    InputError
        If the tokenizer is something else.
    ModelError
        If there is no template, it fails, or it does not show a request exactly once; or if the tokenizer is slow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | None, name: str, max_context: int) -> None:
        if not hasattr(tokenizer, "apply_chat_template"):
            raise InputError(
                f"the tokenizer of {name} must be one of transformers, got {tokenizer!r}; load it with "
                "AutoTokenizer.from_pretrained"
            )
        own: Any = text or tokenizer.chat_template
        if not own:
            raise ModelError(
                f"the tokenizer of {name} has no chat template; give one with load(template=...) or --template FILE"
            )
        if not tokenizer.is_fast:
            raise ModelError(f"the tokenizer of {name} is a slow one; kvgeom needs a fast tokenizer")
        self.text = str(own)
        self._tokenizer, self._name, self._max_context = tokenizer, name, max_context
        self._prefix, self._suffix = self._render(_REQUEST_MARK).split(_REQUEST_MARK)

    def encode(self, requests: Sequence[str]) -> list[EncodedPrompt]:
        """Put each request into the template and find its tokens; see :meth:`kvgeom.models.model.Model.encode`."""
        return [self._encode(request.strip()) for request in requests]

    def _encode(self, request: str) -> EncodedPrompt:
        if not request:
            raise InputError("a request is empty; every prompt needs some text")
        encoding = self._tokenizer(
            self._prefix + request + self._suffix, add_special_tokens=False, return_offsets_mapping=True
        )
        ids: Any = encoding["input_ids"]
        if len(ids) >= self._max_context:
            raise InputError(
                f"prompt {request[:40]!r}... has {len(ids)} tokens, but {self._name} has a context of "
                f"{self._max_context}; shorten or drop it"
            )
        start, stop = len(self._prefix), len(self._prefix) + len(request)
        offsets: Any = encoding["offset_mapping"]
        inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and b > a]
        return EncodedPrompt(text=request, ids=tuple(ids), instruction=slice(inside[0], inside[-1] + 1))

    def _render(self, request: str) -> str:
        try:
            rendered = str(
                self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": request}],
                    chat_template=self.text,
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
        except Exception as error:  # a template is a program of the user's; whatever it raises is bad input
            raise ModelError(f"the chat template of {self._name} fails on a plain request: {error}") from error
        if rendered.count(request) != 1:
            raise ModelError(
                f"the chat template of {self._name} shows a request {rendered.count(request)} times; it must show it once"
            )
        return rendered
