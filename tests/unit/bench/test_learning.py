"""The learning curves run on any machine; what they show takes hundreds of steps."""

import json
from pathlib import Path

from tests.unit.bench.program import run_program


def test_every_run_is_of_its_recipe_and_is_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Some words to learn from. " * 100)
    arguments = [
        "--recipes=rowwise,mxfp8_rceil",
        f"--folder={tmp_path}/runs",
        f"--training.dataset_path={tmp_path}/text.txt",
        "--training.steps=1",
        "--training.seq_len=32",
        "--training.local_batch_size=1",
    ]
    first = run_program("learning", *arguments)
    assert first.returncode == 0, first.stderr
    for line in ("float8 rowwise: 28 of 29", "float8 mxfp8_rceil: 28 of 29"):
        assert line in first.stdout
    report = json.loads((tmp_path / "runs" / "learning.json").read_text())
    assert list(report["runs"]) == ["high precision", "rowwise", "mxfp8_rceil"]
    plain = report["runs"]["high precision"]
    assert plain["config"]["model"]["converters"] == []
    for run in report["runs"].values():
        # One step from the same weights on the same text: only float8's rounding lies between.
        assert abs(run["final_loss"] / plain["final_loss"] - 1) < 0.01
    assert (tmp_path / "runs" / "learning.png").stat().st_size > 0

    again = run_program("learning", *arguments)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(": there already") == 3
    assert "nats per byte" not in again.stdout
    assert again.stdout[again.stdout.index("| |") :] == first.stdout[first.stdout.index("| |") :]


def test_refuses_a_recipe_that_does_not_exist() -> None:
    run = run_program("learning", "--recipes=rowwise,rowise", fork=False)  # as a person does
    assert run.returncode == 2
    assert "unknown rowise; known: tensorwise, rowwise" in run.stderr
