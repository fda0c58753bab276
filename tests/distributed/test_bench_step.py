"""The step benchmark runs on any machine; its times mean something on a GPU only."""

import json
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.unit.bench.program import load_program, run_program

SIZES = (
    "--layers=1 --dim=128 --ffn=256 --vocab=256 --seq=32 --steps=2 --microbatches=2 --no-compile"
)


def test_prints_and_saves_a_row_per_variant(tmp_path: Path) -> None:
    variants = [
        "bf16",
        "torchao:tensorwise",
        "fp8dist:tensorwise-cache",
        "fp8dist:tensorwise-ag+fa",
    ]
    saved = tmp_path / "rows.json"
    run = run_program(
        "bench_step",
        *SIZES.split(),
        f"--variants={','.join(variants)}",
        f"--json={saved}",
        "--profile",
        ranks=2,
    )
    assert run.returncode == 0, run.stderr
    printed = [line.split() for line in run.stdout.splitlines() if "tok/s/rank" in line]
    report = json.loads(saved.read_text())
    assert [row[0] for row in printed] == [row["variant"] for row in report["rows"]] == variants
    assert [row[3] for row in printed][0] == "x1.000"
    assert run.stdout.count(" kernels, ") == len(variants)
    assert report["ranks"] == 2
    # Same weights, tokens and number of steps: what the rounding of float8 leaves apart in the
    # loss, some 5.5 nats, is far below a tenth.
    losses = [row["loss"] for row in report["rows"]]
    assert losses == pytest.approx([losses[0]] * len(losses), abs=0.1)


@pytest.mark.parametrize("name", ["fp8", "torchao:rowwise+ag", "fp8dist:tensorwise+fa-ag"])
def test_refuses_a_variant_that_does_not_exist(name: str) -> None:
    program = load_program("bench_step")
    with mock.patch.object(sys, "argv", ["bench_step", f"--variants=bf16,{name}"]):
        with pytest.raises(ValueError, match=f"^{re.escape(name)}: "):
            program.main()


def test_other_losses_than_the_first_variants_are_wrong() -> None:
    bench_step = load_program("bench_step")
    first = torch.tensor([9.0, 8.5])
    bench_step.check_losses(torch.tensor([9.01, 8.4]), first)
    bench_step.check_losses(torch.tensor([9.01, 0.4]), first)
    for losses in ([9.2, 8.5], [8.8, 8.5], [9.0, 9.1], [9.0, float("nan")], [float("inf"), 8.5]):
        with pytest.raises(load_program("harness").WrongResult, match=r"of the first .* 8\.5000"):
            bench_step.check_losses(torch.tensor(losses), first)


def test_a_first_variant_without_a_loss_is_wrong() -> None:
    bench_step = load_program("bench_step")
    losses = torch.tensor([9.0, float("nan")])
    with pytest.raises(load_program("harness").WrongResult):
        bench_step.check_losses(losses, losses)
