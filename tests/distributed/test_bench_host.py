"""The benchmark of the host's work runs on any machine."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.distributed.harness import DEVICE, run_on_ranks
from tests.unit.bench.program import load_program, run_program

SMALL = "--groups=2 --weights=2 --rows=128 --columns=128 --calls=2".split()


def test_prints_and_saves_a_row_per_variant(tmp_path: Path) -> None:
    variants = ["bf16", "torchao:tensorwise+ag", "fp8dist:rowwise"]
    saved = tmp_path / "rows.json"
    flags = [*SMALL, f"--variants={','.join(variants)}", f"--json={saved}"]
    run = run_program("bench_host", *flags, ranks=1)
    assert run.returncode == 0, run.stderr
    rows = json.loads(saved.read_text())["rows"]
    printed = [line.split()[0] for line in run.stdout.splitlines() if " per step " in line]
    assert printed == [row["variant"] for row in rows] == variants
    for row in rows:
        times = [row["unshard"], row["unshard_profiled"]]
        if row["variant"] != "bf16":  # which has nothing to precompute
            times += [row["precompute"], row["precompute_profiled"]]
        # A call's share for each of four weights: not a call's, nor seconds.
        assert all(0.1 < microseconds < 1e5 for microseconds in times)
        assert row["per_step"] == pytest.approx(2 * row["unshard"] + row["precompute"])
        assert row["ratio"] == pytest.approx(row["per_step"] / rows[0]["per_step"])


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
    assert "SQNR of an unsharded weight is 6.0 dB" in message  # 20 log10(2)


@pytest.mark.parametrize("name", ["torchao:tensorwise", "fp8dist:rowwise-ag"])
def test_refuses_what_does_not_gather_in_float8(name: str) -> None:
    with mock.patch.object(sys, "argv", ["bench_host", f"--variants=bf16,{name}"]):
        with pytest.raises(ValueError, match=f"^{name}: does not gather"):
            load_program("bench_host").main()
