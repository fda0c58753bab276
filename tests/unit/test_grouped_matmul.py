"""The grouped matmuls, against exact arithmetic and, on a GPU, the dequantized one."""

from typing import Any

import pytest
import torch

from fp8dist import grouped_numerics, hardware, kernels, numerics
from fp8dist.config import COLUMN, RECIPES, ROW
from fp8dist.grouped_matmul import scaled_grouped_matmul, scaled_grouped_outer
from fp8dist.grouped_numerics import ContractedRows, ScaledGroups
from fp8dist.numerics import Scaled

E4M3 = torch.float8_e4m3fn
ROWWISE = RECIPES["rowwise"]
EXPERTS, K, N = 3, 32, 48


def operand(rows: int, columns: int, seed: int) -> Scaled:
    """Small integers with scales of rows, so that products and sums are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(-4, 5, (rows, columns), generator=generator).to(E4M3)
    scale = 2.0 ** torch.randint(-2, 3, (rows, 1), generator=generator)
    return Scaled(data, scale, ROW)


def value(x: Scaled) -> torch.Tensor:
    return x.data.double() / x.scale.double()


def groups(x: torch.Tensor, ends: torch.Tensor) -> ScaledGroups:
    return grouped_numerics.quantize_groups(x, ends, COLUMN, E4M3, "power_of_2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[5, 0, 12], [0, 0, 17], [0, 0, 0]], ids=str)
def test_tokens_by_their_experts_weight(counts: list[int], dtype: torch.dtype) -> None:
    a, b = operand(sum(counts), K, 0), operand(EXPERTS * N, K, 1)
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    found = scaled_grouped_matmul(a, b, ends, dtype, ROWWISE)
    expected = torch.cat(
        [
            part @ weight.t()
            for part, weight in zip(value(a).split(counts), value(b).view(3, N, K), strict=True)
        ]
    )
    assert found.dtype == dtype
    assert found.equal(expected.to(dtype))


def by_rows(b: Scaled) -> ContractedRows:
    """b (E * A, B) with a factor and inverses, of which products of small integers are exact."""
    generator = torch.Generator().manual_seed(2)
    inverse = 2.0 ** torch.randint(-2, 3, (EXPERTS,), generator=generator)
    return ContractedRows(b.data, torch.ones(EXPERTS, b.data.size(0) // EXPERTS), inverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[5, 0, 12], [0, 0, 17], [0, 0, 0]], ids=str)
def test_tokens_by_rows_of_their_experts_weight(counts: list[int], dtype: torch.dtype) -> None:
    a, b = operand(sum(counts), N, 0), by_rows(operand(EXPERTS * N, K, 1))
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    found = scaled_grouped_matmul(a, b, ends, dtype, ROWWISE)
    weights = b.data.double().view(EXPERTS, N, K) * b.inverse.double()[:, None, None]
    parts = zip(value(a).split(counts), weights, strict=True)
    expected = torch.cat([part @ weight for part, weight in parts])
    assert found.dtype == dtype
    assert found.equal(expected.to(dtype))


@pytest.mark.parametrize("counts", [[5, 0, 12], [0, 0, 17], [0, 0, 0]], ids=str)
def test_tokens_contracted(counts: list[int]) -> None:
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    # Halves of small integers: exact in float8 with any power of two.
    a, b = (torch.randint(-4, 5, (sum(counts), n), generator=generator) / 2 for n in (N, K))
    found = scaled_grouped_outer(groups(a, ends), groups(b, ends), torch.float32, ROWWISE)
    expected = torch.stack(
        [p.t() @ q for p, q in zip(a.split(counts), b.split(counts), strict=True)]
    )
    assert found.shape == (EXPERTS, N, K)
    assert found.equal(expected)


@pytest.mark.parametrize(
    ("fast_accum", "gluon", "expected"),
    [
        (True, True, ["ours", "rows", "outer"]),
        (True, False, ["ours", "ours, transposed", ("torch", True)]),
        (False, True, [("torch", False), ("torch, transposed", False), ("torch", False)]),
    ],
)
def test_whose_kernels_multiply(
    fast_accum: bool, gluon: bool, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Hopper GPU, whose tensor cores sum fast: exact sums are torch's, and with a Triton whose
    Gluon is not known grad_weight is. Where rows are contracted these want a transpose.
    """
    called: list[Any] = []

    def note(name: str, b: torch.Tensor) -> str:
        return f"{name}, transposed" if b.view(torch.uint8).equal(transposed) else name

    def of_torch(_: Any, b: torch.Tensor, *__: Any, use_fast_accum: bool, **___: Any) -> Any:
        b = b.transpose(1, 2).flatten(0, 1) if b.dim() == 3 else b
        called.append((note("torch", b), use_fast_accum))
        return torch.zeros(2, 2)

    def ours(_: Any, b: torch.Tensor, *__: Any) -> torch.Tensor:
        called.append(note("ours", b))
        return torch.zeros(2, 2)

    def rows(
        _: Any, b: torch.Tensor, a_inverse: torch.Tensor, b_inverse: torch.Tensor, __: Any
    ) -> torch.Tensor:
        called.append(note("rows", b))
        assert a_inverse.equal(1 / c.scale.flatten()) and b_inverse.equal(d.inverse)
        return torch.zeros(2, 2, dtype=torch.bfloat16)

    def outer(*_: Any) -> torch.Tensor:
        called.append("outer")
        return torch.zeros(2, 2)

    monkeypatch.setattr(hardware, "has_grouped_matmul", lambda device, recipe: True)
    monkeypatch.setattr(kernels.grouped, "multiplies_groups", lambda a: True)
    monkeypatch.setattr(kernels.grouped, "HAS_GLUON", gluon)
    monkeypatch.setattr(torch, "_scaled_grouped_mm", of_torch)
    ends = torch.tensor([5, 5, 17], dtype=torch.int32)
    a, b = operand(17, K, 0), operand(EXPERTS * N, K, 1)
    c, d = operand(17, N, 2), by_rows(operand(EXPERTS * N, K, 3))
    transposed = d.data.view(torch.uint8).view(EXPERTS, N, K).transpose(1, 2).flatten(0, 1)
    x, y = (groups(torch.randn(17, n), ends) for n in (N, K))
    with torch.library._scoped_library("fp8dist", "IMPL") as library:
        library.impl("scaled_grouped_mm", ours, "CPU")
        library.impl("scaled_grouped_mm_rows", rows, "CPU")
        library.impl("scaled_grouped_outer", outer, "CPU")
        scaled_grouped_matmul(a, b, ends, torch.bfloat16, ROWWISE, fast_accum=fast_accum)
        found = scaled_grouped_matmul(c, d, ends, torch.float32, ROWWISE, fast_accum=fast_accum)
        assert found.dtype == torch.float32
        none = Scaled(c.data[:0], c.scale[:0], ROW)
        assert scaled_grouped_matmul(none, d, ends * 0, torch.float32, ROWWISE).shape == (0, K)
        scaled_grouped_outer(x, y, torch.bfloat16, ROWWISE, fast_accum=fast_accum)
    assert called == expected


