"""The benchmarks as their tests use them: run as programs, or imported for their functions."""

import importlib
import subprocess
import sys
from types import ModuleType
from typing import Any

from tests.distributed import programs
from tests.environment import ROOT

BENCH = ROOT / "scripts" / "bench"


def run_program(name: str, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run scripts/bench/NAME.py; the options are those of `programs.run`."""
    return programs.run(BENCH / f"{name}.py", *arguments, **options)


def load_program(name: str) -> ModuleType:
    """scripts/bench/NAME.py as a module."""
    if str(BENCH) not in sys.path:
        sys.path.insert(0, str(BENCH))
    return importlib.import_module(name)
