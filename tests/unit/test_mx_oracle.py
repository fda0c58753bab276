"""MXFP8 against torchao's MX prototypes, tried with torchao 0.18; they may move or change.

On a CPU torchao takes the exponent from `log2` in float32, which the tensors here do not bring to
where it rounds wrongly (just above large powers of two).
"""

import pytest
import torch
from torchao.prototype.moe_training.mxfp8_linear import mx_mm
from torchao.prototype.mx_formats.config import (
    MXFP8Dim0CastKernelChoice,
    MXFP8Dim1CastKernelChoice,
    ScaleCalculationMode,
)
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.utils import to_blocked
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

import fp8dist
from fp8dist import matmul, numerics

RCEIL = ScaleCalculationMode.RCEIL
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def tensor_of(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Magnitudes from 2^-30 to 2^30 by row, with a block of zeros in the first."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp2(torch.linspace(-30, 30, rows))[:, None]
    x[0, :32] = 0
    return x.to(dtype)


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("float8_dtype", [E4M3, E5M2])
def test_casts_are_bitwise_to_mx(dtype: torch.dtype, float8_dtype: torch.dtype) -> None:
    x = tensor_of(61, 96, dtype)
    their_exponent, their_data = to_mx(x, float8_dtype, 32, scaling_mode=RCEIL)
    found = numerics.quantize(x, (1, 32), float8_dtype, "e8m0")
    assert torch.equal(bytes_of(found.data), bytes_of(their_data))
    assert torch.equal(numerics.scale_to_exponent(found.scale), bytes_of(their_exponent))


def test_each_row_of_what_is_packed_ends_with_its_exponents() -> None:
    x = tensor_of(61, 96, torch.float32)
    their_exponent, their_data = to_mx(x, E4M3, 32, scaling_mode=RCEIL)
    out = torch.full((64, 99), 77, dtype=torch.uint8)
    numerics.pack_into([numerics.PackPart(x, (1, 32), E4M3, out[:61], torch.zeros(1))])
    assert torch.equal(out[:61], torch.cat([bytes_of(their_data), bytes_of(their_exponent)], 1))
    assert out[61:].eq(77).all()


def test_casts_of_columns_are_bitwise_to_mx_of_the_transpose() -> None:
    x = tensor_of(96, 61, torch.float32)
    their_exponent, their_data = to_mx(x.t().contiguous(), E4M3, 32, scaling_mode=RCEIL)
    _, found = numerics.quantize_both(x, None, (32, 1), E4M3, "e8m0")
    assert found is not None
    assert torch.equal(bytes_of(found.data), bytes_of(their_data))
    assert torch.equal(numerics.scale_to_exponent(found.scale), bytes_of(their_exponent))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_exponents_of_what_is_not_finite_are_those_of_to_mx(value: float) -> None:
    x = torch.ones(1, 32)
    x[0, 3] = value
    their_exponent, _ = to_mx(x, E4M3, 32, scaling_mode=RCEIL)
    found = numerics.quantize(x, (1, 32), E4M3, "e8m0")
    assert numerics.scale_to_exponent(found.scale).item() == bytes_of(their_exponent).item()


@pytest.mark.parametrize(
    ("rows", "columns"), [(128, 4), (256, 8), (1, 1), (130, 4), (128, 5), (384, 12), (33, 7)]
)
def test_the_order_of_scales_is_bitwise_to_blocked(rows: int, columns: int) -> None:
    # Counting up, so that two scales that changed places are noticed wherever 256 allows.
    exponent = (torch.arange(rows * columns) % 251 + 1).to(torch.uint8).view(rows, columns)
    assert torch.equal(matmul.to_blocked(exponent), to_blocked(exponent))


@pytest.mark.parametrize("recipe", ["mxfp8_rceil", "mxfp8_rceil_wgrad_with_hp"])
def test_a_layer_is_bitwise_torchaos(recipe: str) -> None:
    """Without FSDP2, where the weight for grad_input is cast from the high-precision one."""
    generator = torch.Generator().manual_seed(1)
    input = torch.randn(64, 96, generator=generator).requires_grad_()
    weight = torch.randn(160, 96, generator=generator).requires_grad_()
    grad_output = torch.randn(64, 160, generator=generator)
    linear = torch.nn.Linear(96, 160, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    fp8dist.convert_to_float8_training(linear, config=recipe)
    ours = input.detach().clone().requires_grad_()
    output = linear(ours)
    output.backward(grad_output)

    theirs = mx_mm.apply(
        input,
        weight,
        E4M3,
        E4M3,
        E4M3,
        32,
        KernelPreference.EMULATED,
        MXFP8Dim0CastKernelChoice.TORCH,
        MXFP8Dim1CastKernelChoice.TORCH,
        RCEIL,
        recipe.endswith("wgrad_with_hp"),
    )
    theirs.backward(grad_output)
    assert torch.equal(output, theirs)
    assert torch.equal(ours.grad, input.grad)
    assert torch.equal(linear.weight.grad, weight.grad)
