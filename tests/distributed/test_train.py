"""The trainer's job on real ranks: what it prints, writes, refuses, and how it ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fp8dist.train import compare, loop, model
from fp8dist.train.config import parse_config
from fp8dist.train.documents import find_documents
from fp8dist.train.model import ModelShape
from tests.distributed import programs
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.environment import cpu_environment

TINY = ModelShape(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=256)
FLOAT8 = "--model.converters=quantize.linear.float8"
STEPS = 6
# Two updates of the weights, the second with the whole learning rate.
FEW = "--training.steps=3"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little of the standard library, so that a job starts at once."""
    return write_text(tmp_path_factory.mktemp("text"))


def write_text(folder: Path) -> Path:
    for document in find_documents(None)[:40]:
        (folder / f"{document.path.stem}-{document.length}.txt").write_bytes(document.read())
    return folder


def arguments(folder: Path, text: Path, *more: str) -> list[str]:
    return [
        f"--job.dump_folder={folder}",
        f"--training.dataset_path={text}",
        "--model.flavor=tiny",
        f"--training.steps={STEPS}",
        "--training.seq_len=32",
        "--training.local_batch_size=2",
        "--training.global_batch_size=8",
        "--training.mixed_precision_param=float32",
        "--activation_checkpoint.mode=none",
        "--optimizer.lr=3e-3",
        "--lr_scheduler.warmup_steps=2",
        "--metrics.log_freq=2",
        *more,
    ]


def train(argv: list[str]) -> dict[str, Any]:
    """On every rank: one run of the tiny model; its record."""
    model.FLAVORS["tiny"] = TINY
    device = torch.device(DEVICE, torch.cuda.current_device() if DEVICE == "cuda" else None)
    return loop.Trainer(parse_config(argv), device).train().to_dict()


def refusal(argv: list[str]) -> str:
    """On every rank: the message of the ValueError that the run ends with."""
    with pytest.raises(ValueError) as caught:
        train(argv)
    return str(caught.value)


def warnings(argv: list[str]) -> list[str]:
    """On every rank: what the loop warns of."""
    with mock.patch.object(loop.logger, "warning") as warning:
        train(argv)
    return [call.args[0] % call.args[1:] for call in warning.call_args_list]


def test_resume_goes_on_bitwise(tmp_path: Path, text: Path) -> None:
    argv = arguments(tmp_path, text, FLOAT8, "--checkpoint.enable", "--checkpoint.interval=3")
    whole, _ = run_on_ranks(2, train, argv)
    checkpoints = tmp_path / "checkpoint"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-3", "step-6"]
    shutil.rmtree(checkpoints / "step-6")
    (checkpoints / "step-4.tmp").mkdir()  # a save that was interrupted
    resumed, _ = run_on_ranks(2, train, argv)
    assert len(whole["losses"]) == STEPS
    assert resumed["losses"] == whole["losses"]
    assert resumed["grad_norms"] == whole["grad_norms"]
    saved = json.loads((tmp_path / "run.json").read_text())
    assert saved["losses"] == whole["losses"]
    left = "nothing is left to train: the checkpoint is of step 6, training.steps is 4"
    assert run_on_ranks(2, warnings, [*argv, "--training.steps=4"]) == [[left], [left]]


def test_checkpoint_fits_other_ranks_and_converters_but_no_other_model(
    tmp_path: Path, text: Path
) -> None:
    saving = ("--checkpoint.enable", "--checkpoint.interval=3")
    argv = arguments(tmp_path, text, FLOAT8, *saving)
    whole, _ = run_on_ranks(2, train, argv)
    shutil.rmtree(tmp_path / "checkpoint" / "step-6")
    [resumed] = run_on_ranks(1, train, arguments(tmp_path, text, *saving))
    # Three steps in float32 after three in float8, on the same data.
    assert resumed["losses"][:3] == whole["losses"][:3]
    assert resumed["losses"][3:] != whole["losses"][3:]
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=0.02)

    messages = run_on_ranks(
        2, refusal, arguments(tmp_path, text, *saving, "--model.flavor=debugmodel")
    )
    assert messages[0] == messages[1]
    assert re.search(r"step-6 is of another model: layers\.0\.attention\.wk\.weight", messages[0])
    (tmp_path / "checkpoint" / "step-6" / ".metadata").write_bytes(b"broken")
    messages = run_on_ranks(2, refusal, argv)
    assert messages[0] == messages[1]
    assert "step-6 cannot be read" in messages[0]


