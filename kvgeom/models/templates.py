"""Which chat template a model is given: of a file, of the tokenizer, with which options, and after which conversation."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvgeom.checks import as_path, as_text
from kvgeom.errors import InputError, ModelError, brief, reason
from kvgeom.paths import read_text

#: What transformers uses of several templates.
_DEFAULT = "default"
#: The first line of a template that puts a conversation before each request.
_BEFORE, _AFTER = "{%- set messages = ", " + messages -%}\n"

#: As transformers sets it up, but for what hangs on the day.
_JINJA = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
#: A message of a chat, with ``role`` and ``content``.
Message = dict[str, str]


def read_template(template: Any) -> str | None:
    """The text of a chat template that is given as text or as a file.

    Raises
    ------
    InputError
        If there is no such file, or it holds no text.
    """
    if template is None:
        return None
    if isinstance(template, str) and "{" in template:
        return as_text("template", template)
    path = as_path("template", template)
    if template == "" or not os.path.exists(path):
        raise InputError(
            f"no such file for the template: {brief(template)}; give a file with a Jinja chat template, or its text"
        )
    return as_text(f"the template in {path}", read_text(path))


def checked_options(options: Any) -> dict[str, Any] | None:
    """Options of a chat template, None if there are none. Results write them down as JSON.

    Raises
    ------
    InputError
        If they are no mapping of what JSON knows.
    """
    try:
        text = json.dumps(options and dict(options), allow_nan=False)
        written = isinstance(options, Mapping | None) and json.loads(text) == options
    except (TypeError, ValueError, RecursionError):
        written = False
    if not written:
        raise InputError(
            f"template_options must be a mapping such as {{'enable_thinking': False}}, with values that JSON "
            f"knows, got {brief(options)}"
        )
    return dict(options) if options else None


def chosen_template(tokenizer: Any, given: str | None, name: str) -> tuple[str, tuple[str, ...]]:
    """The text of the chat template of a model, and the names of all that its tokenizer has if there are several.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    given : str or None
        Text of one that is to be used instead of the tokenizer's.
    name : str
        Of the model, for messages.

    Raises
    ------
    InputError
        If there are several and none is called default, as transformers wants it; or one is no text.
    ModelError
        If there is none.
    """
    if given is not None:
        return as_text("template", given), ()
    own = tokenizer.chat_template
    if isinstance(own, list) and all(isinstance(each, Mapping) for each in own):
        own = {str(each.get("name")): each.get("template") for each in own}
    several = tuple(map(str, own)) if isinstance(own, Mapping) else ()
    if isinstance(own, Mapping) and own:
        if _DEFAULT not in own:
            raise InputError(
                f"the tokenizer of {name} has several chat templates ({', '.join(several)}), and none is called {_DEFAULT}; choose "
                f"one: load(template=tokenizer.chat_template[{several[0]!r}]), or --template FILE"
            )
        own = own[_DEFAULT]
    if not own:
        raise ModelError(
            f"the tokenizer of {name} has no chat template; give one with load(template=...) or --template FILE"
        )
    return as_text(f"the chat template of {name}", own), several if len(several) > 1 else ()


def checked_conversation(conversation: Any) -> list[Message] | None:
    """Messages that stand before each request, None if there are none; a text is a system prompt.

    Raises
    ------
    InputError
        If they are something else, or one says nothing.
    """
    if conversation is None:
        return None
    if isinstance(conversation, str):
        return [{"role": "system", "content": as_text("conversation", conversation)}]
    if not isinstance(conversation, Sequence) or not conversation:
        raise InputError(
            "conversation must be a system prompt as text, or messages such as {'role': 'user', 'content': 'Hello'}, got "
            f"{brief(conversation)}"
        )
    for message in conversation:
        if not isinstance(message, Mapping) or {*message} != {"role", "content"}:
            raise InputError(f"a message of the conversation must have role and content, got {brief(message)}")
        for part in ("role", "content"):
            as_text(f"{part} of a message of the conversation", message[part])
    return [dict(message) for message in conversation]


def in_conversation(
    text: str, conversation: Sequence[Message], tokenizer: Any, name: str, options: Mapping[str, Any] | None = None
) -> str:
    """A chat template that shows messages before the ones that it is given, and after those that it shows already.

    Raises
    ------
    ModelError
        If the template refuses them, as some do a system prompt, or leaves one out.
    """
    earlier = conversation_of(text)
    if earlier:
        text, conversation = text.partition(_AFTER)[2], [*earlier, *conversation]
    made = f"{_BEFORE}{json.dumps(conversation, ensure_ascii=False)}{_AFTER}{text}"
    asked: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, **(options or {})}
    try:
        whole = str(tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], chat_template=made, **asked))
    except Exception as error:  # a template is a program of the user's
        roles = ", ".join(dict.fromkeys(message["role"] for message in conversation))
        raise ModelError(
            f"the chat template of {name} refuses the conversation before a request (roles {roles}): {error}; give another, or "
            "leave it out"
        ) from error
    if (hidden := _hidden(conversation, whole)) is not None:
        raise ModelError(
            f"the chat template of {name} leaves out {brief(hidden['content'])} of the conversation (role {hidden['role']}), or "
            "alters it; give another template, or leave it out"
        )
    return made


def _hidden(messages: Sequence[Message], shown: str) -> Message | None:
    """The first of some messages that a rendered chat does not show."""
    return next((message for message in messages if message["content"].strip() not in shown), None)


def rendered(template: str, messages: Sequence[Message]) -> str:
    """A chat as a template shows it, with the beginning of an answer; without a tokenizer, special tokens by name are empty.

    Raises
    ------
    InputError
        If the template is no Jinja, or fails on these messages.
    """
    try:
        made = _JINJA.from_string(template).render(
            messages=messages, add_generation_prompt=True, bos_token="", eos_token="", raise_exception=_raised
        )
    except Exception as error:  # a template is a program of the user's
        raise InputError(f"the template fails on a chat: {reason(error)}; give another") from error
    if (hidden := _hidden(messages, made)) is not None:
        raise InputError(f"the template leaves out {brief(hidden['content'])}, or alters it; give another")
    return str(made)


def _raised(text: str) -> None:
    raise ValueError(text)


def conversation_of(template: str | None) -> list[Message]:
    """The messages that a template of :func:`in_conversation` shows before each request; none of any other."""
    if template is None or not template.startswith(_BEFORE):
        return []
    line = template.partition(_AFTER)[0].removeprefix(_BEFORE)
    try:
        found: list[Message] = json.loads(line)
    except ValueError:  # a template that begins so by itself
        return []
    return found
