"""Casts of tokens in groups where they are: as `grouped_numerics` does them."""

import pytest
import torch

from fp8dist import grouped_numerics, numerics
from fp8dist.config import COLUMN, RECIPES, ROW, Block
from fp8dist.kernels import grouped
from fp8dist.numerics import Scaled

E4M3 = torch.float8_e4m3fn
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# The recipes' blocks of a row, of a column of a group, and the format of their scales.
CASES: list[tuple[Block, Block, str]] = [
    (ROW, COLUMN, "power_of_2"),
    ((1, 32), (32, 1), "e8m0"),
]
COUNTS = [[5, 0, 37, 16], [0, 0, 0, 300], [0, 0, 0, 0], [256, 0, 384, 128], [1] * 100]


def tokens(rows: int, columns: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 3, columns)
    return x.to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS, ids=lambda c: str(c)[:20])
@pytest.mark.parametrize("block, transposed_block, scale_format", CASES)
@pytest.mark.parametrize("rows, wanted", [(True, True), (True, False), (False, True)])
def test_tokens(
    block: Block,
    transposed_block: Block,
    scale_format: str,
    counts: list[int],
    dtype: torch.dtype,
    device: str,
    rows: bool,
    wanted: bool,
) -> None:
    x = tokens(sum(counts) + 7, 96, dtype, device)  # 7 rows of no group
    x[sum(counts) :] = torch.nan
    ends = torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)
    scaled, groups = grouped.quantize_tokens(
        x, ends, block if rows else None, transposed_block if wanted else None, E4M3, scale_format
    )
    assert (scaled is not None) == rows and (groups is not None) == wanted
    if scaled is not None:
        expected = numerics.quantize(x, block, E4M3, scale_format)
        m = sum(counts)
        assert scaled.data[:m].view(torch.uint8).equal(expected.data[:m].view(torch.uint8))
        assert scaled.scale[:m].equal(expected.scale[:m])
    if groups is not None:
        of = grouped_numerics.quantize_groups(x, ends, transposed_block, E4M3, scale_format)
        assert groups.block == of.block
        assert groups.ends.equal(of.ends)
        assert (
            groups.data.contiguous().view(torch.uint8).equal(of.data.contiguous().view(torch.uint8))
        )
        assert groups.scale.equal(of.scale)
        if groups.inverse is not None:
            assert groups.inverse.equal(of.scale.reciprocal())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", COUNTS, ids=lambda c: str(c)[:20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [True, False])
def test_tokens_times_a_factor(
    counts: list[int], wanted: bool, dtype: torch.dtype, device: str
) -> None:
    """Rows are cast of the product, columns of the tokens themselves."""
    x = tokens(sum(counts) + 7, 96, dtype, device)  # 7 rows of no group
    ends = torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)
    exponents = torch.randint(-30, 1, (len(counts), 96), generator=torch.Generator().manual_seed(0))
    factor = (2.0**exponents).to(device)
    column = COLUMN if wanted else None
    scaled, groups = grouped.quantize_tokens(x, ends, ROW, column, E4M3, "power_of_2", factor)
    m = sum(counts)
    product = x[:m].float() * factor.repeat_interleave(torch.tensor(counts, device=device), 0)
    expected = numerics.quantize(product, ROW, E4M3, "power_of_2")
    assert scaled.data[:m].view(torch.uint8).equal(expected.data.view(torch.uint8))
    assert scaled.scale[:m].equal(expected.scale)
    assert (groups is not None) == wanted
    if groups is not None:
        of = grouped_numerics.quantize_groups(x, ends, COLUMN, E4M3, "power_of_2")
        assert (
            groups.data.contiguous().view(torch.uint8).equal(of.data.contiguous().view(torch.uint8))
        )
        assert groups.scale.equal(of.scale)


def stacked(size: tuple[int, int], recipe: str, device: str) -> Scaled:
    of, (n, k) = RECIPES[recipe], size
    w = tokens(3 * n, k, torch.float32, device)
    return numerics.quantize(w, of.weight, E4M3, of.scale_format)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(64, 96), (160, 256)], ids=str)
def test_transposing_each(size: tuple[int, int], device: str) -> None:
    scaled, (n, k) = stacked(size, "rowwise", device), size
    rows = grouped_numerics.contracted_rows(scaled, 3)
    found = grouped.transposed(rows)
    expected = scaled.data.view(torch.uint8).view(3, n, k).transpose(1, 2).reshape(3 * k, n)
    assert found.data.view(torch.uint8).equal(expected)
    assert found.scale.reciprocal().equal(rows.inverse.repeat_interleave(k)[:, None])
    assert found.inverse.equal(found.scale.reciprocal())
    assert found.block == ROW
    op = torch.ops.fp8dist.transpose_each.default
    torch.library.opcheck(op, (scaled.data, n, None), test_utils="test_faketensor")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(64, 96), (160, 256)], ids=str)
def test_rescaling_each(size: tuple[int, int], device: str) -> None:
    of, scaled = RECIPES["mxfp8_rceil"], stacked(size, "mxfp8_rceil", device)
    arguments = (scaled, size[0], of.weight_for_grad_input, of.scale_format)
    found, expected = (module.rescale_each(*arguments) for module in (grouped, grouped_numerics))
    assert (
        found.data.contiguous()
        .view(torch.uint8)
        .equal(expected.data.contiguous().view(torch.uint8))
    )
    assert found.scale.equal(expected.scale)
    assert found.block == expected.block
    op, (rows, block, scale_format) = torch.ops.fp8dist.rescale_each.default, arguments[1:]
    given = (scaled.data, scaled.scale, scaled.block, rows, block, scale_format, None)
    torch.library.opcheck(op, given, test_utils="test_faketensor")
