"""Files of a checkpoint, checked before transformers reads them."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kvgeom.errors import InputError, brief, reason
from kvgeom.paths import LFS_POINTER, read_text
from kvgeom.words import counted

#: Sizes in a configuration that a model is built with, by all names that they have.
_SIZES = (
    *("hidden_size", "n_embd", "d_model", "vocab_size"),
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "n_inner", "ffn_dim", "max_position_embeddings", "n_positions"),
)
#: Those of them that count decoder layers.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
#: Classes that answer with something else than text, as configurations name them.
_NO_LANGUAGE = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForMaskedLM",
    "RewardModel",
)
#: Small files of a checkpoint, which may be missing.
_BESIDE = frozenset({"generation_config.json", "tokenizer_config.json", "special_tokens_map.json"})
_AGAIN = "fetch it again"
#: The number of an expert in the name of one of its weights.
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
#: Files that are read as text, by their endings, and the most bytes that one may have; tokenizers have some 35 MB.
_TEXTS, _LARGEST_TEXT = (".json", ".jinja", ".txt", ".model"), 1 << 28


def check_folder(path: Path, variant: str | None = None) -> None:
    """Whether a folder holds a whole transformers checkpoint: a configuration, and the safetensors files that are read.

    Only headers are read.

    Parameters
    ----------
    path : Path
    variant : str, optional
        As in ``from_pretrained``: of the files ``model.<variant>.safetensors``.

    Raises
    ------
    InputError
        If a file is missing or damaged, the configuration makes no sense or describes more layers than there are tensors,
        or there is only an adapter.
    """
    files = {file.name for file in path.iterdir()} if path.is_dir() else set()
    for name in sorted(files):
        _check_readable(path / name)
    if has_adapter(path) and ("config.json" not in files or not files & set(names_of_weights(variant))):
        raise InputError(
            f"{path} holds an adapter and not the model that it changes; merge it into its base model with "
            "peft's merge_and_unload(), save_pretrained() to a folder, and give that"
        )
    if "config.json" not in files:
        single = sorted(name for name in files if name.endswith(".gguf"))
        hint = f"; did you mean {path / single[0]}?" if single else "; give a folder with a transformers checkpoint"
        raise InputError(f"{path} holds no model (no config.json){hint}")
    for name in _BESIDE & files:  # transformers goes on without those that it cannot read
        _check_encoding(path / name)
        read_json(path / name)
    if "chat_template.jinja" in files:
        _check_encoding(path / "chat_template.jinja")
    if "tokenizer.json" in files:
        check_begins(path / "tokenizer.json")
    config = read_json(path / "config.json")
    _check_sizes(config, path / "config.json")
    if not any(name.endswith(".safetensors") for name in files):
        raise InputError(
            f"{path} holds no .safetensors weights; convert them (pickled weights can run code and are not read)"
        )
    names = stored_tensors(path, config, variant)
    _check_names(path, names)
    tensors = len(names)
    for part in _parts(config):
        layers = max((part[name] for name in _LAYERS if isinstance(part.get(name), int)), default=0)
        if layers > tensors:
            raise InputError(
                f"{path / 'config.json'} describes {layers:,} layers, and the weights are {counted(tensors, 'tensor')}; get the "
                "config.json that belongs to them"
            )


def _check_names(path: Path, names: Mapping[str, object]) -> None:
    """Whether each tensor has one name, and the experts of a layer are numbered from 0 without a gap.

    transformers takes either of two names, and stacks experts in the order of their numbers whatever these are.
    """
    for name in names:
        inner = name.partition(".")[2]
        if inner in names:
            raise InputError(
                f"{path} holds {name} and {inner}, which are two names of one tensor, and only one can be the model's; fetch it again"
            )
    numbers: dict[str, set[int]] = {}
    for name in names:
        if found := _EXPERT.search(name):
            numbers.setdefault(name[: found.start()], set()).add(int(found[1]))
    for layer, there in numbers.items():
        lost = next((number for number in range(max(there) + 1) if number not in there), None)
        if lost is not None:
            raise InputError(
                f"{path} lacks expert {lost} of {layer} and holds expert {max(there)}; the experts would take each other's places: fetch "
                "the weights again"
            )


def _check_readable(path: Path) -> None:
    """Refuse what a checkpoint's reader would wait for, or fill the memory with: pipes, devices, and texts without end."""
    if path.is_dir() or path.suffix not in (*_TEXTS, ".safetensors"):
        return
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file but a pipe or a device; {_AGAIN}")
    if path.is_file() and path.suffix in _TEXTS and path.stat().st_size > _LARGEST_TEXT:
        raise InputError(
            f"{path} has {path.stat().st_size:,} bytes, and no file of its kind has more than {_LARGEST_TEXT:,}; {_AGAIN}"
        )


def _check_encoding(path: Path) -> None:
    """Refuse a byte order mark or another encoding: transformers drops such a file, or reads the mark as part of it."""
    begins = path.read_bytes()
    try:
        begins.decode("utf-8")
        plain = not begins.startswith(codecs.BOM_UTF8)
    except UnicodeDecodeError:
        plain = False
    if not plain:
        raise InputError(
            f"{path} is not in plain UTF-8, as transformers reads it; save it as UTF-8 without a byte order mark"
        )


