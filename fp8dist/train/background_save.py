"""Writing a checkpoint while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions


class BackgroundSaver:
    """One save at a time, from a copy in main memory that it keeps for the next.

    Args:
        mode: "async", or "async_with_pinned_mem", whose copy lies in page-locked memory where
            there is a GPU: that is filled faster, and never swapped out.
    """

    def __init__(self, mode: str):
        pinned = mode == "async_with_pinned_mem" and torch.cuda.is_available()
        self._stager = _KeptStager(
            StagingOptions(
                use_pinned_memory=pinned,
                use_shared_memory=False,
                use_async_staging=False,  # an optimizer step would change what is being copied
                use_non_blocking_copy=pinned,
            )
        )
        # Of its own, so that its messages do not meet those of training.
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def save(self, state: dict[str, Any], folder: Path, publish: Callable[[], None]) -> None:
        """Copy `state`; write the copy to `folder` and then call `publish`, in another thread.

        Once a rank's write has ended without an error, those of all other ranks have. The save
        before must have ended.
        """
        if self._running is not None:
            raise AssertionError("a save has begun before the one before it was waited for")
        written = dcp.async_save(
            state, checkpoint_id=folder, process_group=self._group, async_stager=self._stager
        )
        if not isinstance(written, Future):
            raise AssertionError("the copy is not made asynchronously, but torch says it is")
        self._running = self._thread.submit(_finish, written, publish)

    def wait(self) -> None:
        """Return when the last save has ended; raises its error."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Give back the memory and the thread."""
        self._thread.shutdown()
        self._stager.release()
        dist.destroy_process_group(self._group)


class _KeptStager(DefaultStager):
    """torch's, which keeps its memory for the next save: that of torch 2.11 cannot copy twice."""

    def stage(self, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """A copy in main memory, complete when this returns."""
        wait = self._config.use_non_blocking_copy
        copy = self._state_dict_stager.stage(state_dict, non_blocking=wait)
        if wait:
            torch.cuda.synchronize()
        return copy

    def close(self) -> None:
        """Nothing: torch calls this after every save."""

    def release(self) -> None:
        """Give back the memory."""
        self._state_dict_stager.close()


def _finish(written: Future[Any], publish: Callable[[], None]) -> None:
    written.result()
    publish()
