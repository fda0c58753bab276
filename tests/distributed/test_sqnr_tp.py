"""Every recipe's results have the noise of one device, by the program that prints it."""

import json
from pathlib import Path

import pytest

from fp8dist.config import RECIPES
from tests.unit.bench.program import run_program

SIZE = 256


def test_noise_is_that_of_one_device(tmp_path: Path) -> None:
    saved = tmp_path / "rows.json"
    run = run_program("sqnr_tp", f"--size={SIZE}", f"--json={saved}", ranks=2)
    assert run.returncode == 0, run.stderr
    rows = {(row["variant"], row["cut"]): row for row in json.loads(saved.read_text())["rows"]}
    assert len(rows) == 2 * len(RECIPES) + 2
    for (variant, _), row in rows.items():
        results = list(zip(row["parallel"], row["one_device"], strict=True))
        *first, (grad_weight, expected) = results
        assert all(20 < alone < 35 for _, alone in first), "float8 has noise"
        for found, alone in first:
            assert found == pytest.approx(alone, abs=0.1)
        if "from float8" in variant:
            # One operand in float8, of a recipe that has none there.
            assert 29 < grad_weight < 34 and expected > 45
        elif expected > 100:  # no float8 at all: float32 sums
            assert grad_weight > 100
        else:
            assert grad_weight == pytest.approx(expected, abs=0.1)
