"""Documents packed into the sequences of batches, in an order that can be taken up again."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fp8dist.train.documents import Document
from fp8dist.train.tokenizer import Tokenizer

BLOCK_TOKENS = 2**20
"""Sequences are shuffled within blocks of about this many tokens."""


def check_batch(global_batch_size: int, local_batch_size: int, world: int) -> None:
    """Raise ValueError unless `world` ranks can share out a global batch in local ones."""
    if global_batch_size < 1 or global_batch_size % (local_batch_size * world):
        raise ValueError(
            f"training.global_batch_size={global_batch_size} is not a multiple of "
            f"training.local_batch_size={local_batch_size} times {world} data-parallel ranks"
        )


class Batch(NamedTuple):
    """Token ids and, for each, the id that follows it; both (local_batch_size, seq_len) int64."""

    tokens: torch.Tensor
    targets: torch.Tensor


class Position(NamedTuple):
    """Where in the stream of documents a block begins."""

    block: int
    epoch: int
    next_document: int
    left_over: list[int]
    """Tokens already read that belong to this block."""


class Block(NamedTuple):
    """A stretch of the stream: its sequences in shuffled order, (count, seq_len + 1) int64."""

    start: Position
    sequences: np.ndarray
    following: Position


class PackedDataset:
    """An endless stream of batches over shuffled documents.

    Documents are shuffled anew in every epoch and each is followed by a separator. Their tokens
    are cut into sequences of `seq_len` and their targets, without padding, and the sequences are
    shuffled once more within blocks, since the pieces of a long document would otherwise fill
    whole batches. Every rank reads the whole stream and keeps its part of each global batch, so
    a global batch is the same however many ranks share it, and a saved position suits any
    number of ranks.

    Args:
        documents: what to train on; at least one.
        rank, world: this rank's place among the data-parallel ranks.
        global_batch_size: sequences in a step over all ranks; a multiple of
            `local_batch_size * world`.
    """

    def __init__(
        self,
        documents: list[Document],
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        local_batch_size: int,
        global_batch_size: int,
        rank: int,
        world: int,
        seed: int,
    ):
        check_batch(global_batch_size, local_batch_size, world)
        self._documents, self._tokenizer, self._seed = documents, tokenizer, seed
        self._seq_len, self._local_batch_size = seq_len, local_batch_size
        self._global_batch_size = global_batch_size
        share = global_batch_size // world
        self._mine = slice(rank * share, (rank + 1) * share)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._enter(self._submit(Position(0, 0, 0, [])))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self._global_batch_size * self._seq_len

    def next_step(self) -> list[Batch]:
        """The batches this rank takes in the next step, one for each gradient accumulation."""
        sequences = torch.from_numpy(self._take(self._global_batch_size)[self._mine])
        return [
            Batch(part[:, :-1], part[:, 1:]) for part in sequences.split(self._local_batch_size)
        ]

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, the same on every rank; plain values."""
        return {
            "documents": len(self._documents),
            "tokenizer": self._tokenizer.name,
            "seq_len": self._seq_len,
            "seed": self._seed,
            "position": self._block.start._asdict(),
            "used": self._used,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            ValueError: it was saved over another stream of sequences.
        """
        if "workers" in state:
            raise ValueError(
                f"the checkpoint's data has {state['workers']} workers, this run's 0: resume with "
                "the same training.dataloader.num_workers"
            )
        mine = self.state_dict()
        for key in ("documents", "tokenizer", "seq_len", "seed"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"the checkpoint's data has {key} {state[key]!r}, this run's {mine[key]!r}: "
                    "resume with the same data, tokenizer, training.seq_len and debug.seed"
                )
        self._enter(self._submit(Position(**state["position"])))
        self._used = state["used"]

    def _take(self, count: int) -> np.ndarray:
        """The next `count` sequences with their last targets, (count, seq_len + 1)."""
        parts = []
        while count:
            if self._used == len(self._block.sequences):
                self._enter(self._next)
            part = self._block.sequences[self._used : self._used + count]
            parts.append(part)
            self._used += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def _submit(self, start: Position) -> Future[Block]:
        return self._reader.submit(self._read_block, start)

    def _enter(self, block: Future[Block]) -> None:
        """Make `block` the current one, and have the next one read meanwhile."""
        self._block, self._used = block.result(), 0
        self._next = self._submit(self._block.following)

    def _read_block(self, start: Position) -> Block:
        """The block at `start`; depends on nothing else, so that a thread can run ahead."""
        count = max(1, BLOCK_TOKENS // self._seq_len)
        wanted = count * self._seq_len
        parts, have = [np.array(start.left_over, dtype=np.int64)], len(start.left_over)
        epoch, next_document = start.epoch, start.next_document
        order = self._order(epoch)
        while have <= wanted:
            if next_document == len(order):
                epoch, next_document = epoch + 1, 0
                order = self._order(epoch)
            tokens = self._tokenizer.encode(self._documents[order[next_document]].read())
            next_document += 1
            parts += [tokens, np.array([self._tokenizer.separator])]
            have += tokens.size + 1
        stream = np.concatenate(parts)
        # The last target of a sequence is the first token of the next one.
        begins = self._random(1, start.block).permutation(count) * self._seq_len
        sequences = stream[begins[:, None] + np.arange(self._seq_len + 1)]
        left_over = stream[wanted:].tolist()
        following = Position(start.block + 1, epoch, next_document, left_over)
        return Block(start, sequences, following)

    def _order(self, epoch: int) -> list[int]:
        """The documents in the order of an epoch: shuffled, but neighbours together, since reading
        one row of a .parquet takes as long as reading all of its group.
        """
        order = self._random(0, epoch).permutation(len(self._documents)).tolist()
        first: dict[tuple[Path, int], int] = {}
        places = [first.setdefault(self._documents[i].neighbours, len(first)) for i in order]
        if len(first) == len(order):
            return order
        return [i for _, i in sorted(zip(places, order, strict=True), key=lambda pair: pair[0])]

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, *purpose))
