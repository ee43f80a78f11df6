"""From a request to tokens: a model's chat template, and where in it the request lies."""

from __future__ import annotations

import json
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvgeom.errors import InputError, KvgeomWarning, ModelError, brief
from kvgeom.models.model import EncodedPrompt
from kvgeom.models.templates import chosen_template
from kvgeom.models.tokenization import tokenized
from kvgeom.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Context of a model that names none.
ANY_LENGTH = 2**31
#: Stands for a request, and is left as it is by templates that escape what they show.
_REQUEST_MARK = "kvgeomRequest7c41b0"
#: A request with all that templates are known to escape or to tidy inside a text, and longer than what some leave of one.
_PROBE = "a \"b\" <c> & 'd'\n\n  \u00e9 \\e  f G" + " and so on" * 400
#: Options with which templates are told whether the model shall reason.
SWITCHES = ("enable_thinking", "thinking")
#: What transformers hands to every template.
_ALWAYS = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("raise_exception", "strftime_now"),
        *(f"{token}_token" for token in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")),
    }
)
_ALTERS = "the chat template alters what a request says (it escapes or tidies it); prompts are as it writes them"
_PASSES = (
    "the chat template writes the date or the time, or something random: prompts of another day are others; a template with a fixed "
    "date (--template) keeps them"
)
#: What makes a template write something else each time.
_OF_THE_DAY = re.compile(r"\bstrftime_now\b|\|\s*random\b")
_JINJA = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
#: A tag that transformers adds to Jinja.
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


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
    options : mapping, optional
        Variables that are handed to the template, such as ``{"enable_thinking": False}``.

    Attributes
    ----------
    text : str
        Jinja text of the template.
    options : dict
    notes : tuple of str
        What of the template changes answers.

    Raises
    ------
    InputError
        If the tokenizer is something else, has several templates and no default, or the template is empty or does not use an
        option.
    ModelError
        If there is no template, it fails, or it does not show a request exactly once; or if the tokenizer is slow.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str | None,
        name: str,
        max_context: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if not hasattr(tokenizer, "apply_chat_template"):
            raise InputError(
                f"the tokenizer of {name} must be one of transformers, got {brief(tokenizer)}; load it with "
                "AutoTokenizer.from_pretrained"
            )
        self.text, several = chosen_template(tokenizer, text, name)
        if not tokenizer.is_fast:
            raise ModelError(f"the tokenizer of {name} is a slow one; kvgeom needs a fast tokenizer")
        self.options = dict(options or {})
        self._tokenizer, self._name, self._max_context = tokenizer, name, max_context
        _check_options(self.options, self.text, name)
        self._prefix, self._suffix = self._render(_REQUEST_MARK, self.options).split(_REQUEST_MARK)
        # Found now: what keeps a lock to find it later (cached_property of Python 3.11) cannot be sent with a model.
        #: The option that would switch off reasoning, which the template now asks for or leaves to the model.
        self.reasoning_switch = self._switch()
        self.notes = (
            *_several(several),
            *_without_dropout(tokenizer),
            *([_ALTERS] if self._alters_requests() else []),
            *([_PASSES] if _OF_THE_DAY.search(self.text) else []),
        )

    @property
    def suffix(self) -> str:
        """What a prompt has after the request."""
        return self._suffix

    @property
    def signature(self) -> str:
        """What tells templates apart: text and options, and what it writes if that is another text each day."""
        own = signature(self.text, self.options)
        return f"{own}\n{self._prefix}\n{self._suffix}" if _OF_THE_DAY.search(self.text) else own

    def _switch(self) -> str | None:
        whole, known = self._prefix + _REQUEST_MARK + self._suffix, template_variables(self.text)
        off = {name: {**self.options, name: False} for name in SWITCHES if name in known}
        return next((name for name in off if self._render(_REQUEST_MARK, off[name]) != whole), None)

    def _alters_requests(self) -> bool:
        try:
            return _PROBE not in self._apply(_PROBE, self.options)
        except ModelError:
            return True

    def _shown(self, request: str) -> str:
        """A request as the template shows it: what it does to one may depend on its words or its length."""
        whole = self._apply(request, self.options)
        around = len(self._prefix) + len(self._suffix)
        if len(whole) <= around or not (whole.startswith(self._prefix) and whole.endswith(self._suffix)):
            todo = "load the model again if another day has begun" if _OF_THE_DAY.search(self.text) else "drop it"
            raise InputError(
                f"the chat template of {self._name} does not show prompt {brief(request)} between the same texts as others; {todo}"
            )
        return whole[len(self._prefix) : len(whole) - len(self._suffix)]

    def encode(self, requests: Sequence[str]) -> list[EncodedPrompt]:
        """Put each request into the template and find its tokens; see :meth:`kvgeom.models.model.Model.encode`."""
        found = [self.prompt(request.strip()) for request in requests]
        self._check_whole(found)
        return found

    def _check_whole(self, prompts: Sequence[EncodedPrompt]) -> None:
        """Say which requests the model reads less of than was asked, by the template's doing or the tokenizer's.

        Raises
        ------
        InputError
            If two different requests are read as the same.
        """
        lost = {prompt.text: missing for prompt in prompts if (missing := self._missing(prompt))}
        if not lost:
            return
        first: dict[tuple[int, ...], str] = {}
        for prompt in prompts:
            if first.setdefault(prompt.ids, prompt.text) != prompt.text:
                raise InputError(
                    f"{self._name} reads prompts {brief(first[prompt.ids])} and {brief(prompt.text)} as the same: its chat template or "
                    "tokenizer leaves out what is different; give a template that shows requests whole (--template), or drop one"
                )
        request, missing = next(iter(lost.items()))
        warnings.warn(
            f"{self._name} reads {counted(len(lost), 'request')} of {len(prompts)} otherwise than asked: its chat template or tokenizer "
            f"leaves out {brief(missing)} of {brief(request)}",
            KvgeomWarning,
            stacklevel=4,
        )

    def _missing(self, prompt: EncodedPrompt) -> str:
        """Letters, digits and symbols of a request that are not in the text of its tokens."""
        read = self._tokenizer.decode(
            list(prompt.ids[prompt.instruction]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        left = Counter(_letters(str(read)))
        missing = []
        for letter in _letters(prompt.text):
            if left[letter]:
                left[letter] -= 1
            else:
                missing.append(letter)
        return "".join(missing)

    def prompt(self, request: str) -> EncodedPrompt:
        """One request in the template, and its tokens; whether the model reads all of it is not looked at."""
        if not request:
            raise InputError("a request is empty; every prompt needs some text")
        shown = self._shown(request)
        encoding = tokenized(
            self._tokenizer, self._prefix + shown + self._suffix, self._name, return_offsets_mapping=True
        )
        ids: Any = encoding["input_ids"]
        if len(ids) >= self._max_context:
            raise InputError(
                f"prompt {request[:40]!r}... has {len(ids)} tokens, but {self._name} has a context of "
                f"{self._max_context}; shorten or drop it"
            )
        start, stop = len(self._prefix), len(self._prefix) + len(shown)
        offsets: Any = encoding["offset_mapping"]
        inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and b > a]
        if not inside:
            raise InputError(f"the tokenizer of {self._name} makes no token of prompt {brief(request)}; drop it")
        return EncodedPrompt(text=request, ids=tuple(ids), instruction=slice(inside[0], inside[-1] + 1))

    def _apply(self, request: str, options: Mapping[str, Any]) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": request}],
                    chat_template=self.text,
                    tokenize=False,
                    add_generation_prompt=True,
                    **options,
                )
            )
        except Exception as error:  # a template is a program of the user's; whatever it raises is bad input
            raise ModelError(f"the chat template of {self._name} fails on a plain request: {error}") from error

    def _render(self, request: str, options: Mapping[str, Any]) -> str:
        rendered = self._apply(request, options)
        if rendered.count(request) != 1:
            raise ModelError(
                f"the chat template of {self._name} shows a request {rendered.count(request)} times; it must show it once"
            )
        return rendered


