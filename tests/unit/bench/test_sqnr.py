"""The noise table runs on any machine, and shows what the library claims."""

import json
from pathlib import Path

import pytest

from tests.unit.bench.program import run_program


def test_one_copy_serves_both(tmp_path: Path) -> None:
    run = run_program("sqnr", "--tokens=128", "--k=256", "--n=384", f"--out={tmp_path}/sqnr")
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "sqnr.json").read_text())
    assert (tmp_path / "sqnr.png").stat().st_size > 0
    for rows in report["weights"].values():
        for row in rows.values():
            # Equal but for elements that are subnormal in one scaling: far below 0.01 dB.
            assert row["derived"] == pytest.approx(row["direct"], abs=0.01)
    for tensors, rows in report["layers"].items():
        assert f"| {tensors} |" in run.stdout
        for recipe in ("tensorwise", "rowwise"):
            ours, theirs = rows[f"fp8dist {recipe}"]["all"], rows[f"torchao {recipe}"]["all"]
            assert ours == pytest.approx(theirs, abs=0.01)
    for variant, row in report["layers"]["trained-like"].items():
        # e4m3 rounds to 4 bits, which is 31.5 dB below an operand and 3 dB more below a product
        # of two; e5m2, tensorwise's output gradients, has one bit less: 6 dB.
        worst = 22 if "tensorwise" in variant else 27
        assert min(row["all"]) > worst, variant


def test_refuses_sizes_that_blocks_do_not_divide() -> None:
    run = run_program("sqnr", "--k=100")
    assert run.returncode == 2
    assert "must be a multiple of 128" in run.stderr
