"""Documents in .parquet files; where pyarrow is not installed, that it is asked for."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from fp8dist.train import packing, parquet
from fp8dist.train.documents import find_documents
from fp8dist.train.packing import PackedDataset
from fp8dist.train.tokenizer import ByteTokenizer

needs_pyarrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed"
)


def write(path: Path, columns: dict[str, list[Any]], rows_in_group: int = 3) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), path, row_group_size=rows_in_group)
    return path


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet needs the pyarrow .*: pip install pyarrow"):
        find_documents(path)


@needs_pyarrow
def test_rows_are_documents(tmp_path: Path) -> None:
    texts = [f"document {i} é" for i in range(7)] + [None]
    write(tmp_path / "b.parquet", {"id": list(range(8)), "text": texts})
    (tmp_path / "a.txt").write_text("before")
    documents = find_documents(tmp_path)
    expected = [b"before", *((text or "").encode() for text in texts)]
    assert [document.read() for document in documents] == expected
    assert [document.read() for document in reversed(documents)] == expected[::-1]


@needs_pyarrow
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"content": ["x"], "id": [1]}, "no column 'text'; its columns: content, id. Rename"),
        ({"text": [3]}, "the column 'text' is of type int64; expected string"),
    ],
)
def test_other_columns_are_refused(tmp_path: Path, columns: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_documents(write(tmp_path / "a.parquet", columns))


@needs_pyarrow
def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match=r"a\.parquet is not a \.parquet file"):
        find_documents(path)


@needs_pyarrow
def test_a_row_group_is_read_once_in_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 100)
    texts = [chr(ord("a") + i) * 20 for i in range(24)]
    documents = find_documents(write(tmp_path / "a.parquet", {"text": texts}))
    dataset = PackedDataset(
        documents,
        ByteTokenizer(),
        seq_len=8,
        local_batch_size=1,
        global_batch_size=1,
        rank=0,
        world=1,
        seed=0,
    )
    first, second = dataset._order(0), dataset._order(1)
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second != list(range(24))
    dataset._reader.shutdown()  # which reads ahead
    parquet._group.cache_clear()
    for index in first:
        assert documents[index].read() == texts[index].encode()
    assert parquet._group.cache_info().misses == 8
    # Groups are shuffled, and the rows of a group too.
    groups = [index // 3 for index in first[::3]]
    assert sorted(groups) == list(range(8)) != groups
    assert any(first[i : i + 3] != sorted(first[i : i + 3]) for i in range(0, 24, 3))
