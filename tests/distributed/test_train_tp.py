"""The trainer's job and the short script with tensor parallelism."""

import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8dist.train.model import TransformerBlock
from tests.distributed import programs
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.test_train import (
    FEW,
    FLOAT8,
    STEPS,
    TINY,
    arguments,
    compare_runs,
    refusal,
    train,
    write_text,
)
from tests.environment import ROOT

SCRIPT = ROOT / "scripts" / "train_tp_fsdp2.py"
SECTION = "--quantize.linear.float8"
# Forwards of the same 4 sequences, whatever the ranks: the scales of activations are the same.
BATCH = "--training.local_batch_size=4"
TP = "--parallelism.tensor_parallel_degree=2"
HSDP = "--parallelism.data_parallel_replicate_degree=2"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def assert_same(found: dict[str, Any], expected: dict[str, Any], first: int = 0) -> None:
    """That two runs, which have the same weights before step `first`, add up in another order.

    Then partial sums differ by a few units of float32, 1e-7. So do the loss and the gradients of
    that step: a gradient that misses a rank's part moves their norm by 1e-2. What follows is Adam
    on numbers of which float8 rounds some to their other neighbour, 1/16 away: FSDP alone, on 2
    ranks or 1, has 2e-4 after 6 steps of the debug model.

    A Hopper GPU adds up products of float8 with 14 bits only, part by part: 1e-4, of which rounding
    to float8 makes 1/16 here and there.
    """
    float8 = bool(found["config"]["model"]["converters"])
    of_loss, of_norm = (5e-4, 5e-3) if float8 and DEVICE == "cuda" else (1e-6, 1e-4)
    assert found["losses"][first] == pytest.approx(expected["losses"][first], rel=of_loss)
    assert found["grad_norms"][first] == pytest.approx(expected["grad_norms"][first], rel=of_norm)
    tolerance = 1e-4
    if float8:
        tolerance = 2e-3 if DEVICE == "cpu" else 5e-3
    assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance)


@pytest.mark.parametrize(
    ("worlds", "flags"),
    [
        ((2, 4), ["--model.converters="]),
        ((2,), [f"{SECTION}.recipe_name=tensorwise"]),
        ((2, 4), [f"{SECTION}.recipe_name=rowwise"]),
        ((2,), [f"{SECTION}.recipe_name=rowwise_with_gw_hp", f"{SECTION}.filter_fqns=w2"]),
        ((2,), [f"{SECTION}.filter_fqns=wk,output", "--activation_checkpoint.mode=full"]),
    ],
    ids=["float32", "tensorwise", "rowwise", "rowwise_with_gw_hp but w2", "tensorwise but wk"],
)
def test_losses_are_those_without(
    tmp_path: Path, text: Path, worlds: tuple[int, ...], flags: list[str]
) -> None:
    argv = arguments(tmp_path, text, BATCH, FLOAT8, "--model.flavor=debugmodel:2", FEW, *flags)
    [alone] = run_on_ranks(1, train, argv)
    for world in worlds:
        for record in run_on_ranks(world, train, [*argv, TP]):
            assert_same(record, alone)


def test_replicas(tmp_path: Path, text: Path) -> None:
    argv = arguments(tmp_path, text, BATCH, FLOAT8, f"{SECTION}.recipe_name=rowwise", FEW)
    [alone] = run_on_ranks(1, train, argv)
    for record in run_on_ranks(4, train, [*argv, TP, HSDP]):
        assert_same(record, alone)


def test_gathered_bytes_are_those_of_a_part(tmp_path: Path, text: Path) -> None:
    argv = arguments(tmp_path, text, FLOAT8, TP, f"{SECTION}.filter_fqns=output", FEW)
    argv.append("--training.global_batch_size=4")  # one forward
    record, *_ = run_on_ranks(4, train, argv)
    kv = TINY.n_kv_heads * TINY.dim // TINY.n_heads
    in_float8 = TINY.dim * (2 * TINY.dim + 2 * kv + 3 * TINY.hidden_dim) // 2  # of 2 parts
    norm = 4 * TINY.dim  # not cut by tensor parallelism
    root = 4 * 2 * TINY.vocab_size * TINY.dim // 2 + norm
    # Blocks are gathered in forward and in backward, what is around them once.
    assert record["gathered_bytes_per_step"] == 2 * TINY.n_layers * (in_float8 + 2 * norm) + root
    # On 2 ranks there is nothing for FSDP to gather.
    record, _ = run_on_ranks(2, train, argv)
    assert record["gathered_bytes_per_step"] == 0