@pytest.mark.parametrize("converter", ["--model.converters=", FLOAT8])
def test_one_and_two_ranks_agree(tmp_path: Path, text: Path, converter: str) -> None:
    # Accumulation on one rank forwards the same pairs of sequences as two ranks do, so that even
    # the scales of float8 activations are the same. What is left: gradients are added up in
    # another order, in float32. 6 steps of Adam at 3e-3 make 1e-5 of that; float8 rounds a
    # weight that changed by 1 unit of float32 differently now and then, by up to 1/16.
    argv = arguments(tmp_path, text, converter)
    [alone] = run_on_ranks(1, train, argv)
    together, again = run_on_ranks(2, train, argv)
    assert together["losses"] == again["losses"]
    assert alone["losses"][0] == pytest.approx(together["losses"][0], rel=1e-6)
    tolerance = 1e-3 if converter == FLOAT8 else 1e-4
    assert alone["losses"] == pytest.approx(together["losses"], rel=tolerance)
    assert alone["gathered_bytes_per_step"] == 0


def padded_bytes(rows: int, columns: int, size: int, ranks: int) -> int:
    return -(-rows // ranks) * ranks * columns * size


@pytest.mark.parametrize(
    ("flags", "size", "gathers", "root_gathers"),
    [
        ([FLOAT8], 1, 2, 1),
        ([FLOAT8, "--parallelism.fsdp_reshard_after_forward=always"], 1, 2, 2),
        ([FLOAT8, "--parallelism.fsdp_reshard_after_forward=never"], 1, 1, 1),
        (["--training.mixed_precision_param=bfloat16"], 2, 2, 1),
        ([FLOAT8, "--quantize.linear.float8.enable_fsdp_float8_all_gather=false"], 4, 2, 1),
    ],
)
def test_gathered_bytes_are_counted(
    tmp_path: Path, text: Path, flags: list[str], size: int, gathers: int, root_gathers: int
) -> None:
    argv = arguments(tmp_path, text, "--training.global_batch_size=4", FEW, *flags)
    argv.append("--quantize.linear.float8.filter_fqns=output")
    record, _ = run_on_ranks(2, train, argv)
    high = 2 if "--training.mixed_precision_param=bfloat16" in flags else 4
    head_dim = TINY.dim // TINY.n_heads
    kv = TINY.n_kv_heads * head_dim
    weights = [(TINY.dim, TINY.dim)] * 2 + [(kv, TINY.dim)] * 2
    weights += [(TINY.hidden_dim, TINY.dim)] * 2 + [(TINY.dim, TINY.hidden_dim)]
    block = sum(padded_bytes(*shape, size, 2) for shape in weights)
    block += 2 * padded_bytes(TINY.dim, 1, high, 2)
    root = 2 * padded_bytes(TINY.vocab_size, TINY.dim, high, 2) + padded_bytes(TINY.dim, 1, high, 2)
    expected = gathers * TINY.n_layers * block + root_gathers * root
    assert record["gathered_bytes_per_step"] == expected


def test_memory_and_mesh_options_change_no_loss(tmp_path: Path, text: Path) -> None:
    argv = arguments(tmp_path, text, FLOAT8, FEW)
    reference, _ = run_on_ranks(2, train, argv)
    for flags in (
        ["--activation_checkpoint.mode=full"],
        ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=2"],
        [
            "--activation_checkpoint.mode=selective",
            "--activation_checkpoint.selective_ac_option=op",
        ],
        ["--parallelism.fsdp_reshard_after_forward=never"],
    ):
        record, _ = run_on_ranks(2, train, [*argv, *flags])
        assert record["losses"] == reference["losses"], flags
    hsdp = ["--parallelism.data_parallel_replicate_degree=2"]
    record, _ = run_on_ranks(2, train, [*argv, *hsdp])
    # The sum over two replicas is the sum over two shards: the same two numbers are added.
    assert record["losses"] == pytest.approx(reference["losses"], rel=1e-6)


def test_compare_trains_both_on_the_same_data(tmp_path: Path, text: Path) -> None:
    run_on_ranks(2, compare_runs, arguments(tmp_path, text))
    saved = json.loads((tmp_path / "compare.json").read_text())
    plain, float8 = saved["runs"]["float32"], saved["runs"]["float8"]
    assert plain["losses"] != float8["losses"]
    # The first step differs by the rounding of a forward pass alone.
    assert plain["losses"][0] == pytest.approx(float8["losses"][0], rel=1e-2)
    assert float8["gathered_bytes_per_step"] < plain["gathered_bytes_per_step"]
    difference = 100 * (float8["final_loss"] / plain["final_loss"] - 1)
    assert saved["loss_difference_percent"] == pytest.approx(difference)
    for picture in ("compare.png", "float32/loss.png", "float8/loss.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def compare_runs(argv: list[str]) -> None:
    model.FLAVORS["tiny"] = TINY
    device = torch.device(DEVICE, torch.cuda.current_device() if DEVICE == "cuda" else None)
    compare.compare(parse_config(argv), device)


def test_nan_goes_on_and_shows(tmp_path: Path, text: Path) -> None:
    flags = ["--optimizer.lr=1e38", "--training.max_norm=1e38", "--lr_scheduler.warmup_steps=0"]
    records = run_on_ranks(2, train, arguments(tmp_path, text, FLOAT8, *flags))
    for record in records:
        assert len(record["losses"]) == STEPS
        assert record["losses"][-1] == "nan"
        assert record["losses"][0] != "nan"


def refusal_with_a_path_for_each_rank(argv: list[str], paths: list[str]) -> str:
    return refusal([*argv, f"--training.dataset_path={paths[dist.get_rank()]}"])


def test_data_that_one_rank_lacks_is_refused_on_all(tmp_path: Path, text: Path) -> None:
    argv = arguments(tmp_path, text)
    argv.remove(f"--training.dataset_path={text}")
    paths = [str(text), str(tmp_path / "missing")]
    messages = run_on_ranks(2, refusal_with_a_path_for_each_rank, argv, paths)
    assert messages == [f"rank 1: training.dataset_path {paths[1]} does not exist"] * 2
    (tmp_path / "empty").mkdir()
    messages = run_on_ranks(2, refusal, [*argv, f"--training.dataset_path={tmp_path / 'empty'}"])
    assert messages[0] == messages[1]
    assert "has no text to train on" in messages[0]
    (tmp_path / "other.txt").write_text("other text")
    paths = [str(text), str(tmp_path / "other.txt")]
    messages = run_on_ranks(2, refusal_with_a_path_for_each_rank, argv, paths)
    assert messages[0] == messages[1]
    assert "the training text (documents, bytes) differs between ranks" in messages[0]


@pytest.mark.parametrize("folder", [__file__, f"{__file__}/run", "/proc"])
def test_folder_that_cannot_be_written_to_is_refused_before_training(
    folder: str, text: Path
) -> None:
    """A file, what would be below it, and a folder in which there can be no new file."""
    argv = arguments(Path(folder), text, "--training.dataset_path=missing")
    for found in run_on_ranks(2, refusal, argv):
        assert found.startswith(f"rank 0: job.dump_folder: {folder} cannot be written to ")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--parallelism.data_parallel_shard_degree=3", "do not fit 2 ranks"),
        ("--training.global_batch_size=7", "global_batch_size=7 is not a multiple"),
        ("--model.flavor=9B", "'9B' does not exist"),
    ],
)
def test_job_that_does_not_fit_is_refused(
    tmp_path: Path, text: Path, flag: str, message: str
) -> None:
    for found in run_on_ranks(2, refusal, arguments(tmp_path, text, flag)):
        assert message in found


