"""The step benchmark runs on any machine; its times mean something on a GPU only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench" / "bench_step.py"
SIZES = (
    "--layers=1 --dim=128 --ffn=256 --vocab=256 --seq=32 --steps=2 --microbatches=2 --no-compile"
)


def run_bench(
    *arguments: str, torchrun: tuple[str, ...] = ()
) -> "subprocess.CompletedProcess[str]":
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *torchrun, str(BENCH), *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_prints_and_saves_a_row_per_variant(tmp_path: Path) -> None:
    variants = ["bf16", "torchao:tensorwise", "fp8dist:tensorwise", "fp8dist:tensorwise-ag+fa"]
    saved = tmp_path / "rows.json"
    run = run_bench(
        *SIZES.split(),
        f"--variants={','.join(variants)}",
        f"--json={saved}",
        "--profile",
        torchrun=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
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
    run = run_bench(f"--variants=bf16,{name}")
    assert run.returncode != 0
    assert f"ValueError: {name}: " in run.stderr
