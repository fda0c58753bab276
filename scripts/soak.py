"""Train a small model for long, twice: flat memory, the same losses, steps that do not get slower.

    python -m torch.distributed.run --standalone --nproc-per-node 2 scripts/soak.py --steps 2000

Ranks use a GPU each, or the CPU where there is none.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as deterministic algorithms ask for

import torch.distributed as dist  # noqa: E402  # after the path

from tests.distributed.harness import init_process_group  # noqa: E402  # after the path
from tests.distributed.soaking import EVERY, Soaked, faults, soak  # noqa: E402  # after the path

# Of the medians of the first and the last fifth after the warm-up; a machine's own noise.
DRIFT = 1.2
# Of the process, which Python's own allocations move.
RESIDENT_GROWTH = 0.03


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--recipe", default="tensorwise")
    options = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    init_process_group(rank, world, "env://")
    first, second = (soak(options.recipe, options.steps) for _ in range(2))
    warm_up = max(1, options.steps // EVERY // 10)
    wrong = faults(first, second, warm_up)
    drift = _drift(first)
    if drift > DRIFT:
        wrong.append(f"steps take {drift:.2f} of what they took")
    growth = first.resident[-1] / max(first.resident[warm_up], 1) - 1
    if growth > RESIDENT_GROWTH:
        wrong.append(f"the process grows by {100 * growth:.1f} %")
    print(
        f"rank {rank}: {options.recipe}, 2 x {options.steps} steps, loss {first.losses[0]:.4f} to "
        f"{first.losses[-1]:.4f}, allocated {first.allocated[warm_up]} to {first.allocated[-1]}, "
        f"process {growth:+.1%}, step time {statistics.median(first.seconds) * 1e3:.1f} ms, "
        f"drift {drift:.2f}: {'; '.join(wrong) or 'good'}",
        flush=True,
    )
    dist.destroy_process_group()
    return 1 if wrong else 0


def _drift(run: Soaked) -> float:
    after = run.seconds[len(run.seconds) // 10 :]
    fifth = len(after) // 5
    return statistics.median(after[-fifth:]) / statistics.median(after[:fifth])


if __name__ == "__main__":
    sys.exit(main())
