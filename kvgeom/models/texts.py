"""What a backend of a transformers model does with text: chat template, tokens, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvgeom.errors import brief
from kvgeom.models.chat import ChatTemplate
from kvgeom.models.model import EncodedPrompt
from kvgeom.models.sanity import check_tokens
from kvgeom.models.tokenization import tokenized


class Texts:
    """Part of a backend that runs a transformers model: requests as tokens, and tokens as text.

    Attributes
    ----------
    template : str
        Jinja text of the chat template.
    template_options : dict
        What it is told.
    notes : tuple of str
        What of template, model and tokenizer changes answers.
    """

    name: str
    tokenizer: Any
    max_context: int
    template: str
    template_options: dict[str, Any]
    _chat: ChatTemplate
    #: Rows of the embedding.
    _rows: int
    #: What of the model changes answers, whatever its template.
    _own_notes: tuple[str, ...] = ()

    def take_template(self, template: str | None, options: Mapping[str, Any] | None) -> None:
        """Show requests in a chat template; None is the tokenizer's own."""
        self._chat = ChatTemplate(self.tokenizer, template, self.name, self.max_context, options)
        self.template, self.template_options = self._chat.text, self._chat.options
        self._suffix = self._chat.suffix
        self.notes = (*self._chat.notes, *self._own_notes)

    def encode(self, requests: Sequence[str]) -> list[EncodedPrompt]:
        prompts = self._chat.encode(requests)
        for prompt in prompts:
            self._check(prompt.ids, f"prompt {brief(prompt.text)}")
        return prompts

    def tokens(self, text: str) -> list[int]:
        ids = list(tokenized(self.tokenizer, text, self.name)["input_ids"])
        self._check(ids, f"text {brief(text)}")
        return ids

    def _check(self, ids: Sequence[int], where: str) -> None:
        check_tokens(ids, self._rows, self.tokenizer, self.name, where)

    def written(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @property
    def prompt_end(self) -> str:
        return self._suffix

    @property
    def reasoning_switch(self) -> str | None:
        return self._chat.reasoning_switch

    def decode(self, ids: Sequence[int]) -> str:
        # Many files cannot hold a NUL.
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        return text.replace("\0", "\ufffd").strip()
