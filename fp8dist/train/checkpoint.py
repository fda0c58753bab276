"""Saving a run with torch.distributed.checkpoint, and resuming it."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from fp8dist.train.background_save import BackgroundSaver
from fp8dist.train.checkpoint_files import Rehearsal, SafePlanner, SafeReader, check_files
from fp8dist.train.config_sections import CheckpointSection
from fp8dist.train.distributed import agree

UNFINISHED = ".tmp"


class Checkpointer:
    """Writes `folder/step-N` and finds the newest one; the folder is shared by all ranks.

    The model is saved as plain tensors under the unconverted model's names. Everything else
    about the run is a dictionary of plain values that the caller owns.
    """

    def __init__(
        self,
        section: CheckpointSection,
        dump_folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
    ):
        self._folder = dump_folder / section.folder
        self._model, self._optimizer = model, optimizer
        mode = section.async_mode
        self._background = None if mode == "disabled" else BackgroundSaver(mode)

    def save(self, step: int, progress: dict[str, Any]) -> None:
        """Write checkpoint `step`; it appears under its name only when it is complete.

        Asynchronously this returns when all that it needs has been copied, and first waits for the
        save before, whose error it raises.
        """
        self.wait()
        finished = self._folder / f"step-{step}"
        unfinished = finished.with_name(finished.name + UNFINISHED)

        def clear_way() -> None:
            if dist.get_rank() == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(unfinished, ignore_errors=True)

        def publish() -> None:
            if dist.get_rank() == 0:
                shutil.rmtree(finished, ignore_errors=True)
                os.rename(unfinished, finished)

        agree(clear_way)
        state = {**self._tensors(), "progress": json.dumps(progress)}
        if self._background is None:
            dcp.save(state, checkpoint_id=unfinished)
            agree(publish)
        else:
            self._background.save(state, unfinished, publish)

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            ValueError: on every rank: what was being written could not be published.
        """
        if self._background is not None:
            agree(self._background.wait)

    def close(self) -> None:
        """`wait`, and give back what saving kept; nothing can be saved after this."""
        self.wait()
        if self._background is not None:
            self._background.close()

    def load_newest(self) -> dict[str, Any] | None:
        """Restore the newest checkpoint and return its progress; None if there is none.

        Raises:
            ValueError: on every rank: it is not of this model, a file of it is missing, cut off or
                damaged, or holds anything but data; model and optimizer are as they were.
        """
        path = self._newest()
        if path is None:
            return None
        state = {**self._tensors(), "progress": ""}
        agree(lambda: self._check(path, state))
        # In place, so all is read once before: what cannot be read leaves this run as it is.
        for planner in (Rehearsal(), SafePlanner()):
            try:
                dcp.load(state, storage_reader=SafeReader(path), planner=planner)
            except dcp.api.CheckpointException as error:  # on all ranks, of whichever failed
                raise _unreadable(path, _first_failure(error)) from error
            progress = agree(lambda: _parse(path, state["progress"]))
        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return progress

    def _tensors(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer}

    def _newest(self) -> Path | None:
        """The complete checkpoint with the highest step, as rank 0 sees it."""
        found: list[str | None] = [None]
        if dist.get_rank() == 0 and self._folder.is_dir():
            steps = [
                int(match[1])
                for entry in self._folder.iterdir()
                if (match := re.fullmatch(r"step-(\d+)", entry.name))
            ]
            found = [f"step-{max(steps)}" if steps else None]
        dist.broadcast_object_list(found, src=0)
        return self._folder / found[0] if found[0] is not None else None

    def _check(self, path: Path, state: dict[str, Any]) -> None:
        """Raise ValueError unless `path` holds exactly this model's parameters, in its shapes."""
        try:
            metadata = SafeReader(path).read_metadata()
            check_files(path, metadata)
        except Exception as error:  # missing file or broken pickle, of any exception type
            raise _unreadable(path, error) from error
        saved = {
            name.removeprefix("model."): tuple(entry.size)
            for name, entry in metadata.state_dict_metadata.items()
            if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
        }
        wanted = {name: tuple(tensor.shape) for name, tensor in state["model"].items()}
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise ValueError(
                    f"checkpoint {path} is of another model: {name} is "
                    f"{saved.get(name, 'missing')} there and {wanted.get(name, 'missing')} here. "
                    "Resume with the model it was saved from, or choose another "
                    "job.dump_folder or checkpoint.folder"
                )


def _unreadable(path: Path, error: BaseException) -> ValueError:
    return ValueError(
        f"checkpoint {path} cannot be read ({error!r}): remove it to start from an older one or "
        "from the beginning"
    )


def _first_failure(error: dcp.api.CheckpointException) -> BaseException:
    failure, _traceback = error.failures[min(error.failures)]
    return failure


def _parse(path: Path, text: Any) -> dict[str, Any]:
    try:
        progress = json.loads(text)
    except (TypeError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(progress, dict):
        raise _unreadable(path, TypeError(f"its progress is a {type(progress).__name__}"))
    return progress
