"""The collectives of a forward and a backward of a Llama block, for each recipe."""

from expecttest import assert_expected_inline
from torch.distributed.tensor.parallel import parallelize_module

import fp8dist
from tests.distributed.harness import run_on_ranks
from tests.distributed.tp_block import batch, block_of, part, plan, tp_mesh
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
