"""`torchrun --nnodes`: what a failure on one node costs is the steps since the last checkpoint.

`scripts/kill_nodes.py` kills whole nodes too.
"""

import re
import sys
from pathlib import Path

import pytest

from tests.distributed.killing import (
    ONE_LAYER,
    check_checkpoints,
    job_arguments,
    record_of,
    run_undisturbed,
)
from tests.distributed.nodes import Nodes
from tests.distributed.test_train import write_text

STEPS = 20  # more than a fast machine takes in the time that a kill may take


@pytest.mark.skipif(sys.platform != "linux", reason="finds the rank's process in /proc")
def test_both_nodes_start_again_when_a_worker_of_one_is_killed(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    text = write_text(tmp_path / "text")
    run_undisturbed([*job_arguments(tmp_path / "undisturbed", text, STEPS), ONE_LAYER])
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
    check_checkpoints(tmp_path / "killed")
    expected, found = record_of(tmp_path / "undisturbed"), record_of(tmp_path / "killed")
    assert len(found["losses"]) == STEPS
    assert found["losses"] == expected["losses"]
    assert found["grad_norms"] == expected["grad_norms"]
