"""The collectives of a forward and a backward of a Llama block, for each recipe."""

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

import fp8dist
from tests.distributed.harness import DEVICE, run_on_ranks
from tests.distributed.tp_block import RECIPES, batch, block_of, part, plan, tp_mesh
from tests.distributed.wire import Collective, collectives


def traffic(recipe: str, again: bool) -> tuple[list[Collective], list[Collective]]:
    mesh = tp_mesh()
    block = parallelize_module(block_of(recipe), mesh, plan(again))
    fp8dist.precompute_float8_dynamic_scale_for_fsdp(block)
    mine = part(batch(1), mesh).requires_grad_()
    with collectives() as forward:
        output = block(mine)
    with collectives() as backward:
        output.backward(part(batch(2), mesh))
    return forward, backward


def text(recipe: str, again: bool = True) -> str:
    (forward, backward), *others = run_on_ranks(2, traffic, recipe, again)
    assert all(other == (forward, backward) for other in others)
    lines = ["forward", *(f"  {issued}" for issued in forward)]
    return "\n".join([*lines, "backward", *(f"  {issued}" for issued in backward)])


# A rank has 2 * 32 tokens of 512 numbers: 32768 elements.


class InFlight(TorchDispatchMode):
    """The most collectives that were on their way at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: set[int] = set()
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # a subclass first makes of it what it sends
        result = func(*args, **(kwargs or {}))
        if func is torch.ops._c10d_functional.wait_tensor.default:
            self.launched.discard(args[0].untyped_storage().data_ptr())
        elif func.namespace == "_c10d_functional" and len(func._schema.arguments) > 1:
            self.launched.add(result.untyped_storage().data_ptr())
            self.most = max(self.most, len(self.launched))
        return result


def in_flight(recipe: str) -> int:
    mesh = tp_mesh()
    block = parallelize_module(block_of(recipe), mesh, plan())
    with InFlight() as mode:
        block(part(batch(1), mesh)).backward(part(batch(2), mesh))
    return mode.most


@pytest.mark.skipif(DEVICE != "cpu", reason="NCCL has an order, and may have several")
@pytest.mark.parametrize("recipe", RECIPES)
def test_gloo_is_given_one_at_a_time(recipe: str) -> None:
    """Two all-gathers of one group at a time corrupt its memory."""
    assert run_on_ranks(2, in_flight, recipe) == [1, 1]


def test_rowwise_collectives() -> None:
    assert_expected_inline(
        text("rowwise"),
        """\
forward
  all_gather uint8[32768] over 2 ranks
  all_gather float32[64] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
  all_gather uint8[32768] over 2 ranks
  all_gather float32[64] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
backward
  all_gather uint8[32768] over 2 ranks
  all_gather float32[64] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
  all_gather uint8[32768] over 2 ranks
  all_gather float32[64] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks""",
    )


def test_blockwise_collectives() -> None:
    assert_expected_inline(
        text("blockwise"),
        """\
forward
  all_gather uint8[32768] over 2 ranks
  all_gather float32[256] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
  all_gather uint8[32768] over 2 ranks
  all_gather float32[256] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
backward
  all_gather uint8[32768] over 2 ranks
  all_gather float32[256] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
  all_gather uint8[32768] over 2 ranks
  all_gather float32[256] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks""",
    )


def test_mxfp8_collectives() -> None:
    assert_expected_inline(
        text("mxfp8_rceil"),
        """\
forward
  all_gather uint8[32768] over 2 ranks
  all_gather uint8[1024] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
  all_gather uint8[32768] over 2 ranks
  all_gather uint8[1024] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
backward
  all_gather uint8[32768] over 2 ranks
  all_gather uint8[1024] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
  all_gather uint8[32768] over 2 ranks
  all_gather uint8[1024] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks""",
    )


def test_tensorwise_collectives() -> None:
    assert_expected_inline(
        text("tensorwise"),
        """\
forward
  all_reduce MAX int32[1] over 2 ranks
  all_gather uint8[32768] over 2 ranks
  all_reduce MAX int32[1] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
  all_reduce MAX int32[1] over 2 ranks
  all_gather uint8[32768] over 2 ranks
  all_reduce MAX int32[1] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
backward
  all_reduce MAX int32[1] over 2 ranks
  all_gather uint8[32768] over 2 ranks
  all_reduce MAX int32[1] over 2 ranks
  all_reduce MAX int32[1] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
  all_reduce MAX int32[1] over 2 ranks
  all_gather uint8[32768] over 2 ranks
  all_reduce MAX int32[1] over 2 ranks
  all_reduce MAX int32[1] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks""",
    )


def test_rowwise_with_gw_hp_collectives() -> None:
    """In backward the input crosses once more, in high precision (float32 here), as does the
    gradient."""
    assert_expected_inline(
        text("rowwise_with_gw_hp"),
        """\
forward
  all_gather uint8[32768] over 2 ranks
  all_gather float32[64] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
  all_gather uint8[32768] over 2 ranks
  all_gather float32[64] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
backward
  all_gather float32[32768] over 2 ranks
  all_gather float32[32768] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
  all_gather float32[32768] over 2 ranks
  all_gather float32[32768] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks""",
    )


def test_rowwise_with_gw_hp_collectives_from_the_float8_copy() -> None:
    assert_expected_inline(
        text("rowwise_with_gw_hp", again=False),
        """\
forward
  all_gather uint8[32768] over 2 ranks
  all_gather float32[64] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
  all_gather uint8[32768] over 2 ranks
  all_gather float32[64] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
backward
  all_gather float32[32768] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks
  all_gather float32[32768] over 2 ranks
  reduce_scatter SUM float32[65536] over 2 ranks""",
    )
