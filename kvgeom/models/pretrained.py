"""Checkpoints read by transformers, and what came of it: no weight of a model that is loaded is random."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgeom.errors import InputError, brief, reason
from kvgeom.models.files import check_language_model, has_adapter, held_twice, left_unread, read_json, stored_tensors
from kvgeom.models.gguf_settings import kept_notes
from kvgeom.models.notes import remember_notes
from kvgeom.models.quiet import quiet_transformers
from kvgeom.models.tokenization import other_rules
from kvgeom.words import counted

if TYPE_CHECKING:
    import torch

#: Options that the tokenizer is loaded with, too.
_SHARED = ("cache_dir", "force_download", "local_files_only", "proxies", "subfolder", "token")
#: Ends of the names of what weights in few bits are stored with; without it they are other numbers.
_SCALES = re.compile(
    r"(weight_scale(_\w+)?|_scale_inv|weight_zero_point|weight_packed|weight_shape|weight_global_scale|scales|qzeros|qweight"
    r"|g_idx|SCB|absmax|quant_map|quant_state\.\w+|_blocks|_scales)$"
)
#: Number formats that mean nothing without a scale: whole numbers, and floating point of 8 bits or fewer.
_CODES = re.compile(r"[IU]\d|F[468]_")
#: What the code of an older model has stored in its layers beside weights: tables, masks, and scales of a cache in FP8.
_NO_WEIGHT = re.compile(
    r"(inv_freq|(cos|sin)_cached|rotary\w*\.(cos|sin)\w*|position_ids|embed_positions|masked_bias|(attn|attention|mixer)\.(bias|mask)|[qkv]_scale"
    r"|rope\.freqs)$"
)
#: Weights of adapters that were saved with the model that they change.
_ADAPTER = re.compile(r"\b(lora_|loha_|lokr_|ia3_|vera_|oft_|adapter_?\w*\.)")
#: A model of so many times the weights of its files is another one. Half may be missing, which is said by name.
_MOST = 2
#: Names that an error or a note shows.
_SHOWN = 3
_LAYER = re.compile(r"\.(\d+)\.")


def read_pretrained(
    source: str,
    name: str,
    device: str,
    dtype: torch.dtype | str,
    shared: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    converted: bool = False,
) -> tuple[Any, Any]:
    """A transformers model and its tokenizer.

    Parameters
    ----------
    source : str
        A folder, whose files have been checked, or a hub id.
    name : str
        For messages.
    device : str
    dtype : torch.dtype or str
    shared : mapping
        Options for both.
    options : mapping
        Options of ``from_pretrained`` for the model; those that say where files lie are for the tokenizer, too.
    converted : bool
        Whether the folder was made of a GGUF file, which has no rules for reading text but the kind of tokenizer.

    Raises
    ------
    InputError
        If transformers cannot read it, its configuration and its weights are not of one model, or weights are missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto: Any = AutoModelForCausalLM
    folder = Path(source, options.get("subfolder", ""))
    try:
        with quiet_transformers():
            for_both = {option: options[option] for option in _SHARED if option in options}
            if folder.is_dir():
                _check_configuration(folder, name, shared, options.get("variant"))
            tokenizer = AutoTokenizer.from_pretrained(source, **shared, **for_both)
            loaded, found = auto.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which are reported below, by name
                **shared,
                **options,
            )
            check_loaded(loaded, found, name)
            placed = options.keys() & {"device_map", "tp_plan"}
            quantized = getattr(loaded, "is_quantized", False)  # bitsandbytes: placed while loading, and there to stay
            loaded = loaded if placed or quantized else loaded.to(device)
    except InputError:
        raise
    except Exception as error:  # a damaged checkpoint can raise anything inside
        raise InputError(f"{name} cannot be loaded: {_said(error)}") from error
    loaded.requires_grad_(False)
    notes = [
        *_left_out(found["unexpected_keys"]),
        *_twice(folder, options.get("variant")),
        *(left_unread(folder) if folder.is_dir() else []),
        *_adapter(folder, loaded),
        *(kept_notes(folder) if converted else other_rules(tokenizer, folder)),
    ]
    remember_notes(loaded, notes)
    return loaded, tokenizer


