"""Triton kernels: one pass over a matrix that finds amaxes, or casts in one or two orientations.

Each program handles one tile. Amaxes travel as the bits of float32 numbers with the sign off: as
integers these keep the order of the floats and put NaN on top, so that a maximum never loses one.
"""

import triton
import triton.language as tl

# Which elements share a scale is told to a kernel by a string (KIND): "tensor", "row" and "column"
# say it; "own" are the blocks of the tile itself, which need no amax from outside; "none".
# These are no constants of the module because Triton compares those at every launch.


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
    amax_ptr,
    M,
    N,
    x_stride,
    WANT_ROW: tl.constexpr,
    WANT_COLUMN: tl.constexpr,
    WANT_TENSOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Amaxes of the (M, N) matrix x as int32 bits, into a buffer that is zero before.

    The buffer has, of what is wanted: M of rows, N of columns, one of the tensor.
    """
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    row_mask, column_mask = rows < M, columns < N
    mask = row_mask[:, None] & column_mask[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0)
    bits = _abs_bits(x)
    if WANT_ROW:
        tl.atomic_max(amax_ptr + rows, tl.max(bits, 1), mask=row_mask, sem="relaxed")
        amax_ptr += M
    if WANT_COLUMN:
        tl.atomic_max(amax_ptr + columns, tl.max(bits, 0), mask=column_mask, sem="relaxed")
        amax_ptr += N
    if WANT_TENSOR:
        tl.atomic_max(amax_ptr, tl.max(tl.max(bits, 1), 0), sem="relaxed")


@triton.jit
def _store_scale(scale_ptr, index, count, scale, mask, FORMAT: tl.constexpr):
    """Write `count` reciprocals of scales and after them the scales; e8m0 has the latter only."""
    if FORMAT != "e8m0":
        tl.store(scale_ptr + index, tl.div_rn(1.0, scale), mask=mask)
        scale_ptr += count
    tl.store(scale_ptr + index, scale, mask=mask)


@triton.jit
def quantize_kernel(
    x_ptr,
    x_scale_ptr,
    amax_ptr,
    data_ptr,
    scale_ptr,
    t_data_ptr,
    t_scale_ptr,
    M,
    N,
    M_PADDED,
    x_stride,
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

    KIND says which elements share a scale in data ("none": data is not wanted), T_KIND the same
    for t_data, as blocks of x. For "own" they are blocks of 1 x BLOCK and T_BLOCK x 1 and the
    scales are written column by column: scale is (N / BLOCK, M), t_scale (M_PADDED / T_BLOCK, N).
    Otherwise amax has the bits of the amaxes as `amax_kernel` writes them; with T_GIVEN, it has
    the scales for t_data themselves, and data is not wanted. For what is written see
    `_store_scale`.
    x_scale, where there is one, is what x was scaled by: a power of two per row (X_SCALE is "row")
    or per 1 x 32 block ("own", (M, N / 32)).
    """
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    rows = pid_m.to(tl.int64) * BM + tl.arange(0, BM)
    columns = pid_n * BN + tl.arange(0, BN)
    row_mask, column_mask = rows < M, columns < N
    mask = row_mask[:, None] & column_mask[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    if X_SCALE == "row":
        x_scale = tl.load(x_scale_ptr + rows, mask=row_mask, other=1.0)
        x = x * tl.div_rn(1.0, x_scale)[:, None]
    if X_SCALE == "own":
        blocks = pid_n * (BN // 32) + tl.arange(0, BN // 32)
        x_scale = tl.load(
            x_scale_ptr + rows[:, None] * (N // 32) + blocks[None, :],
            mask=row_mask[:, None] & (blocks < N // 32)[None, :],
            other=1.0,
        )
        inverse = tl.broadcast_to(tl.div_rn(1.0, x_scale)[:, :, None], (BM, BN // 32, 32))
        x = x * tl.reshape(inverse, (BM, BN))

    if KIND != "none":
        if KIND == "tensor":
            # The amax of the tensor comes last.
            if T_KIND == "column":
                scale = amax_to_scale(tl.load(amax_ptr + N), FLOAT8_MAX, FORMAT)
            else:
                scale = amax_to_scale(tl.load(amax_ptr), FLOAT8_MAX, FORMAT)
            _store_scale(scale_ptr, 0, 1, scale, (pid_m == 0) & (pid_n == 0), FORMAT)
            scaled = x * scale
        if KIND == "row":
            bits = tl.load(amax_ptr + rows, mask=row_mask, other=0)
            scale = amax_to_scale(bits, FLOAT8_MAX, FORMAT)
            _store_scale(scale_ptr, rows, M, scale, row_mask & (pid_n == 0), FORMAT)
            scaled = x * scale[:, None]
        if KIND == "own":
            tile = tl.reshape(x, (BM, BN // BLOCK, BLOCK))
            scale = amax_to_scale(tl.max(_abs_bits(tile), 2), FLOAT8_MAX, FORMAT)
            blocks = pid_n * (BN // BLOCK) + tl.arange(0, BN // BLOCK)
            index = blocks[None, :].to(tl.int64) * M + rows[:, None]
            wanted = row_mask[:, None] & (blocks < N // BLOCK)[None, :]
            _store_scale(scale_ptr, index, (N // BLOCK).to(tl.int64) * M, scale, wanted, FORMAT)
            scaled = tl.reshape(tile * scale[:, :, None], (BM, BN))
        offsets = rows[:, None] * N + columns[None, :]
        tl.store(data_ptr + offsets, scaled.to(data_ptr.dtype.element_ty), mask=mask)

    if T_KIND != "none":
        if T_KIND == "tensor":
            if T_GIVEN:
                t_scale = tl.load(amax_ptr)
            else:
                if KIND == "row":
                    t_scale = amax_to_scale(tl.load(amax_ptr + M), FLOAT8_MAX, FORMAT)
                else:
                    t_scale = amax_to_scale(tl.load(amax_ptr), FLOAT8_MAX, FORMAT)
                _store_scale(t_scale_ptr, 0, 1, t_scale, (pid_m == 0) & (pid_n == 0), FORMAT)
            scaled = x * t_scale
        if T_KIND == "column":
            if T_GIVEN:
                t_scale = tl.load(amax_ptr + columns, mask=column_mask, other=0.0)
            else:
                before = M if KIND == "row" else 0
                bits = tl.load(amax_ptr + before + columns, mask=column_mask, other=0)
                t_scale = amax_to_scale(bits, FLOAT8_MAX, FORMAT)
                _store_scale(t_scale_ptr, columns, N, t_scale, column_mask & (pid_m == 0), FORMAT)
            scaled = x * t_scale[None, :]
        if T_KIND == "own":
            tile = tl.reshape(x, (BM // T_BLOCK, T_BLOCK, BN))
            t_scale = amax_to_scale(tl.max(_abs_bits(tile), 1), FLOAT8_MAX, FORMAT)
            blocks = pid_m * (BM // T_BLOCK) + tl.arange(0, BM // T_BLOCK)
            index = blocks[:, None].to(tl.int64) * N + columns[None, :]
            wanted = (blocks < M_PADDED // T_BLOCK)[:, None] & column_mask[None, :]
            count = (M_PADDED // T_BLOCK).to(tl.int64) * N
            _store_scale(t_scale_ptr, index, count, t_scale, wanted, FORMAT)
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


# [Note: many matrices in one launch]
# A model has hundreds of weights, and a launch for each costs more time on the CPU than the work
# takes on the GPU. So one launch does all: program i works on a tile of matrix `matrix_ptr[i]`,
# whose sizes and places are an entry of a table. Places are numbers of elements from the first
# matrix's; the GPU's addresses are one space.


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
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Raise amaxes, int32 bits, to those of matrices; see [Note: many matrices in one launch].

    A program takes BM rows and STEPS times BN columns. For blocks of BN x BN, a matrix is the rows
    from row_start on of one whose blocks the buffer has; so it is for rows.
    """
    pid = tl.program_id(0)
    entry = table_ptr + tl.load(matrix_ptr + pid).to(tl.int64) * 10
    M, N, stride = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    row_start, first, x_at = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    if ALIGNED:
        N, stride, x_at = (
            tl.multiple_of(N, 16),
            tl.multiple_of(stride, 16),
            tl.multiple_of(x_at, 16),
        )
    strips = tl.cdiv(N, BN * STEPS)
    rows = (pid - first) // strips * BM + tl.arange(0, BM)
    first_column = (pid - first) % strips * (BN * STEPS)
    row_mask = rows < M
    row_amax = tl.zeros((BM,), dtype=tl.int32)
    for step in range(STEPS):
        columns = first_column + step * BN + tl.arange(0, BN)
        column_mask = columns < N
        offsets = rows[:, None] * stride + columns[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        bits = _abs_bits(tl.load(x_ptr + x_at + offsets, mask=mask, other=0.0))
        of_row = tl.max(bits, 1)
        row_amax = tl.maximum(row_amax, of_row)
        if WANT_COLUMN:
            column_at = tl.load(entry + 7)
            tl.atomic_max(
                amax_ptr + column_at + columns, tl.max(bits, 0), mask=column_mask, sem="relaxed"
            )
        if WANT_BLOCK:
            block_at = tl.load(entry + 8)
            index = (rows + row_start) // BN * tl.cdiv(N, BN) + first_column // BN + step
            in_matrix = row_mask & (first_column + step * BN < N)
            tl.atomic_max(amax_ptr + block_at + index, of_row, mask=in_matrix, sem="relaxed")
    if WANT_ROW:
        row_at = tl.load(entry + 6) + row_start
        tl.atomic_max(amax_ptr + row_at + rows, row_amax, mask=row_mask, sem="relaxed")
    if WANT_TENSOR:
        tensor_at = tl.load(entry + 9)
        tl.atomic_max(amax_ptr + tensor_at, tl.max(row_amax, 0), sem="relaxed")


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
    M, N, stride = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    row_start, first, x_at = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    scale_at, scale_stride = tl.load(entry + 6), tl.load(entry + 7)
    out_at, out_stride = tl.load(entry + 8), tl.load(entry + 9)
    if ALIGNED:
        N, stride, x_at = (
            tl.multiple_of(N, 16),
            tl.multiple_of(stride, 16),
            tl.multiple_of(x_at, 16),
        )
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
