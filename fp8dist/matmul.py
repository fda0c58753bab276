"""A float8 matmul of two scaled operands, and its dequantized stand-in."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.library import Library, register_fake
from torch.nn.functional import ScalingType, SwizzleType
from torch.utils.flop_counter import register_flop_formula

from fp8dist import hardware, numerics
from fp8dist.config import ROW, TENSOR, Recipe
from fp8dist.numerics import Scaled


def scaled_matmul(
    a: Scaled,
    b: Scaled,
    output_dtype: torch.dtype,
    recipe: Recipe,
    *,
    fast_accum: bool = False,
    emulate: bool = False,
) -> torch.Tensor:
    """(a / a.scale) @ (b / b.scale)^T, the last dimension of both contracted.

    Hopper's float8 matmul reads both operands with the contracted dimension contiguous, so an
    operand that arrives as a transposed view is copied there; where operands are dequantized
    the view is used as it is.

    Args:
        a: (M, K). b: (N, K). K may be padded with zeros to a multiple of 16 in one of them.
        output_dtype: float32, bfloat16 or float16. The hardware's matmuls of rows and blocks
            write bfloat16, which is then cast.

    Returns:
        (M, N), output_dtype.
    """
    if not hardware.multiplies(a.data.device, recipe, emulate):
        return _dequantized_matmul(a, b, output_dtype, recipe)
    if a.data.numel() == 0:  # no tokens; cuBLAS refuses empty matrices
        return a.scale.new_zeros((a.data.size(0), b.data.size(0)), dtype=output_dtype)
    a_data, b_data = _aligned(a.data), _aligned(b.data)
    tensorwise = a.block == b.block == TENSOR
    if a.block == ROW and b.block == TENSOR:
        rows = b.data.size(0)
        inverse = None if b.inverse is None else b.inverse.expand(rows, 1)
        b = Scaled(b.data, b.scale.expand(rows, 1), ROW, inverse)
    a_scale, b_scale = _hardware_scale(a), _hardware_scale(b)
    b_scale = b_scale.t() if b.block == ROW else b_scale
    hardware_dtype = output_dtype if tensorwise else torch.bfloat16
    if a.block in (TENSOR, ROW):
        # Not `F.scaled_mm`: the compiler allocates the result of this itself (of the other only in
        # torch 2.13) and overlaps it with all-gathers; lists of what recomputation keeps name it.
        output = torch._scaled_mm(
            a_data,
            b_data.t(),
            a_scale,
            b_scale,
            out_dtype=hardware_dtype,
            use_fast_accum=fast_accum,
        )
    else:
        output = torch.ops.fp8dist.scaled_mm.default(
            a_data, b_data, a_scale, b_scale, a.block, b.block, fast_accum
        )
    return output.to(output_dtype)


# torch 2.13's compiler knows `F.scaled_mm`, but makes of it a call of `torch._scaled_mm`, which has
# no swizzled scales and does not take padded ones.
_library = Library("fp8dist", "FRAGMENT")
_library.define(
    "scaled_mm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, int[2] a_block, int[2] b_block, "
    "bool fast_accum) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    a_block: Sequence[int],
    b_block: Sequence[int],
    fast_accum: bool,
) -> torch.Tensor:
    """a (M, K) @ b^T (K, N), in blocks: (M, N), bfloat16. Scales are those of `_hardware_scale`."""
    a_type, b_type = (_SCALING_TYPES[block[0], block[1]] for block in (a_block, b_block))
    swizzle = None
    if a_type == ScalingType.BlockWise1x32:
        swizzle = SwizzleType.SWIZZLE_32_4_4
        # Exponents until here: not every compiler has a type for them.
        a_scale, b_scale = (scale.view(torch.float8_e8m0fnu) for scale in (a_scale, b_scale))
    return F.scaled_mm(
        a,
        b.t(),
        a_scale,
        a_type,
        b_scale,
        b_type,
        swizzle_a=swizzle,
        swizzle_b=swizzle,
        output_dtype=torch.bfloat16,
        use_fast_accum=fast_accum,
    )


_library.impl("scaled_mm", _scaled_mm, "CompositeExplicitAutograd")


@register_fake("fp8dist::scaled_mm", lib=_library)
def _(a: torch.Tensor, b: torch.Tensor, *_: Any) -> torch.Tensor:
    return a.new_empty((a.size(0), b.size(0)), dtype=torch.bfloat16)


@register_flop_formula(torch.ops.fp8dist.scaled_mm)
def _(a_shape: Sequence[int], b_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """As torch's counter has it for `torch._scaled_mm`."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[0]


def _dequantized_matmul(
    a: Scaled, b: Scaled, output_dtype: torch.dtype, recipe: Recipe
) -> torch.Tensor:
    # Tokens have no padding in what arrived from other ranks, and have in what was cast here.
    if a.data.size(1) != b.data.size(1):
        a, b = (x._replace(data=_aligned(x.data)) for x in (a, b))
    a_hp, b_hp = (numerics.dequantize(x.data, x.scale) for x in (a, b))
    # float8 times a power of two is exact in bfloat16, which tensor cores multiply much faster.
    if a_hp.is_cuda and output_dtype == torch.bfloat16 and recipe.scale_format != "exact":
        a_hp, b_hp = a_hp.bfloat16(), b_hp.bfloat16()
    return torch.mm(a_hp, b_hp.t()).to(output_dtype)


_SCALING_TYPES = {
    (1, 128): ScalingType.BlockWise1x128,
    (128, 128): ScalingType.BlockWise128x128,
    (1, 32): ScalingType.BlockWise1x32,
}


def _hardware_scale(x: Scaled) -> torch.Tensor:
    """What dequantizes an operand, in the layout that `scaled_mm` wants for its block.

    The layouts are cuBLAS's: https://docs.nvidia.com/cuda/cublas, "1D block scaling" and "2D
    block scaling" for FP8 data types.
    """
    if x.block == (1, 32):
        return to_blocked(numerics.scale_to_exponent(x.scale))
    inverse = x.scale.reciprocal() if x.inverse is None else x.inverse
    if x.block == (1, 128):  # (rows, K / 128), rows contiguous
        return inverse.t().contiguous().t()
    if x.block == (128, 128):  # (K / 128 padded to 4, N / 128), the former contiguous
        return F.pad(inverse, (0, -inverse.size(1) % 4)).contiguous().t()
    return inverse.contiguous()


def to_blocked(exponent: torch.Tensor) -> torch.Tensor:
    """MX scales in the order in which Blackwell's matmul reads them.

    Tiles of 128 x 4 scales lie one after the other; within one, the scale of row r and column c
    is byte 16 * (r % 32) + 4 * (r // 32) + c (cuBLAS documentation, "1D block scaling factors
    layout").

    Args:
        exponent: (rows, K / 32), uint8.

    Returns:
        1-D, uint8, rows padded to 128 and columns to 4 with zeros.
    """
    rows, columns = exponent.shape
    padded = F.pad(exponent, (0, -columns % 4, 0, -rows % 128))
    tiles = padded.unflatten(1, (-1, 4)).unflatten(0, (-1, 4, 32))  # 5D: tile, r // 32, r % 32,
    return tiles.permute(0, 3, 2, 1, 4).flatten()  # tile, c


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension contiguous and zeros up to a multiple of 16 there.

    K and N are multiples already (the filter sees to it); tokens, contracted by grad_weight,
    may be of any number.
    """
    missing = -x.size(1) % 16
    if missing:
        return F.pad(x.contiguous().view(torch.uint8), (0, missing)).view(x.dtype)
    return x.contiguous()
