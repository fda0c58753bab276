"""The benchmarks as their tests use them: run as programs, or imported for their functions."""

import importlib
import subprocess
import sys
from types import ModuleType

from tests.distributed.forks import TIMEOUT, run_forks
from tests.distributed.harness import DEVICE
from tests.environment import ROOT, cpu_environment

BENCH = ROOT / "scripts" / "bench"


def run_program(
    name: str, *arguments: str, ranks: int | None = None, fork: bool = DEVICE == "cpu"
) -> "subprocess.CompletedProcess[str]":
    """Run scripts/bench/NAME.py on the CPU; with `ranks`, on as many gloo ranks.

    Args:
        fork: as forks of a process that has imported what they need; else as a person starts it,
            which takes some seconds of each process.
    """
    path = BENCH / f"{name}.py"
    if fork:
        return run_forks(path, *arguments, ranks=ranks)
    launcher = []
    if ranks is not None:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [sys.executable, *launcher, str(path), *arguments],
        env=cpu_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def load_program(name: str) -> ModuleType:
    """scripts/bench/NAME.py as a module."""
    if str(BENCH) not in sys.path:
        sys.path.insert(0, str(BENCH))
    return importlib.import_module(name)
