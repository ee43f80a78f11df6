"""llama.cpp through llama-cpp-python: its blocks by ctypes, and a model with a quantized cache, on tokens alone."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open


def write_gguf(folder: Path, path: Path) -> None:
    """A qwen2 checkpoint in float32, without a tokenizer: the same weights as transformers runs, to the last bit."""
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"]
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                writer.add_tensor(names.get_name(name, (".weight", ".bias")), weights.get_tensor(name).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A model in llama.cpp whose cache holds ``kind``, with or without its rotation."""

    def __init__(self, path: Path, kind: str, *, rotation: bool = True) -> None:
        from llama_cpp import llama_cpp as library

        self.library: Any = library
        self.kind = getattr(library, f"GGML_TYPE_{kind.upper()}")
        os.environ["LLAMA_ATTN_ROT_DISABLE"] = "0" if rotation else "1"
        self._quiet = library.llama_log_callback(lambda *_: None)
        library.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self.model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        options = library.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = self.kind
        options.flash_attn_type = 1  # a quantized V needs it
        self.context = library.llama_init_from_model(self.model, options)
        self.vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))
        self.position = 0

    def feed(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits after some tokens more."""
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = token, self.position + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = index == len(ids) - 1
        assert self.library.llama_decode(self.context, batch) == 0
        self.position += len(ids)
        pointer = self.library.llama_get_logits_ith(self.context, -1)
        logits = np.ctypeslib.as_array(pointer, shape=(self.vocabulary,)).copy()
        self.library.llama_batch_free(batch)
        return torch.from_numpy(logits)

    def run(self, prompt: Sequence[int], forced: Sequence[int]) -> torch.Tensor:
        """Logits after a prompt and after each of the forced tokens."""
        self.position = 0
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        return torch.stack([self.feed(prompt), *(self.feed([token]) for token in forced)])

    def first_keys(self, row: int) -> np.ndarray[Any, Any]:
        """The bytes that the cache of layer 0 holds of the keys, ``[tokens, row]``."""
        size = self.library.llama_state_seq_get_size(self.context, 0)
        buffer = (ctypes.c_uint8 * size)()
        self.library.llama_state_seq_get_data(self.context, buffer, size, 0)
        state = bytes(buffer)
        mark = int(self.kind).to_bytes(4, "little") + row.to_bytes(
            8, "little"
        )  # type and row size stand before the rows
        begin = state.index(mark) + len(mark)
        return np.frombuffer(state, np.uint8, self.position * row, begin).reshape(self.position, row)

    def close(self) -> None:
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)


def reference_blocks(kind: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What ``quantize_row_<kind>_ref`` of the compiled library makes of floats, as bytes."""
    import llama_cpp

    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so*"))))
    block, size = gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, kind.upper())]
    values = np.ascontiguousarray(x, dtype=np.float32)
    out = np.zeros(values.size // block * size, dtype=np.uint8)
    function = getattr(library, f"quantize_row_{kind}_ref")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    function(values.ctypes.data, out.ctypes.data, values.size)
    return out