def launch(folder: Path, text: Path, *more: str, ranks: int = 2) -> subprocess.Popen[str]:
    """The job as a user starts it, on the CPU; all it prints goes to one pipe."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # debugmodel: the tiny flavor is known to these tests only.
    argv = arguments(folder, text, "--model.flavor=debugmodel", *more)
    return subprocess.Popen(
        [*torchrun, "--nproc-per-node", str(ranks), "-m", "fp8dist.train", *argv],
        env=cpu_environment(TORCH_CPP_LOG_LEVEL="ERROR"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


LINES = [
    r"float8 tensorwise: 28 of 29 linear layers: .*",
    r"left in high precision, .*: output",
    r"debugmodel: 3\.3 million parameters, 2 ranks on CPU, 40 documents, tokenizer: bytes",
    r".* matmuls are emulated on cpu: .*",
    *[
        rf"step {step}/6  loss \d\.\d{{4}}  grad norm \d+\.\d{{3}} +[\d,]+ tokens/s  "
        r"memory [\d.]+ [MG]B  gathered [\d.]+ MB"
        for step in (1, 2, 4, 6)
    ],
    r"final loss \d\.\d{4} nats per byte \(this text's entropy: 3\.\d\d by single bytes, "
    r"2\.\d\d by byte pairs\), [\d,]+ tokens/s, [\d.]+ MB gathered per step and rank, \d+ s",
    r"wrote .*run\.json and .*loss\.png",
]


def test_screen_shows_the_job_and_nothing_else(tmp_path: Path, text: Path) -> None:
    flags = ["--quantize.linear.float8.filter_fqns=output", "--metrics.enable_tensorboard"]
    job = launch(tmp_path, text, FLOAT8, *flags)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output
    assert re.fullmatch("\n".join(LINES) + "\n", output), output
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["losses"][-1] < record["losses"][0] - 0.5
    assert record["ranks"] == 2
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tb").glob("events.out.tfevents*"))


def pid_of_rank(rank: int, launcher: int) -> int:
    """The process that `launcher` started as this rank."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended meanwhile, or is another user's
                continue
            if parent == str(launcher) and f"RANK={rank}".encode() in variables:
                return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the rank's process in /proc")
