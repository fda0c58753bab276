"""Random models, shapes, shardings and recipes against one process, for as long as wanted.

    python scripts/fuzz.py --cases 500
    python scripts/fuzz.py --case "FuzzCase(recipe='rowwise', mesh=(3,))"

What fails is shrunk to the simplest case that still does, and printed as a line to paste.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402  # after the path

from tests.distributed.fuzz import FuzzCase, cases, failure_of  # noqa: E402  # after the path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500, help="how many to run")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other cases")
    parser.add_argument("--case", help="run this one alone")
    options = parser.parse_args()
    if options.case is not None:
        found = failure_of(eval(options.case, {"FuzzCase": FuzzCase}))
        print(found or "as in one process")
        return 1 if found else 0
    return fuzz(options.cases, options.seed)


def fuzz(count: int, first_seed: int) -> int:
    started, run = time.monotonic(), 0
    failed: list[tuple[FuzzCase, str]] = []

    @seed(first_seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=False,
    )
    @given(cases())
    def check(case: FuzzCase) -> None:
        nonlocal run
        run += 1
        if (found := failure_of(case)) is not None:
            failed.append((case, found))
            raise AssertionError(found)
        if run % 50 == 0:
            print(f"{run} cases, {time.monotonic() - started:.0f} s", flush=True)

    try:
        check()
    except AssertionError:
        case, found = failed[-1]  # the shrunk one runs last
        print(f'{found}\npython scripts/fuzz.py --case "{case!r}"')
        return 1
    print(f"{run} cases, none fails, seed {first_seed}, {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
