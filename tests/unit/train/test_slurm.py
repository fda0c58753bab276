"""The Slurm script, with commands that stand for Slurm's."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "train.slurm"

# Runs the task once for each node, one after the other, as srun does at once.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
  case $1 in --ntasks) nodes=$2; shift ;; --ntasks-per-node) shift ;; esac
  shift
done
for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node "$@"; done
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames node[7-9]" ]] && printf 'node7\\nnode8\\nnode9\\n'
"""
RUN_TRAIN = """#!/usr/bin/env bash
echo "$NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT: $#: $*"
"""


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    for name, text in {
        "bin/srun": SRUN,
        "bin/scontrol": SCONTROL,
        "repository/scripts/run_train.sh": RUN_TRAIN,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **variables}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)


def slurm(folder: Path) -> dict[str, str]:
    return {
        "SLURM_SUBMIT_DIR": str(folder / "repository"),
        "SLURM_JOB_NODELIST": "node[7-9]",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_ID": "1230042",
    }


def test_every_node_runs_the_trainer_with_its_number(tmp_path: Path) -> None:
    job = run(tmp_path, "--job.description", "two words", **slurm(tmp_path))
    assert job.returncode == 0, job.stderr
    assert job.stdout.splitlines() == [
        f"{node} of 3 at node7:20042: 2: --job.description two words" for node in range(3)
    ]
    job = run(tmp_path, **slurm(tmp_path), MASTER_PORT="1234")
    assert "at node7:1234:" in job.stdout


@pytest.mark.parametrize(
    ("lacking", "message"),
    [("SLURM_SUBMIT_DIR", "set FP8DIST to it"), ("SLURM_JOB_NODELIST", "a job for Slurm: sbatch")],
)
def test_what_is_missing_is_said(tmp_path: Path, lacking: str, message: str) -> None:
    variables = slurm(tmp_path)
    del variables[lacking]
    if lacking != "SLURM_SUBMIT_DIR":
        variables["FP8DIST"] = variables["SLURM_SUBMIT_DIR"]
    else:
        variables["SLURM_SUBMIT_DIR"] = str(tmp_path)
    job = run(tmp_path, **variables)
    assert job.returncode == 1
    assert message in job.stderr
