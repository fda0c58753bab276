"""Training jobs of which ranks are killed: started as a user does, with torchrun."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fp8dist.train.checkpoint_files import SafeReader, check_files
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.test_train import FLOAT8, arguments, pid_of_rank, train
from tests.environment import cpu_environment

# From a rank's death to the job's end: torchrun waits up to 30 s for the other ranks to go.
TIMEOUT = 60.0
ONE_LAYER = "--model.flavor=debugmodel:1"


def job_arguments(folder: Path, text: Path, steps: int) -> list[str]:
    return arguments(
        folder,
        text,
        FLOAT8,
        "--model.flavor=debugmodel",  # the tiny one is known to tests only
        "--checkpoint.enable",
        "--checkpoint.interval=3",
        f"--training.steps={steps}",
        "--metrics.log_freq=1",
    )


def run_undisturbed(argv: list[str]) -> None:
    """The job of two ranks that nothing happens to."""
    if DEVICE == "cpu":  # as below, but on ranks that have started and imported it all
        run_on_ranks(2, train, argv)
    else:
        finish(start(argv, ranks=2), [])


def start(argv: list[str], ranks: int, max_restarts: int = 0) -> subprocess.Popen[str]:
    torchrun = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(max_restarts)]
    return subprocess.Popen(
        command(torchrun, argv),
        env=cpu_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def command(torchrun: list[str], argv: list[str]) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *torchrun, "-m", "fp8dist.train", *argv]


def kill_at_random(
    job: subprocess.Popen[str],
    ranks: int,
    generator: random.Random,
    lines: list[str],
    first: int = 1,
) -> bool:
    """Kill a rank somewhere in one of the next steps; False if the job ended before.

    Args:
        lines: gets what the job prints until then.
        first: the first of the steps in which it may be.
    """
    if job.stdout is None:
        raise AssertionError("the job's output is not read")
    steps = generator.randint(first, first + 4)
    while steps > 0:
        line = job.stdout.readline()
        if not line:
            return False
        lines.append(line)
        steps -= line.startswith("step ")
    time.sleep(generator.uniform(0, 0.2))
    try:
        os.kill(pid_of_rank(generator.randrange(ranks), job.pid), signal.SIGKILL)
    except (AssertionError, ProcessLookupError):  # it has just ended
        return False
    return True


def check_checkpoints(folder: Path) -> None:
    """Every checkpoint that has its name is whole; raises what is wrong otherwise."""
    for checkpoint in folder.glob("checkpoint/step-*"):
        if re.fullmatch(r"step-\d+", checkpoint.name):
            check_files(checkpoint, SafeReader(checkpoint).read_metadata())


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def finish(job: subprocess.Popen[str], lines: list[str]) -> None:
    """Let a job run to its end, which must be a good one."""
    output, _ = job.communicate(timeout=600)
    lines.append(output)
    if job.returncode != 0:
        raise AssertionError("".join(lines))
