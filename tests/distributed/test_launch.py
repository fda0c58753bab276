"""The launch script, run as a person runs it: nodes, refusals, exit codes."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--model.flavor=debugmodel:1",
    "--training.steps=3",
    "--training.seq_len=64",
    "--training.local_batch_size=2",
    "--training.global_batch_size=-1",
    "--metrics.log_freq=1",
]
EXIT_LIMIT = 120  # seconds; a run takes 10 to 20


def environment(**extra: str) -> dict[str, str]:
    """This Python for the script, no GPU, and nothing of an enclosing launch."""
    launch = {"CONFIG_FILE", "NGPU", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}
    env = {key: value for key, value in os.environ.items() if key not in launch}
    env |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return env | extra


def start(*arguments: str, pipesize: int = -1, **env: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [str(ROOT / "scripts" / "run_train.sh"), *arguments],
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        pipesize=pipesize,
    )


def finish(process: "subprocess.Popen[str]") -> str:
    """Everything it printed."""
    try:
        return process.communicate(timeout=EXIT_LIMIT)[0]
    finally:
        process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_two_nodes_train_one_job(tmp_path: Path) -> None:
    shared = {"NNODES": "2", "NGPU": "1", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    arguments = [*TINY, f"--job.dump_folder={tmp_path}"]
    nodes = [start(*arguments, NODE_RANK=str(node), **shared) for node in range(2)]
    printed = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(printed)
    # One job of two ranks, not two jobs: each step is reported once, by the first rank.
    steps = re.findall(r"\bstep\W+(\d+)", "".join(printed))
    assert steps == ["1", "2", "3"], "\n".join(printed)


def test_missing_config_file_names_those_shipped() -> None:
    process = start(CONFIG_FILE="scripts/configs/llama4.toml")
    printed = finish(process)
    assert process.returncode != 0
    assert "scripts/configs/llama4.toml" in printed
    for shipped in (ROOT / "scripts" / "configs").glob("*.toml"):
        assert f"scripts/configs/{shipped.name}" in printed


def test_mistyped_flag_is_refused() -> None:
    process = start("--training.step=3", NGPU="1")
    printed = finish(process)
    assert process.returncode != 0
    assert "training.step" in printed
    assert "training.steps" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="pipes cannot be made small")
def test_help_ends_in_silence_when_its_reader_has_enough() -> None:
    """`--help | head`: more is printed than fits a pipe of a page and what is read of it."""
    process = start("--help", pipesize=4096)
    assert process.stdout is not None
    printed = process.stdout.readline()
    process.stdout.close()
    assert process.wait(EXIT_LIMIT) == -signal.SIGPIPE
    assert printed.startswith("--compare: ")


def test_node_without_address_is_refused() -> None:
    process = start(NNODES="2")
    printed = finish(process)
    assert process.returncode != 0
    assert "MASTER_ADDR" in printed


def test_range_of_nodes_that_is_none_is_refused() -> None:
    process = start(NNODES="3:2", MASTER_ADDR="127.0.0.1")
    printed = finish(process)
    assert process.returncode != 0
    assert "NNODES=3:2: a positive number is needed, or the fewest and the most" in printed


def test_restarts_that_are_no_number_are_refused() -> None:
    process = start(MAX_RESTARTS="often")
    printed = finish(process)
    assert process.returncode != 0
    assert "MAX_RESTARTS=often: a number is needed" in printed


def test_taken_port_is_refused() -> None:
    with socket.create_server(("", 0)) as holder:
        port = holder.getsockname()[1]
        process = start(MASTER_PORT=str(port))
        printed = finish(process)
    assert process.returncode != 0
    assert f"MASTER_PORT={port} is taken" in printed
