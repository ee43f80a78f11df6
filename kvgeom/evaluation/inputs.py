"""Models and prompts as users have them, turned into what the measures work on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvgeom.checks import whole_numbers
from kvgeom.evaluation.baseline import versions
from kvgeom.models.load import load
from kvgeom.models.model import EncodedPrompt, Model
from kvgeom.models.templates import conversation_of
from kvgeom.prompts.load import as_requests
from kvgeom.prompts.sets import fingerprint


def as_encoded(model: Model, prompts: Any) -> tuple[EncodedPrompt, ...]:
    """Prompts as tokens of a model.

    Parameters
    ----------
    model : Model
    prompts : sequence of EncodedPrompt, or anything that :func:`kvgeom.prompts.load.as_requests` takes
        What is encoded already is returned as it is.

    Raises
    ------
    InputError
        If it is neither, or a request is empty or too long for the model.
    """
    if isinstance(prompts, Sequence) and prompts and all(isinstance(prompt, EncodedPrompt) for prompt in prompts):
        return tuple(prompts)
    return tuple(model.encode(as_requests(prompts)))


def as_tokens(model: Model, tokens: Any) -> frozenset[int]:
    """Tokens of a model by number, or one.

    Raises
    ------
    InputError
        If one is no whole number, or not in the model's vocabulary.
    """
    return frozenset(whole_numbers("a refusal token", tokens, 0, model.vocabulary - 1))


def made_with(model: Model, harmful: Iterable[str], harmless: Iterable[str] = ()) -> dict[str, Any]:
    """What ``meta`` of a result says of its model and of the requests that were asked.

    See :meth:`kvgeom.results.Result.provenance`.
    """
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "weights": model.weights,
        **({"template_options": dict(options)} if (options := getattr(model, "template_options", None)) else {}),
        **({"conversation": said} if (said := conversation_of(getattr(model, "template", None))) else {}),
        **({"notes": list(notes)} if (notes := getattr(model, "notes", ())) else {}),
        "prompt_set": fingerprint(harmful, harmless),
        "versions": versions(),
    }


def opened(
    model: Any, prompts: Any, options: Mapping[str, Any], progress: bool = True
) -> tuple[Model, tuple[EncodedPrompt, ...]]:
    """A model that :func:`kvgeom.load` takes, loaded with its options, and prompts as its tokens."""
    loaded = load(model, progress=progress, **options)
    return loaded, as_encoded(loaded, prompts)
