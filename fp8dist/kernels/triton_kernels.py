"""Triton kernels: one pass over a matrix that finds amaxes, or casts in one or two orientations.

Each program handles one tile. Amaxes travel as the bits of float32 numbers with the sign off: as
integers these keep the order of the floats and put NaN on top, so that a maximum never loses one.
"""

import triton
import triton.language as tl

# Which elements share a scale, as seen by a kernel: all; a row; a column; or the blocks of the
# tile itself, which need no amax from outside.
NONE = tl.constexpr(0)
TENSOR = tl.constexpr(1)
ROW = tl.constexpr(2)
COLUMN = tl.constexpr(3)
OWN = tl.constexpr(4)


@triton.jit
def _abs_bits(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def amax_to_scale(bits, FLOAT8_MAX: tl.constexpr, FORMAT: tl.constexpr):
    """numerics.amax_to_scale, on the bits of the amax."""
    amax = bits.to(tl.float32, bitcast=True)
    if FORMAT == "e8m0":
        descale_bits = tl.div_rn(amax, FLOAT8_MAX).to(tl.int32, bitcast=True)
        exponent = (descale_bits >> 23) + tl.where((descale_bits & 0x7FFFFF) != 0, 1, 0)
        exponent = tl.minimum(exponent, 254)
        scale_bits = tl.where(exponent == 254, 1 << 22, (254 - exponent) << 23)
        return tl.where(bits > 0x7F800000, 0x7FC00000, scale_bits).to(tl.float32, bitcast=True)
    else:
        wide = amax.to(tl.float64)
        wide = tl.where(wide < 1e-12, 1e-12, wide)  # a NaN stays
        scale = (FLOAT8_MAX / wide).to(tl.float32)
        if FORMAT == "power_of_2":
            rounded = (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            scale = tl.where(scale != scale, scale, rounded)
        return scale


@triton.jit
def amax_kernel(
    x_ptr,
    tensor_ptr,
    row_ptr,
    column_ptr,
    block_ptr,
    M,
    N,
    x_stride,
    row_start,
    WANT_TENSOR: tl.constexpr,
    WANT_ROW: tl.constexpr,
    WANT_COLUMN: tl.constexpr,
    WANT_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Amaxes of the (M, N) matrix x as int32 bits, into buffers that are zero before.

    For blocks of BN x BN, x is the rows from row_start on of a matrix whose blocks the buffer has.
    """
    pid_n = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = pid_n * BN + tl.arange(0, BN)
    row_mask, column_mask = rows < M, columns < N
    mask = row_mask[:, None] & column_mask[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0)
    bits = _abs_bits(x)
    if WANT_ROW:
        tl.atomic_max(row_ptr + rows, tl.max(bits, 1), mask=row_mask, sem="relaxed")
    if WANT_COLUMN:
        tl.atomic_max(column_ptr + columns, tl.max(bits, 0), mask=column_mask, sem="relaxed")
    if WANT_BLOCK:
        index = (rows + row_start) // BN * tl.cdiv(N, BN) + pid_n
        tl.atomic_max(block_ptr + index, tl.max(bits, 1), mask=row_mask, sem="relaxed")
    if WANT_TENSOR:
        tl.atomic_max(tensor_ptr, tl.max(tl.max(bits, 1), 0), sem="relaxed")


@triton.jit
def quantize_kernel(
    x_ptr,
    x_scale_ptr,
    amax_ptr,
    data_ptr,
    scale_ptr,
    t_amax_ptr,
    t_data_ptr,
    t_scale_ptr,
    M,
    N,
    M_PADDED,
    x_stride,
    data_stride,
    FLOAT8_MAX: tl.constexpr,
    FORMAT: tl.constexpr,
    X_SCALE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    T_KIND: tl.constexpr,
    T_BLOCK: tl.constexpr,
    T_GIVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Cast the (M, N) matrix x to data (M, N) and to t_data (N, M_PADDED), its transpose.

    KIND says which elements share a scale in data (NONE: data is not wanted), T_KIND the same for
    t_data, as blocks of x. For OWN they are blocks of 1 x BLOCK and T_BLOCK x 1 and the scales are
    written column by column: scale is (N / BLOCK, M), t_scale (M_PADDED / T_BLOCK, N). Otherwise
    amax has the bits of the amaxes and the scales are written in its shape; with T_GIVEN, t_amax
    has the scales themselves.
    x_scale, where there is one, is what x was scaled by: a power of two per row (X_SCALE = ROW) or
    per 1 x 32 block (OWN, (M, N / 32)).
    """
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    rows = pid_m.to(tl.int64) * BM + tl.arange(0, BM)
    columns = pid_n * BN + tl.arange(0, BN)
    row_mask, column_mask = rows < M, columns < N
    mask = row_mask[:, None] & column_mask[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    if X_SCALE == ROW:
        x_scale = tl.load(x_scale_ptr + rows, mask=row_mask, other=1.0)
        x = x * tl.div_rn(1.0, x_scale)[:, None]
    if X_SCALE == OWN:
        blocks = pid_n * (BN // 32) + tl.arange(0, BN // 32)
        x_scale = tl.load(
            x_scale_ptr + rows[:, None] * (N // 32) + blocks[None, :],
            mask=row_mask[:, None] & (blocks < N // 32)[None, :],
            other=1.0,
        )
        inverse = tl.broadcast_to(tl.div_rn(1.0, x_scale)[:, :, None], (BM, BN // 32, 32))
        x = x * tl.reshape(inverse, (BM, BN))

    if KIND != NONE:
        if KIND == TENSOR:
            scale = amax_to_scale(tl.load(amax_ptr), FLOAT8_MAX, FORMAT)
            tl.store(scale_ptr, scale, mask=(pid_m == 0) & (pid_n == 0))
            scaled = x * scale
        if KIND == ROW:
            bits = tl.load(amax_ptr + rows, mask=row_mask, other=0)
            scale = amax_to_scale(bits, FLOAT8_MAX, FORMAT)
            tl.store(scale_ptr + rows, scale, mask=row_mask & (pid_n == 0))
            scaled = x * scale[:, None]
        if KIND == OWN:
            tile = tl.reshape(x, (BM, BN // BLOCK, BLOCK))
            scale = amax_to_scale(tl.max(_abs_bits(tile), 2), FLOAT8_MAX, FORMAT)
            blocks = pid_n * (BN // BLOCK) + tl.arange(0, BN // BLOCK)
            tl.store(
                scale_ptr + blocks[None, :].to(tl.int64) * M + rows[:, None],
                scale,
                mask=row_mask[:, None] & (blocks < N // BLOCK)[None, :],
            )
            scaled = tl.reshape(tile * scale[:, :, None], (BM, BN))
        offsets = rows[:, None] * data_stride + columns[None, :]
        tl.store(data_ptr + offsets, scaled.to(data_ptr.dtype.element_ty), mask=mask)

    if T_KIND != NONE:
        if T_KIND == TENSOR:
            if T_GIVEN:
                t_scale = tl.load(t_amax_ptr)
            else:
                t_scale = amax_to_scale(tl.load(t_amax_ptr), FLOAT8_MAX, FORMAT)
                tl.store(t_scale_ptr, t_scale, mask=(pid_m == 0) & (pid_n == 0))
            scaled = x * t_scale
        if T_KIND == COLUMN:
            if T_GIVEN:
                t_scale = tl.load(t_amax_ptr + columns, mask=column_mask, other=0.0)
            else:
                bits = tl.load(t_amax_ptr + columns, mask=column_mask, other=0)
                t_scale = amax_to_scale(bits, FLOAT8_MAX, FORMAT)
                tl.store(t_scale_ptr + columns, t_scale, mask=column_mask & (pid_m == 0))
            scaled = x * t_scale[None, :]
        if T_KIND == OWN:
            tile = tl.reshape(x, (BM // T_BLOCK, T_BLOCK, BN))
            t_scale = amax_to_scale(tl.max(_abs_bits(tile), 1), FLOAT8_MAX, FORMAT)
            blocks = pid_m * (BM // T_BLOCK) + tl.arange(0, BM // T_BLOCK)
            tl.store(
                t_scale_ptr + blocks[:, None].to(tl.int64) * N + columns[None, :],
                t_scale,
                mask=(blocks < M_PADDED // T_BLOCK)[:, None] & column_mask[None, :],
            )
            scaled = tl.reshape(tile * t_scale[:, None, :], (BM, BN))
        offsets = columns[:, None].to(tl.int64) * M_PADDED + rows[None, :]
        tl.store(
            t_data_ptr + offsets,
            tl.trans(scaled.to(t_data_ptr.dtype.element_ty)),
            mask=column_mask[:, None] & (rows < M_PADDED)[None, :],
        )


@triton.jit
def transpose_kernel(
    x_ptr, out_ptr, M, N, x_stride, out_stride, BM: tl.constexpr, BN: tl.constexpr
):
    """out (N, M) = x (M, N) transposed; bytes."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask)
    offsets = columns[:, None] * out_stride + rows[None, :]
    tl.store(out_ptr + offsets, tl.trans(x), mask=(columns < N)[:, None] & (rows < M)[None, :])


@triton.jit
def cast_kernel(
    x_ptr,
    scale_ptr,
    out_ptr,
    M,
    N,
    x_stride,
    out_stride,
    scale_columns,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """out = x * scale as float8: one scale (TENSOR), one per row (ROW), or one per row and BN
    columns (OWN).
    """
    pid_n = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = pid_n * BN + tl.arange(0, BN)
    row_mask = rows < M
    mask = row_mask[:, None] & (columns < N)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    if KIND == TENSOR:
        scaled = x * tl.load(scale_ptr)
    else:
        index = rows if KIND == ROW else rows * scale_columns + pid_n
        scaled = x * tl.load(scale_ptr + index, mask=row_mask, other=0.0)[:, None]
    offsets = rows[:, None] * out_stride + columns[None, :]
    tl.store(out_ptr + offsets, scaled.to(out_ptr.dtype.element_ty), mask=mask)
