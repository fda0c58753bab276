"""A killed rank costs the steps since the last checkpoint, and nothing else.

`scripts/kill_ranks.py` does it as often as wanted.
"""

import random
import sys
from pathlib import Path

import pytest

from tests.distributed.killing import (
    ONE_LAYER,
    check_checkpoints,
    finish,
    job_arguments,
    kill_at_random,
    record_of,
    run_undisturbed,
    start,
)
from tests.distributed.test_train import write_text

STEPS = 20  # more than a fast machine takes in the time that a kill may wait


@pytest.mark.skipif(sys.platform != "linux", reason="finds the rank's process in /proc")
def test_an_elastic_restart_ends_where_the_undisturbed_run_does(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    text = write_text(tmp_path / "text")
    run_undisturbed([*job_arguments(tmp_path / "undisturbed", text, STEPS), ONE_LAYER])

    lines: list[str] = []
    argv = [*job_arguments(tmp_path / "killed", text, STEPS), ONE_LAYER]
    job = start(argv, ranks=2, max_restarts=2)
    assert kill_at_random(job, 2, random.Random(3), lines, first=4), "".join(lines)
    finish(job, lines)
    assert "resuming after step" in "".join(lines)
    check_checkpoints(tmp_path / "killed")
    expected, found = record_of(tmp_path / "undisturbed"), record_of(tmp_path / "killed")
    assert len(found["losses"]) == STEPS
    assert found["losses"] == expected["losses"]
    assert found["grad_norms"] == expected["grad_norms"]
