"""Programs of this repository, as their tests run them."""

import os
import runpy
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import torch.distributed as dist

from tests.distributed.harness import CONTEXT, DEVICE, GRACE
from tests.environment import cpu_environment

TIMEOUT = 200.0  # seconds


def run(
    path: Path, *arguments: str, ranks: int | None = None, fork: bool = DEVICE == "cpu"
) -> "subprocess.CompletedProcess[str]":
    """Run a program on the CPU; with `ranks`, on as many gloo ranks.

    Args:
        fork: as forks of a process that has imported torch, torchao and fp8dist, which takes a new
            one longer than most programs take. Else as a person starts it, with torchrun.
    """
    if fork:
        return _run_forks(path, arguments, ranks)
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


def _run_forks(
    path: Path, arguments: tuple[str, ...], ranks: int | None
) -> "subprocess.CompletedProcess[str]":
    environments: list[dict[str, str]] = [{}]
    if ranks is not None:  # what torchrun tells them, and where they meet
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        environments = [
            {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)
        ]
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, stream) for stream in ("stdout", "stderr")]
        processes = [
            CONTEXT.Process(target=_be_program, args=(str(path), arguments, environment, printed))
            for environment in environments
        ]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + TIMEOUT
            while running := [p for p in processes if p.exitcode is None]:
                if any(p.exitcode for p in processes):  # the others are left to say so, and ended
                    deadline = min(deadline, time.monotonic() + GRACE)
                if not wait([p.sentinel for p in running], deadline - time.monotonic()):
                    break
            codes = [p.exitcode for p in processes]
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        output, errors = (one.read_text() if one.exists() else "" for one in printed)
    command = [str(path), *arguments]
    if None in codes and not any(codes):
        raise subprocess.TimeoutExpired(command, TIMEOUT, output, errors)
    code = next((code for code in codes if code), 0)
    return subprocess.CompletedProcess(command, code, output, errors)


def _be_program(
    path: str, arguments: tuple[str, ...], environment: dict[str, str], printed: list[Path]
) -> None:
    """A fork's life: the program, with what it prints in files that its ranks share."""
    for descriptor, file in enumerate(printed, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(environment)
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    try:
        runpy.run_path(path, run_name="__main__")
    except Exception:  # as Python ends a program; multiprocessing would print it otherwise
        sys.excepthook(*sys.exc_info())  # torch's, which says what rank it is
        sys.exit(1)
