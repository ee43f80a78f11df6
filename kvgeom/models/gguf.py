"""GGUF files: checked before they are read, converted once."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from kvgeom.errors import InputError, reason
from kvgeom.models.files import check_begins
from kvgeom.models.gguf_rotary import match_rotary
from kvgeom.models.gguf_settings import keep_notes, settle
from kvgeom.models.pretrained import check_loaded
from kvgeom.models.quiet import quiet_transformers
from kvgeom.paths import cache_dir, not_written, write_whole
from kvgeom.progress import bar

#: Of what is made of a file: conversions before 2 may have other rotary frequencies than it, before 3 other settings.
CONVERSION = 3
_CHUNK = 1 << 24
#: Types of GGUF that are no quantization, by the names that they have everywhere else.
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def check_gguf(path: Path) -> None:
    """Refuse a file that is not a whole GGUF file.

    Reads the header and compares where it says that tensors lie with the length of the file. Bytes altered
    inside a tensor show only in the weights, which :func:`converted_gguf` checks.

    Raises
    ------
    InputError
        If the file is too short, is not GGUF, or its header does not make sense.
    """
    import gguf

    check_begins(path)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InputError(f"{path} is no GGUF file: it begins with {magic!r}; fetch it again")
    size = path.stat().st_size
    try:
        reader = gguf.GGUFReader(path)
        end = max(int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors)
        architecture = reader.get_field("general.architecture")
    except Exception as error:  # the reader indexes blindly into the file: a damaged one can raise anything
        raise InputError(f"{path} is a truncated or altered GGUF file ({reason(error)}); fetch it again") from error
    if end > size:
        raise InputError(
            f"{path} is truncated: its header describes {end:,} bytes, the file has {size:,}; fetch it again"
        )
    if architecture is None:
        raise InputError(f"the header of {path} names no architecture; the file is altered or holds no model")


def gguf_stored(path: Path) -> str:
    """How a whole GGUF file stores its weights: ``"Q4_K_M (GGUF)"``.

    That is the file type that its header names; where it names none, the type of most of its weights.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    field = reader.get_field("general.file_type")
    named = {int(each): each.name for each in gguf.LlamaFileType}
    kind = None if field is None else named.get(int(field.parts[-1][0]))  # None of one that is newer than the reader
    if kind is None:
        counts: Counter[str] = Counter()
        for tensor in reader.tensors:
            counts[tensor.tensor_type.name] += int(tensor.n_elements)
        kind = counts.most_common(1)[0][0]
    kind = kind.removeprefix("MOSTLY_").removeprefix("ALL_")
    return f"{_FLOATS.get(kind, kind)} (GGUF)"


def kept_stored(path: Path, folder: Path) -> str:
    """What :func:`gguf_stored` says of a file, kept in the folder with its conversion.

    Reading the header takes some ten seconds where the vocabulary is large.
    """
    kept = folder / "kvgeom-stored.txt"
    if not kept.is_file():
        write_whole(kept, gguf_stored(path))
    return kept.read_text(encoding="utf-8")


def converted_gguf(path: Path) -> Path:
    """A folder with the model and tokenizer of a GGUF file as safetensors, in float32.

    Conversion takes about a minute for half a billion parameters; its result is kept, under the hash of the
    file's content, so that an altered file is never taken for the one that was converted.
    """
    from filelock import FileLock

    folder = cache_dir(f"gguf-{CONVERSION}") / _sha256(path)[:32]
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            check_gguf(path)
            convert(path, folder)
    return folder


def convert(path: Path, folder: Path) -> None:
    """Convert a GGUF file into ``folder``, which appears only when it is complete; one process at a time may do so.

    Raises
    ------
    InputError
        If transformers cannot read this architecture, or not its rotary frequencies, the weights are damaged or not whole, or
        the disk is full.
    """
    import gguf
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scratch = folder.with_name(
        f"{folder.name}.partial"
    )  # of this file alone: what a killed conversion has left goes now
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet_transformers())
            drawn = stack.enter_context(bar("converting GGUF", 3))
            if drawn.disable:  # transformers draws a bar of its own here, which no setting of it turns off
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            try:
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
                drawn.update(1)
                auto: Any = AutoModelForCausalLM
                model, found = auto.from_pretrained(
                    path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
                )
            except Exception as error:  # whatever fails inside: this file cannot be used
                raise InputError(f"transformers cannot read {path}: {reason(error)}") from error
            check_loaded(model, found, str(path))
            reader = gguf.GGUFReader(path)
            notes = settle(model, tokenizer, reader, path)
            match_rotary(model, reader, path)
            _check_weights(model, path)
            drawn.update(1)
            # transformers refuses to save what it still takes for a quantized model.
            model.hf_quantizer, model.is_quantized = None, False
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            try:
                model.save_pretrained(scratch)
                tokenizer.save_pretrained(scratch)
                keep_notes(notes, scratch)
                os.replace(scratch, folder)
            except OSError as error:
                raise not_written(folder, error, "set KVGEOM_CACHE to another folder") from error
            except SafetensorError as error:  # which gives the system's error as text
                raise not_written(folder, OSError(str(error)), "set KVGEOM_CACHE to another folder") from error
            drawn.update(1)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_weights(model: Any, path: Path) -> None:
    import torch

    for name, weight in model.named_parameters():
        largest = weight.detach().abs().max()
        # No trained weight is near the range of half precision; a damaged block scale quickly is.
        if not torch.isfinite(largest) or largest > 1e4:
            raise InputError(f"tensor {name} of {path} holds {float(largest):.3g}: the file is altered; fetch it again")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, bar("hashing GGUF", path.stat().st_size) as drawn:
        while block := file.read(_CHUNK):
            digest.update(block)
            drawn.update(len(block))
    return digest.hexdigest()
