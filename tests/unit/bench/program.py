"""The benchmarks as their tests use them: run as programs, or imported for their functions."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[3]
BENCH = ROOT / "scripts" / "bench"


def run_program(
    name: str, *arguments: str, ranks: int | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run scripts/bench/NAME.py on the CPU; with `ranks`, on as many gloo ranks."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = []
    if ranks is not None:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [sys.executable, *launcher, str(BENCH / f"{name}.py"), *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )


def load_program(name: str) -> ModuleType:
    """scripts/bench/NAME.py as a module."""
    if str(BENCH) not in sys.path:
        sys.path.insert(0, str(BENCH))
    return importlib.import_module(name)
