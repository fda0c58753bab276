"""Casts count what kernels of one pass each read and write."""

import pytest
import torch

from fp8dist import kernels
from fp8dist.config import COLUMN, ROW, TENSOR, Block
from fp8dist.plan.operands import Operands

E4M3 = torch.float8_e4m3fn
SIZE = (64, 32)
N = 64 * 32


def cast(x: torch.Tensor, block: Block | None, transposed: Block | None) -> None:
    kernels.quantize_both(x, block, transposed, E4M3, "power_of_2")


@pytest.mark.parametrize(
    ("block", "transposed", "reads", "writes"),
    [
        (TENSOR, None, 2, 1),
        (TENSOR, TENSOR, 2, 2),
        (ROW, None, 1, 1),  # a row is scaled as it is read
        (ROW, COLUMN, 2, 2),
        (None, COLUMN, 2, 1),
        ((1, 32), (32, 1), 1, 2),  # a tile too
        (None, None, 0, 0),
    ],
)
def test_casts(block: Block | None, transposed: Block | None, reads: int, writes: int) -> None:
    operands = Operands(merged=False)
    with kernels.watched(by=operands):
        cast(torch.ones(SIZE, dtype=torch.bfloat16), block, transposed)
    assert operands.bytes == reads * 2 * N + writes * N


def test_a_cast_by_given_blocks() -> None:
    operands = Operands(merged=False)
    with kernels.watched(by=operands):
        kernels.quantize(torch.ones(SIZE), ROW, E4M3, "power_of_2")
    assert operands.bytes == 4 * N + N


@pytest.mark.parametrize(
    ("own", "block", "given", "passes"),
    [
        (TENSOR, TENSOR, False, 2),  # the transpose alone
        (ROW, COLUMN, True, 2),
        (ROW, COLUMN, False, 3),
        ((1, 32), (32, 1), False, 2),
    ],
)
def test_transposes(own: Block, block: Block, given: bool, passes: int) -> None:
    weight, _ = kernels.quantize_both(torch.ones(SIZE), own, None, E4M3, "power_of_2")
    assert weight is not None
    scale = torch.ones(1, SIZE[1]) if given else None
    operands = Operands(merged=False)
    with kernels.watched(by=operands):
        kernels.rescale_transposed(weight, block, scale, "power_of_2")
    assert operands.bytes == passes * N


@pytest.mark.parametrize(("merged", "casts"), [(False, 4), (True, 3)])
def test_an_input_that_layers_share(merged: bool, casts: int) -> None:
    shared, other = torch.ones(SIZE), torch.ones(SIZE)
    operands = Operands(merged)
    with kernels.watched(by=operands):
        cast(shared, ROW, None)
        cast(shared.view(SIZE), ROW, None)  # the same
        cast(shared, TENSOR, None)  # is cast otherwise
        cast(other, ROW, None)
    row, tensor = 5 * N, 9 * N
    assert operands.bytes == tensor + (casts - 1) * row


def test_nothing_counts_before_or_after() -> None:
    operands = Operands(merged=False)
    with kernels.watched(by=operands):
        pass
    cast(torch.ones(SIZE), ROW, None)
    assert operands.bytes == 0
