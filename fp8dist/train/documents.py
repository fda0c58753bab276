"""The training text: which documents there are, and how to read one."""

import json
import math
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fp8dist.train.parquet import ParquetRow, rows_of

KINDS = (".txt", ".jsonl", ".parquet")
"""Of the files that documents are read from."""

REFERENCE_BYTES = 64 * 2**20
"""The reference entropies are computed on at most this much text."""


class TextDocument(NamedTuple):
    """One document: a stretch of a file."""

    path: Path
    offset: int
    length: int

    @property
    def neighbours(self) -> tuple[Path, int]:
        """The same for documents that are best read one after the other: here, for no two."""
        return self.path, self.offset

    def read(self) -> bytes:
        """The document's text, as UTF-8. Raises ValueError for a broken line of .jsonl."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.length)
        if self.path.suffix != ".jsonl":
            return content
        try:
            text = json.loads(content)["text"]
            return text.encode("utf-8", errors="replace")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} at byte {self.offset} is no JSON object with a string named "
                f'"text": {content[:60]!r}'
            ) from error


Document = TextDocument | ParquetRow


def find_documents(path: Path | None, section: str = "training") -> list[Document]:
    """The documents at `path`, a .txt, .jsonl or .parquet file or a folder of them, in a fixed
    order. Those of a .parquet are the rows of its column "text".

    Without a path: the source files of this Python's standard library, its tests left out; to
    validate (`section` is the configuration's, whose dataset_path it is), torch's own.

    Raises:
        ValueError: nothing to train on is there, or it is of another kind.
    """
    key = f"{section}.dataset_path"
    if path is None and section == "validation":
        files, where = torch_sources(), "torch"
    elif path is None:
        files, where = standard_library_sources(), "Python's standard library"
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in KINDS)
        where = str(path)
    elif path.is_file():
        if path.suffix not in KINDS:
            raise ValueError(
                f"{key} {path} is neither a .txt, .jsonl or .parquet file, nor a folder"
            )
        files, where = [path], str(path)
    else:
        raise ValueError(f"{key} {path} does not exist")
    documents = [document for file in files for document in _documents_in(file)]
    if not documents:
        raise ValueError(
            f"{where} has no text to {'train on' if section == 'training' else 'validate on'}: "
            f"give {key} a .txt, .jsonl or .parquet file that is not empty, or a folder of them"
        )
    documents[0].read()  # a .jsonl without "text" is refused now, not in the middle of the run
    return documents


def standard_library_sources() -> list[Path]:
    """The .py files of this Python's standard library in a fixed order, tests left out."""
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    found = []
    for folder, folders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        folders[:] = set(folders) - left_out  # which may be large, and are not looked into
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(path for path in found if path.is_file())


def torch_sources() -> list[Path]:
    """The .py files of the installed torch in a fixed order."""
    return sorted(Path(torch.__file__).parent.rglob("*.py"))


def _documents_in(path: Path) -> Iterator[Document]:
    """Every non-empty line of a .jsonl, every row of a .parquet, the whole of any other file;
    nothing if it is empty."""
    if path.suffix == ".parquet":
        yield from rows_of(path)
        return
    if path.suffix != ".jsonl":
        size = path.stat().st_size
        if size:
            yield TextDocument(path, 0, size)
        return
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                yield TextDocument(path, offset, len(line))
            offset += len(line)


class ReferenceEntropies(NamedTuple):
    """What a model that counts reaches on this text, in nats per byte."""

    single_bytes: float
    """The entropy of a byte."""
    byte_pairs: float
    """The entropy of a byte when the one before it is known."""


def reference_entropies(
    documents: list[Document], limit: int = REFERENCE_BYTES
) -> ReferenceEntropies:
    """Entropies of bytes and of byte pairs, counted over the first `limit` bytes of text.

    Pairs do not reach across documents; they and the bytes are those of the same text.
    """
    pairs = np.zeros(256 * 256, dtype=np.int64)
    read = 0
    for document in documents:
        text = np.frombuffer(document.read(), dtype=np.uint8).astype(np.int64)
        pairs += np.bincount(text[:-1] * 256 + text[1:], minlength=pairs.size)
        read += text.size
        if read >= limit:
            break
    table = pairs.reshape(256, 256)
    first, second = table.sum(axis=1), table.sum(axis=0)
    return ReferenceEntropies(_entropy(second), max(0.0, _entropy(table) - _entropy(first)))


def _entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution with these counts; NaN if there are none."""
    total = counts.sum()
    if total == 0:
        return math.nan
    share = counts[counts > 0] / total
    return float(-(share * np.log(share)).sum())
