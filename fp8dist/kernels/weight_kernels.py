"""Triton kernels for weights: amaxes and casts of many matrices, to what was there before."""

import triton
import triton.language as tl

from fp8dist.kernels.amax_kernels import _abs_bits, _raise_amaxes
from fp8dist.kernels.triton_kernels import amax_to_scale

# [Note: many matrices in one launch]
# A model has hundreds of weights, and a launch for each costs more time on the CPU than the work
# takes on the GPU. So one launch does all: program i works on a tile of matrix `matrix_ptr[i]`,
# whose sizes and places are an entry of a table. Places are numbers of elements from the first
# matrix's; the GPU's addresses are one space.


@triton.jit
def _matrix(entry, ALIGNED: tl.constexpr):
    """What every table's entry begins with; ALIGNED if all that matters is multiples of 16."""
    M, N, stride = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    row_start, first, x_at = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    if ALIGNED:
        N, stride, x_at = (
            tl.multiple_of(N, 16),
            tl.multiple_of(stride, 16),
            tl.multiple_of(x_at, 16),
        )
    return M, N, stride, row_start, first, x_at


@triton.jit
def fill_amaxes_kernel(
    x_ptr,
    amax_ptr,
    table_ptr,
    matrix_ptr,
    ALIGNED: tl.constexpr,
    WANT_ROW: tl.constexpr,
    WANT_COLUMN: tl.constexpr,
    WANT_TENSOR: tl.constexpr,
    WANT_BLOCK: tl.constexpr,
    IN_ONE_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Raise amaxes to those of matrices; see `_raise_amaxes` and [Note: many matrices in one
    launch]. For rows, too, a matrix is the rows from row_start on of the one with the amaxes.
    """
    pid = tl.program_id(0)
    entry = table_ptr + tl.load(matrix_ptr + pid).to(tl.int64) * 10
    M, N, stride, row_start, first, x_at = _matrix(entry, ALIGNED)
    tiles_n = tl.cdiv(N, BN)
    _raise_amaxes(
        x_ptr + x_at,
        M,
        N,
        stride,
        (pid - first) // tiles_n * (BM * STEPS),
        (pid - first) % tiles_n * BN,
        amax_ptr,
        amax_ptr + tl.load(entry + 6) + row_start,
        amax_ptr + tl.load(entry + 7),
        amax_ptr + tl.load(entry + 9),
        amax_ptr + tl.load(entry + 8),
        row_start,
        False,
        WANT_ROW,
        WANT_COLUMN,
        WANT_TENSOR,
        WANT_BLOCK,
        IN_ONE_BLOCK,
        BM,
        BN,
        STEPS,
        STAGES,
    )


@triton.jit
def cast_rows_kernel(
    x_ptr,
    amax_ptr,
    out_ptr,
    table_ptr,
    matrix_ptr,
    ALIGNED: tl.constexpr,
    WANT_COLUMN: tl.constexpr,
    WANT_TENSOR: tl.constexpr,
    FLOAT8_EXPONENT: tl.constexpr,
    FORMAT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the amaxes of rows of matrices and cast them by those, raise the amaxes of columns or
    of the tensor: x is read once; see [Note: many matrices in one launch].

    A program takes whole rows, STEPS times BM of them. Row amaxes are as in `fill_amaxes_kernel`.
    """
    pid = tl.program_id(0)
    entry = table_ptr + tl.load(matrix_ptr + pid).to(tl.int64) * 11
    M, N, stride, row_start, first, x_at = _matrix(entry, ALIGNED)
    row_ptr = amax_ptr + tl.load(entry + 6) + row_start
    out_at, out_stride = tl.load(entry + 9), tl.load(entry + 10)
    if ALIGNED:
        out_at, out_stride = tl.multiple_of(out_at, 16), tl.multiple_of(out_stride, 16)
    columns = tl.arange(0, BN)
    column_mask = columns < N
    most = tl.zeros((BM, BN), dtype=tl.int32)
    most_of_rows = tl.zeros((BM,), dtype=tl.int32)
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = (pid - first) * (BM * STEPS) + step * BM + tl.arange(0, BM)
        row_mask = rows < M
        mask = row_mask[:, None] & column_mask[None, :]
        x = tl.load(x_ptr + x_at + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)
        bits = _abs_bits(x)
        of_rows = tl.max(bits, 1)
        tl.store(row_ptr + rows, of_rows, mask=row_mask)
        scale = amax_to_scale(of_rows, FLOAT8_EXPONENT, FORMAT)
        scaled = (x * scale[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(
            out_ptr + out_at + rows[:, None] * out_stride + columns[None, :], scaled, mask=mask
        )
        if WANT_COLUMN:
            most = tl.maximum(most, bits)
        if WANT_TENSOR:
            most_of_rows = tl.maximum(most_of_rows, of_rows)
    if WANT_COLUMN:
        column_ptr = amax_ptr + tl.load(entry + 7)
        tl.atomic_max(column_ptr + columns, tl.max(most, 0), mask=column_mask, sem="relaxed")
    if WANT_TENSOR:
        tensor_ptr = amax_ptr + tl.load(entry + 8)
        tl.atomic_max(tensor_ptr, tl.max(most_of_rows, 0), sem="relaxed")


@triton.jit
def cast_kernel(
    x_ptr,
    scale_ptr,
    out_ptr,
    table_ptr,
    matrix_ptr,
    ALIGNED: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """out = x * scale as float8, for matrices; see [Note: many matrices in one launch].

    There is one scale ("tensor"), one per row ("row") or one per BLOCK_ROWS x BN ("block"), of the
    matrix of which x is the rows from row_start on.
    """
    pid = tl.program_id(0)
    entry = table_ptr + tl.load(matrix_ptr + pid).to(tl.int64) * 10
    M, N, stride, row_start, first, x_at = _matrix(entry, ALIGNED)
    scale_at, scale_stride = tl.load(entry + 6), tl.load(entry + 7)
    out_at, out_stride = tl.load(entry + 8), tl.load(entry + 9)
    if ALIGNED:
        out_at, out_stride = tl.multiple_of(out_at, 16), tl.multiple_of(out_stride, 16)
    tiles_n = tl.cdiv(N, BN)
    rows = (pid - first) // tiles_n * BM + tl.arange(0, BM)
    pid_n = (pid - first) % tiles_n
    columns = pid_n * BN + tl.arange(0, BN)
    row_mask = rows < M
    mask = row_mask[:, None] & (columns < N)[None, :]
    x = tl.load(x_ptr + x_at + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    if KIND == "tensor":
        scaled = x * tl.load(scale_ptr + scale_at)
    else:
        if KIND == "row":
            index = (rows + row_start) * scale_stride
        else:
            index = (rows + row_start) // BLOCK_ROWS * scale_stride + pid_n
        scaled = x * tl.load(scale_ptr + scale_at + index, mask=row_mask, other=0.0)[:, None]
    offsets = rows[:, None] * out_stride + columns[None, :]
    tl.store(out_ptr + out_at + offsets, scaled.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pack_kernel(
    x_ptr,
    out_ptr,
    not_finite_ptr,
    table_ptr,
    matrix_ptr,
    ALIGNED: tl.constexpr,
    FLOAT8_EXPONENT: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Cast matrices by e8m0 scales of 1 x BLOCK, which are written after each row of what they are
    cast to; see [Note: many matrices in one launch]. Of one with a NaN or Inf `not_finite` becomes
    the bits of Inf.
    """
    pid = tl.program_id(0)
    entry = table_ptr + tl.load(matrix_ptr + pid).to(tl.int64) * 9
    M, N, stride, _, first, x_at = _matrix(entry, ALIGNED)
    out_at, out_stride = tl.load(entry + 6), tl.load(entry + 7)
    if ALIGNED:
        out_at, out_stride = tl.multiple_of(out_at, 16), tl.multiple_of(out_stride, 16)
    tiles_n = tl.cdiv(N, BN)
    rows = (pid - first) // tiles_n * BM + tl.arange(0, BM)
    first_column = (pid - first) % tiles_n * BN
    columns = first_column + tl.arange(0, BN)
    row_mask = rows < M
    mask = row_mask[:, None] & (columns < N)[None, :]
    x = tl.load(x_ptr + x_at + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)
    tile = tl.reshape(x.to(tl.float32), (BM, BN // BLOCK, BLOCK))
    scale = amax_to_scale(tl.max(_abs_bits(tile), 2), FLOAT8_EXPONENT, "e8m0")
    scaled = tl.reshape(tile * scale[:, :, None], (BM, BN)).to(out_ptr.dtype.element_ty)
    out_rows = out_at + rows[:, None] * out_stride
    tl.store(out_ptr + out_rows + columns[None, :], scaled, mask=mask)
    # As numerics.scale_to_exponent has it.
    exponents = (254 - (scale.to(tl.int32, bitcast=True) >> 23)).to(tl.uint8)
    blocks = first_column // BLOCK + tl.arange(0, BN // BLOCK)
    bytes_ptr = out_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    wanted = row_mask[:, None] & (blocks < N // BLOCK)[None, :]
    tl.store(bytes_ptr + out_rows + N + blocks[None, :], exponents, mask=wanted)
    bad = exponents >= 254  # an amax of Inf, or NaN
    not_finite = not_finite_ptr + tl.load(entry + 8) + tl.zeros_like(bad.to(tl.int32))
    # Each that is bad by itself: for the largest of a tile its warps would wait for each other.
    tl.atomic_max(not_finite, 0x7F800000, mask=bad, sem="relaxed")
