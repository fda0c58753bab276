"""What a job can do besides: validate, trace, save while it trains, keep its state elsewhere."""

import json
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils._pytree import keystr, tree_flatten_with_path

from fp8dist.train.checkpoint import Checkpointer
from fp8dist.train.config import parse_config
from fp8dist.train.loop import Trainer
from fp8dist.train.model import FLAVORS
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.test_train import (
    FLOAT8,
    STEPS,
    TINY,
    arguments,
    refusal,
    train,
    write_text,
)

VALIDATION = ["--validation.enable", "--validation.freq=4", "--validation.steps=2"]
TRAINED = ("losses", "grad_norms", "gathered_bytes")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plain")


@pytest.fixture(scope="module")
def plain(plain_folder: Path, text: Path) -> dict:
    """The record that nothing here may change."""
    argv = arguments(plain_folder, text, FLOAT8, "--checkpoint.enable", "--checkpoint.interval=2")
    record, _ = run_on_ranks(2, train, argv)
    return record


@pytest.fixture(scope="module")
def watched_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched")


@pytest.fixture(scope="module")
def watched(watched_folder: Path, text: Path) -> list[tuple[dict, bool]]:
    """By rank, the record of a run with validation and traces, and what `train_and_look` saw."""
    flags = [*VALIDATION, f"--validation.dataset_path={text}", "--metrics.enable_tensorboard"]
    flags += ["--profiling.enable_profiling", "--profiling.profile_freq=3"]
    flags += ["--profiling.profiler_warmup=1", "--profiling.save_traces_folder=traces"]
    return run_on_ranks(2, train_and_look, arguments(watched_folder, text, FLOAT8, *flags))


def train_and_look(argv: list[str]) -> tuple[dict, bool]:
    """The record, and whether all of the model is in training mode afterwards."""
    FLAVORS["tiny"] = TINY
    device = torch.device(DEVICE, torch.cuda.current_device() if DEVICE == "cuda" else None)
    trainer = Trainer(parse_config(argv), device)
    record = trainer.train().to_dict()
    return record, all(module.training for module in trainer.model.modules())


def test_validation_and_traces_change_no_step(
    watched: list[tuple[dict, bool]], plain: dict
) -> None:
    (record, is_training), _ = watched
    for name in TRAINED:
        assert record[name] == plain[name], name
    assert is_training


def test_validation_losses_are_recorded(
    watched: list[tuple[dict, bool]], watched_folder: Path
) -> None:
    (record, _), (other, _) = watched
    assert record["validation_steps"] == [4, STEPS]
    assert record["validation_losses"] == other["validation_losses"]
    saved = json.loads((watched_folder / "run.json").read_text())
    assert saved["validation_losses"] == record["validation_losses"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(watched_folder / "tb")).Reload()
    events = board.Scalars("validation_loss")
    assert [event.step for event in events] == [4, STEPS]
    # float32, as TensorBoard keeps it.
    assert [event.value for event in events] == pytest.approx(record["validation_losses"], rel=1e-6)


def test_one_rank_that_takes_all_sequences_has_the_validation_loss(
    tmp_path: Path,
    text: Path,
) -> None:
    """To float8's rounding: scales of each forward's activations are others."""
    flags = [*VALIDATION, f"--validation.dataset_path={text}", "--training.steps=1"]
    alone = arguments(tmp_path / "1", text, FLOAT8, *flags, "--validation.local_batch_size=4")
    [single] = run_on_ranks(1, train, alone)
    pair, _ = run_on_ranks(2, train, arguments(tmp_path / "2", text, FLOAT8, *flags))
    assert single["validation_losses"] == pytest.approx(pair["validation_losses"], rel=1e-3)


def test_validation_that_cannot_be_is_refused(tmp_path: Path, text: Path) -> None:
    (tmp_path / "short.txt").write_text("not one global batch")
    argv = arguments(tmp_path, text, "--validation.enable")
    for message in run_on_ranks(2, refusal, [*argv, f"--validation.dataset_path={tmp_path}"]):
        assert "the validation text has less than one global batch of 2 sequences" in message
    missing = f"--validation.dataset_path={tmp_path / 'missing'}"
    for message in run_on_ranks(2, refusal, [*argv, missing]):
        assert message == f"validation.dataset_path {tmp_path / 'missing'} does not exist"
    for message in run_on_ranks(2, refusal, [*argv, "--validation.dataset=c4_validation"]):
        assert "which needs validation.dataset_path" in message


