"""MXFP8's grouped matmuls as a Blackwell GPU has them, with stand-ins for the two parts that need
one: torchao's kernels that arrange scales, for which it has references in plain torch, and torch's
matmul, which reads scales as cuBLAS's documentation has them ("1D block scaling factors layout").
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchao.prototype.moe_training.kernels import mxfp8

from fp8dist import Float8Config, grouped_numerics, hardware, mx_grouped_matmul, numerics
from fp8dist.config import RECIPES
from fp8dist.experts import Float8ShardedExperts
from fp8dist.grouped_matmul import scaled_grouped_matmul, scaled_grouped_outer
from tests.unit.moe import DIM, EXPERTS, HIDDEN, tokens

E4M3 = torch.float8_e4m3fn
MX = RECIPES["mxfp8_rceil"]
COUNTS = [[5, 0, 37, 16], [0, 0, 0, 50], [32, 64, 32, 96], [300, 1, 130], [7]]


def from_blocked(flat: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The scales (rows, columns) from tiles of 128 x 4, of which one after the other is read."""
    found = torch.empty(-(-rows // 128) * 128, -(-columns // 4) * 4)
    values = flat.flatten().view(torch.uint8)
    for row in range(found.size(0)):
        for column in range(found.size(1)):
            tile = row // 128 * (found.size(1) // 4) + column // 4
            in_tile = 16 * (row % 32) + 4 * (row % 128 // 32) + column % 4
            found[row, column] = 2.0 ** (int(values[512 * tile + in_tile]) - 127)
    return found[:rows, :columns]


def as_meta(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")


of_torch = torch._scaled_grouped_mm


def value(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return data.double() * scale.double().repeat_interleave(32, 1)


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    offs: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """torch's, group by group; what is of no group is NaN. What torch checks it checks itself."""
    operands = [as_meta(x) for x in (a, b, a_scale, b_scale)]
    shape = of_torch(*operands, offs=as_meta(offs), out_dtype=out_dtype).shape
    ends = [0, *offs.tolist()]
    assert all(end % 32 == 0 for end in ends) and offs.dtype == torch.int32
    groups = list(zip(ends[:-1], ends[1:], strict=True))
    if b.dim() == 3:
        out = torch.full((a.size(0), b.size(2)), torch.nan, dtype=torch.double)
        (start, columns), n = (0, a.size(1) // 32), b.size(2)
        assert a_scale.size(1) == -(-columns // 4) * 4
        for g, (first, end) in enumerate(groups):
            own = a_scale.flatten()[start * a_scale.size(1) :]
            x = value(a[first:end], from_blocked(own, end - first, columns))
            out[first:end] = x @ value(b[g].t(), from_blocked(b_scale[g], n, columns)).t()
            start += -(-(end - first) // 128) * 128
        assert out.shape == shape
        return out.to(out_dtype)
    products, starts = [], [0, 0]
    for first, end in groups:
        operands = []
        for i, (x, scale) in enumerate(((a, a_scale), (b.t(), b_scale))):
            columns = (end - first) // 32
            own = from_blocked(scale.flatten()[starts[i] :], x.size(0), columns)
            operands.append(value(x[:, first:end], own))
            starts[i] += -(-x.size(0) // 128) * 128 * -(-columns // 4) * 4
        products.append(operands[0] @ operands[1].t())
    assert (len(products), *products[0].shape) == shape
    return torch.stack(products).to(out_dtype)


@pytest.fixture
def blackwell(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of dimensions of the second operands that are multiplied."""
    calls: list[int] = []

    def noted(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(b.dim())
        return matmul(a, b, *args, **kwargs)

    monkeypatch.setattr(torch, "_scaled_grouped_mm", noted)
    monkeypatch.setattr(hardware, "has_grouped_matmul", lambda device, recipe: True)
    for name in "2d_M_groups", "2d_K_groups", "per_group_3d":
        monkeypatch.setattr(mxfp8, f"triton_mx_block_rearrange_{name}", reference(name))
    yield calls


def reference(name: str) -> Any:
    arrange = getattr(mxfp8, f"torch_to_blocked_{name}")

    def call(scales: torch.Tensor, *ends: torch.Tensor) -> torch.Tensor:
        for groups in ends:
            assert groups.numel().bit_count() == 1, "the kernels compile for no others"
        # The references take columns in fours only where the kernels pad them.
        bytes_of = scales.view(torch.uint8)
        if name != "2d_K_groups":
            bytes_of = F.pad(bytes_of, (0, -scales.size(-1) % 4))
        found = arrange(bytes_of, *ends)
        return (found[0] if isinstance(found, tuple) else found).view(torch.float8_e8m0fnu)

    return call


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("k", [96, 256])
def test_as_dequantized(counts: list[int], k: int, blackwell: list[int]) -> None:
    n, ends = 160, torch.tensor(counts).cumsum(0, dtype=torch.int32)
    x, y = tokens(counts, k), tokens(counts, n, seed=1)
    x = torch.cat([x, torch.full((3, k), torch.nan)])  # of no group
    a = numerics.quantize(x, MX.input, E4M3, "e8m0")
    b = numerics.quantize(torch.randn(len(counts) * n, k), MX.weight, E4M3, "e8m0")
    found, expected = (
        scaled_grouped_matmul(a, b, ends, torch.bfloat16, MX, emulate=emulate)[: sum(counts)]
        for emulate in (False, True)
    )
    # Both round sums, in float64 and in float32, to bfloat16 (2^-8).
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-14)
    p, q = (
        grouped_numerics.quantize_groups(z[: sum(counts)], ends, (32, 1), E4M3, "e8m0")
        for z in (y, x)
    )
    found, expected = (
        scaled_grouped_outer(p, q, torch.bfloat16, MX, emulate=emulate) for emulate in (False, True)
    )
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-14)
    assert blackwell == [3, 2]


def test_packed_weights(blackwell: list[int]) -> None:
    """As they arrive, each row's exponents after its data."""
    counts, n, k = [40, 3, 0], 64, 96
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    a = numerics.quantize(tokens(counts, k), MX.input, E4M3, "e8m0")
    b = numerics.quantize(torch.randn(3 * n, k), MX.weight, E4M3, "e8m0")
    packed = torch.cat([b.data.view(torch.uint8), numerics.scale_to_exponent(b.scale)], 1)
    rows = b._replace(data=packed[:, :k].view(E4M3))
    found, expected = (scaled_grouped_matmul(a, x, ends, torch.float32, MX) for x in (rows, b))
    assert found.dtype == torch.float32 and found.equal(expected)
    p = grouped_numerics.quantize_groups(tokens(counts, n), ends, (32, 1), E4M3, "e8m0")
    assert scaled_grouped_outer(p, p, torch.float32, MX).dtype == torch.float32


def test_what_the_compiler_is_told_of_the_ops(blackwell: list[int]) -> None:
    ends, ones = torch.tensor([64, 192], dtype=torch.int32), torch.ones(192, 64).to(E4M3)
    exponents = torch.full((192, 2), 127, dtype=torch.uint8)
    operands = (ones, ones[:128], exponents, exponents[:128], ends)
    op = torch.ops.fp8dist.mx_grouped_mm.default
    torch.library.opcheck(op, operands, test_utils="test_faketensor")
    rows, exponents = ones.t().contiguous(), exponents[:64, :1].expand(64, 6)
    operands = (rows, rows[:32], exponents, exponents[:32], ends)
    op = torch.ops.fp8dist.mx_grouped_outer.default
    torch.library.opcheck(op, operands, test_utils="test_faketensor")


@pytest.mark.parametrize("compiled", [False, True])
def test_experts(compiled: bool, blackwell: list[int]) -> None:
    """All three matmuls are torch's, also compiled."""
    counts, weight = COUNTS[0], torch.randn(EXPERTS, HIDDEN, DIM)
    ends, grad = torch.tensor(counts).cumsum(0, dtype=torch.int32), tokens(counts, HIDDEN, seed=1)

    def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)

    if compiled:
        multiply = torch.compile(multiply, fullgraph=True, backend="aot_eager")
    results = []
    for emulate in (False, True):
        config = Float8Config("mxfp8", emulate=emulate)
        parameter = nn.Parameter(Float8ShardedExperts(weight, config, "weight"))
        x = tokens(counts).requires_grad_()
        output = multiply(x, parameter)
        output.backward(grad)
        results.append((output.detach(), x.grad, parameter.grad))
    assert sorted(blackwell) == [2, 3, 3]
    for found, expected in zip(*results, strict=True):
        # The hardware's products are bfloat16 (2^-8).
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-14)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 3, 6, 8])
@pytest.mark.parametrize("columns", [3, 8])
def test_torchaos_kernels_are_as_its_references(columns: int, groups: int) -> None:
    """Which stand for them above; any GPU has them."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 4, (groups,), generator=generator)
    ends = mx_grouped_matmul._of_kernels(sizes.cumsum(0, dtype=torch.int32))
    rows = int(ends[-1]) + 2
    for name, size, given in (
        ("2d_M_groups", (64 * rows, columns), (64 * ends,)),
        ("2d_K_groups", (200, 2 * rows), (2 * ends,)),
        ("per_group_3d", (groups, 160, columns), ()),
    ):
        scales = torch.randint(256, size, generator=generator).byte()
        expected = reference(name)(scales.view(torch.float8_e8m0fnu), *given)
        kernel = getattr(mxfp8, f"triton_mx_block_rearrange_{name}")
        found = kernel(scales.cuda().view(torch.float8_e8m0fnu), *(x.cuda() for x in given))
        found, expected = (x.view(torch.uint8).cpu().flatten() for x in (found, expected))
        count = min(found.numel(), expected.numel())
        assert found[:count].equal(expected[:count])
        assert not found[count:].any() and not expected[count:].any()
