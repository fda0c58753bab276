"""What the benchmarks share: checks that stop, timing, tables and files."""

import csv
import json
import time
from pathlib import Path

import pytest
import torch

from tests.unit.bench.program import load_program

harness = load_program("harness")


def test_a_table_is_what_the_results_have() -> None:
    table = harness.markdown_table(["", "time"], [["a", "1 s"], ["b", ""]])
    assert table == "| | time |\n|---|---|\n| a | 1 s |\n| b | |"


def test_the_setting_says_where_and_when() -> None:
    facts = harness.setting()
    assert facts["versions"]["torch"] == torch.__version__
    line = harness.describe(facts | {"gpu": "NVIDIA H200", "ranks": 2})
    assert line.startswith("NVIDIA H200 · 2 ranks · python 3.")
    assert f" · torch {torch.__version__} · torchao " in line
    assert line.endswith(f" · {facts['date']}")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (torch.tensor([1.0, -0.0]), "scales: 1 of 8 bytes differ"),
        (torch.tensor([1.0, 0.0, 0.0]), r"scales: torch.float32 \(3,\) instead of .* \(2,\)"),
        (torch.tensor([1.0, 0.0]).bfloat16(), r"scales: torch.bfloat16 \(2,\) instead of"),
    ],
)
def test_bytes_that_differ_are_told(found: torch.Tensor, message: str) -> None:
    expected = torch.tensor([1.0, 0.0])
    harness.check_same_bytes(expected.clone(), expected, "scales")
    with pytest.raises(harness.WrongResult, match=message):
        harness.check_same_bytes(found, expected, "scales")


def test_bytes_of_views_are_compared_as_they_are_read() -> None:
    x = torch.randn(16, 32).to(torch.float8_e4m3fn)
    harness.check_same_bytes(x.t(), x.t().contiguous(), "transposed")


def test_sqnr_is_the_energy_of_the_error_in_decibel() -> None:
    truth = torch.randn(1000, dtype=torch.float64)
    assert harness.sqnr(truth * 1.1, truth) == pytest.approx(20)


def test_calls_that_the_host_was_late_with_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = iter([0] * (harness.WARM_UP_CALLS + 1) + [0.02, 0.03, 0.001, 0.001])
    passed = iter([True, True, False, False])
    given: list[float] = []
    monkeypatch.setattr(harness, "has_passed", lambda _: next(passed))
    monkeypatch.setattr(harness, "occupy", given.append)
    seconds = harness.median_seconds(lambda: time.sleep(next(durations)), calls=4)
    assert 0.001 <= seconds < 0.02
    assert given[0] < given[1] < given[2] == given[3]
    assert given[3] < 1.5 * harness.LONGEST_LAUNCH + 100e-6


def test_the_median_call_is_timed() -> None:
    durations = iter([0] * (harness.WARM_UP_CALLS + 1) + [0.001, 0.2, 0.02, 0.021, 0.001])
    seconds = harness.median_seconds(lambda: time.sleep(next(durations)), calls=5)
    assert 0.02 <= seconds < 0.2


def test_operators_of_a_call_are_counted() -> None:
    x = torch.randn(64, 64)
    kernels = {kernel.name: kernel for kernel in harness.kernels_of(lambda: x @ x + x @ x)}
    assert kernels["aten::mm"].count == 2
    assert kernels["aten::add"].seconds > 0


def test_files_have_what_was_given(tmp_path: Path) -> None:
    rows = [{"m": 1, "time": 0.5}, {"m": 2, "time": 0.25}]
    harness.write_csv(tmp_path / "new" / "rows.csv", rows)
    with (tmp_path / "new" / "rows.csv").open() as file:
        assert list(csv.DictReader(file)) == [
            {"m": "1", "time": "0.5"},
            {"m": "2", "time": "0.25"},
        ]
    harness.write_json(tmp_path / "new" / "rows.json", {"rows": rows})
    assert json.loads((tmp_path / "new" / "rows.json").read_text()) == {"rows": rows}
