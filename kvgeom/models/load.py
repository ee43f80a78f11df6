"""One door to a model: a hub id, a folder, a GGUF file, the demo, or an object that is already loaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # of the standard library from Python 3.12 on, for pydantic

from kvgeom.checks import as_name, as_path, flag, one_of
from kvgeom.errors import InputError, KvgeomWarning, brief, unknown_option
from kvgeom.models.backends import Backend, backends
from kvgeom.models.demo import DEMOS, demo_model_dir
from kvgeom.models.device import device_and_dtype
from kvgeom.models.files import check_folder, names_of_weights
from kvgeom.models.hub import check_hub
from kvgeom.models.model import missing_members
from kvgeom.models.pretrained import read_pretrained
from kvgeom.models.templates import (
    checked_conversation,
    checked_options,
    chosen_template,
    in_conversation,
    read_template,
)
from kvgeom.models.weights import remember_stored
from kvgeom.progress import shown

if TYPE_CHECKING:
    import torch

    from kvgeom.models.model import Model


class PretrainedOptions(TypedDict, total=False):
    """Options of :func:`load` that go to ``from_pretrained`` of transformers, where they are described."""

    attn_implementation: str
    cache_dir: str | Path
    device_map: Any
    experts_implementation: str
    force_download: bool
    local_files_only: bool
    low_cpu_mem_usage: bool
    max_memory: dict[int | str, int | str]
    offload_buffers: bool
    offload_folder: str | Path
    proxies: dict[str, str]
    quantization_config: Any
    subfolder: str
    token: str | bool
    tp_plan: Any
    use_kernels: bool
    variant: str


class LoadOptions(PretrainedOptions, total=False):
    """All keyword options of :func:`load` but ``progress``."""

    tokenizer: Any
    name: str | None
    backend: str | None
    remote: bool | Literal["local"]
    template: str | Path | None
    template_options: Mapping[str, Any] | None
    conversation: str | Sequence[Mapping[str, str]] | None
    dtype: torch.dtype | str | None
    device: str | None
    revision: str | None
    trust_remote_code: bool


def load_option_names() -> frozenset[str]:
    """Names of the keyword options of :func:`load`, without ``progress``."""
    return frozenset(LoadOptions.__annotations__)


def load(
    model: Any,
    *,
    tokenizer: Any = None,
    name: str | None = None,
    backend: str | None = None,
    remote: bool | Literal["local"] = False,
    template: str | Path | None = None,
    template_options: Mapping[str, Any] | None = None,
    conversation: str | Sequence[Mapping[str, str]] | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
    **options: Unpack[PretrainedOptions],
) -> Model:
    """Load a language model.

    Parameters
    ----------
    model : str, Path, PreTrainedModel or Model
        One of:

        - ``"demo"`` or ``"demo-no-refusal"``;
        - a folder with a transformers checkpoint, or a ``.gguf`` file;
        - a hub id such as ``"Qwen/Qwen2.5-7B-Instruct"``;
        - a loaded model: of transformers (with ``tokenizer``), a ``TransformerBridge`` of TransformerLens, an nnsight
          model, or one of another backend (:func:`~kvgeom.models.backends.register_backend`);
        - any object with the members of :class:`~kvgeom.models.model.Model`, which is returned as it is.
    tokenizer : PreTrainedTokenizerBase, optional
        Needed with a transformers model. A bridge and an nnsight model have their own.
    name : str, optional
        What results and reports call the model. By default its hub id, or the name of its file or folder.
    backend : str, optional
        What runs the model: ``"hf"`` (plain transformers), ``"lens"`` (TransformerLens), ``"nnsight"``, or another that is
        registered. By default that of a loaded model, and plain transformers for a name or file. Note that
        TransformerLens replaces modules of the model that it wraps.
    remote : {False, True, "local"}
        Where an nnsight model runs; see :class:`~kvgeom.models.nnsight.NNsightModel`.
    template : str or Path, optional
        Chat template, as Jinja text or a file with it, for models without one of their own.
    template_options : mapping, optional
        Variables that the chat template reads, such as ``{"enable_thinking": False}``, which keeps Qwen3 and others from
        reasoning before they answer. They are part of the model's fingerprint.
    conversation : str or sequence of messages, optional
        What stands before each request: a system prompt, or messages with ``role`` and ``content``, for instance those that
        :func:`kvgeom.conversation` makes. It is part of the fingerprint too.
    dtype : torch.dtype or str, optional
        By default float32 on a CPU, where comparisons are exact, and the checkpoint's own on an accelerator.
    device : str, optional
        By default an accelerator if there is one, else the CPU.
    revision : str, optional
        Branch, tag or commit of a hub id.
    trust_remote_code : bool
        Run code that comes with the checkpoint.
    progress : bool
        Show bars while fetching and converting.
    **options
        More options of ``from_pretrained``: see :class:`PretrainedOptions`.

    Raises
    ------
    InputError
        If there is no model there, or not a whole one (a file is damaged, or weights are missing); if an option is unknown,
        does not apply to a loaded model, or is not one of its chat template's.
    ModelError
        If it loads but lacks what is needed, such as a chat template.
    """
    for option in options:
        if option not in PretrainedOptions.__annotations__:
            raise unknown_option(option, load_option_names())
    if backend is not None:
        one_of("backend", backend, backends())
    if name is not None:
        name = as_name("name", name)
    trust_remote_code, progress = flag("trust_remote_code", trust_remote_code), flag("progress", progress)
    given = {
        "dtype": dtype,
        "device": device,
        "revision": revision,
        "trust_remote_code": trust_remote_code or None,
        **options,
    }
    wrapping = {
        "tokenizer": tokenizer,
        "name": name,
        "template": read_template(template),
        "template_options": checked_options(template_options),
        "conversation": checked_conversation(conversation),
        "remote": remote or None,
    }
    with shown(progress):
        if not isinstance(model, str | Path):
            _refuse(given, model, "it is loaded already")
            return _told(_from_object(model, backend, wrapping), model)
        if tokenizer is not None:
            raise InputError("option 'tokenizer' goes with a loaded transformers model, not with the name of one")
        _check_types(options)
        device, dtype = device_and_dtype(device, dtype)
        source, own_name, stored = _locate(str(model), revision, options)
        shared = {"revision": revision, "trust_remote_code": trust_remote_code}
        hf_model, own_tokenizer = read_pretrained(
            source, own_name, device, dtype, shared, {**options}, converted=stored is not None
        )
        if stored is not None:
            remember_stored(hf_model, stored)
        wrapping |= {"tokenizer": own_tokenizer, "name": name or own_name}
        return _told(_make(backends()[backend or "hf"], hf_model, wrapping), model)


def _check_types(options: PretrainedOptions) -> None:
    """Refuse options of a wrong type; many of them are otherwise only read where they are needed."""
    try:
        TypeAdapter(PretrainedOptions).validate_python(options, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"option {str(first['loc'][0])!r} is {brief(first['input'])}: {first['msg'].lower()}"
        ) from error


def _told(made: Model, given: Any) -> Model:
    """Say once, when a model is made, what of it changes answers."""
    for note in () if made is given else getattr(made, "notes", ()):
        warnings.warn(f"{made.name}: {note}", KvgeomWarning, stacklevel=3)
    return made


def _refuse(options: dict[str, Any], model: object, why: str) -> None:
    """Refuse options that do nothing, rather than to ignore them."""
    found = next((option for option, value in options.items() if value is not None), None)
    if found is not None:
        raise InputError(f"option {found!r} does not apply to a {type(model).__name__}: {why}")


def _make(backend: Backend, model: Any, wrapping: dict[str, Any]) -> Model:
    remote = wrapping["remote"] or False
    if remote and not backend.remote:
        able = ", ".join(repr(found.name) for found in backends().values() if found.remote)
        raise InputError(f"remote={brief(remote)} needs backend {able}, got {backend.name!r}")
    options = wrapping["template_options"]
    if options and "template_options" not in signature(backend.make).parameters:
        raise InputError(f"backend {backend.name!r} takes no template_options; give a template that needs none")
    return backend.make(
        model,
        wrapping["tokenizer"],
        name=wrapping["name"],
        template=_template(model, wrapping),
        **({"remote": remote} if backend.remote else {}),
        **({"template_options": options} if options else {}),
    )


def _template(model: Any, wrapping: dict[str, Any]) -> str | None:
    """The template that is given, or the model's own, with the conversation before each request."""
    said, given = wrapping["conversation"], wrapping["template"]
    if said is None:
        return given  # type: ignore[no-any-return]
    tokenizer = wrapping["tokenizer"] or model.tokenizer
    name = wrapping["name"] or type(model).__name__
    return in_conversation(
        chosen_template(tokenizer, given, name)[0], said, tokenizer, name, wrapping["template_options"]
    )


