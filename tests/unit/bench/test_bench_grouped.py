"""The benchmark of experts runs on any machine, and times nothing that is wrong."""

import json
from pathlib import Path

import pytest
import torch

from tests.unit.bench.program import load_program, run_program

bench_grouped = load_program("bench_grouped")
SHAPE = "96x64x96x4"


def test_matmuls(tmp_path: Path) -> None:
    variants = ["bf16", "fp8dist:rowwise-fa", "fp8dist:mxfp8_rceil", "alone:rowwise"]
    run = run_program(
        "bench_grouped",
        f"--shapes={SHAPE},48x32x32x3",
        f"--variants={','.join(variants)}",
        f"--json={tmp_path}/new/grouped.json",
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "new" / "grouped.json").read_text())["rows"]
    assert [(row["shape"], row["variant"]) for row in rows] == [
        (shape, variant) for shape in (SHAPE, "48x32x32x3") for variant in variants
    ]
    for row in rows:
        first = next(r for r in rows if r["shape"] == row["shape"])
        assert row["speedup"] == pytest.approx(first["seconds"] / row["seconds"])
        # Of 4 bits, 31.5 dB below an operand and 3 dB more below a product of two.
        if row is not first:
            assert all(26 < value < 32 for value in row["decibels"])


def test_a_layer_on_two_ranks(tmp_path: Path) -> None:
    run = run_program(
        "bench_grouped",
        "--layer",
        "--no-compile",
        f"--shapes={SHAPE}",
        "--top-k=2",
        "--calls=2",
        f"--json={tmp_path}/layer.json",
        ranks=2,
    )
    assert run.returncode == 0, run.stderr
    plain, float8 = json.loads((tmp_path / "layer.json").read_text())["rows"]
    experts, router = 3 * 4 * 64 * 96, 4 * 64
    # Half of what is gathered twice, at 2 bytes or 1, and of float32 gradients.
    assert plain["bytes_on_the_wire"] == (2 * 2 + 4) * (experts + router) // 2
    assert float8["bytes_on_the_wire"] == ((2 + 4) * experts + 8 * router) // 2
    ratio = plain["bytes_on_the_wire"] / float8["bytes_on_the_wire"]
    assert float8["speedup_by_bytes"] == pytest.approx(ratio)
    assert "by bytes alone" in run.stdout


def test_wrong_results_are_not_timed() -> None:
    expected = (torch.randn(8, 8),)
    with pytest.raises(bench_grouped.WrongResult, match="SQNR to bf16"):
        bench_grouped.check_results((2 * expected[0],), expected)


def test_token_counts_are_multiples_of_16_and_add_up() -> None:
    ends = bench_grouped.ends_of(bench_grouped.Shape.parse("16384x64x64x16"))
    counts = ends.diff(prepend=ends.new_zeros(1))
    assert ends[-1] == 16384
    assert counts.min() > 0 and (counts % 16).count_nonzero() == 0
    ends = bench_grouped.ends_of(bench_grouped.Shape.parse("16384x64x64x16"), equal=True)
    assert ends.tolist() == list(range(1024, 16384 + 1, 1024))
