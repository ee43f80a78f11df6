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
from kvgeom.errors import InputError, KvgeomWarning, ModelError
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


def loaded(change: Callable[[dict[str, Any]], object] = lambda stored: None, template: str | None = None) -> Any:
    """A tiny model whose tokenizer has other rules, or with another template."""
    stored = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    change(stored)
    tokenizer = tiny_tokenizer()
    rules = Tokenizer.from_str(json.dumps(stored))
    made = type(tokenizer)(
        tokenizer_object=rules,
        **{f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad")},
    )
    made.chat_template = template or tokenizer.chat_template
    return kvgeom.load(tiny_hf_model(), tokenizer=made, progress=False)


@pytest.mark.parametrize("what", ["{{ c[:40] }}", "{{ c|truncate(50) }}", "{{ c|replace('lock', 'l') }}"])
def test_templates_that_show_another_request_are_said_to(what: str) -> None:
    model = loaded(template="{% set c = messages[0].content %}<u>" + what + "</u>")
    model.encode(["Hi you"])
    begins = "Tell me at length how somebody would go about it to "
    with pytest.warns(
        KvgeomWarning, match=r"reads 1 request of 2 otherwise than asked: .* leaves out .* of 'Tell me at length"
    ):
        model.encode(["Hi you", begins + "pick a lock"])
    if "lock" not in what:
        with pytest.raises(InputError, match=r"reads prompts .* as the same"):
            model.encode([begins + "pick a lock", begins + "bake bread"])


@pytest.mark.parametrize("what", ["{{ c|e }}", "{{ c|tojson }}", "{{ c.split()|join(' ') }}"])
def test_templates_that_escape_or_tidy_leave_no_letter_out(what: str) -> None:
    with pytest.warns(KvgeomWarning, match="alters what a request says"):
        model = loaded(template="{% set c = messages[0].content %}<u>" + what + "</u>")
    for request in ('Say "a" and b', "Two\n\nlines  and blanks", "TELL me of \u00e9t\u00e9, \u6c34 and \U0001f30a"):
        assert model.encode([request])


def test_letters_without_a_token_are_no_blanks() -> None:
    """Of a tokenizer of characters that has no token for what it does not know."""

    def letters(stored: dict[str, Any]) -> None:
        keep = {f"<{name}>" for name in ("pad", "s", "/s", "unk")}
        known = [*sorted(keep), *"abcdefghijklmnopqrstuvwxyzHW?.,<>/ "]
        stored["model"] = {"type": "BPE", "vocab": {text: at for at, text in enumerate(known)}, "merges": []}
        stored["pre_tokenizer"] = stored["decoder"] = stored["post_processor"] = stored["normalizer"] = None
        stored["added_tokens"] = []

    model = loaded(letters, template="<u>{{ messages[0].content }}</u>")
    assert len(model.encode(["How does it go?"])[0]) == len("<u>How does it go?</u>")
    for request, lost in (("is it 水?", "水"), ("Как it go?", "как"), ("How W1?", "1")):
        with pytest.warns(KvgeomWarning, match=rf"leaves out '{lost}' of"):
            model.encode([request])
    with pytest.raises(InputError, match="as the same"):
        model.encode(["How Как?", "How Что?"])


def test_random_merges_are_switched_off() -> None:
    def dropping(stored: dict[str, Any]) -> None:
        vocabulary = dict(stored["model"]["vocab"])
        last = max(vocabulary, key=lambda text: vocabulary[text])
        vocabulary["an"] = vocabulary.pop(last)
        stored["model"] |= {"dropout": 0.5, "vocab": vocabulary, "merges": [["a", "n"]]}

    with pytest.warns(KvgeomWarning, match="cuts words at random"):
        model = loaded(dropping)
    assert len({model.encode(["an anan and any banana"])[0].ids for _ in range(20)}) == 1


def test_tokenizers_that_fail_are_one_line() -> None:
    def words(stored: dict[str, Any]) -> None:
        stored["model"] = {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "vocab": {"a": 5},
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 9,
        }

    with pytest.raises(ModelError, match=r"the tokenizer of .* fails on a plain text: .*UNK"):
        loaded(words)


def test_a_folder_whose_tokenizer_fails_is_one_line(tmp_path: Path) -> None:
    """Of a class whose rules need a word that the file does not have."""
    tiny_hf_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "BertTokenizer"}))
    with pytest.raises(ModelError, match=r"the tokenizer of .* fails on a plain text"):
        kvgeom.load(tmp_path, progress=False)
