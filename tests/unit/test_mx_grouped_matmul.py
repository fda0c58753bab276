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

from fp8dist import Float8Config, grouped_numerics, hardware, numerics
from fp8dist.config import RECIPES
from fp8dist.experts import Float8ShardedExperts
from fp8dist.grouped_matmul import scaled_grouped_matmul, scaled_grouped_outer
from tests.unit.moe import DIM, EXPERTS, HIDDEN, tokens

E4M3 = torch.float8_e4m3fn
MX = RECIPES["mxfp8_rceil"]
COUNTS = [[5, 0, 37, 16], [0, 0, 0, 50], [32, 64, 32, 96], [300, 1, 130, 0]]


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
    """torch's, group by group; what is of no group is NaN."""
    assert a.is_contiguous() and b.stride(-2) == 1
    assert a_scale.dtype == b_scale.dtype == torch.float8_e8m0fnu
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
        assert scales.is_contiguous()
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
@pytest.mark.parametrize("columns", [3, 8])
def test_torchaos_kernels_are_as_its_references(columns: int) -> None:
    """Which stand for them above; any GPU has them."""
    generator = torch.Generator().manual_seed(0)
    for name, size, ends in (
        ("2d_M_groups", (640, columns), [64, 128, 448]),
        ("2d_K_groups", (200, 20), [2, 6, 20]),
        ("per_group_3d", (3, 160, columns), None),
    ):
        scales = torch.randint(256, size, generator=generator).byte()
        given = () if ends is None else (torch.tensor(ends, dtype=torch.int32),)
        expected = reference(name)(scales.view(torch.float8_e8m0fnu), *given).view(torch.uint8)
        kernel = getattr(mxfp8, f"triton_mx_block_rearrange_{name}")
        on_gpu = (x.cuda() for x in given)
        found = kernel(scales.cuda().view(torch.float8_e8m0fnu), *on_gpu)
        found = found.view(torch.uint8).cpu().flatten()
        count = min(found.numel(), expected.numel())
        assert found[:count].equal(expected.flatten()[:count])
        assert not found[count:].any() and not expected.flatten()[count:].any()