def _without_dropout(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Switch off that a tokenizer leaves out merges at random, as one does that was stored for training."""
    rules = tokenizer.backend_tokenizer.model
    if not getattr(rules, "dropout", None):
        return []
    rules.dropout = None
    return ["the tokenizer cuts words at random (dropout, meant for training); that is switched off"]


def _letters(text: str) -> str:
    """Letters, digits and symbols, without what normalizers of tokenizers change: case, accents, compatible forms."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    return "".join(character for character in plain if unicodedata.category(character)[0] in "LNS")


def _several(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    others = ", ".join(name for name in names if name != "default")
    return [f"the tokenizer has several chat templates; the one called default is used, not {others}"]


def signature(text: str, options: Mapping[str, Any]) -> str:
    """Text and options of a template as one text, which without options is the template's."""
    return text + ("\n" + json.dumps(dict(options), sort_keys=True, default=str) if options else "")


def template_variables(text: str) -> frozenset[str]:
    """Variables that a chat template reads and does not set before, without those that every template is given.

    Empty for one that Jinja cannot read.
    """
    try:
        found = meta.find_undeclared_variables(_JINJA.parse(_GENERATION.sub("", text)))
    except TemplateSyntaxError:
        return frozenset()
    return frozenset(found) - _ALWAYS - _JINJA.globals.keys()


def _check_options(options: Mapping[str, Any], text: str, name: str) -> None:
    known = sorted(template_variables(text))
    for option in options:
        if option not in known:
            uses = f"it uses {', '.join(known)}" if known else "it uses none"
            raise InputError(f"the chat template of {name} does not use the template option {option!r}; {uses}")
