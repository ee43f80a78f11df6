"""One door to a model: a hub id, a folder, a GGUF file, the demo, or an object that is already loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvgeom.errors import InputError, KvgeomError
from kvgeom.models.demo import DEMOS, demo_model_dir
from kvgeom.models.quiet import quiet_transformers

if TYPE_CHECKING:
    import torch

    from kvgeom.models.model import Model

#: transformers itself, TransformerLens, nnsight.
BACKENDS = ("hf", "lens", "nnsight")


def load(
    model: Any,
    *,
    tokenizer: Any = None,
    backend: str | None = None,
    remote: bool | Literal["local"] = False,
    template: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
    **options: Any,
) -> Model:
    """Load a language model.

    Parameters
    ----------
    model : str, Path, PreTrainedModel or Model
        ``"demo"`` (or ``"demo-no-refusal"``), a folder with a transformers checkpoint, a ``.gguf`` file, a hub id
        such as ``"Qwen/Qwen2.5-7B-Instruct"``; a model that you hold: of transformers (with ``tokenizer``), a
        ``TransformerBridge`` of TransformerLens, or an nnsight model; or something that this function returned
        before, which is returned as it is.
    tokenizer : PreTrainedTokenizerBase, optional
        Needed with a transformers model; a bridge and an nnsight model have their own.
    backend : {"hf", "lens", "nnsight"}, optional
        What runs the model: plain transformers, TransformerLens or nnsight. By default what was given, and plain
        transformers for a name or file. Note that TransformerLens replaces modules of the model that it wraps.
    remote : {False, True, "local"}
        For nnsight: where it runs; see :class:`~kvgeom.models.nnsight.NNsightModel`.
    template : str or Path, optional
        Chat template, as Jinja text or a file of it; for models without one of their own.
    dtype : torch.dtype or str, optional
        float32 on a CPU, where comparisons are to be exact; the checkpoint's own on an accelerator.
    device : str, optional
        An accelerator if there is one, else the CPU.
    revision : str, optional
        Of a hub id.
    trust_remote_code : bool
        Run code that comes with the checkpoint. Off unless you ask for it.
    progress : bool
        Show bars while fetching and converting.
    **options
        Go to ``from_pretrained`` (for instance ``device_map``, ``quantization_config``, ``attn_implementation``).

    Raises
    ------
    InputError
        If there is no model there, or not a whole one.
    ModelError
        If it loads but lacks what is needed, such as a chat template.
    """
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"backend {backend!r} was asked, but there is only {', '.join(BACKENDS)}")
    chat_template = _read_template(template)
    if not isinstance(model, str | Path):
        return _wrap(model, tokenizer, chat_template, backend, remote)
    if tokenizer is not None:
        raise InputError("a tokenizer was given with a model name; it goes with a loaded transformers model only")
    source, name = _locate(str(model), revision, progress)
    hf_model, own_tokenizer = _from_pretrained(
        source,
        name,
        device=device,
        dtype=dtype,
        tokenizer_options={"revision": revision, "trust_remote_code": trust_remote_code},
        model_options=options,
    )
    return _backed(hf_model, own_tokenizer, name, chat_template, backend or "hf", remote)


def _backed(
    hf_model: Any, tokenizer: Any, name: str, template: str | None, backend: str, remote: bool | Literal["local"]
) -> Model:
    if remote and backend != "nnsight":
        raise InputError(f"remote={remote!r} was asked with backend {backend!r}; only backend='nnsight' runs elsewhere")
    if backend == "lens":
        from kvgeom.models.lens import LensModel

        return LensModel.around(hf_model, tokenizer, name=name, template=template)
    if backend == "nnsight":
        from kvgeom.models.nnsight import NNsightModel

        return NNsightModel.around(hf_model, tokenizer, name=name, template=template, remote=remote)
    from kvgeom.models.hf import HFModel

    return HFModel(hf_model, tokenizer, name=name, template=template)


def _wrap(
    model: Any, tokenizer: Any, template: str | None, backend: str | None, remote: bool | Literal["local"]
) -> Model:
    from transformers import PreTrainedModel

    from kvgeom.models.hf import HFModel

    home = type(model).__module__.partition(".")[0]
    given = {"transformer_lens": "lens", "nnsight": "nnsight"}.get(home, "hf")
    if isinstance(model, HFModel):
        given = model.backend
    if not isinstance(model, PreTrainedModel | HFModel) and given == "hf":
        raise InputError(
            f"a {type(model).__name__} was given; give a hub id, a folder, a .gguf file, 'demo', or a model of "
            "transformers, TransformerLens (TransformerBridge) or nnsight"
        )
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise InputError(
                f"a {type(model).__name__} was given without its tokenizer; give load(model, tokenizer=...)"
            )
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        return _backed(model, tokenizer, name, template, backend or "hf", remote)
    if backend not in (None, given):
        raise InputError(
            f"backend {backend!r} was asked, but the model that was given runs on {given!r}; load it anew by its name"
        )
    if isinstance(model, HFModel):
        return model
    if given == "lens":
        from kvgeom.models.lens import LensModel

        if not hasattr(model, "original_model"):
            raise InputError(
                f"a {type(model).__name__} was given; of TransformerLens, kvgeom takes a TransformerBridge"
            )
        return LensModel(model, tokenizer=tokenizer, template=template)
    from kvgeom.models.nnsight import NNsightModel

    if not isinstance(getattr(model, "_module", None), PreTrainedModel):
        raise InputError(
            f"a {type(model).__name__} was given; of nnsight, kvgeom takes a loaded language model "
            "(TransformersModel or LanguageModel, with dispatch=True if it was named by its hub id)"
        )
    return NNsightModel(model, tokenizer=tokenizer, template=template, remote=remote)


def _locate(asked: str, revision: str | None, progress: bool) -> tuple[str, str]:
    """What to hand to transformers, and what to call the model."""
    if asked in DEMOS:
        return str(demo_model_dir(DEMOS[asked], progress=progress)), f"{asked} ({DEMOS[asked].title})"
    path = Path(asked).expanduser()
    if path.is_dir():
        _check_folder(path)
        return str(path), path.resolve().name
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{asked} was asked, but a single file must be a .gguf; for a checkpoint give its folder")
        from kvgeom.models.gguf import converted_gguf

        return str(converted_gguf(path, progress)), path.name
    if asked.startswith((".", "~", os.sep)) or asked.endswith(".gguf") or asked.count("/") != 1:
        known = ", ".join(DEMOS)
        raise InputError(
            f"{asked} was asked, but there is no such file or folder; give one, a hub id (owner/name), or one of: {known}"
        )
    _check_hub(asked, revision)
    return asked, asked


def _check_hub(name: str, revision: str | None) -> None:
    """Ask the hub once whether a model is there; transformers would go on trying for a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    asked = f"{name} was asked, but there is no such folder here, and"
    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except RevisionNotFoundError as error:
        raise InputError(
            f"{asked} that model has no revision {revision} on the hub; give another --revision"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{asked} no such model on the hub; check the name or, if it is private, run: hf auth login"
        ) from error
    except Exception as error:  # of whichever HTTP library the installed hub client uses
        raise InputError(
            f"{asked} the hub cannot be reached ({error or type(error).__name__}); check the path or the network"
        ) from error


