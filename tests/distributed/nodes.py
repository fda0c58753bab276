"""A training job on two nodes, of which each is a torchrun on this machine with one rank."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

from tests.distributed.killing import command
from tests.distributed.test_launch import free_port
from tests.distributed.test_train import pid_of_rank
from tests.environment import cpu_environment


class Nodes:
    """Nodes that can be killed and started again; they end with the `with` block at the latest.

    Args:
        argv: of the job.
        nnodes: torchrun's: how many nodes the job needs, `"2"` or `"1:2"`. Two are started.
        log: what all of them print. Which of them has rank 0, which talks, is torchrun's choice.
    """

    def __init__(self, argv: list[str], nnodes: str, log: Path, max_restarts: int = 1) -> None:
        self._argv, self._log, self._read = argv, log, 0
        self._torchrun = ["--nnodes", nnodes, "--nproc-per-node", "1"]
        self._torchrun += ["--max-restarts", str(max_restarts), "--rdzv-backend", "c10d"]
        self._torchrun += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "nodes"]
        log.write_text("")
        self._agents = [self._start(node) for node in range(2)]

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        for node in range(2):
            self.kill(node)

    def _start(self, node: int) -> "subprocess.Popen[bytes]":
        # Node 0 is where they meet. Once there are enough, others have 2 s to come.
        rendezvous = ["--rdzv-conf", f"is_host={node == 0},last_call_timeout=2"]
        with self._log.open("ab") as output:
            return subprocess.Popen(
                command([*self._torchrun, *rendezvous], self._argv),
                env=cpu_environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
                stdout=output,
                stderr=output,
            )

    def start_again(self, node: int) -> None:
        self._agents[node] = self._start(node)

    @property
    def printed(self) -> str:
        return self._log.read_text()

    def wait_for(self, pattern: str, timeout: float = 100.0) -> None:
        """Until `pattern` is printed, after what was waited for before."""
        deadline = time.monotonic() + timeout
        while not (match := re.compile(pattern).search(self.printed, self._read)):
            if time.monotonic() > deadline or all(
                agent.poll() is not None for agent in self._agents
            ):
                raise AssertionError(f"no {pattern!r} in\n{self.printed}")
            time.sleep(0.02)
        self._read = match.end()

    def worker(self, node: int) -> int:
        """The process of a node's rank.

        Raises:
            AssertionError: it has none now.
        """
        for rank in range(2):
            try:
                return pid_of_rank(rank, self._agents[node].pid)
            except AssertionError:
                continue
        raise AssertionError(f"node {node} has no worker")

    def kill_worker(self, node: int) -> None:
        os.kill(self.worker(node), signal.SIGKILL)

    def kill(self, node: int) -> None:
        """As when the machine is switched off."""
        agent = self._agents[node]
        if agent.poll() is None:
            agent.send_signal(signal.SIGSTOP)  # so that it starts no worker meanwhile
            try:
                self.kill_worker(node)
            except (AssertionError, ProcessLookupError):  # it is between two
                pass
            agent.kill()
            agent.wait()

    def finish(self, timeout: float = 200.0) -> list[int]:
        """The exit codes of both nodes, once they have ended by themselves."""
        deadline = time.monotonic() + timeout
        return [agent.wait(deadline - time.monotonic()) for agent in self._agents]