def check_language_model(config: Mapping[str, Any], name: str) -> None:
    """Whether a configuration names a class of models that go on with a text.

    Raises
    ------
    InputError
        If it names a classifier.
    """
    named = config.get("architectures")
    for found in named if isinstance(named, list) else ():
        if str(found).endswith(_NO_LANGUAGE):
            raise InputError(f"{name} is a {found}, which does not write text; give a causal language model")


def has_adapter(path: Path) -> bool:
    """Whether a folder has the files of an adapter (LoRA and the like), which transformers may or may not apply."""
    return any((path / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors"))


def names_of_weights(variant: str | None) -> tuple[str, str]:
    """How the weights are called in one file, and the index of several."""
    part = f".{variant}" if variant else ""
    return f"model{part}.safetensors", f"model.safetensors.index{part}.json"


def weight_files(path: Path, config: Mapping[str, Any], variant: str | None = None) -> list[Path]:
    """The safetensors files of a folder that transformers reads.

    Raises
    ------
    InputError
        If there are none, or an index names others than there are.
    """
    named = config.get("transformers_weights")
    single, index = (named, named) if isinstance(named, str) else names_of_weights(variant)
    if (path / single).is_file() and single.endswith(".safetensors"):
        return [path / single]
    if not (path / index).is_file():
        others = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))[:3])
        raise InputError(
            f"{path} holds neither {single} nor {index}, only {others}; fetch what is missing, or give the variant"
        )
    weights = read_json(path / index).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(file, str) for file in weights.values()):
        raise InputError(f"{path / index} does not say in which file each tensor is (weight_map); {_AGAIN}")
    wanted = sorted(set(weights.values()))
    strange = next((name for name in wanted if Path(name).name != name or not name.endswith(".safetensors")), None)
    if strange is not None:
        raise InputError(f"{path / index} names {brief(strange)}, which is no .safetensors file beside it; {_AGAIN}")
    missing = [name for name in wanted if not (path / name).is_file()]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of the {len(wanted)} files that {index} names, such as {missing[0]}; fetch them"
        )
    return [path / name for name in wanted]


def stored_tensors(
    path: Path, config: Mapping[str, Any], variant: str | None = None
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and number format of all tensors that transformers reads from a folder, by name.

    Raises
    ------
    InputError
        If a file is missing or damaged, or two files hold a tensor of one name.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    holds: dict[str, Path] = {}
    for file in weight_files(path, config, variant):
        for name, tensor in tensors_of(file).items():
            if name in holds:
                raise InputError(
                    f"{holds[name].name} and {file.name} in {path} both hold {name}, and only one can be the model's; they are not of "
                    "one checkpoint: fetch it again, into an empty folder"
                )
            found[name], holds[name] = tensor, file
    return found


def held_twice(path: Path, variant: str | None = None) -> tuple[str, str] | None:
    """The file of all weights and the index of several where a folder has both; transformers reads the first."""
    single, index = names_of_weights(variant)
    return (single, index) if (path / single).is_file() and (path / index).is_file() else None


def left_unread(path: Path) -> list[str]:
    """What a folder has beside what is read of it, and may say something else."""
    pickled = sorted(file.name for pattern in ("pytorch_model*.bin", "*.pth", "*.ckpt") for file in path.glob(pattern))
    found = (
        [f"{path} holds {pickled[0]} too, which is not read: the weights are those of the .safetensors files"]
        if pickled
        else []
    )
    beside, config = path / "chat_template.jinja", path / "tokenizer_config.json"
    if beside.is_file() and config.is_file():
        other = read_json(config).get("chat_template")
        if isinstance(other, str) and other.strip() != read_text(beside).strip():
            found.append(
                f"chat_template.jinja in {path} is used, and the other template in tokenizer_config.json is not"
            )
    return found


def tensors_of(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and number format of the tensors of a safetensors file by name, from its header.

    Raises
    ------
    InputError
        If the file is empty, truncated, a Git LFS pointer, or its header makes no sense.
    """
    check_begins(path)
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(x.get_shape()), str(x.get_dtype())) for name, x in slices.items()}
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise InputError(f"{path} is a truncated or altered .safetensors file ({reason(error)}); {_AGAIN}") from error


def check_begins(path: Path) -> None:
    """Whether a file has a content of its own.

    Raises
    ------
    InputError
        If it is empty, a Git LFS pointer, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            begins = file.read(len(LFS_POINTER))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}; give another file") from error
    if not begins:
        raise InputError(f"{path} is empty; {_AGAIN}")
    if begins == LFS_POINTER:
        raise InputError(f"{path} is a Git LFS pointer, not the file it stands for; run: git lfs pull")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises
    ------
    InputError
        If it holds something else.
    """
    check_begins(path)
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({reason(error)}); {_AGAIN}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold a JSON object, got {brief(found)}; {_AGAIN}")
    return found


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A configuration, and that of the language model inside it."""
    yield config
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        yield inner


def _check_sizes(config: Mapping[str, Any], path: Path) -> None:
    """Whether the sizes that a model is built with are numbers that a size can be."""
    for part in _parts(config):
        for name in _SIZES:
            values = part.get(name)
            # Null is the default; a list has a number for each layer.
            for value in islice(values, 10_000) if isinstance(values, list) else () if values is None else (values,):
                if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**40:
                    if isinstance(values, list) and value in (None, 0):  # a layer without it
                        continue
                    raise InputError(
                        f"{path} has {name} {brief(value)}, which must be a whole number above 0; get the config.json that "
                        "belongs to the weights"
                    )
