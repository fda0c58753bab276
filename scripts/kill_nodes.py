"""Kill workers and whole nodes of a training job on two nodes, and see how it goes on.

    python scripts/kill_nodes.py [CASE ...]

Nodes are torchruns on this machine. A run that went on with as many ranks must end with bitwise the
losses of one that nothing happened to. The cases, all of them by default:

    workers     workers of either node are killed: torchrun starts those of both again
    replaced    --nnodes 2, a node is switched off, and the other waits for one in its place
    alone       --nnodes 1:2, a node is switched off: the job goes on without, and with it again
                when it is back
    host        the node at which they meet is switched off: the job ends by itself, and goes on
                from its checkpoint when it is started again
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.distributed.killing import (  # noqa: E402  # after the path
    TIMEOUT,
    check_checkpoints,
    finish,
    job_arguments,
    record_of,
    start,
)
from tests.distributed.nodes import Nodes  # noqa: E402  # after the path
from tests.distributed.test_train import write_text  # noqa: E402  # after the path

STEPS = 60
RESUMED = r"resuming after step \d+\n(.*\n)*?step .*\n"  # and has done a step since
# Fewer ranks scale and add in another order: the curve is another one as far as float8 rounds.
CLOSE = 0.02


def workers(argv: list[str], log: Path) -> None:
    with Nodes(argv, "2", log, max_restarts=4) as nodes:
        nodes.wait_for(r"step +4/")
        for node in (1, 0, 0, 1):
            nodes.kill_worker(node)
            nodes.wait_for(RESUMED)
        _end(nodes, [0, 0])


def replaced(argv: list[str], log: Path) -> None:
    with Nodes(argv, "2", log) as nodes:
        nodes.wait_for(r"step +4/")
        nodes.kill(1)
        nodes.start_again(1)
        nodes.wait_for(RESUMED)
        _end(nodes, [0, 0])


def alone(argv: list[str], log: Path) -> None:
    with Nodes(argv, "1:2", log) as nodes:
        nodes.wait_for(r"step +4/")
        nodes.kill(1)
        nodes.wait_for(r"debugmodel: .*, 1 ranks on CPU.*\n")
        nodes.wait_for(RESUMED)
        nodes.start_again(1)
        nodes.wait_for(r"debugmodel: .*, 2 ranks on CPU.*\n")
        nodes.wait_for(RESUMED)
        _end(nodes, [0, 0])


def host(argv: list[str], log: Path) -> None:
    with Nodes(argv, "1:2", log) as nodes:
        nodes.wait_for(r"step +4/")
        nodes.kill(0)
        _end(nodes, [-9, 1], timeout=TIMEOUT)
        nodes.wait_for("RendezvousConnectionError: The connection to the C10d store has failed")
    with Nodes(argv, "1:2", log) as nodes:
        nodes.wait_for(RESUMED)
        _end(nodes, [0, 0])


CASES: dict[str, Callable[[list[str], Path], None]] = {
    case.__name__: case for case in (workers, replaced, alone, host)
}


def _end(nodes: Nodes, codes: list[int], timeout: float = 200.0) -> None:
    found = nodes.finish(timeout)
    if found != codes:
        raise AssertionError(f"exit codes {found}, not {codes}\n{nodes.printed}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE")
    cases = parser.parse_args().cases or list(CASES)
    if unknown := set(cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}: there are {', '.join(CASES)}")
    folder = Path(tempfile.mkdtemp(prefix="kill-nodes-"))
    (folder / "text").mkdir()
    text = write_text(folder / "text")
    failed = False
    try:
        finish(start(job_arguments(folder / "undisturbed", text, STEPS), ranks=2), [])
        expected = record_of(folder / "undisturbed")["losses"]
        for name in cases:
            started = time.monotonic()
            CASES[name](job_arguments(folder / name, text, STEPS), folder / f"{name}.log")
            check_checkpoints(folder / name)
            found = record_of(folder / name)["losses"]
            same, off = found == expected, abs(found[-1] / expected[-1] - 1)
            good = len(found) == STEPS and (same or (name == "alone" and off < CLOSE))
            failed |= not good
            told = "the same losses" if same else f"final loss {found[-1]:.4f}, {off:.2%} off"
            print(
                f"{name}: {'' if good else 'WRONG: '}{told}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