def train_compiled(argv: list[str]) -> dict[str, Any]:
    """`train`, without the part of the compiler that needs one of C++, and takes longest."""
    torch._dynamo.reset()
    whole = TransformerBlock.compile
    TransformerBlock.compile = functools.partialmethod(whole, backend="aot_eager")
    try:
        return train(argv)
    finally:
        TransformerBlock.compile = whole


def test_compiled(tmp_path: Path, text: Path) -> None:
    argv = arguments(tmp_path, text, BATCH, FLOAT8, f"{SECTION}.recipe_name=rowwise", FEW)
    [alone] = run_on_ranks(1, train, argv)
    for record in run_on_ranks(2, train_compiled, [*argv, TP, "--compile.enable"]):
        assert_same(record, alone)


@pytest.mark.parametrize(
    ("saving", "resuming"), [((4, [TP]), (1, [])), ((1, []), (2, [TP]))], ids=["away", "to"]
)
def test_checkpoints_fit_with_and_without(
    tmp_path: Path, text: Path, saving: tuple[int, list[str]], resuming: tuple[int, list[str]]
) -> None:
    argv = arguments(tmp_path, text, BATCH, FLOAT8, f"{SECTION}.recipe_name=rowwise")
    argv += ["--checkpoint.enable", "--checkpoint.interval=3"]
    world, flags = saving
    whole, *_ = run_on_ranks(world, train, [*argv, *flags])
    shutil.rmtree(tmp_path / "checkpoint" / "step-6")
    world, flags = resuming
    resumed, *_ = run_on_ranks(world, train, [*argv, *flags])
    assert len(resumed["losses"]) == STEPS
    assert resumed["losses"][:3] == whole["losses"][:3]
    assert_same(resumed, whole, first=3)
    # The step after that is the first to show what became of the optimizer's state.
    of_rounding = 1e-4 if DEVICE == "cpu" else 1e-3  # see assert_same
    assert resumed["losses"][4] == pytest.approx(whole["losses"][4], rel=of_rounding)


def test_compare(tmp_path: Path, text: Path) -> None:
    run_on_ranks(2, compare_runs, arguments(tmp_path, text, TP, FEW))
    runs = json.loads((tmp_path / "compare.json").read_text())["runs"]
    plain, float8 = runs["float32"], runs["float8"]
    assert plain["losses"] != float8["losses"]
    # The first step differs by the rounding of a forward pass alone.
    assert plain["losses"][0] == pytest.approx(float8["losses"][0], rel=1e-2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parallelism.tensor_parallel_degree=3"], "tensor_parallel_degree=3 do not fit 2 ranks"),
        ([TP, "--training.seq_len=33"], "does not divide training.seq_len=33"),
        (
            [TP, FLOAT8, f"{SECTION}.recipe_name=blockwise", "--model.flavor=debugmodel"],
            "add attention.wk to quantize.linear.float8.filter_fqns",
        ),
    ],
)
def test_what_does_not_divide_is_refused_on_every_rank(
    tmp_path: Path, text: Path, flags: list[str], message: str
) -> None:
    for found in run_on_ranks(2, refusal, arguments(tmp_path, text, *flags)):
        assert message in found


def test_script_is_short_and_learns() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 60
    run = programs.run(SCRIPT, ranks=4)
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr
    losses = [float(loss) for loss in re.findall(r"^step \d+  loss (\S+)$", run.stdout, re.M)]
    assert len(losses) == 4, run.stdout
    # From a uniform guess over 256 bytes (5.5 nats) to below the file's own byte frequencies
    # (3.4 nats), which takes learning what follows what.
    assert losses[0] > 5.0
    assert losses[-1] < 2.6
