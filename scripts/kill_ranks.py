"""Kill ranks of a training job at random points, and see that it goes on as if nothing had been.

    python scripts/kill_ranks.py --kills 50

Half of the kills end the job, which has to say so within a minute and is then started again; the
other half are left to torchrun's elastic restart. The losses at the end are bitwise those of a run
that nothing happened to. Then one more run is killed, and goes on with fewer ranks.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.distributed.killing import (  # noqa: E402  # after the path
    TIMEOUT,
    check_checkpoints,
    finish,
    job_arguments,
    kill_at_random,
    record_of,
    start,
)
from tests.distributed.test_train import write_text  # noqa: E402  # after the path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill-ranks-"))
    (folder / "text").mkdir()
    text = write_text(folder / "text")
    # A kill costs some 5 steps, of which at most 3 are since the last checkpoint.
    steps = 3 * options.kills + 30
    generator = random.Random(options.seed)
    try:
        undisturbed = job_arguments(folder / "undisturbed", text, steps)
        finish(start(undisturbed, options.ranks), [])
        expected = record_of(folder / "undisturbed")["losses"]
        half = options.kills // 2
        for name, kills, by_torchrun in (
            ("ended", options.kills - half, False),
            ("elastic", half, True),
        ):
            argv = job_arguments(folder / name, text, steps)
            run = _elastic if by_torchrun else _ended
            done = run(argv, folder / name, options.ranks, kills, generator)
            same = record_of(folder / name)["losses"] == expected
            print(f"{name}: {done} kills, losses {'the same' if same else 'OTHER'}", flush=True)
            if not same or done < kills:
                return 1
        return _fewer(folder, text, options.ranks, steps, expected, generator)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _ended(argv: list[str], folder: Path, ranks: int, kills: int, generator: random.Random) -> int:
    done = 0
    while True:
        job, lines = start(argv, ranks), []
        if done == kills or not kill_at_random(job, ranks, generator, lines):
            finish(job, lines)
            return done
        killed = time.monotonic()
        output, _ = job.communicate(timeout=TIMEOUT)  # raises if it hangs
        if job.returncode == 0 or "SIGKILL" not in output:
            raise AssertionError("".join([*lines, output]))
        check_checkpoints(folder)
        done += 1
        print(f"kill {done}: ended after {time.monotonic() - killed:.1f} s", flush=True)


def _elastic(
    argv: list[str], folder: Path, ranks: int, kills: int, generator: random.Random
) -> int:
    job, lines, done = start(argv, ranks, max_restarts=kills), [], 0
    while done < kills and kill_at_random(job, ranks, generator, lines):
        done += 1
        print(f"kill {done}: left to torchrun", flush=True)
    finish(job, lines)
    check_checkpoints(folder)
    return done


def _fewer(
    folder: Path,
    text: Path,
    ranks: int,
    steps: int,
    expected: list[float],
    generator: random.Random,
) -> int:
    argv = job_arguments(folder / "fewer", text, steps)
    job, lines = start(argv, ranks), []
    for _ in range(5):  # so that there is a checkpoint
        _read_a_step(job, lines)
    kill_at_random(job, ranks, generator, lines)
    job.communicate(timeout=TIMEOUT)
    finish(start(argv, ranks - 1), lines)
    found = record_of(folder / "fewer")["losses"]
    # Activations are scaled by the amax of what one rank has, and gradients are added up in
    # another order: the curve is another one as far as float8 rounds, 1/16 of single elements.
    off = abs(found[-1] / expected[-1] - 1)
    print(f"fewer ranks: final loss {found[-1]:.4f}, undisturbed {expected[-1]:.4f}")
    return 0 if len(found) == steps and off < 0.02 else 1


def _read_a_step(job: subprocess.Popen[str], lines: list[str]) -> None:
    while True:
        line = job.stdout.readline()
        lines.append(line)
        if not line or line.startswith("step "):
            return


if __name__ == "__main__":
    sys.exit(main())
