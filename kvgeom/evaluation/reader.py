"""Where in a response the answer begins, and when a response needs no more tokens."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from kvgeom.errors import KvgeomWarning
from kvgeom.judges.judge import Judge, Judgement, judgement, reading, settles, unended
from kvgeom.judges.reasoning import Markers, begun_by, may_begin, opened_by, shown, split
from kvgeom.models.model import EncodedPrompt, Model

#: No marker has so many tokens, even where each is one character.
MARKER_TOKENS = 48


@dataclass(frozen=True)
class Reader:
    """Reads responses of a model: reasoning, where there is any, and the answer, which alone a judge is shown.

    Attributes
    ----------
    model : Model
    judge : Judge
    max_new_tokens : int
        Longest answer.
    max_reasoning_tokens : int
        Longest reasoning, its markers included.
    """

    model: Model
    judge: Judge
    max_new_tokens: int
    max_reasoning_tokens: int

    @cached_property
    def opened(self) -> Markers | None:
        """What the chat template opens in every prompt."""
        return opened_by(getattr(self.model, "prompt_end", ""))

    @property
    def expects_reasoning(self) -> bool:
        """Whether the template opens reasoning, or could be told that there shall be none."""
        return self.opened is not None or getattr(self.model, "reasoning_switch", None) is not None

    def warn(self, begun: Markers | None = None) -> None:
        """Say that responses begin with reasoning, if the template asks for it or they have ``begun`` with markers."""
        name, switch = self.model.name, getattr(self.model, "reasoning_switch", None)
        if self.opened is not None:
            found = f"the chat template of {name} opens reasoning ({self.opened.open})"
        elif switch is not None:
            found = f"the chat template of {name} knows {switch}, and its responses may begin with reasoning (<think>)"
        elif begun is not None:
            found = f"responses of {name} begin with reasoning ({begun.open})"
        else:
            return
        off = f"; load(template_options={{{switch!r}: False}}) or --template-options switches it off" if switch else ""
        warnings.warn(
            f"{found}: it may take {self.max_reasoning_tokens} tokens (max_reasoning_tokens), only the answer after it is judged, "
            f"and refusal margins are not measured{off}",
            KvgeomWarning,
            stacklevel=2,
        )

    def budget(self, prompt: EncodedPrompt) -> int:
        """Longest reasoning after a prompt: what the model's context leaves, less the longest answer."""
        return min(self.max_reasoning_tokens, max(0, self.model.max_context - len(prompt) - self.max_new_tokens))

    def longest(self, prompt: EncodedPrompt) -> int:
        """Most tokens of a response to a prompt, if it reasons."""
        return self.budget(prompt) + self.max_new_tokens

    def written(self, tokens: Sequence[int]) -> str:
        """Text of tokens with the special ones among them, if the model shows them."""
        write: Callable[[Sequence[int]], str] = getattr(self.model, "written", self.model.decode)
        return write(tokens)

    def markers(self, tokens: Sequence[int]) -> Markers | None:
        """The markers of a response's reasoning; None if it has none."""
        return self.opened or begun_by(self.written(tokens[:MARKER_TOKENS]))

    def begin(self, tokens: Sequence[int]) -> int | None:
        """The token with which the answer begins: 0 without reasoning, None if that has not ended."""
        markers = self.markers(tokens)
        if markers is None:
            return 0
        end = markers.first_end(self.written(tokens))
        if end is None:
            return None
        return bisect_left(range(len(tokens)), end, key=lambda count: len(self.written(tokens[:count])))

    def text(self, tokens: Sequence[int]) -> str:
        """A response as results show it: reasoning stands in one kind of markers, whatever those of the model are."""
        begin = self.begin(tokens)
        if begin == 0:
            return self.model.decode(tokens)
        reasoning = split(self.written(tokens[:begin]), self.opened or False).reasoning or ""
        answer = None if begin is None else self.model.decode(tokens[begin:])
        return shown(reasoning.replace("\0", "\ufffd"), answer)

    def watch(self, prompts: Sequence[EncodedPrompt], *, to_end: bool = False) -> Watch:
        """Says of growing responses to prompts, by their number, when they need no more tokens.

        With ``to_end`` answers are not cut where the judge reads no further.
        """
        return Watch(self, prompts, to_end)

    def finished(self, prompt: EncodedPrompt, tokens: Sequence[int]) -> bool:
        """Whether a response to a prompt needs no more tokens."""
        return self.watch([prompt])(0, tokens)

    def judged(
        self, prompt: EncodedPrompt, tokens: Sequence[int], likelihood: Callable[[Sequence[int], int], float]
    ) -> Judgement:
        """What the judge says of a response: of its answer, as far as it reads that.

        Parameters
        ----------
        prompt : EncodedPrompt
        tokens : sequence of int
        likelihood : callable (tokens, begin) -> float
            Mean log-probability (nats per token) of the tokens from ``begin`` on.
        """
        begin = self.begin(tokens)
        if begin is None:
            return unended(len(tokens))
        read = tokens[: begin + reading(self.judge, self.model.decode, tokens[begin:])]
        return judgement(self.judge, prompt.text, self.text(read), lambda: likelihood(read, begin))


class Watch:
    """Made by :meth:`Reader.watch`. It remembers where the answers begin, so that little is decoded at every token."""

    def __init__(self, reader: Reader, prompts: Sequence[EncodedPrompt], to_end: bool) -> None:
        self._reader, self._prompts, self._to_end = reader, prompts, to_end
        self._begins: dict[int, int] = {}
        self._reasoning: dict[int, Markers] = {}

    def __call__(self, row: int, tokens: Sequence[int]) -> bool:
        """Whether the response to prompt ``row`` ends here."""
        reader, prompt = self._reader, self._prompts[row]
        if len(tokens) >= reader.longest(prompt):
            return True
        begin = self._begins.get(row)
        if begin is None:
            marker = self._reasoning.get(row)
            if marker is not None and marker.first_end(reader.written(tokens[-MARKER_TOKENS:])) is None:
                return len(tokens) >= reader.budget(prompt)
            if marker is None and self._undecided(tokens):
                return False
            begin = reader.begin(tokens)
            if begin is None:
                self._reasoning[row] = reader.markers(tokens) or self._reasoning[row]
                return len(tokens) >= reader.budget(prompt)
            if begin or reader.written(tokens).strip():  # blanks may still be followed by a marker
                self._begins[row] = begin
        answer = tokens[begin:]
        if len(answer) >= reader.max_new_tokens:
            return True
        return not self._to_end and bool(answer) and settles(reader.judge, reader.model.decode(answer))

    def _undecided(self, tokens: Sequence[int]) -> bool:
        """Whether the first tokens may still become a marker."""
        reader = self._reader
        return (
            reader.opened is None
            and len(tokens) < MARKER_TOKENS
            and reader.markers(tokens) is None
            and may_begin(reader.written(tokens))
        )
