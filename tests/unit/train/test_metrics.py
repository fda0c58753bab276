"""The record of a run, its numbers and its JSON; progress lines; the picture."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from fp8dist.train.metrics import Reporter, RunRecord, peak_memory, readable_bytes, write_json
from fp8dist.train.plot import plot_losses


def record(losses: list[float]) -> RunRecord:
    steps = len(losses)
    return RunRecord(
        config={"job": {"description": "a test"}},
        device="CPU",
        ranks=2,
        parameters=10,
        losses=losses,
        grad_norms=[1.0] * steps,
        gathered_bytes=[0] + [1500] * (steps - 1),
    )


def test_final_loss_is_the_mean_of_the_last_steps() -> None:
    assert record([5.0, 4.0, 3.0]).final_loss == 3.0
    assert record([9.0] * 28 + [1.0, 2.0]).final_loss == pytest.approx((9.0 + 1.0 + 2.0) / 3)
    assert record([9.0] * 1000 + [1.0] * 20).final_loss == 1.0
    assert math.isnan(record([]).final_loss)
    assert math.isnan(record([1.0] * 30 + [math.nan]).final_loss)


def test_json_is_standard_even_with_nan(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    write_json(record([3.0, math.nan, math.inf]).to_dict(), path)
    saved = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert saved["losses"] == [3.0, "nan", "inf"]
    assert saved["gathered_bytes_per_step"] == 1500
    assert saved["config"]["job"]["description"] == "a test"
    assert saved["versions"]["torch"] == torch.__version__


def test_history_survives_a_checkpoint() -> None:
    saved, resumed = record([3.0, 2.0]), record([])
    resumed.restore_history(json.loads(json.dumps(saved.history())))
    assert (resumed.losses, resumed.grad_norms, resumed.gathered_bytes) == (
        [3.0, 2.0],
        [1.0, 1.0],
        [0, 1500],
    )


def test_summary_has_the_references_beside_the_loss() -> None:
    run = record([2.0] * 5)
    run.tokens_per_second, run.training_seconds = 1234.0, 61.0
    assert "nats per token" in run.summary()
    run.entropy_of_bytes, run.entropy_of_byte_pairs = 3.25, 2.43
    assert run.summary() == (
        "final loss 2.0000 nats per byte (this text's entropy: 3.25 by single bytes, 2.43 by "
        "byte pairs), 1,234 tokens/s, 1.5 kB gathered per step and rank, 61 s"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (24_100_000, "24.1 MB"), (8e15, "8000.0 TB")],
)
def test_readable_bytes(count: float, text: str) -> None:
    assert readable_bytes(count) == text


def test_peak_memory_counts_bytes() -> None:
    # Python with torch in it needs more than 50 MB and this test less than 50 GB.
    assert 50e6 < peak_memory(torch.device("cpu")) < 50e9


def test_progress_line_and_tensorboard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = record([3.5, 2.25])
    with caplog.at_level(logging.INFO, logger="fp8dist.train.metrics"):
        reporter = Reporter(run, 100, torch.device("cpu"), tmp_path)
        reporter.count_tokens(512)
        reporter.report(2, learning_rate=0.125)
        reporter.close()
    [line] = caplog.messages
    assert line.startswith("step   2/100  loss 2.2500  grad norm 1.000  ")
    assert "tokens/s  memory " in line
    assert line.endswith("gathered 1.5 kB")
    assert run.tokens_per_second == pytest.approx(512 / run.training_seconds)
    events = EventAccumulator(str(tmp_path)).Reload()
    [loss] = events.Scalars("loss")
    assert (loss.step, loss.value) == (2, 2.25)
    assert events.Scalars("gathered_bytes")[0].value == 1500
    assert events.Scalars("learning_rate")[0].value == 0.125


def test_picture_is_a_png_with_both_runs(tmp_path: Path) -> None:
    first, second = record([5.0, 4.0, math.nan]), record([5.0, 4.5, 4.0])
    first.entropy_of_bytes, first.entropy_of_byte_pairs = 3.25, 2.43
    path = tmp_path / "new" / "loss.png"
    plot_losses({"bf16": first, "float8": second}, "a title", path)
    assert path.read_bytes().startswith(b"\x89PNG")
    alone = tmp_path / "alone.png"
    plot_losses({"bf16": first}, "a title", alone)
    assert alone.read_bytes() != path.read_bytes()
