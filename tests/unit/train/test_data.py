"""Packing, dealing, shuffling and resuming, checked against the documents' own tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp8dist.train import packing
from fp8dist.train.config import JobConfig
from fp8dist.train.data import build_dataset, find_data
from fp8dist.train.documents import Document, TextDocument
from fp8dist.train.packing import PackedDataset
from fp8dist.train.tokenizer import ByteTokenizer

SEQ_LEN = 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that do not hold these few bytes thousands of times over."""
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 400)


@pytest.fixture
def documents(tmp_path: Path) -> list[Document]:
    """20 documents of 1 to 20 bytes; document i is all byte 100 + i."""
    found = []
    for i in range(20):
        path = tmp_path / f"{i:02}.txt"
        path.write_bytes(bytes([100 + i]) * (i + 1))
        found.append(TextDocument(path, 0, i + 1))
    return found


def dataset(documents: list[Document], rank: int = 0, world: int = 1, **changes: Any):
    arguments = {
        "seq_len": SEQ_LEN,
        "local_batch_size": 2,
        "global_batch_size": 8,
        "seed": 3,
        "rank": rank,
        "world": world,
    }
    return PackedDataset(documents, ByteTokenizer(), **{**arguments, **changes})


def rows(dataset: PackedDataset, steps: int) -> np.ndarray:
    """All sequences of some steps, with the last target: (steps * batch, seq_len + 1)."""
    batches = [batch for _ in range(steps) for batch in dataset.next_step()]
    return np.concatenate(
        [np.concatenate((batch.tokens, batch.targets[:, -1:]), axis=1) for batch in batches]
    )


def test_targets_are_the_next_tokens(documents: list[Document]) -> None:
    for batch in dataset(documents).next_step():
        assert batch.tokens.shape == batch.targets.shape == (2, SEQ_LEN)
        assert (batch.tokens[:, 1:] == batch.targets[:, :-1]).all()


def test_an_epoch_holds_every_token_once_and_separators(
    documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 210 bytes of text and 20 separators; blocks of 46 x 5 tokens are exactly one epoch.
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 230)
    stream = rows(dataset(documents, seq_len=5, global_batch_size=46), steps=1)[:, :-1]
    values, counts = np.unique(stream, return_counts=True)
    expected = {0: 20} | {100 + i: i + 1 for i in range(20)}
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == expected


def test_documents_are_whole_and_end_in_a_separator(
    documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One sequence per block: the order of the stream stays, and pieces can be joined again.
    monkeypatch.setattr(packing, "BLOCK_TOKENS", SEQ_LEN)
    stream = rows(dataset(documents), steps=10)[:, :-1].flatten()
    assert len(stream) == 640
    parts = bytes(stream.astype(np.uint8)).split(b"\0")
    for part in parts[:-1]:  # the last one is cut off where the steps end
        assert part == part[:1] * (part[0] - 99)
    # Two whole epochs were read, in two orders.
    first, second = parts[:20], parts[20:40]
    assert sorted(first) == sorted(second)
    assert first != second
    assert first != sorted(first)


def test_sequences_are_shuffled_within_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.txt"
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 4000)
    path.write_bytes(bytes(range(1, 251)) * 4)
    stream = rows(dataset([TextDocument(path, 0, 1000)]), steps=10)
    # Each row goes on as the document does; the next row is rarely where this one ended.
    inside = np.diff(stream, axis=1)
    assert (np.isin(inside, (1, -249)) | (stream[:, 1:] == 0) | (stream[:, :-1] == 0)).all()
    follows = stream[1:, 0] == stream[:-1, -1]
    assert follows.mean() < 0.1


@pytest.mark.parametrize("world", [2, 4])
def test_global_batch_does_not_depend_on_the_ranks(documents: list[Document], world: int) -> None:
    alone = dataset(documents)
    shared = [dataset(documents, rank, world) for rank in range(world)]
    for _ in range(5):
        together = np.concatenate([rows(part, 1) for part in shared])
        assert np.array_equal(rows(alone, 1), together)


def test_accumulation_splits_a_ranks_share(documents: list[Document]) -> None:
    batches = dataset(documents, rank=1, world=2).next_step()
    assert [tuple(batch.tokens.shape) for batch in batches] == [(2, SEQ_LEN)] * 2
    with pytest.raises(ValueError, match="global_batch_size=8 .*local_batch_size=3 times 1"):
        dataset(documents, local_batch_size=3)
    with pytest.raises(ValueError, match="global_batch_size=0"):
        dataset(documents, global_batch_size=0)


@pytest.mark.parametrize("steps_before", [0, 1, 7])
def test_resumes_where_it_was_saved(
    documents: list[Document], steps_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of 5 sequences, so that steps of 8 begin and end inside them.
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 5 * SEQ_LEN)
    original = dataset(documents)
    for _ in range(steps_before):
        original.next_step()
    saved = json.loads(json.dumps(original.state_dict()))
    expected = rows(original, 6)
    resumed = dataset(documents)
    rows(resumed, 2)
    resumed.load_state_dict(saved)
    assert np.array_equal(rows(resumed, 6), expected)
    # A position suits another number of ranks and another batch size.
    half = dataset(documents, rank=0, world=2, global_batch_size=4)
    half.load_state_dict(saved)
    assert np.array_equal(rows(half, 1), expected[:2])


def test_position_in_other_data_is_refused(documents: list[Document]) -> None:
    saved = dataset(documents).state_dict()
    with pytest.raises(ValueError, match="documents 20, this run's 19"):
        dataset(documents[1:]).load_state_dict(saved)
    with pytest.raises(ValueError, match="seed 3, this run's 4"):
        dataset(documents, seed=4).load_state_dict(saved)
    with pytest.raises(ValueError, match="seq_len 8, this run's 9"):
        dataset(documents, seq_len=9).load_state_dict(saved)


def test_seeds_differ(documents: list[Document]) -> None:
    assert not np.array_equal(rows(dataset(documents), 2), rows(dataset(documents, seed=4), 2))


def test_broken_document_surfaces_from_the_reading_thread(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"no text": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl at byte 0"):
        dataset([TextDocument(path, 0, 15)])


def test_job_says_what_to_read(tmp_path: Path) -> None:
    job = JobConfig()
    job.training.dataset_path = str(tmp_path)
    with pytest.raises(ValueError, match="no text"):
        find_data(job)
    (tmp_path / "a.txt").write_text("some text")
    job.training.local_batch_size, job.training.seq_len = 3, 4
    documents, tokenizer = find_data(job)
    built = build_dataset(job, documents, tokenizer, rank=1, world=2)
    assert built.tokens_per_step == 2 * 3 * 4  # -1: local batches of all ranks
    assert [tuple(batch.tokens.shape) for batch in built.next_step()] == [(3, 4)]
