"""A float8 matmul of two scaled operands, and its dequantized stand-in."""

import torch
import torch.nn.functional as F
from torch.nn.functional import ScalingType

from fp8dist import hardware, numerics


def scaled_matmul(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    output_dtype: torch.dtype,
    *,
    fast_accum: bool = False,
    emulate: bool = False,
) -> torch.Tensor:
    """(a / a_scale) @ (b / b_scale)^T, the last dimension of both contracted.

    Hopper's float8 matmul reads both operands with the contracted dimension contiguous, so an
    operand that arrives as a transposed view is copied there; where operands are dequantized
    the view is used as it is.

    Args:
        a: (M, K), float8.
        b: (N, K), float8.
        a_scale, b_scale: float32, (1, 1): what the data was multiplied by.
        output_dtype: float32, bfloat16 or float16.

    Returns:
        (M, N), output_dtype.
    """
    if not hardware.multiplies_float8(a.device, emulate):
        a_hp, b_hp = numerics.dequantize(a, a_scale), numerics.dequantize(b, b_scale)
        return torch.mm(a_hp, b_hp.t()).to(output_dtype)
    a, b = _pad_contracted(a.contiguous()), _pad_contracted(b.contiguous())
    return F.scaled_mm(
        a,
        b.t(),
        a_scale.reciprocal(),
        ScalingType.TensorWise,
        b_scale.reciprocal(),
        ScalingType.TensorWise,
        output_dtype=output_dtype,
        use_fast_accum=fast_accum,
    )


def _pad_contracted(x: torch.Tensor) -> torch.Tensor:
    """Zeros up to a multiple of 16 in the last dimension, which the hardware asks for.

    K and N are multiples already (the filter sees to it); tokens, contracted by grad_weight,
    may be of any number.
    """
    missing = -x.size(1) % 16
    if missing == 0:
        return x
    return F.pad(x.view(torch.uint8), (0, missing)).view(x.dtype)
