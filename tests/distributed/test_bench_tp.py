"""The benchmark of tensor parallelism runs on any machine; its times mean something on a GPU."""

import json
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.unit.bench.program import load_program, run_program

# Two heads of keys and values, one for each rank.
SIZES = "--layers=1 --dim=1024 --ffn=256 --seq=64 --steps=1 --no-compile"
# A rank's half of the tokens, 32 x 1024 elements, which cross in each direction of each half of
# the block: two all-gathers in forward, two in backward, and as many reduce-scatters.
PART = 32 * 1024
NORMS = 2 * 1024 * 2  # bfloat16; of an all-reduce over two ranks each sends as much


def test_prints_and_saves_a_row_per_variant(tmp_path: Path) -> None:
    recipes = {
        "bf16": {"all_gather bfloat16": 4 * 2 * PART},
        "fp8dist:tensorwise": {"all_gather uint8": 4 * PART},
        "fp8dist:rowwise_with_gw_hp": {
            "all_gather uint8": 2 * PART,
            "all_gather bfloat16": 4 * 2 * PART,
            "all_gather float32": 2 * 32 * 4,
        },
        "fp8dist:rowwise_with_gw_hp-again": {
            "all_gather uint8": 2 * PART,
            "all_gather bfloat16": 2 * 2 * PART,
            "all_gather float32": 2 * 32 * 4,
        },
        "fp8dist:mxfp8": {"all_gather uint8": 4 * (PART + PART // 32)},
    }
    saved = tmp_path / "rows.json"
    names = ",".join(recipes)
    run = run_program("bench_tp", *SIZES.split(), f"--variants={names}", f"--json={saved}", ranks=2)
    assert run.returncode == 0, run.stderr
    report = json.loads(saved.read_text())
    assert [row["variant"] for row in report["rows"]] == list(recipes)
    printed = [line.split()[0] for line in run.stdout.splitlines() if "tok/s" in line]
    assert printed == list(recipes)
    assert report["ranks"] == 2
    for row in report["rows"]:
        sent = row["sent"]
        assert {k: v for k, v in sent.items() if "all_gather" in k} == recipes[row["variant"]]
        assert sent["reduce_scatter bfloat16"] == 4 * 2 * PART
        assert sent["all_reduce bfloat16"] == NORMS
    assert "sends 0.397 MB: all_gather uint8 0.131" in run.stdout


@pytest.mark.parametrize("name", ["fp8", "torchao:rowwise", "fp8dist:tensorwise-again+fa"])
def test_refuses_a_variant_that_does_not_exist(name: str) -> None:
    program = load_program("bench_tp")
    with mock.patch.object(sys, "argv", ["bench_tp", f"--variants=bf16,{name}"]):
        with pytest.raises(ValueError, match=f"^{re.escape(name)}: "):
            program.main()


def test_other_results_than_the_first_variants_are_wrong() -> None:
    bench_tp, wrong = load_program("bench_tp"), load_program("harness").WrongResult
    added = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    row = bench_tp.Row("bf16", 1.0, 1.0, {}, None, None, 1.5)
    first = bench_tp.Measured(row, torch.tensor([2.0, 1.5]), added)
    noisy = added + 0.04 * torch.randn(added.shape, generator=torch.Generator().manual_seed(1))
    assert bench_tp.check_results(torch.tensor([2.01, 1.52]), noisy, first) > 20
    with pytest.raises(wrong, match="what the blocks add has"):
        bench_tp.check_results(torch.tensor([2.0, 1.5]), added.flip(1), first)
    for losses in ([2.0, 1.6], [2.0, 2.5], [2.0, float("nan")]):
        with pytest.raises(wrong, match=r"falls by .* by 0\.5000"):
            bench_tp.check_results(torch.tensor(losses), noisy, first)