def test_traces_of_every_rank(watched: list[tuple[dict, bool]], watched_folder: Path) -> None:
    files = sorted(
        str(path.relative_to(watched_folder)) for path in watched_folder.glob("traces/*/*")
    )
    assert files == [
        f"traces/iteration_{step}/rank{rank}_trace.json" for step in (3, 6) for rank in (0, 1)
    ]
    events = json.loads((watched_folder / files[0]).read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    # One step, the one that the name says, with a matmul and a collective in it.
    assert [name for name in names if re.match(r"ProfilerStep#", str(name))] == ["ProfilerStep#2"]
    assert "aten::mm" in names
    assert any("allgather" in str(name).lower() for name in names)


# Memory is pinned for a GPU; without one the modes are the same.
@pytest.mark.parametrize(
    "mode", ["async"] if DEVICE == "cpu" else ["async", "async_with_pinned_mem"]
)
def test_asynchronous_saves_are_of_one_moment(
    tmp_path: Path,
    text: Path,
    plain: dict,
    plain_folder: Path,
    mode: str,
) -> None:
    saving = ["--checkpoint.enable", "--checkpoint.interval=2", f"--checkpoint.async_mode={mode}"]
    argv = arguments(tmp_path, text, FLOAT8, *saving)
    whole, _ = run_on_ranks(2, train_while_saves_are_slow, argv)
    for name in TRAINED:
        assert whole[name] == plain[name], name
    checkpoints = tmp_path / "checkpoint"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-2", "step-4", "step-6"]
    for path in sorted(checkpoints.iterdir()):
        saved, expected = (
            everything_in(folder / "checkpoint" / path.name) for folder in (tmp_path, plain_folder)
        )
        assert saved == expected, path.name


def everything_in(checkpoint: Path) -> dict[str, object]:
    """Name -> what is saved there, tensors as bytes."""
    file = checkpoint.parent / "whole.pt"
    dcp_to_torch_save(checkpoint, file)
    state = torch.load(file, weights_only=False)
    file.unlink()
    leaves, _ = tree_flatten_with_path(state)
    return {
        keystr(path): leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else leaf
        for path, leaf in leaves
    }


def train_while_saves_are_slow(argv: list[str]) -> dict:
    """On every rank: a run whose saves write nothing before the next step has been trained."""
    published: list[int] = []
    stepped = threading.Event()
    write_data, save, close = FileSystemWriter.write_data, Checkpointer.save, Checkpointer.close
    step = Trainer._step

    def late(self, plan, planner):
        assert stepped.wait(60)
        return write_data(self, plan, planner)

    def counted(self, number, progress):
        self.wait()
        stepped.clear()
        save(self, number, progress)
        published.append(len(list(self._folder.glob("step-*[0-9]"))))

    def step_and_tell(self, number):
        numbers = step(self, number)
        stepped.set()
        return numbers

    def close_at_last(self):
        stepped.set()
        close(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", late)
        patch.setattr(Checkpointer, "save", counted)
        patch.setattr(Checkpointer, "close", close_at_last)
        patch.setattr(Trainer, "_step", step_and_tell)
        record = train(argv)
    # When the n-th save returned, it was not published yet.
    assert published == [0, 1, 2]
    return record


def test_offloaded_job_trains_alike(tmp_path: Path, text: Path, plain: dict) -> None:
    flags = ["--training.enable_cpu_offload", "--checkpoint.enable", "--checkpoint.interval=4"]
    argv = arguments(tmp_path, text, FLOAT8, *flags)
    record, _ = run_on_ranks(2, train, argv)
    shutil.rmtree(tmp_path / "checkpoint" / "step-6")
    resumed, _ = run_on_ranks(2, train, argv)
    assert resumed["losses"] == record["losses"]
    # Where the device is the CPU these are the same sums; a GPU's Adam rounds otherwise.
    assert record["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    assert record["gathered_bytes_per_step"] == plain["gathered_bytes_per_step"]
