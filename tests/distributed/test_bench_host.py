"""The benchmark of the host's work runs on any machine."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

import fp8dist
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.unit.bench.program import load_program, run_program

SMALL = "--groups=2 --weights=2 --rows=128 --columns=128 --calls=2".split()


@pytest.mark.parametrize(
    ("ranks", "variants"),
    [(1, ["bf16", "torchao:tensorwise+ag", "fp8dist:rowwise"]), (2, ["bf16", "fp8dist:rowwise"])],
)
def test_prints_and_saves_a_row_per_variant(
    ranks: int, variants: list[str], tmp_path: Path
) -> None:
    saved = tmp_path / "rows.json"
    flags = [*SMALL, f"--variants={','.join(variants)}", f"--json={saved}"]
    run = run_program("bench_host", *flags, ranks=ranks)
    assert run.returncode == 0, run.stderr
    rows = json.loads(saved.read_text())["rows"]
    printed = [line.split()[0] for line in run.stdout.splitlines() if " per step " in line]
    assert printed == [row["variant"] for row in rows] == variants
    for row in rows:
        assert row["unshard"] > 0 and row["unshard_profiled"] > 0
        assert row["per_step"] == pytest.approx(2 * row["unshard"] + row["precompute"])
        assert row["ratio"] == pytest.approx(row["per_step"] / rows[0]["per_step"])


def test_gloo_is_not_given_torchaos_float8() -> None:
    program = load_program("bench_host")
    with (
        mock.patch.object(sys, "argv", ["bench_host", "--variants=bf16,torchao:tensorwise+ag"]),
        mock.patch.object(program, "init_distributed"),
        mock.patch.object(program, "CUDA", False),
        mock.patch.object(program.dist, "get_world_size", return_value=2),
        pytest.raises(ValueError, match="leave torchao out"),
    ):
        program.main()


def calls_and_row(name: str) -> tuple[list[Counter[str]], dict[str, Any]]:
    """What the functions that are timed call, in order, and the row if a call takes 12 us by the
    clock and 24 by the profiler.
    """
    program = load_program("bench_host")
    counts: list[Counter[str]] = []

    def once(seconds: float) -> Callable[[Callable[[], object]], float]:
        def call(function: Callable[[], object]) -> float:
            with (
                mock.patch.object(FSDPParamGroup, "wait_for_unshard", autospec=True) as unshard,
                mock.patch.object(FSDPParamGroup, "reshard", autospec=True) as reshard,
                mock.patch.object(fp8dist.fsdp, "_by_group", return_value={}) as precompute,
            ):
                function()
            mocks = {"unshard": unshard, "reshard": reshard, "precompute": precompute}
            counts.append(Counter({name: mocked.call_count for name, mocked in mocks.items()}))
            return seconds

        return call

    options = argparse.Namespace(groups=3, weights=2, rows=128, columns=128, calls=1)
    with (
        mock.patch.object(program, "host_seconds", once(12e-6)),
        mock.patch.object(program, "profiled_seconds", once(24e-6)),
    ):
        measured = program.measure(name, options, init_device_mesh(DEVICE, (1,)), None)
    return counts, asdict(measured.row)


def test_what_is_timed_is_each_groups_unshard_and_one_precompute() -> None:
    """Of three groups of two weights."""
    ((counts, row),) = run_on_ranks(1, calls_and_row, "fp8dist:rowwise")
    unshard = Counter(unshard=3, reshard=3, precompute=0)
    precompute = Counter(unshard=0, reshard=0, precompute=1)
    assert counts == [unshard, unshard, precompute, precompute]
    times = {"unshard": 2, "unshard_profiled": 4, "precompute": 2, "precompute_profiled": 4}
    assert row == pytest.approx({"variant": "fp8dist:rowwise", **times, "per_step": 6, "ratio": 1})


def test_the_profiler_is_asked_for_one_call() -> None:
    """Not for all that there are: together they take no longer than the whole does."""
    program = load_program("bench_host")
    start = time.perf_counter()
    seconds = program.profiled_seconds(lambda: time.sleep(0.3))
    assert 0.3 <= seconds <= (time.perf_counter() - start) / program.PROFILED_CALLS


def message_for(name: str) -> str:
    """Where what is gathered is another weight than was sharded."""
    program = load_program("bench_host")

    def edit(groups: nn.Module, mesh: DeviceMesh, **options: Any) -> None:
        with torch.no_grad():
            groups[0].weight.mul_(0.5)
        fully_shard(groups, mesh=mesh, **options)

    options = argparse.Namespace(groups=1, weights=1, rows=128, columns=128, calls=1)
    with mock.patch.object(program, "fully_shard", edit):
        with pytest.raises(load_program("harness").WrongResult) as error:
            program.measure(name, options, init_device_mesh(DEVICE, (1,)), None)
    return str(error.value)


@pytest.mark.parametrize("name", ["bf16", "fp8dist:rowwise"])
def test_another_weight_is_wrong(name: str) -> None:
    (message,) = run_on_ranks(1, message_for, name)
    assert "SQNR of the unsharded weight is 6.0 dB" in message  # 20 log10(2)


@pytest.mark.parametrize("name", ["torchao:tensorwise", "fp8dist:rowwise-ag"])
def test_refuses_what_does_not_gather_in_float8(name: str) -> None:
    with mock.patch.object(sys, "argv", ["bench_host", f"--variants=bf16,{name}"]):
        with pytest.raises(ValueError, match=f"^{name}: does not gather"):
            load_program("bench_host").main()