def _from_object(model: Any, backend: str | None, wrapping: dict[str, Any]) -> Model:
    own = next((found for found in backends().values() if found.wraps(model)), None)
    if own is None:
        return _checked_model(model, backend, wrapping)
    if own.name != "hf" and backend not in (None, own.name):
        raise InputError(
            f"a {type(model).__name__} runs on backend {own.name!r}, not {backend!r}; load the model by its name for that"
        )
    if own.name == "hf" and wrapping["tokenizer"] is None:
        raise InputError(f"a {type(model).__name__} comes without its tokenizer; give load(model, tokenizer=...)")
    return _make(backends()[backend or own.name], model, wrapping)


def _checked_model(model: Any, backend: str | None, wrapping: dict[str, Any]) -> Model:
    """An object that is a :class:`~kvgeom.models.model.Model` as it stands."""
    lacking = missing_members(model)
    if lacking and hasattr(model, "geometry"):
        raise InputError(
            f"a {type(model).__name__} is no kvgeom.models.model.Model: it has no {', '.join(lacking)}; add what is missing"
        )
    if lacking:
        around = next(
            (name for name in ("_orig_mod", "module", "model") if hasattr(getattr(model, name, None), "config")), ""
        )
        beside = ", tokenizer=it.tokenizer" if around == "model" and hasattr(model, "tokenizer") else ""
        if around:
            raise InputError(
                f"{type(model).__name__} is no model, but has one inside; give load(it.{around}{beside or ', tokenizer=...'})"
            )
        raise InputError(
            f"a {type(model).__name__} is no model; give a hub id, a folder, a .gguf file, 'demo', a loaded model of "
            "transformers, TransformerLens or nnsight, or an object with the members of kvgeom.models.model.Model"
        )
    _refuse(wrapping, model, "it is a kvgeom model already")
    if backend not in (None, model.backend):
        raise InputError(f"{model.name} runs on backend {model.backend!r}, not {backend!r}; load it again by its name")
    if hasattr(model, "refresh"):  # of models whose weights others may have changed meanwhile
        model.refresh()
    found: Model = model
    return found


