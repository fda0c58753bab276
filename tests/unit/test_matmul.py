"""The float8 matmul and its dequantized stand-in, against exact arithmetic and torch's own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import ScalingType

from fp8dist import hardware, matmul
from fp8dist.matmul import scaled_matmul

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def operand(
    rows: int, columns: int, dtype: torch.dtype, scale: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Small integers, exact in float8, so that products and sums are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(-4, 5, (rows, columns), generator=generator).to(dtype)
    return data, torch.full((1, 1), scale)


def exact(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor
) -> torch.Tensor:
    return (a.double() / a_scale.double()) @ (b.double() / b_scale.double()).t()


@pytest.fixture
def float8_hardware(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Lets `F.scaled_mm` run on the CPU, where it is right but slow, and notes its arguments."""
    calls: list[dict[str, Any]] = []
    scaled_mm = F.scaled_mm

    def noting(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append({"a": a, "b": b, "scales": args[::2], "scaling": args[1::2], **kwargs})
        return scaled_mm(a, b, *args, **kwargs)

    monkeypatch.setattr(hardware, "has_float8_matmul", lambda device: True)
    monkeypatch.setattr(F, "scaled_mm", noting)
    return calls


@pytest.mark.parametrize("output_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("emulate", [False, True])
def test_on_a_cpu_the_result_is_exact_and_rounded_once(
    emulate: bool, output_dtype: torch.dtype
) -> None:
    """Scales are powers of two, so that dequantizing is exact too."""
    a, a_scale = operand(24, 48, E4M3, 0.25, seed=0)
    b, b_scale = operand(32, 48, E5M2, 8.0, seed=1)
    found = scaled_matmul(a, a_scale, b, b_scale, output_dtype, emulate=emulate)
    assert found.dtype == output_dtype
    assert torch.equal(found, exact(a, a_scale, b, b_scale).to(output_dtype))


def test_scales_divide_not_multiply() -> None:
    one = torch.ones(16, 16).to(E4M3)
    found = scaled_matmul(
        one, torch.tensor([[2.0]]), one, torch.tensor([[4.0]]), torch.float32, emulate=True
    )
    assert found.eq(16 / 2 / 4).all()


def test_transposed_views_are_taken_as_they_are() -> None:
    a, a_scale = operand(32, 24, E4M3, 0.5, seed=0)
    b, b_scale = operand(32, 16, E4M3, 2.0, seed=1)
    found = scaled_matmul(a.t(), a_scale, b.t(), b_scale, torch.float32)
    assert torch.equal(found.double(), exact(a.t(), a_scale, b.t(), b_scale))


def test_a_cpu_never_uses_scaled_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("F.scaled_mm takes minutes on a CPU")

    monkeypatch.setattr(F, "scaled_mm", refuse)
    a, a_scale = operand(16, 16, E4M3, 1.0, seed=0)
    scaled_matmul(a, a_scale, a, a_scale, torch.float32)


def test_emulate_never_uses_scaled_mm(float8_hardware: list[dict[str, Any]]) -> None:
    a, a_scale = operand(16, 16, E4M3, 1.0, seed=0)
    scaled_matmul(a, a_scale, a, a_scale, torch.float32, emulate=True)
    assert not float8_hardware


@pytest.mark.parametrize("fast_accum", [False, True])
@pytest.mark.parametrize("transposed", ["neither", "a", "b", "both"])
def test_scaled_mm_gets_what_hopper_can_read(
    float8_hardware: list[dict[str, Any]], transposed: str, fast_accum: bool
) -> None:
    a, a_scale = operand(32, 48, E4M3, 0.25, seed=0)
    b, b_scale = operand(16, 48, E5M2, 8.0, seed=1)
    if transposed in ("a", "both"):
        a = a.t().contiguous().t()
    if transposed in ("b", "both"):
        b = b.t().contiguous().t()
    found = scaled_matmul(a, a_scale, b, b_scale, torch.bfloat16, fast_accum=fast_accum)
    (call,) = float8_hardware
    # Row-major times column-major: the contracted dimension is contiguous in both.
    assert call["a"].is_contiguous()
    assert call["b"].t().is_contiguous()
    assert (call["a"].dtype, call["b"].dtype) == (E4M3, E5M2)
    assert call["scaling"] == (ScalingType.TensorWise, ScalingType.TensorWise)
    assert call["use_fast_accum"] is fast_accum
    assert torch.equal(found, exact(a, a_scale, b, b_scale).bfloat16())


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 100])
def test_contracted_tokens_of_any_number(
    float8_hardware: list[dict[str, Any]], tokens: int
) -> None:
    """grad_weight: (N, M) times (M, K), both transposed views, contracting M."""
    grad_output, grad_scale = operand(tokens, 32, E5M2, 2.0, seed=0)
    input, input_scale = operand(tokens, 16, E4M3, 0.5, seed=1)
    found = scaled_matmul(grad_output.t(), grad_scale, input.t(), input_scale, torch.float32)
    (call,) = float8_hardware
    assert call["a"].size(1) == call["b"].size(0) == (tokens + 15) // 16 * 16
    assert torch.equal(found.double(), exact(grad_output.t(), grad_scale, input.t(), input_scale))


def test_padding_adds_zeros_and_only_where_needed() -> None:
    x, _ = operand(4, 19, E4M3, 1.0, seed=0)
    padded = matmul._pad_contracted(x)
    assert padded.shape == (4, 32)
    assert padded.dtype == E4M3
    assert torch.equal(padded[:, :19].float(), x.float())
    assert padded[:, 19:].float().eq(0).all()
    aligned, _ = operand(4, 32, E4M3, 1.0, seed=0)
    assert matmul._pad_contracted(aligned) is aligned


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 15, 64, 100])
@pytest.mark.parametrize("output_dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_hardware_gives_the_exact_result(
    tokens: int, output_dtype: torch.dtype
) -> None:
    if not hardware.has_float8_matmul(torch.device("cuda")):
        pytest.skip("needs compute capability 8.9")
    a, a_scale = operand(tokens, 48, E5M2, 2.0, seed=0)
    b, b_scale = operand(tokens, 32, E4M3, 0.5, seed=1)
    for left, right in [((a.t(), a_scale), (b.t(), b_scale)), ((a[:, :32], a_scale), (b, b_scale))]:
        on_gpu = [part.cuda() for part in (*left, *right)]
        found = scaled_matmul(*on_gpu, output_dtype)
        assert torch.equal(found.cpu(), exact(*left, *right).to(output_dtype))