def _said(error: Exception) -> str:
    """What transformers says; of classes that it knows, not all."""
    said = " ".join(str(error).split()) if reason(error).endswith(":") else reason(error)
    if isinstance(error, KeyError) and " " not in said:
        said = f"{said} is not known"
    if isinstance(error, ImportError):
        said = f"it needs a package that is not installed ({said}); install it, or take quantization_config out if it is not needed"
    if isinstance(error, TypeError | AttributeError):
        said = f"an entry of its configuration, or an option, is of a kind that transformers cannot use ({said})"
    if said.startswith("Unrecognized configuration class"):
        return "transformers knows no causal language model of this kind"
    if "issues during automatic conversion" in said:
        return "weights of some experts or parts that belong together are missing or of other shapes; fetch the files again"
    return said if len(said) <= 300 else f"{said[:300]}..."


def _check_configuration(folder: Path, name: str, shared: Mapping[str, Any], variant: str | None) -> None:
    """Whether a configuration is that of a language model which is not far larger than its weights.

    transformers would make room for what is missing, and fill it with random numbers, before it says so.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    stored = read_json(folder / "config.json")
    check_language_model(stored, name)
    if stored.get("quantization_config") is not None:
        _check_quantization(stored["quantization_config"], name)
        return
    if shared.get("trust_remote_code"):
        return
    tensors = stored_tensors(folder, stored, variant)
    # Masks and positions, which older checkpoints hold as whole numbers, are not called weights.
    coded = [name for name, (_, dtype) in tensors.items() if name.endswith("weight") and _CODES.match(dtype)]
    if coded:
        raise InputError(
            f"{name} is stored quantized, with {counted(len(coded), 'weight')} in {tensors[coded[0]][1]} such as {coded[0]}, and its "
            "config.json has no quantization_config that says how; get the whole config.json"
        )
    held = sum(_elements(shape) for shape, _ in tensors.values())
    with torch.device("meta"):
        described = auto.from_config(AutoConfig.from_pretrained(folder))
    wanted = sum(weight.numel() for weight in described.parameters())
    if wanted > _MOST * held:
        raise InputError(
            f"the config.json of {name} describes a model of {wanted:,} weights, and its files hold {held:,}; get those that "
            "belong together"
        )


def _check_quantization(found: object, name: str) -> None:
    """Whether transformers knows how weights are stored: it goes on as if they were not quantized if it does not."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    method = found.get("quant_method") if isinstance(found, Mapping) else None
    old = isinstance(found, Mapping) and (found.get("load_in_8bit") or found.get("load_in_4bit"))  # of bitsandbytes
    if not (isinstance(method, str) and method in KNOWN) and not old:
        raise InputError(
            f"quantization_config in the config.json of {name} names the method {brief(method)}, which transformers does not know; if "
            "its weights are not quantized, take quantization_config out"
        )


