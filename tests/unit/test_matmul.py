"""The float8 matmul and its dequantized stand-in, against exact arithmetic and torch's own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.nn.functional import SwizzleType
from torch.utils.flop_counter import FlopCounterMode

from fp8dist import hardware, matmul, numerics
from fp8dist.config import RECIPES, ROW, TENSOR
from fp8dist.matmul import scaled_matmul
from fp8dist.numerics import Scaled

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TENSORWISE = RECIPES["tensorwise"]


def operand(rows: int, columns: int, dtype: torch.dtype, scale: float, seed: int) -> Scaled:
    """Small integers, exact in float8, so that products and sums are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(-4, 5, (rows, columns), generator=generator).to(dtype)
    return Scaled(data, torch.full((1, 1), scale), TENSOR)


def exact(a: Scaled, b: Scaled) -> torch.Tensor:
    return (a.data.double() / a.scale.double()) @ (b.data.double() / b.scale.double()).t()


@pytest.fixture
def float8_hardware(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Lets `torch._scaled_mm` run on the CPU, right but slowly, and notes its arguments."""
    calls: list[dict[str, Any]] = []
    scaled_mm = torch._scaled_mm

    def noting(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append({"a": a, "b": b, "scales": args, **kwargs})
        return scaled_mm(a, b, *args, **kwargs)

    monkeypatch.setattr(hardware, "has_matmul", lambda device, recipe: True)
    monkeypatch.setattr(torch, "_scaled_mm", noting)
    return calls


@pytest.mark.parametrize("output_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("emulate", [False, True])
def test_on_a_cpu_the_result_is_exact_and_rounded_once(
    emulate: bool, output_dtype: torch.dtype
) -> None:
    """Scales are powers of two, so that dequantizing is exact too."""
    a, b = operand(24, 48, E4M3, 0.25, seed=0), operand(32, 48, E5M2, 8.0, seed=1)
    found = scaled_matmul(a, b, output_dtype, TENSORWISE, emulate=emulate)
    assert found.dtype == output_dtype
    assert torch.equal(found, exact(a, b).to(output_dtype))


def test_scales_divide_not_multiply() -> None:
    one = torch.ones(16, 16).to(E4M3)
    a, b = (Scaled(one, torch.tensor([[scale]]), TENSOR) for scale in (2.0, 4.0))
    found = scaled_matmul(a, b, torch.float32, TENSORWISE, emulate=True)
    assert found.eq(16 / 2 / 4).all()


def test_transposed_views_are_taken_as_they_are() -> None:
    a, b = operand(32, 24, E4M3, 0.5, seed=0).t(), operand(32, 16, E4M3, 2.0, seed=1).t()
    found = scaled_matmul(a, b, torch.float32, TENSORWISE)
    assert torch.equal(found.double(), exact(a, b))


def test_a_cpu_never_uses_scaled_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a float8 matmul takes minutes on a CPU")

    monkeypatch.setattr(F, "scaled_mm", refuse)
    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    a = operand(16, 16, E4M3, 1.0, seed=0)
    scaled_matmul(a, a, torch.float32, TENSORWISE)


def test_emulate_never_uses_scaled_mm(float8_hardware: list[dict[str, Any]]) -> None:
    a = operand(16, 16, E4M3, 1.0, seed=0)
    scaled_matmul(a, a, torch.float32, TENSORWISE, emulate=True)
    assert not float8_hardware


@pytest.mark.parametrize("fast_accum", [False, True])
@pytest.mark.parametrize("transposed", ["neither", "a", "b", "both"])
def test_scaled_mm_gets_what_hopper_can_read(
    float8_hardware: list[dict[str, Any]], transposed: str, fast_accum: bool
) -> None:
    a, b = operand(32, 48, E4M3, 0.25, seed=0), operand(16, 48, E5M2, 8.0, seed=1)
    if transposed in ("a", "both"):
        a = a._replace(data=a.data.t().contiguous().t())
    if transposed in ("b", "both"):
        b = b._replace(data=b.data.t().contiguous().t())
    found = scaled_matmul(a, b, torch.bfloat16, TENSORWISE, fast_accum=fast_accum)
    (call,) = float8_hardware
    # Row-major times column-major: the contracted dimension is contiguous in both.
    assert call["a"].is_contiguous()
    assert call["b"].t().is_contiguous()
    assert (call["a"].dtype, call["b"].dtype) == (E4M3, E5M2)
    assert call["scales"] == (4.0, 0.125)
    assert call["use_fast_accum"] is fast_accum
    assert torch.equal(found, exact(a, b).bfloat16())


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 100])
def test_contracted_tokens_of_any_number(
    float8_hardware: list[dict[str, Any]], tokens: int
) -> None:
    """grad_weight: (N, M) times (M, K), both transposed views, contracting M."""
    grad_output = operand(tokens, 32, E5M2, 2.0, seed=0).t()
    input = operand(tokens, 16, E4M3, 0.5, seed=1).t()
    found = scaled_matmul(grad_output, input, torch.float32, TENSORWISE)
    (call,) = float8_hardware
    assert call["a"].size(1) == call["b"].size(0) == (tokens + 15) // 16 * 16
    assert torch.equal(found.double(), exact(grad_output, input))


def test_scales_of_rows_lie_along_the_rows_of_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """(M, 1) and (1, N), reciprocals; one scale for b, of rowwise_with_gw_hp, is one for each N."""
    calls: list[tuple[Any, ...]] = []

    def noting(a: torch.Tensor, b: torch.Tensor, *scales: torch.Tensor, **_: Any) -> torch.Tensor:
        calls.append(scales)
        return torch.zeros(a.size(0), b.size(1), dtype=torch.bfloat16)

    monkeypatch.setattr(hardware, "has_matmul", lambda device, recipe: True)
    monkeypatch.setattr(torch, "_scaled_mm", noting)
    a, b = (operand(rows, 48, E4M3, 1.0, seed=rows)._replace(block=ROW) for rows in (32, 16))
    a = a._replace(scale=torch.arange(1.0, 33).view(32, 1))
    by_rows = b._replace(scale=torch.arange(1.0, 17).view(16, 1))
    scaled_matmul(a, by_rows, torch.float32, RECIPES["rowwise"])
    scaled_matmul(a, operand(16, 48, E4M3, 4.0, seed=0), torch.float32, RECIPES["rowwise"])
    (a_scale, b_scale), (_, of_one) = calls
    assert torch.equal(a_scale, a.scale.reciprocal())
    assert torch.equal(b_scale, by_rows.scale.reciprocal().t())
    assert torch.equal(of_one, torch.full((1, 16), 0.25))


BLOCKS = {
    "output": ((1, 128), (128, 128), "blockwise"),
    "grad_weight": ((1, 128), (1, 128), "blockwise"),
    "mx": ((1, 32), (1, 32), "mxfp8_rceil"),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_are_multiplied_by_torch_as_cublas_reads_them(
    case: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, too: torch 2.13's compiler would make a call of `torch._scaled_mm` of it, and has
    no swizzled scales. K / 128 is no multiple of 4."""
    a_block, b_block, recipe = BLOCKS[case]
    (m, n, k), calls = (256, 128, 640), []

    def noting(a: torch.Tensor, b: torch.Tensor, *scaling: Any, **options: Any) -> torch.Tensor:
        calls.append((a, b, scaling, options))
        return torch.ones(a.size(0), b.size(1), dtype=torch.bfloat16)

    monkeypatch.setattr(hardware, "has_matmul", lambda device, recipe: True)
    monkeypatch.setattr(F, "scaled_mm", noting)
    dtype, scale_format = RECIPES[recipe].weight_dtype, RECIPES[recipe].scale_format
    generator = torch.Generator().manual_seed(0)
    a, b = (
        numerics.quantize(torch.randn(rows, k, generator=generator), block, dtype, scale_format)
        for rows, block in ((m, a_block), (n, b_block))
    )

    def matmul(a: Scaled, b: Scaled) -> torch.Tensor:
        return scaled_matmul(a, b, torch.float32, RECIPES[recipe], fast_accum=True)

    found = (torch.compile(matmul, fullgraph=True) if compiled else matmul)(a, b)
    assert found.dtype == torch.float32 and found.eq(1).all() and found.shape == (m, n)
    ((a_data, b_data, scaling, options),) = calls
    assert a_data.is_contiguous() and b_data.t().is_contiguous()
    types = {(1, 128): "BlockWise1x128", (128, 128): "BlockWise128x128", (1, 32): "BlockWise1x32"}
    assert [kind.name for kind in scaling[1::2]] == [types[a_block], types[b_block]]
    swizzled = SwizzleType.SWIZZLE_32_4_4 if case == "mx" else None
    assert options["swizzle_a"] == options["swizzle_b"] == swizzled
    assert options["use_fast_accum"] and options["output_dtype"] == torch.bfloat16
    strides = [(scale.shape, scale.stride()) for scale in scaling[::2]]
    if case == "mx":  # 128 rows by 4 scales to a tile
        assert strides == [((rows * k // 32,), (1,)) for rows in (m, n)]
        assert {scale.dtype for scale in scaling[::2]} == {torch.float8_e8m0fnu}
    else:  # of rows: (rows, K / 128), rows contiguous; of squares: (K / 128, N / 128), padded to 4
        of_rows = [((rows, 5), (1, rows)) for rows in (m, n)]
        assert strides == [of_rows[0], ((8, 1), (1, 8)) if case == "output" else of_rows[1]]
        assert torch.equal(scaling[0], a.scale.reciprocal())
        columns = b.scale.reciprocal() if case == "grad_weight" else b.scale.reciprocal().t()
        assert torch.equal(scaling[2][: len(columns)], columns)


def test_products_of_blocks_are_counted() -> None:
    """By torch's counter, as many as of a matmul of that size."""
    with FakeTensorMode(), FlopCounterMode(display=False) as of_torch:
        a, b = torch.empty(384, 256), torch.empty(128, 256)
        torch.mm(a, b.t())
    with FakeTensorMode(), FlopCounterMode(display=False) as found:
        a, b, scale = torch.empty(384, 256), torch.empty(128, 256), torch.empty(1, 1)
        blocks = (1, 128), (128, 128)
        torch.ops.fp8dist.scaled_mm(a.to(E4M3), b.to(E4M3), scale, scale, *blocks, True)
    assert found.get_total_flops() == of_torch.get_total_flops() == 2 * 384 * 256 * 128


def test_tokens_that_are_padded_in_one_operand() -> None:
    """What arrived from other ranks is transposed without padding."""
    a, b = (operand(rows, 17, E4M3, 2.0, seed=rows) for rows in (32, 16))
    padded = [x._replace(data=matmul._aligned(x.data)) for x in (a, b)]
    for args in ((padded[0], b), (a, padded[1])):
        found = scaled_matmul(*args, torch.float32, TENSORWISE)
        assert torch.equal(found.double(), exact(a, b))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        scaled_matmul(padded[0], operand(16, 48, E4M3, 2.0, seed=0), torch.float32, TENSORWISE)


def test_padding_adds_zeros_and_only_where_needed() -> None:
    x = operand(4, 19, E4M3, 1.0, seed=0).data
    padded = matmul._aligned(x)
    assert padded.shape == (4, 32)
    assert padded.dtype == E4M3
    assert torch.equal(padded[:, :19].float(), x.float())
    assert padded[:, 19:].float().eq(0).all()
    aligned = operand(4, 32, E4M3, 1.0, seed=0).data
    assert matmul._aligned(aligned) is aligned


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 15, 64, 100])
@pytest.mark.parametrize("output_dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_hardware_gives_the_exact_result(
    tokens: int, output_dtype: torch.dtype
) -> None:
    if not hardware.has_matmul(torch.device("cuda"), TENSORWISE):
        pytest.skip("needs compute capability 8.9")
    grad_output = operand(tokens, 48, E5M2, 2.0, seed=0)
    input = operand(tokens, 32, E4M3, 0.5, seed=1)
    weight = operand(48, 32, E4M3, 4.0, seed=2)
    for a, b in [(grad_output.t(), input.t()), (grad_output, weight.t()), (input, weight)]:
        on_gpu = [x._replace(data=x.data.cuda(), scale=x.scale.cuda()) for x in (a, b)]
        found = scaled_matmul(*on_gpu, output_dtype, TENSORWISE)
        assert torch.equal(found.cpu(), exact(a, b).to(output_dtype))
