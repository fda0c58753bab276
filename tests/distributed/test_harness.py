"""A rank that fails or hangs fails its test, and the next test has ranks that work."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import DEVICE, UNDER_TORCHRUN, run_on_ranks
from tests.distributed.wire import collectives

pool_only = pytest.mark.skipif(UNDER_TORCHRUN, reason="ends the ranks, which torchrun has started")


def rank_and_world(offset: int) -> tuple[int, int]:
    return dist.get_rank() + offset, dist.get_world_size()


def one_raises_in_a_collective() -> None:
    if dist.get_rank() == 1:
        raise KeyError("only here")
    dist.barrier()


def one_hangs() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)


def one_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(17)
    dist.barrier()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_rank_runs_it(world: int) -> None:
    assert run_on_ranks(world, rank_and_world, 10) == [(10 + rank, world) for rank in range(world)]


@pool_only
def test_a_rank_that_raises() -> None:
    with pytest.raises(AssertionError, match="(?s)rank 1 of 2.*one_raises.*KeyError: 'only here'"):
        run_on_ranks(2, one_raises_in_a_collective)
    assert run_on_ranks(1, rank_and_world, 0) == [(0, 1)]


@pool_only
def test_a_rank_that_hangs() -> None:
    run_on_ranks(2, rank_and_world, 0)  # so that both have imported what there is
    with pytest.raises(AssertionError, match="(?s)rank 1 of 2: still running.*in one_hangs"):
        run_on_ranks(2, one_hangs, timeout=1)


@pool_only
def test_a_rank_that_dies() -> None:
    with pytest.raises(AssertionError, match="rank 1 of 2: died: exit code 17"):
        run_on_ranks(2, one_dies)


def every_kind() -> list[str]:
    with collectives() as recorded:
        x = torch.zeros(6, device=DEVICE)
        dist.all_reduce(x.view(torch.int32), op=dist.ReduceOp.MAX)
        half = torch.zeros(3, device=DEVICE, dtype=torch.bfloat16)
        dist.all_gather([half.clone(), half.clone()], half)
        dist.broadcast(x, 0)
    return [str(collective) for collective in recorded]


def test_collectives_are_recorded() -> None:
    expected = [
        "all_reduce MAX int32[6] over 2 ranks",
        "all_gather bfloat16[3] over 2 ranks",
        "broadcast_ float32[6] over 2 ranks",
    ]
    assert run_on_ranks(2, every_kind) == [expected] * 2