def _elements(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def check_loaded(model: Any, found: Mapping[str, Any], name: str) -> None:
    """Whether all weights of a model are those of its files.

    Raises
    ------
    InputError
        With the first that are missing, or of another shape, or quantized in a way that the configuration does not name;
        or if the files hold more layers.
    """
    missing, unexpected = _ordered(found["missing_keys"]), _ordered(found["unexpected_keys"])
    other = sorted(found["mismatched_keys"], key=lambda each: _order(each[0]))
    if other:
        first, stored, wanted = other[0]
        raise InputError(
            f"the files of {name} have {counted(len(other), 'weight')} of other shapes than its config.json describes, such as "
            f"{first}: {_shape(stored)}, not {_shape(wanted)}; get the config.json that belongs to the weights"
        )
    if missing:
        raise InputError(
            f"{name} lacks {counted(len(missing), 'weight')} that its config.json describes: {_some(missing)}; "
            f"{_advice(missing, unexpected)}"
        )
    if getattr(model, "hf_quantizer", None) is None:
        scales = [key for key in unexpected if _SCALES.search(key) and not re.search(r"\.[qkv]_scale$", key)]
        if scales:
            raise InputError(
                f"{name} is stored quantized, with {_some(scales)}, and its config.json has no quantization_config that says "
                "how; get the whole config.json"
            )
    added = [key for key in unexpected if _ADAPTER.search(key)]
    if added:
        raise InputError(
            f"the files of {name} hold {counted(len(added), 'weight')} of an adapter that is not merged: {_some(added)}; load them with peft, "
            "merge_and_unload(), and save_pretrained() to a folder"
        )
    more = _layers_beyond(model, unexpected)
    if more:
        count = model.config.get_text_config().num_hidden_layers
        raise InputError(
            f"the files of {name} hold layers that its config.json leaves out (it has {count}): {_some(more)}; get the "
            "config.json that belongs to the weights"
        )
    inside = _inside_layers(model, unexpected)
    if inside:
        raise InputError(
            f"the files of {name} hold {counted(len(inside), 'weight')} inside its layers that a {type(model).__name__} of its config.json "
            f"does not have: {_some(inside)}; get the config.json that belongs to the weights"
        )


def _inside_layers(model: Any, unexpected: list[str]) -> list[str]:
    """Weights in the decoder layers of a model that its class has no place for: it would compute something else."""
    known = {name[: found.end()] for name, _ in model.named_parameters() if (found := _LAYER.search(name))}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return [
        key
        for key in unexpected
        if (found := _LAYER.search(key))
        and not _NO_WEIGHT.search(key)
        and (key[: found.end()] in known or prefix + key[: found.end()] in known)
    ]


def _layers_beyond(model: Any, unexpected: list[str]) -> list[str]:
    """Weights of whole layers beside those that were loaded, as if the model were cut.

    Layers with weights of their own kind, such as those that predict several tokens, are no decoder layers.
    """
    known = {_LAYER.sub(".*.", name, count=1) for name, _ in model.named_parameters()}
    layers: dict[str, list[str]] = {}
    for key in unexpected:
        if number := _LAYER.search(key):
            layers.setdefault(key[: number.end()], []).append(key)
    kinds = {layer: {_LAYER.sub(".*.", key, count=1) for key in keys} for layer, keys in layers.items()}
    prefixes = ("", f"{getattr(model, 'base_model_prefix', '')}.")
    return [
        key
        for layer, keys in layers.items()
        if any(all(f"{prefix}{kind}" in known for kind in kinds[layer]) for prefix in prefixes)
        for key in keys
    ]


def _advice(missing: list[str], unexpected: list[str]) -> str:
    """What to do about missing weights, as other names in the files tell."""
    extra = _renamed(missing, unexpected)
    if extra:
        return (
            f"the files name them with {extra!r}, as wrappers of a model do; take that out of the names, or save the model "
            "inside the wrapper with save_pretrained"
        )
    if all(re.search(r"(lm_head|embed_out|output)\.weight$", key) for key in missing):
        return (
            "it was saved without its language-model head (by AutoModel or for another task), or its config.json has lost "
            "tie_word_embeddings; get the model as it was published"
        )
    named = f"they hold {_some(unexpected)} instead; " if unexpected else ""
    return f"{named}fetch the files again, or save the model with save_pretrained"


def _renamed(missing: list[str], unexpected: list[str]) -> str:
    """What names in the files have more than those of missing weights, if most have the same."""
    by_end: dict[str, list[list[str]]] = {}
    for key in unexpected:
        parts = key.split(".")
        by_end.setdefault(parts[-1], []).append(parts)
    counts: Counter[str] = Counter()
    for key in missing:
        parts = key.split(".")
        counts.update({extra for found in by_end.get(parts[-1], ()) if (extra := _beyond(found, parts)) is not None})
    if not counts:
        return ""
    extra, count = counts.most_common(1)[0]
    return extra if 2 * count >= len(missing) else ""


def _beyond(found: list[str], wanted: list[str]) -> str | None:
    """The one run of parts that a name has more than another, with its point; None if that is not all."""
    more = len(found) - len(wanted)
    if more <= 0:
        return None
    at = next((i for i, part in enumerate(wanted) if found[i] != part), len(wanted))
    return ".".join(found[at : at + more]) + "." if found[:at] + found[at + more :] == wanted else None


def _left_out(unexpected: Iterable[str]) -> list[str]:
    keys = _ordered(unexpected)
    return (
        [f"{counted(len(keys), 'weight')} in the files that the model has no place for, left out: {_some(keys)}"]
        if keys
        else []
    )


def _twice(folder: Path, variant: str | None) -> list[str]:
    both = held_twice(folder, variant) if folder.is_dir() else None
    return [f"{folder} holds weights twice: {both[0]} was read, and what {both[1]} names was not"] if both else []


def _adapter(folder: Path, model: Any) -> list[str]:
    if not folder.is_dir() or not has_adapter(folder):
        return []
    if getattr(model, "_hf_peft_config_loaded", False):
        return ["the adapter in the folder is applied to the model"]
    return [
        "there is an adapter in the folder, which is not applied: merge it with peft's merge_and_unload() to audit it"
    ]


def _ordered(keys: Iterable[str]) -> list[str]:
    return sorted(keys, key=_order)


def _order(key: str) -> list[tuple[int, str]]:
    """Names with numbers in the order of these."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def _shape(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes)) or "a single number"
