"""What follows from where a shard lies: how its payload is made up, and what its scales take."""

import pytest
import torch

from fp8dist import kernels
from fp8dist.config import RECIPES
from fp8dist.shard import Shard, empty_scales, payload_columns

CPU = torch.device("cpu")


def whole(rows: int, columns: int, recipe: str) -> Shard:
    size = rows, columns
    return Shard(torch.zeros(size), size, (0, 0), size, RECIPES[recipe])


def test_rows_too_wide_for_the_kernel_are_cast_afterwards() -> None:
    widths = kernels.WIDEST_ROWS, kernels.WIDEST_ROWS + 16
    shards = [whole(2, width, "rowwise") for width in widths]
    assert [shard.cast_by_rows for shard in shards] == [True, False]


@pytest.mark.parametrize(
    "rows, largest, world, packed",
    [(32, 16, 2, True), (32, 32, 1, True), (32, 11, 3, False), (32, 4, 9, False), (32, 4, 8, True)],
)
def test_scales_are_packed_where_every_rank_has_a_full_shard(
    rows: int, largest: int, world: int, packed: bool
) -> None:
    """32 rows on 9 ranks are 8 full shards of 4 and an empty one."""
    size = (rows, 64)
    recipe = RECIPES["mxfp8_rceil"]
    shard = Shard(torch.zeros(largest, 64), size, (0, 0), (largest, 64), recipe, world)
    assert shard.packed is packed
    assert shard.exchanges_words is not packed
    assert payload_columns(shard) == (66 if packed else 64)


@pytest.mark.parametrize(
    "recipe, sizes",
    [
        ("tensorwise", [(2, 1, 1)]),
        ("rowwise", [(2, 256, 1), (2, 1, 384)]),
        ("blockwise", [(2, 2, 3)]),
        ("mxfp8_rceil", []),
    ],
)
def test_scales_have_storages_of_their_own(recipe: str, sizes: list[tuple[int, ...]]) -> None:
    scales = empty_scales(whole(256, 384, recipe), CPU)
    assert [tuple(each.shape) for each in scales] == sizes
    assert all(each.untyped_storage().nbytes() == each.nbytes for each in scales)


def test_exponents_that_are_exchanged_are_those_of_the_weight() -> None:
    shard = Shard(torch.zeros(11, 64), (32, 64), (0, 0), (11, 64), RECIPES["mxfp8_rceil"], 3)
    (exponents,) = empty_scales(shard, CPU)
    assert (exponents.shape, exponents.dtype) == ((1, 32, 2), torch.uint8)
