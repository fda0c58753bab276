"""Text to token ids: a `tokenizer.json`, or the bytes themselves."""

from pathlib import Path
from typing import Protocol

import numpy as np

BYTE_SEPARATOR = 0
"""Stands between documents of bytes: NUL, which text does not contain."""


class Tokenizer(Protocol):
    """What the data set needs of a tokenizer."""

    name: str
    vocab_size: int
    separator: int
    """The id that ends a document."""

    def encode(self, text: bytes) -> np.ndarray:
        """UTF-8 text -> its token ids, int64, without the separator."""
        ...


class ByteTokenizer:
    """Every byte is a token; a loss is then in nats per byte."""

    name = "bytes"
    vocab_size = 256
    separator = BYTE_SEPARATOR

    def encode(self, text: bytes) -> np.ndarray:
        """The bytes of `text` as int64."""
        return np.frombuffer(text, dtype=np.uint8).astype(np.int64)


class FileTokenizer:
    """A tokenizer in the format of Hugging Face's `tokenizers` package.

    The document separator is the first of its tokens that is named like one, else id 0.

    Raises:
        ValueError: the file is not such a tokenizer, or the package is missing.
    """

    ENDINGS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[SEP]", "[EOS]")

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer as HuggingFaceTokenizer
        except ImportError as error:
            raise ValueError(
                f"{path} needs the tokenizers package: pip install tokenizers"
            ) from error
        try:
            self._tokenizer = HuggingFaceTokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{path} is not a tokenizer that can be read: {error}") from error
        self.name = str(path)
        # Ids can have gaps, so the largest one counts and not their number.
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        if not ids:
            raise ValueError(f"{path} has an empty vocabulary")
        self.vocab_size = max(ids.values()) + 1
        self.separator = next((ids[name] for name in self.ENDINGS if name in ids), 0)

    def encode(self, text: bytes) -> np.ndarray:
        """The token ids of `text` as int64, without special tokens added around it."""
        decoded = text.decode("utf-8", errors="replace")
        ids = self._tokenizer.encode(decoded, add_special_tokens=False).ids
        return np.array(ids, dtype=np.int64)


def load_tokenizer(assets: str | None) -> Tokenizer:
    """The tokenizer in the folder `assets`, or bytes if it has no `tokenizer.json`."""
    path = Path(assets) / "tokenizer.json" if assets else None
    return FileTokenizer(path) if path is not None and path.is_file() else ByteTokenizer()
