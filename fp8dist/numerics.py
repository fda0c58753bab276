"""The reference numerics in plain torch: amax -> scale -> cast -> dequantize.

This file is the specification. What runs on an accelerator must give the same bytes.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F

from fp8dist.config import ROW, WHOLE, Block, ScaleFormat

# A block of zeros has no scale of its own: its amax is taken as this, which keeps the scale finite
# (torchao's `torchao.float8.float8_utils.EPS`, so that both give the same scales).
AMAX_EPS = 1e-12


def amax(x: torch.Tensor, block: Block) -> torch.Tensor:
    """max(abs(x)) over each block; 0 for a tensor with no elements, NaN where a block has one.

    Args:
        x: (M, N), float32, bfloat16 or float16.
        block: see [Note: blocks]; M and N are multiples of it.

    Returns:
        (M / block rows, N / block columns), dtype of x.
    """
    rows, columns = (x.size(dim) if block[dim] == WHOLE else block[dim] for dim in (0, 1))
    if x.numel() == 0:
        size = x.size(0) // rows if rows else 1, x.size(1) // columns if columns else 1
        return x.new_zeros(size) + x.sum()  # to the compiler it is made of x, as any amax is
    blocks = x.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # 4D
    return blocks.abs().amax(dim=(1, 3))


class AmaxPart(NamedTuple):
    """A part of a matrix, and where the amaxes of that matrix go.

    Args:
        x: the part, not empty, high precision.
        start: the row and the column of the matrix at which x begins.
        blocks: for which blocks amaxes are wanted.
        amaxes: for each of blocks, float32, one element per block of the whole matrix.
        out: (m, n), float8, rows contiguous, or None: where x goes, cast by the scales of its
            rows, of these amaxes as they are before they are exchanged. Rows are then among blocks,
            and x has all columns.
        scale_format: of those scales.
    """

    x: torch.Tensor
    start: tuple[int, int]
    blocks: Sequence[Block]
    amaxes: Sequence[torch.Tensor]
    out: torch.Tensor | None = None
    scale_format: ScaleFormat | None = None


def fill_amaxes(parts: Sequence[AmaxPart]) -> None:
    """Write the amaxes of the blocks that parts of matrices touch, and cast those that have `out`.

    Blocks that a part does not touch are left as they are; one that it holds in part gets the
    amax of that part.
    """
    for part in parts:
        x, start = part.x, part.start
        for out, block in zip(part.amaxes, part.blocks, strict=True):
            before = [0 if block[dim] == WHOLE else start[dim] % block[dim] for dim in (0, 1)]
            after = [
                0 if block[dim] == WHOLE else -(before[dim] + x.size(dim)) % block[dim]
                for dim in (0, 1)
            ]
            padded = x
            if any(before) or any(after):
                padded = F.pad(x, (before[1], after[1], before[0], after[0]))
            local = amax(padded, block)
            row, column = (0 if block[dim] == WHOLE else start[dim] // block[dim] for dim in (0, 1))
            out[row : row + local.size(0), column : column + local.size(1)].copy_(local)
    cast_into([_by_rows(part) for part in parts if part.out is not None])


def _by_rows(part: AmaxPart) -> "CastPart":
    """The cast of a part that has `out`, by amaxes that are there."""
    if part.out is None or part.scale_format is None:
        raise AssertionError("a part that is not to be cast")
    amaxes = part.amaxes[part.blocks.index(ROW)].narrow(0, part.start[0], part.x.size(0))
    scale = amax_to_scale(amaxes, part.out.dtype, part.scale_format)
    return CastPart(part.x, (0, 0), ROW, scale, part.out)


def amax_to_scale(
    amax: torch.Tensor, float8_dtype: torch.dtype, scale_format: ScaleFormat
) -> torch.Tensor:
    """scale = float8_max / amax, so that the largest element of a block becomes float8_max.

    The division is in float64: in float32 eager and compiled code round differently.

    Args:
        amax: any shape and floating dtype, >= 0.
        scale_format: see `fp8dist.config.ScaleFormat`.

    Returns:
        float32, the shape of amax. NaN where amax is NaN; where it is infinite 0, or in e8m0,
        which has no 0, the smallest: 2^-127.
    """
    float8_max = torch.finfo(float8_dtype).max
    if scale_format == "e8m0":
        return exponent_to_scale(_amax_to_exponent(amax.float(), float8_max))
    scale = (float8_max / amax.double().clamp(min=AMAX_EPS)).float()
    if scale_format == "power_of_2":
        # Without its mantissa a float is the power of two below it.
        rounded = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
        scale = torch.where(scale.isnan(), scale, rounded)
    return scale


# [Note: e8m0]
# An MX scale is stored as the biased exponent of the factor that dequantizes: the byte e stands
# for 2^(e - 127), and 255 for NaN (OCP MX specification 1.0, section 5.4.1). Here as everywhere
# in this package `scale` is the factor that quantizes: 2^(127 - e).


def _amax_to_exponent(amax: torch.Tensor, float8_max: float) -> torch.Tensor:
    """ceil(log2(amax / float8_max)) as e8m0: uint8, the shape of amax (float32)."""
    # By a tensor: CUDA turns a division by a number into a product with its rounded reciprocal.
    bits = (amax / torch.full_like(amax, float8_max)).view(torch.int32)
    rounded_up = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return torch.where(amax.isnan(), 255, rounded_up.clamp(max=254)).to(torch.uint8)


def scale_to_exponent(scale: torch.Tensor) -> torch.Tensor:
    """Powers of two, float32, as e8m0: uint8 of the same shape. See [Note: e8m0]."""
    # A NaN has the exponent 255, and -1 as uint8 is 255.
    return (254 - ((scale.contiguous().view(torch.int32) >> 23) & 0xFF)).to(torch.uint8)


def exponent_to_scale(exponent: torch.Tensor) -> torch.Tensor:
    """e8m0, uint8, as powers of two: float32 of the same shape. See [Note: e8m0]."""
    bits = (254 - exponent.int()) << 23
    bits = torch.where(exponent == 254, 1 << 22, bits)  # 2^-127 is subnormal
    bits = torch.where(exponent == 255, 0x7FC00000, bits)  # NaN
    return bits.int().view(torch.float32)


def repeat_blocks(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Scales of blocks, expanded so that they broadcast against a tensor of `shape`.

    A dimension with one scale is left at 1.
    """
    for dim in (0, 1):
        if 1 < scale.size(dim) < shape[dim]:
            scale = scale.repeat_interleave(shape[dim] // scale.size(dim), dim)
    return scale


def cast(x: torch.Tensor, scale: torch.Tensor, float8_dtype: torch.dtype) -> torch.Tensor:
    """x * scale in float32, saturated to +-float8_max and rounded to nearest even.

    Args:
        x: (M, N), float32, bfloat16 or float16.
        scale: float32, one per block of x.

    Returns:
        (M, N), float8_dtype. NaN stays NaN; infinities saturate (their scale is 0: NaN).
    """
    float8_max = torch.finfo(float8_dtype).max
    scaled = x.float() * repeat_blocks(scale, x.shape)
    return scaled.clamp(-float8_max, float8_max).to(float8_dtype)


# [Note: reciprocals]
# Hardware multiplies by the reciprocals of scales. They are computed with the scales and kept
# beside them in one (2, ...) tensor: first the reciprocals, as cuBLAS wants them at a multiple of
# 16 bytes, then the scales.


class Scaled(NamedTuple):
    """A quantized matrix: float8 data, its float32 scales, and the block they are for.

    `inverse` is 1 / scale where it is there already; see [Note: reciprocals].
    """

    data: torch.Tensor
    scale: torch.Tensor
    block: Block
    inverse: torch.Tensor | None = None

    def t(self) -> "Scaled":
        inverse = None if self.inverse is None else self.inverse.t()
        return Scaled(self.data.t(), self.scale.t(), (self.block[1], self.block[0]), inverse)


_Operand = TypeVar("_Operand")


def wanted(operand: _Operand | None) -> _Operand:
    """One of what `quantize_both` and the like return, which was asked for."""
    if operand is None:
        raise AssertionError("an operand that was asked for is missing")
    return operand


def quantize(
    x: torch.Tensor,
    block: Block,
    float8_dtype: torch.dtype,
    scale_format: ScaleFormat,
    known_amax: torch.Tensor | None = None,
) -> Scaled:
    """Scale and cast a (M, N) tensor by its own amaxes, or by those that are known already."""
    amaxes = amax(x, block) if known_amax is None else known_amax
    scale = amax_to_scale(amaxes, float8_dtype, scale_format)
    return Scaled(cast(x, scale, float8_dtype), scale, block)


class CastPart(NamedTuple):
    """A part of a matrix, the scales of that matrix, and where the part goes as float8.

    Args:
        x: (m, n), the part, not empty, high precision.
        start: the row and the column of the matrix at which x begins.
        block: which elements of the matrix share a scale.
        scale: float32, one per block of the whole matrix.
        out: (m, n), float8; rows contiguous.
    """

    x: torch.Tensor
    start: tuple[int, int]
    block: Block
    scale: torch.Tensor
    out: torch.Tensor


def cast_into(parts: Sequence[CastPart]) -> None:
    """out = cast(x, scale), for parts of matrices."""
    for x, scale, out in ((part.x, _local_scale(part), part.out) for part in parts):
        # What is in between fits the cache of a CPU, which is several times faster.
        on_cpu = x.device.type == "cpu"
        rows = max(1, _CACHED // x.size(1)) if on_cpu else x.size(0)
        scales = scale.split(rows) if scale.size(0) > 1 else itertools.repeat(scale)
        for from_x, scale_of_rows, to in zip(x.split(rows), scales, out.split(rows), strict=False):
            to.copy_(cast(from_x, scale_of_rows, out.dtype))


_CACHED = 2**16  # elements


class PackPart(NamedTuple):
    """A matrix, and where it goes as float8, with its e8m0 scales.

    Args:
        x: (m, n), not empty, high precision.
        block: (1, s): so many elements of a row share a scale.
        float8_dtype: of the elements.
        out: (m, n + n / s), uint8, rows contiguous: of each row the elements, then the scales.
        not_finite: (1,), float32: becomes Inf if x has a NaN or Inf, and is else left as it is.
    """

    x: torch.Tensor
    block: Block
    float8_dtype: torch.dtype
    out: torch.Tensor
    not_finite: torch.Tensor


def pack_into(parts: Sequence[PackPart]) -> None:
    """Cast matrices, and write the scales after each row; see [Note: e8m0]."""
    for x, block, float8_dtype, out, not_finite in parts:
        scaled = quantize(x, block, float8_dtype, "e8m0")
        elements, scales = out.split([x.size(1), x.size(1) // block[1]], dim=1)
        elements.copy_(scaled.data.view(torch.uint8))
        exponents = scale_to_exponent(scaled.scale)
        scales.copy_(exponents)
        not_finite.masked_fill_((exponents >= 254).any(), torch.inf)  # an amax of Inf, or NaN


def _local_scale(part: CastPart) -> torch.Tensor:
    """The scales of a part's elements: one row of them or one per row, and along the row, one or
    one per block of columns.
    """
    scale = part.scale
    for dim in (0, 1):
        side, start, extent = part.block[dim], part.start[dim], part.x.size(dim)
        whole = extent == scale.size(dim) * side
        if side == WHOLE or (whole and (dim == 1 or side == 1)):
            continue
        if side == 1 or (dim == 1 and start % side == 0 and extent % side == 0):
            scale = scale.narrow(dim, start // side, extent // side)
        else:
            index = torch.arange(start, start + extent, device=scale.device) // side
            scale = scale.index_select(dim, index)
    return scale


def token_multiple(block: Block) -> int:
    """What the rows of a matrix are padded to when a matmul contracts them: a multiple of the
    block, and of the 16 bytes that the hardware asks for.
    """
    return max(16, block[0])


def quantize_both(
    x: torch.Tensor,
    block: Block | None,
    transposed_block: Block | None,
    float8_dtype: torch.dtype,
    scale_format: ScaleFormat,
    known_amax: torch.Tensor | None = None,
) -> tuple[Scaled | None, Scaled | None]:
    """Quantize x for a matmul that contracts its columns and x^T for one that contracts its rows.

    Args:
        x: (M, N), high precision; M is of any number.
        block: the blocks of x for the first; None: it is not wanted.
        transposed_block: the blocks of x for the second; None: it is not wanted.
        known_amax: (1, 1), float32, if one scale is wanted and its amax is known.

    Returns:
        x: (M, N). x^T: (N, M), M padded with zeros to a multiple of `token_multiple`; here as a
        transposed view.
    """
    scaled = transposed = None
    if block is not None:
        scaled = quantize(x, block, float8_dtype, scale_format, known_amax)
    if transposed_block is not None:
        missing = -x.size(0) % token_multiple(transposed_block)
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        if scaled is None or block != transposed_block or missing:
            args = (transposed_block, float8_dtype, scale_format, known_amax)
            transposed = quantize(x, *args).t()
        else:
            transposed = scaled.t()
    return scaled, transposed


def dequantize(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """data / scale in float32.

    Args:
        data: (M, N), float8.
        scale: float32, one per block of data.
    """
    return data.float() / repeat_blocks(scale, data.shape)


def rescale_transposed(
    weight: Scaled, block: Block, new_scale: torch.Tensor | None, scale_format: ScaleFormat
) -> Scaled:
    """w^T for the matmul that contracts the rows of w, from w as it was quantized for the other.

    Between powers of two this moves exponents only, so that it equals quantizing the
    high-precision tensor with new_scale, except for elements that are subnormal in one of the
    two scalings.

    Args:
        weight: (N, K); its scales are powers of two if the blocks differ.
        block: the blocks of w for the new operand; the same as weight's: data and scales stay.
        new_scale: float32, one per block; None: taken from the amaxes of what w stands for.

    Returns:
        (K, N); here as a transposed view.
    """
    if block == weight.block:
        return weight.t()
    w = dequantize(weight.data, weight.scale)
    if new_scale is None:
        return quantize(w, block, weight.data.dtype, scale_format).t()
    return Scaled(cast(w, new_scale, weight.data.dtype), new_scale, block).t()
