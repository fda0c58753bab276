"""Run a function on several ranks: worker processes that outlive the test, or torchrun's.

    def body(rank_argument): ...            # importable by name; returns something picklable
    results = run_on_ranks(3, body, ...)    # one result per rank

Under `torchrun --nproc-per-node N -m pytest ...` every rank runs the tests, and a function runs on
the ranks that torchrun started; tests that ask for another number of ranks are skipped.
"""

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
# Forks of one process that has imported everything start in no time; CUDA forbids forks.
CONTEXT = multiprocessing.get_context("spawn" if DEVICE == "cuda" else "forkserver")
if DEVICE == "cpu":
    multiprocessing.set_forkserver_preload(
        [
            "tests.distributed.toy",
            # Else each rank imports them when it first compiles or trains a job, for seconds.
            "torch._inductor.compile_fx",
            "torch.distributed.checkpoint.state_dict",
            "torchao.optim",
            "fp8dist.train.loop",
            "matplotlib.pyplot",
        ]
    )
TIMEOUT = 120.0  # seconds for one call; the slowest, a compilation, takes about 30
# A collective that the other ranks do not join ends before the call that waits for it.
COLLECTIVE_TIMEOUT = timedelta(seconds=60)
# How long the other ranks may take to report once one has failed.
GRACE = 3.0

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    reason="inductor needs a C++ compiler",
)


def run_on_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT, **kwargs: Any
) -> list[Any]:
    """What `function(*args, **kwargs)` returns on each of `world` ranks, by rank.

    The default process group is that of the `world` ranks.

    Raises:
        AssertionError: a rank raised, died or did not finish in time; the message has the
            traceback of each such rank. The next call gets new processes.
    """
    if UNDER_TORCHRUN:
        return _run_under_torchrun(world, function, args, kwargs)
    if world not in _pools:
        _pools[world] = _Pool(world)
    return _pools[world].run(function, args, kwargs, timeout)


class _Pool:
    """Processes that form a process group and wait for functions to run."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.folder = Path(tempfile.mkdtemp(prefix="fp8dist-ranks-"))
        atexit.register(self.close)
        self.connections: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for rank in range(world):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_serve, args=(rank, world, there, str(self.folder)), daemon=True
            )
            process.start()
            there.close()  # so that a dead worker reads as the end of its connection
            self.connections.append(here)
            self.processes.append(process)
        for rank, connection in enumerate(self.connections):
            if not connection.poll(TIMEOUT):
                raise AssertionError(f"rank {rank} of {world} did not start in {TIMEOUT} s")
            connection.recv_bytes()

    def run(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float,
    ) -> list[Any]:
        message = pickle.dumps((function, args, kwargs))
        for connection in self.connections:
            connection.send_bytes(message)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while waiting := [r for r in range(self.world) if r not in results and r not in failures]:
            ready = wait([self.connections[r] for r in waiting], deadline - time.monotonic())
            if not ready:
                failures |= {r: self._stack_of_hung(r, timeout) for r in waiting}
            for rank in [r for r in waiting if self.connections[r] in ready]:
                try:
                    succeeded, value = pickle.loads(self.connections[rank].recv_bytes())
                except EOFError:
                    self.processes[rank].join(GRACE)
                    succeeded, value = False, f"died: exit code {self.processes[rank].exitcode}"
                (results if succeeded else failures)[rank] = value
                if not succeeded:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            self.close()
            reports = [f"rank {r} of {self.world}: {failures[r]}" for r in sorted(failures)]
            raise AssertionError("\n".join(reports))
        return [results[rank] for rank in range(self.world)]

    def _stack_of_hung(self, rank: int, timeout: float) -> str:
        pid = self.processes[rank].pid
        if pid is not None:
            os.kill(pid, signal.SIGUSR1)
            time.sleep(0.5)  # for the dump to be written
        return f"still running after {timeout} s or another rank's failure:\n" + (
            _stacks(self.folder, rank).read_text()
        )

    def close(self) -> None:
        _pools.pop(self.world, None)
        for process in self.processes:
            process.kill()
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


_pools: dict[int, _Pool] = {}


def _stacks(folder: str | Path, rank: int) -> Path:
    """Where a rank writes what its threads are doing when it is asked to."""
    return Path(folder) / f"stacks-{rank}"


def _serve(rank: int, world: int, connection: Connection, folder: str) -> None:
    """A worker's life: run what arrives, until the session ends."""
    with open(_stacks(folder, rank), "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        init_process_group(rank, world, f"file://{folder}/store")
        connection.send_bytes(b"started")
        while True:
            try:
                message = connection.recv_bytes()
            except EOFError:
                return
            try:
                function, args, kwargs = pickle.loads(message)
                reply = pickle.dumps((True, function(*args, **kwargs)))
            except BaseException:
                reply = pickle.dumps((False, traceback.format_exc()))
            connection.send_bytes(reply)


def init_process_group(rank: int, world: int, init_method: str) -> None:
    if DEVICE == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        if world > torch.cuda.device_count():
            # NCCL refuses two ranks on one GPU unless it takes them for two hosts.
            os.environ["NCCL_HOSTID"] = f"host{rank}"
    elif "lo" in [name for _, name in socket.if_nameindex()]:
        # The host's own name need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        # CPU tensors, such as objects and offloaded shards, go over gloo on any machine.
        "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=world,
        timeout=COLLECTIVE_TIMEOUT,
    )


_exchange: dist.ProcessGroup | None = None


def _run_under_torchrun(
    world: int, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any]:
    global _exchange
    started = int(os.environ["WORLD_SIZE"])
    if world != started:
        pytest.skip(f"needs {world} ranks, torchrun has started {started}")
    if _exchange is None:
        init_process_group(int(os.environ["RANK"]), started, "env://")
        # Of its own, so that a rank that failed does not meet the others' collectives.
        _exchange = dist.new_group(backend="gloo", timeout=2 * COLLECTIVE_TIMEOUT)
    # Every rank has made its own arguments; a temporary folder must be the same on all.
    shared = [(args, kwargs)]
    dist.broadcast_object_list(shared, src=0, group=_exchange)
    args, kwargs = shared[0]
    try:
        reply = (True, function(*args, **kwargs))
    except BaseException:
        reply = (False, traceback.format_exc())
    replies: list[Any] = [None] * world
    dist.all_gather_object(replies, reply, group=_exchange)
    failures = [f"rank {r} of {world}: {text}" for r, (ok, text) in enumerate(replies) if not ok]
    if failures:
        raise AssertionError("\n".join(failures))
    return [value for _, value in replies]