def test_a_plan_is_of_a_gpu_with_all_kernels() -> None:
    assert not kernels.grouped.multiplies_in_gluon(torch.ones(1))
    with hardware.assume_matmuls():
        assert kernels.grouped.multiplies_in_gluon(torch.ones(1))


@pytest.mark.gpu
@pytest.mark.parametrize("fast_accum", [True, False])
@pytest.mark.parametrize("counts", [[5, 0, 12], [0, 0, 170], [256, 128, 512]], ids=str)
def test_on_a_gpu_as_dequantized(counts: list[int], fast_accum: bool) -> None:
    """Products of float8 are summed in float32 by both; the output is bfloat16 (2^-9). So few sums
    are the same fast."""
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32).cuda()
    a = numerics.quantize(torch.randn(sum(counts), K).cuda(), ROW, E4M3, "power_of_2")
    b = numerics.quantize(torch.randn(EXPERTS * N, K).cuda(), ROW, E4M3, "power_of_2")
    found, expected = (
        scaled_grouped_matmul(
            a, b, ends, torch.bfloat16, ROWWISE, fast_accum=fast_accum, emulate=emulate
        )
        for emulate in (False, True)
    )
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
    c = numerics.quantize(torch.randn(sum(counts), N).cuda(), ROW, E4M3, "power_of_2")
    d = grouped_numerics.contracted_rows(b, EXPERTS)
    found, expected = (
        scaled_grouped_matmul(
            c, d, ends, torch.bfloat16, ROWWISE, fast_accum=fast_accum, emulate=emulate
        )
        for emulate in (False, True)
    )
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
    x, y = (groups(torch.randn(sum(counts), n).cuda(), ends) for n in (N, K))
    found, expected = (
        scaled_grouped_outer(x, y, torch.bfloat16, ROWWISE, fast_accum=fast_accum, emulate=emulate)
        for emulate in (False, True)
    )
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-6)
    assert found[[i for i, count in enumerate(counts) if count == 0]].count_nonzero() == 0
