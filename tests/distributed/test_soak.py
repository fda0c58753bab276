"""A short soak; `scripts/soak.py` takes as many steps as wanted."""

import math

from tests.distributed.harness import run_on_ranks
from tests.distributed.soaking import Soaked, faults, soak


def twice(recipe: str) -> tuple[list[str], list[float]]:
    first, second = (soak(recipe, 18, every=6) for _ in range(2))
    return faults(first, second, warm_up=1), first.losses


def test_memory_is_flat_and_a_second_run_is_the_same() -> None:
    for wrong, losses in run_on_ranks(2, twice, "rowwise"):
        assert wrong == []
        assert losses[-1] < losses[0] - 0.1 and math.isfinite(losses[-1])


def test_faults_are_found() -> None:
    good = Soaked(losses=[2.0, 1.0], allocated=[5, 9, 9], tensors=[1, 2, 2])
    assert faults(good, good, warm_up=1) == []
    other = Soaked(losses=[2.0, 1.5], allocated=[5, 9, 10], tensors=[1, 2, 3])
    assert faults(good, other, warm_up=1) == [
        "the losses differ from step 1 on",
        "run 1: allocated grows from 9 to 10",
        "run 1: tensors grows from 2 to 3",
    ]
