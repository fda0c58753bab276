"""Batches that other processes prepare, by torchdata's stateful loader."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch.utils.data

from fp8dist.train.config_sections import DataloaderSection
from fp8dist.train.packing import Batch, PackedDataset


class WorkerLoader:
    """The interface of `PackedDataset`, with each step's batches from the next of some workers.

    Each worker has a part of the documents to itself and packs them as `PackedDataset` does, so
    that tokenizing takes as many cores as there are workers. The order of the data depends on
    their number, and so does a saved position; neither depends on the number of ranks.

    Args:
        stream: (worker, number of workers) -> that worker's data.
        tokens_per_step: tokens of a global batch.

    Raises:
        ValueError: the torchdata package is missing.
    """

    def __init__(
        self,
        section: DataloaderSection,
        stream: Callable[[int, int], PackedDataset],
        tokens_per_step: int,
    ):
        try:
            from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore # optional
        except ImportError as error:
            raise ValueError(
                f"training.dataloader.num_workers is {section.num_workers}, which needs a package: "
                "pip install torchdata. With 0, a thread prepares the batches"
            ) from error
        self.tokens_per_step = tokens_per_step
        self._workers = section.num_workers
        with warnings.catch_warnings():
            # Of a function of torch that has done nothing for long.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            self._loader = StatefulDataLoader(
                _Stream(stream),
                batch_size=None,
                num_workers=section.num_workers,
                prefetch_factor=section.prefetch_factor,
            )
        self._batches: Iterator[list[Batch]] | None = None

    def next_step(self) -> list[Batch]:
        """The batches this rank takes in the next step, one for each gradient accumulation."""
        if self._batches is None:
            self._batches = iter(self._loader)
        return next(self._batches)

    def state_dict(self) -> dict[str, Any]:
        """The position in every worker's stream, the same on every rank; plain values."""
        if self._batches is None:
            self._batches = iter(self._loader)
        return {"workers": self._workers, "loader": self._loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            ValueError: it was saved with another number of workers.
        """
        if state.get("workers", 0) != self._workers:
            raise ValueError(
                f"the checkpoint's data has {state.get('workers', 0)} workers, this run's "
                f"{self._workers}: resume with the same training.dataloader.num_workers"
            )
        self._loader.load_state_dict(state["loader"])
        self._batches = iter(self._loader)


class _Stream(torch.utils.data.IterableDataset):
    """What runs in a worker: endless, and able to say where it is."""

    def __init__(self, stream: Callable[[int, int], PackedDataset]):
        self._open = stream
        self._data: PackedDataset | None = None

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield self._opened().next_step()

    def state_dict(self) -> dict[str, Any]:
        return self._opened().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._opened().load_state_dict(state)

    def _opened(self) -> PackedDataset:
        if self._data is None:
            # Not before, since its thread would not be in the worker.
            worker = torch.utils.data.get_worker_info()
            if worker is None:
                raise AssertionError("a stream of workers was opened outside of one")
            self._data = self._open(worker.id, worker.num_workers)
        return self._data
