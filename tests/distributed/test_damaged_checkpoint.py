"""Checkpoints that are cut off, incomplete, or made to run code are refused on all ranks."""

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from fp8dist.train import model
from fp8dist.train.config import parse_config
from fp8dist.train.loop import Trainer
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.test_train import FLOAT8, TINY, arguments, train, write_text
from tests.distributed.toy import full, same_bits

WEIGHT = "model.layers.0.attention.wq.weight"


class Hostile:
    """Runs a command when it is unpickled, if the reader lets it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def metadata_of(folder: Path) -> Metadata:
    return dcp.FileSystemReader(folder).read_metadata()


def write_metadata(folder: Path, metadata: Metadata) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def data_file(folder: Path) -> Path:
    return sorted(folder.glob("*.distcp"))[-1]


def hostile_metadata(folder: Path, marker: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(marker)))


def hostile_inside_metadata(folder: Path, marker: Path) -> None:
    metadata = metadata_of(folder)
    metadata.planner_data = Hostile(marker)
    write_metadata(folder, metadata)


def cut_metadata(folder: Path, marker: Path) -> None:
    os.truncate(folder / ".metadata", 200)


def empty_metadata(folder: Path, marker: Path) -> None:
    os.truncate(folder / ".metadata", 0)


def no_metadata(folder: Path, marker: Path) -> None:
    (folder / ".metadata").unlink()


def no_data_file(folder: Path, marker: Path) -> None:
    data_file(folder).unlink()


def cut_data_file(folder: Path, marker: Path) -> None:
    os.truncate(data_file(folder), data_file(folder).stat().st_size // 2)


def zeros_in_data_file(folder: Path, marker: Path) -> None:
    size = data_file(folder).stat().st_size
    data_file(folder).write_bytes(bytes(size))


def elsewhere(folder: Path, marker: Path) -> None:
    shutil.copy(data_file(folder), marker.with_name("outside.distcp"))
    metadata = metadata_of(folder)
    for index, place in metadata.storage_data.items():
        metadata.storage_data[index] = replace(place, relative_path="../../../outside.distcp")
    write_metadata(folder, metadata)


def put(folder: Path, name: str, content: Any) -> None:
    """Let the entry `name` be what torch.save makes of `content`."""
    metadata, file = metadata_of(folder), data_file(folder)
    start = file.stat().st_size
    with open(file, "ab") as opened:
        torch.save(content, opened)
    length = file.stat().st_size - start
    for index, place in metadata.storage_data.items():
        if index.fqn == name:
            metadata.storage_data[index] = replace(
                place, relative_path=file.name, offset=start, length=length
            )
    write_metadata(folder, metadata)


def hostile_progress(folder: Path, marker: Path) -> None:
    put(folder, "progress", Hostile(marker))


def hostile_tensor(folder: Path, marker: Path) -> None:
    put(folder, WEIGHT, Hostile(marker))


def hostile_number(folder: Path, marker: Path) -> None:
    put(folder, "optimizer.param_groups.0.lr", Hostile(marker))


def progress_of_another_kind(folder: Path, marker: Path) -> None:
    put(folder, "progress", "[1, 2]")


def tensor_of_another_shape(folder: Path, marker: Path) -> None:
    put(folder, WEIGHT, torch.zeros(3, 5))


def tensor_of_another_dtype(folder: Path, marker: Path) -> None:
    chunk = metadata_of(folder).state_dict_metadata[WEIGHT].chunks[0]
    put(folder, WEIGHT, torch.ones(chunk.sizes, dtype=torch.int64))


def entry_of_another_dtype(folder: Path, marker: Path) -> None:
    tensor_of_another_dtype(folder, marker)
    metadata = metadata_of(folder)
    entry = metadata.state_dict_metadata[WEIGHT]
    properties = replace(entry.properties, dtype=torch.int64)
    metadata.state_dict_metadata[WEIGHT] = replace(entry, properties=properties)
    write_metadata(folder, metadata)


def another_model(folder: Path, marker: Path) -> None:
    metadata = metadata_of(folder)
    entry = metadata.state_dict_metadata[WEIGHT]
    metadata.state_dict_metadata[WEIGHT] = replace(entry, size=torch.Size((8, 8)))
    write_metadata(folder, metadata)


Damage = Callable[[Path, Path], None]
DAMAGES: list[Damage] = [
    hostile_metadata,
    hostile_inside_metadata,
    cut_metadata,
    empty_metadata,
    no_metadata,
    no_data_file,
    cut_data_file,
    zeros_in_data_file,
    elsewhere,
    hostile_progress,
    hostile_tensor,
    hostile_number,
    progress_of_another_kind,
    tensor_of_another_shape,
    tensor_of_another_dtype,
    entry_of_another_dtype,
    another_model,
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A checkpoint of two ranks, and the arguments of its run."""
    text = write_text(tmp_path_factory.mktemp("text"))
    folder = tmp_path_factory.mktemp("run")
    saving = ("--checkpoint.enable", "--checkpoint.interval=2", "--training.steps=2")
    argv = arguments(folder, text, FLOAT8, *saving)
    run_on_ranks(2, train, argv)
    return folder / "checkpoint" / "step-2", argv


def state_of(trainer: Trainer) -> list[Any]:
    optimizer = [
        {
            key: full(value).clone().flatten()
            for key, value in state.items()
            if isinstance(value, torch.Tensor)
        }
        for state in trainer.optimizer.state.values()
    ]
    return [{n: full(p).clone() for n, p in trainer.model.named_parameters()}, optimizer]


def refused(argv: list[str]) -> str:
    """The message; the state of the run is what it was, and the run can go on."""
    model.FLAVORS["tiny"] = TINY
    device = torch.device(DEVICE, torch.cuda.current_device() if DEVICE == "cuda" else None)
    trainer = Trainer(parse_config(argv), device)
    assert trainer.checkpointer is not None
    trainer._step(1)
    before = state_of(trainer)
    with pytest.raises(ValueError) as error:
        trainer.checkpointer.load_newest()
    assert same_bits(state_of(trainer), before)
    assert trainer._step(2).isfinite().all()
    return str(error.value)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_it_is_refused(damage: Damage, saved: tuple[Path, list[str]], tmp_path: Path) -> None:
    checkpoint, argv = saved
    folder, marker = tmp_path / "run" / "checkpoint" / "step-2", tmp_path / "it-ran"
    shutil.copytree(checkpoint, folder)
    damage(folder, marker)
    argv = [f"--job.dump_folder={tmp_path / 'run'}", *argv[1:]]
    first, second = run_on_ranks(2, refused, argv)
    assert first == second
    assert str(folder) in first
    assert "cannot be read" in first or "is of another model" in first
    if "dtype" in damage.__name__:
        assert f"{WEIGHT} is torch.int64" in first
    assert not marker.exists()


def test_the_hostile_ones_would_run(saved: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Or the tests above would show nothing."""
    folder, marker = tmp_path / "step-2", tmp_path / "it-ran"
    shutil.copytree(saved[0], folder)
    hostile_metadata(folder, marker)
    with open(folder / ".metadata", "rb") as file:
        pickle.load(file)
    assert marker.exists()


def test_the_undamaged_one_loads(saved: tuple[Path, list[str]], tmp_path: Path) -> None:
    checkpoint, argv = saved
    shutil.copytree(checkpoint, tmp_path / "checkpoint" / "step-2")
    argv = [f"--job.dump_folder={tmp_path}", *argv[1:], "--training.steps=3"]
    record, _ = run_on_ranks(2, train, argv)
    assert len(record["losses"]) == 3
