"""Tokens in groups and weights one below the other, against one matrix at a time."""

import pytest
import torch

from fp8dist import grouped_numerics, numerics
from fp8dist.config import COLUMN, RECIPES, ROW, WHOLE, Block
from fp8dist.grouped_numerics import GROUP_MULTIPLE, ScaledGroups

E4M3 = torch.float8_e4m3fn
COUNTS = [
    [5, 0, 37, 16],
    [0, 0, 0, 48],  # one has all
    [64, 0, 0, 0],
    [1, 1, 1, 1],
    [32, 64, 32, 96],  # nothing to pad
    [0, 0, 0, 0],
]
BLOCKS: list[tuple[Block, str]] = [(COLUMN, "power_of_2"), ((32, 1), "e8m0")]


def ends_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0, dtype=torch.int32)


def random(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 2, columns)


def up_to(n: int, multiple: int) -> int:
    """Padded as the grouped matmul wants it: at least one block."""
    return max(1, -(-n // multiple)) * multiple


@pytest.mark.parametrize("multiple", [16, 32])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_padded_groups(counts: list[int], multiple: int) -> None:
    x, ends = random(sum(counts) + 3, 8), ends_of(counts)
    x[sum(counts) :] = torch.nan  # rows of no group
    padded = grouped_numerics.pad_groups(x, ends, multiple)
    new_ends = grouped_numerics.padded_ends(ends, multiple).tolist()
    assert padded.size(0) == grouped_numerics.padded_rows(x.size(0), len(counts), multiple)
    assert padded.size(0) % multiple == 0
    expected = torch.zeros_like(padded)
    start = 0
    for part, count, end in zip(x.split([*counts, 3]), counts, new_ends, strict=False):
        expected[start : start + count] = part
        assert end == start + up_to(count, multiple)
        start = end
    assert start <= padded.size(0)
    assert padded.equal(expected)


@pytest.mark.parametrize("block, scale_format", BLOCKS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_each_group_is_quantized_by_itself(
    counts: list[int], block: Block, scale_format: str
) -> None:
    x, ends = random(sum(counts), 8), ends_of(counts)
    found = grouped_numerics.quantize_groups(x, ends, block, E4M3, scale_format)
    value = grouped_numerics.dequantize_groups(found)
    start = 0
    for g, (part, end) in enumerate(zip(x.split(counts), found.ends.tolist(), strict=True)):
        _, expected = numerics.quantize_both(
            torch.cat([part, torch.zeros(end - start - part.size(0), 8)]),
            None,
            block,
            E4M3,
            scale_format,
        )
        assert expected is not None
        assert torch.equal(found.data[:, start:end].float(), expected.data.float())
        if found.block == WHOLE:
            assert found.scale[g].equal(expected.scale[:, 0])
        else:
            assert found.scale[:, start // 32 : end // 32].equal(expected.scale)
        assert value[:, start:end].equal(numerics.dequantize(expected.data, expected.scale))
        start = end
    assert value[:, start:].count_nonzero() == 0


def test_a_nan_stays_in_its_group() -> None:
    x, ends = random(40, 8), ends_of([8, 32])  # each group becomes one of GROUP_MULTIPLE
    x[3, 2] = torch.nan
    value = grouped_numerics.dequantize_groups(
        grouped_numerics.quantize_groups(x, ends, COLUMN, E4M3, "power_of_2")
    )
    assert value[2, :GROUP_MULTIPLE].isnan().any()
    assert not value[2, GROUP_MULTIPLE:].isnan().any()


def test_rescaling_each_of_several_matrices() -> None:
    of, rows, columns = RECIPES["mxfp8_rceil"], 64, 96
    matrices = [random(rows + i, columns)[:rows] for i in range(3)]
    block = of.weight_for_grad_input
    stacked = numerics.quantize(torch.cat(matrices), of.weight, E4M3, of.scale_format)
    found = grouped_numerics.rescale_each(stacked, rows, block, of.scale_format)
    assert found.block == (block[1], block[0])
    for i, w in enumerate(matrices):
        arrived = numerics.quantize(w, of.weight, E4M3, of.scale_format)
        one = numerics.rescale_transposed(arrived, block, None, of.scale_format)
        here = slice(i * columns, (i + 1) * columns)
        assert found.data[here].float().equal(one.data.float())
        assert found.scale[here].equal(one.scale)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_groups_are_padded_and_unpadded(counts: list[int]) -> None:
    x, ends = random(sum(counts) + 3, 8), ends_of(counts)  # 3 rows of no group
    padded = grouped_numerics.pad_groups(x, ends, GROUP_MULTIPLE)
    found = grouped_numerics.unpad_groups(padded, ends, GROUP_MULTIPLE, x.size(0))
    assert found.shape == x.shape
    assert found[: sum(counts)].equal(x[: sum(counts)])


@pytest.mark.parametrize("spread", [0, 8, 30])
def test_contracted_rows(spread: int) -> None:
    """Tokens times factors, times what arrived and its inverse, are the product with the weights
    that arrived; tokens become no larger, and some of each expert's stay as they are."""
    rows, columns, experts = 32, 48, 3
    w = (
        random(experts * rows, columns)
        * 2.0 ** torch.linspace(-spread, spread, 96).round()[:, None]
    )
    arrived = numerics.quantize(w, ROW, E4M3, "power_of_2")
    found = grouped_numerics.contracted_rows(arrived, experts)
    assert found.data is arrived.data
    value = arrived.data.double() / arrived.scale.double()
    of_factors = found.factor.double()[:, :, None] * found.inverse.double()[:, None, None]
    assert (arrived.data.double().view(experts, rows, columns) * of_factors).equal(
        value.view(experts, rows, columns)
    )
    assert found.factor.amax(1).equal(torch.ones(experts))
    x, ends = random(10, rows), torch.tensor([3, 3, 9], dtype=torch.int32)
    group = [0, 0, 0, 2, 2, 2, 2, 2, 2, 2]
    assert grouped_numerics.by_factor(x, ends, found.factor).equal(x * found.factor[group])


@pytest.mark.parametrize("weights", ["normal", "rows of many magnitudes", "with outliers"])
@pytest.mark.parametrize("magnitude", [1.0, 1e-11])
def test_contracted_rows_lose_nothing_to_scaled_columns(weights: str, magnitude: float) -> None:
    """grad_input against float64, beside that of what arrived scaled by columns: as exact in each
    column, also where gradients are near the smallest amax that has a scale (1e-12)."""
    m, n, k = 64, 256, 128
    w = random(n, k)
    if weights == "rows of many magnitudes":
        w *= 2.0 ** random(n, 1).mul(3).round()
    if weights == "with outliers":
        w[::50, ::40] *= 100
    grad = random(m, n) * magnitude
    arrived = numerics.quantize(w, ROW, E4M3, "power_of_2")
    rows = grouped_numerics.contracted_rows(arrived, 1)
    ends = torch.tensor([m], dtype=torch.int32)
    a = numerics.quantize(
        grouped_numerics.by_factor(grad, ends, rows.factor), ROW, E4M3, "power_of_2"
    )
    found = (
        numerics.dequantize(a.data, a.scale).double() @ rows.data.double() * rows.inverse.double()
    )
    value = numerics.dequantize(arrived.data, arrived.scale)
    b = numerics.quantize(value, COLUMN, E4M3, "power_of_2")
    own = numerics.quantize(grad, ROW, E4M3, "power_of_2")
    by_columns = (
        numerics.dequantize(own.data, own.scale).double()
        @ numerics.dequantize(b.data, b.scale).double()
    )
    exact = grad.double() @ w.double()

    def noise(x: torch.Tensor) -> torch.Tensor:
        return (x - exact).norm(dim=0) / exact.norm(dim=0)

    # The same roundings of the same significands, but for the elements that are subnormal in one.
    assert (noise(found) / noise(by_columns)).max() < 1.05


def test_a_scale_of_each_group_is_used_for_its_rows() -> None:
    data = torch.ones(1, 32).to(E4M3)
    scale, ends = torch.tensor([[2.0], [4.0]]), torch.tensor([16, 32], dtype=torch.int32)
    value = grouped_numerics.dequantize_groups(ScaledGroups(data, scale, ends, WHOLE))
    assert value.tolist() == [[0.5] * 16 + [0.25] * 16]
