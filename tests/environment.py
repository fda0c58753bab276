"""The environment of the programs that tests start."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def cpu_environment(**more: str) -> dict[str, str]:
    """For this checkout on the CPU, which every machine has: two ranks would need two GPUs."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # A rank that crashes says where.
    return os.environ | own | {"PYTHONFAULTHANDLER": "1"} | more