def test_a_killed_rank_ends_the_job(tmp_path: Path, text: Path) -> None:
    job = launch(tmp_path, text, FLOAT8, "--training.steps=100000")
    assert job.stdout is not None
    before = ""
    while "step " not in before:
        line = job.stdout.readline()
        assert line, before
        before += line
    killed = time.monotonic()
    os.kill(pid_of_rank(1, job.pid), signal.SIGKILL)
    output, _ = job.communicate(timeout=100)
    # Well before any collective would time out (comm.train_timeout_seconds: 100).
    assert time.monotonic() - killed < 60
    assert job.returncode != 0
    assert re.search(r"exitcode +: -9 \(pid: \d+\)", output), output
    assert "Signal 9 (SIGKILL) received" in output


def test_bad_flag_ends_with_its_message_on_every_rank(tmp_path: Path) -> None:
    program = tmp_path / "job.py"
    program.write_text("from fp8dist.train.__main__ import main\n\nmain()\n")
    run = programs.run(program, "--training.stepz=3", ranks=2)
    assert run.returncode != 0
    for rank in range(2):
        message = (
            rf"^\[rank{rank}\]: ValueError: .*'training\.stepz'; did you mean 'training\.steps'"
        )
        assert re.search(message, run.stderr, re.M), run.stderr
