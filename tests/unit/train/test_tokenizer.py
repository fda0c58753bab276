"""Bytes as tokens, and tokenizer.json files made here."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from fp8dist.train.tokenizer import ByteTokenizer, load_tokenizer


def write_tokenizer(folder: Path, words: dict[str, int]) -> None:
    model = tokenizers.models.WordLevel(words, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    # What puts ids around every text: not wanted here, since documents are packed.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", words["</s>"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def test_without_a_file_bytes_are_tokens(tmp_path: Path) -> None:
    for assets in (None, str(tmp_path), str(tmp_path / "missing")):
        tokenizer = load_tokenizer(assets)
        assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode("aé".encode()).tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.separator not in tokenizer.encode(b"any text\n\t")


def test_tokenizer_json(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, {"?": 0, "hello": 1, "world": 7, "</s>": 5})
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.vocab_size == 8  # ids have a gap, and the largest is 7
    assert tokenizer.separator == 5
    encoded = tokenizer.encode(b"hello brave \xff world")
    assert encoded.dtype == np.int64
    assert encoded.tolist()[0] == 1
    assert encoded.tolist()[-1] == 7
    assert 5 not in encoded


@pytest.mark.parametrize("content", ["{}", "not json", json.dumps({"model": {"type": "What"}})])
def test_broken_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(str(tmp_path))
