"""A killed rank costs the steps since the last checkpoint, and nothing else: on one node, and under
`torchrun --nnodes`.

`scripts/kill_ranks.py` does it as often as wanted, `scripts/kill_nodes.py` to whole nodes too.
"""

import random
import re
import sys
from pathlib import Path
from typing import Any

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
from tests.distributed.nodes import Nodes
from tests.distributed.test_train import write_text

STEPS = 20  # more than a fast machine takes in the time that a kill may wait

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the rank's process in /proc")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_undisturbed([*job_arguments(folder, text, STEPS), ONE_LAYER])
    return record_of(folder)


def check(folder: Path, undisturbed: dict[str, Any]) -> None:
    """Of a job that went on: it ended where the undisturbed run did."""
    check_checkpoints(folder)
    found = record_of(folder)
    assert len(found["losses"]) == STEPS
    assert found["losses"] == undisturbed["losses"]
    assert found["grad_norms"] == undisturbed["grad_norms"]


def test_an_elastic_restart_ends_where_the_undisturbed_run_does(
    tmp_path: Path, text: Path, undisturbed: dict[str, Any]
) -> None:
    lines: list[str] = []
    job = start([*job_arguments(tmp_path, text, STEPS), ONE_LAYER], ranks=2, max_restarts=2)
    assert kill_at_random(job, 2, random.Random(3), lines, first=4), "".join(lines)
    finish(job, lines)
    assert "resuming after step" in "".join(lines)
    check(tmp_path, undisturbed)


def test_both_nodes_start_again_when_a_worker_of_one_is_killed(
    tmp_path: Path, text: Path, undisturbed: dict[str, Any]
) -> None:
    argv = [*job_arguments(tmp_path / "killed", text, STEPS), ONE_LAYER]
    with Nodes(argv, "1:2", tmp_path / "printed.txt") as nodes:
        nodes.wait_for(r"step +4/")  # a checkpoint of step 3 is there
        before = [nodes.worker(node) for node in range(2)]
        nodes.kill_worker(1)
        nodes.wait_for(r"debugmodel:1: .*, 2 ranks on CPU.*\n")
        after = [nodes.worker(node) for node in range(2)]
        nodes.wait_for(r"resuming after step \d+\n")
        codes = nodes.finish()
        printed = nodes.printed
    assert codes == [0, 0], printed
    assert not set(before) & set(after)
    # Nothing was done twice but the steps after the checkpoint, and no third start was needed.
    assert len(re.findall(r"debugmodel:1: ", printed)) == 2, printed
    check(tmp_path / "killed", undisturbed)
