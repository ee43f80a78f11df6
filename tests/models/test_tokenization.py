"""A text becomes the tokens that the file of a tokenizer makes of it, or a note says that it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import kvgeom
from kvgeom.errors import KvgeomWarning
from kvgeom.models.tokenization import other_rules
from tests.builders.tiny import tiny_hf_model, tiny_tokenizer


def qwen(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A checkpoint of a type whose tokenizer class builds its rules anew, with others in its file."""
    tiny_hf_model("qwen2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "Qwen2Tokenizer"}))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # with the rules of the class
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    Tokenizer.from_file(str(path))
    return folder


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Lowercase"},
        {"type": "NFKC"},
        None,
        {"type": "Replace", "pattern": {"String": "qzx"}, "content": "!"},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "_"}]},
    ],
)
def test_rules_that_are_not_those_of_the_file_are_noted(normalizer: Any, tmp_path: Path) -> None:
    folder = qwen(tmp_path, lambda stored: stored.update(normalizer=normalizer))
    with pytest.warns(KvgeomWarning, match=r"Qwen2Tokenizer of transformers .* becomes other tokens"):
        model = kvgeom.load(folder, progress=False)
    assert len(model.notes) == 1


def test_the_same_rules_and_other_files(tmp_path: Path) -> None:
    assert kvgeom.load(qwen(tmp_path, lambda stored: None), progress=False).notes == ()
    assert other_rules(tiny_tokenizer(), tmp_path / "nothing") == []