def _check_folder(path: Path) -> None:
    files = {file.name for file in path.iterdir()}
    if "config.json" not in files:
        single = sorted(name for name in files if name.endswith(".gguf"))
        hint = f"; did you mean {path / single[0]}?" if single else "; give a folder with a transformers checkpoint"
        raise InputError(f"{path} was asked, but it holds no model (no config.json){hint}")
    if not any(name.endswith(".safetensors") for name in files):
        raise InputError(
            f"{path} was asked, but it holds no .safetensors weights; convert them (pickled weights can run code: not read)"
        )


def _read_template(template: str | Path | None) -> str | None:
    if template is None or "{" in str(template):
        return None if template is None else str(template)
    path = Path(template).expanduser()
    if not path.is_file():
        raise InputError(
            f"template {template} was asked, but there is no such file; give a file with a Jinja chat template"
        )
    return path.read_text(encoding="utf-8")


def _from_pretrained(
    source: str,
    name: str,
    *,
    device: str | None,
    dtype: torch.dtype | str | None,
    tokenizer_options: dict[str, Any],
    model_options: dict[str, Any],
) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = device or _best_device()
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else "auto"
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise InputError(f"dtype {dtype} was asked, but it is no floating point type; give e.g. float32 or bfloat16")
    placed = "device_map" in model_options
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, **tokenizer_options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, **tokenizer_options, **model_options
            )
            quantized = getattr(loaded, "is_quantized", False)  # bitsandbytes: placed while loading, and there to stay
            loaded = loaded if placed or quantized else loaded.to(device)
    except KvgeomError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{name} was asked, but it cannot be loaded: {reason.strip()}") from error
    loaded.requires_grad_(False)
    return loaded, tokenizer


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