def _locate(given: str, revision: str | None, options: PretrainedOptions) -> tuple[str, str, str | None]:
    """What to hand to transformers, what to call the model, and how a file that is converted stores its weights."""
    if not given:
        raise InputError("no model was named; give a hub id, a folder, a .gguf file, or 'demo'")
    path = as_path("model", given)
    if revision is not None and (given in DEMOS or path.exists()):
        raise InputError(f"option 'revision' goes with a hub id, and {given} is none; leave it out")
    if given in DEMOS:
        demo = DEMOS[given]
        return str(demo_model_dir(demo)), f"{given} ({demo.title})", demo.stored
    if path.is_dir():
        folder = as_path("subfolder", path / options.get("subfolder", ""))
        variant = options.get("variant")
        as_path("variant", folder / names_of_weights(variant)[1])
        check_folder(folder, variant)
        return str(path), path.resolve().name, None
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{given} is a single file that is not .gguf; for a checkpoint give its folder")
        from kvgeom.models.gguf import converted_gguf, kept_stored

        folder = converted_gguf(path)
        return str(folder), path.name, kept_stored(path, folder)
    if given.startswith((".", "~", os.sep)) or given.endswith(".gguf") or given.count("/") != 1:
        known = ", ".join(DEMOS)
        raise InputError(f"no such file or folder: {given!r}; give one, a hub id (owner/name), or one of: {known}")
    check_hub(
        given,
        revision,
        token=options.get("token"),
        cache_dir=options.get("cache_dir"),
        local_only=options.get("local_files_only", False),
    )
    return given, given, None
