"""Triton kernels: casts of a matrix, in one or two orientations, in one pass over it.

Each program handles one tile. Amaxes come as `amax_kernels` has them.
"""

import triton
import triton.language as tl

from fp8dist.kernels.amax_kernels import _abs_bits

# Which elements share a scale is told to a kernel by a string (KIND): "tensor", "row" and "column"
# say it; "own" are the blocks of the tile itself, which need no amax from outside; "none".
# These are no constants of the module because Triton compares those at every launch.


# [Note: powers of two by bits]
# Scales that are powers of two need no division, which costs a kernel as much as its memory
# traffic. Both formats have float8_max = 1.75 * 2^FLOAT8_EXPONENT. An amax of m * 2^e (1 <= m < 2)
# is scaled by 1.75 / m * 2^(FLOAT8_EXPONENT - e), of which the power of two below is
# 2^(FLOAT8_EXPONENT - e), or half of it if m > 1.75; no rounding of the quotient, to float32 or in
# it, crosses a power of two.


@triton.jit
def amax_to_scale(bits, FLOAT8_EXPONENT: tl.constexpr, FORMAT: tl.constexpr):
    """numerics.amax_to_scale, on the amax or its bits; see [Note: powers of two by bits]."""
    bits = bits.to(tl.int32, bitcast=True)
    if FORMAT == "exact":
        amax = bits.to(tl.float32, bitcast=True).to(tl.float64)
        amax = tl.where(amax < 1e-12, 1e-12, amax)  # a NaN stays
        return ((7 << (FLOAT8_EXPONENT - 2)) / amax).to(tl.float32)
    if FORMAT == "power_of_2":
        bits = tl.maximum(bits, 0x2B8CBCCC)  # 1e-12
    exponent = (bits + 0x1FFFFF) & 0x7F800000  # a mantissa above 1.75 carries; not shifted down
    if FORMAT == "e8m0":
        # Of amax / float8_max, rounded up. Quotients that are subnormal round up to 1, those that
        # are 0 in float32 to 0: an amax of 1.75 * 2^-142, or less for e5m2.
        least = FLOAT8_EXPONENT << 23
        subnormal = bits > (7 << (FLOAT8_EXPONENT - 3))
        exponent = tl.maximum(exponent, tl.where(subnormal, least + (1 << 23), least))
    scale = 0x7F000000 - exponent + (FLOAT8_EXPONENT << 23)
    scale = tl.where(bits == 0x7F800000, 0 if FORMAT == "power_of_2" else 1 << 22, scale)
    return tl.where(bits > 0x7F800000, 0x7FC00000, scale).to(tl.float32, bitcast=True)


@triton.jit
def _store_scale(scale_ptr, index, count, scale, mask, FORMAT: tl.constexpr):
    """Write `count` reciprocals of scales and after them the scales; e8m0 has the latter only."""
    if FORMAT == "exact":
        tl.store(scale_ptr + index, tl.div_rn(1.0, scale), mask=mask)
        scale_ptr += count
    if FORMAT == "power_of_2":
        bits = scale.to(tl.int32, bitcast=True)
        inverse = tl.where(bits == 0, 0x7F800000, 0x7F000000 - bits).to(tl.float32, bitcast=True)
        tl.store(scale_ptr + index, tl.where(scale != scale, scale, inverse), mask=mask)
        scale_ptr += count
    tl.store(scale_ptr + index, scale, mask=mask)


@triton.jit
def quantize_kernel(
    x_ptr,
    x_inverse_ptr,
    amax_ptr,
    data_ptr,
    scale_ptr,
    t_data_ptr,
    t_scale_ptr,
    M,
    N,
    M_PADDED,
    x_stride,
    inverse_stride,
    inverse_block_stride,
    FLOAT8_EXPONENT: tl.constexpr,
    FORMAT: tl.constexpr,
    X_INVERSE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    T_KIND: tl.constexpr,
    T_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Cast the (M, N) matrix x to data (M, N) and to t_data (N, M_PADDED), its transpose.

    KIND says which elements share a scale in data ("none": data is not wanted), T_KIND the same
    for t_data, as blocks of x. For "own" they are blocks of 1 x BLOCK and T_BLOCK x 1 and the
    scales are written column by column: scale is (N / BLOCK, M), t_scale (M_PADDED / T_BLOCK, N).
    Otherwise amax has the bits of the amaxes as `amax_kernel` writes them. For what is written see
    `_store_scale`.
    x_inverse, where there is one, is 1 / what x was scaled by: a power of two per row (X_INVERSE is
    "row") or per 1 x BN block ("own", (M, N / BN)).
    """
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    rows = pid_m.to(tl.int64) * BM + tl.arange(0, BM)
    columns = pid_n * BN + tl.arange(0, BN)
    row_mask, column_mask = rows < M, columns < N
    mask = row_mask[:, None] & column_mask[None, :]
    offsets = rows[:, None] * x_stride + columns[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if X_INVERSE != "none":
        offsets = rows * inverse_stride
        if X_INVERSE == "own":
            offsets += pid_n * inverse_block_stride
        x *= tl.load(x_inverse_ptr + offsets, mask=row_mask, other=1.0)[:, None]

    if KIND != "none":
        if KIND == "tensor":
            # The amax of the tensor comes last.
            if T_KIND == "column":
                scale = amax_to_scale(tl.load(amax_ptr + N), FLOAT8_EXPONENT, FORMAT)
            else:
                scale = amax_to_scale(tl.load(amax_ptr), FLOAT8_EXPONENT, FORMAT)
            _store_scale(scale_ptr, 0, 1, scale, (pid_m == 0) & (pid_n == 0), FORMAT)
            scaled = x * scale
        if KIND == "row":
            bits = tl.load(amax_ptr + rows, mask=row_mask, other=0)
            scale = amax_to_scale(bits, FLOAT8_EXPONENT, FORMAT)
            _store_scale(scale_ptr, rows, M, scale, row_mask & (pid_n == 0), FORMAT)
            scaled = x * scale[:, None]
        if KIND == "own":
            count = (N // BLOCK).to(tl.int64) * M
            if BLOCK == BN:  # without reshapes, which move data between threads
                scale = amax_to_scale(tl.max(_abs_bits(x), 1), FLOAT8_EXPONENT, FORMAT)
                index = pid_n.to(tl.int64) * M + rows
                _store_scale(scale_ptr, index, count, scale, row_mask, FORMAT)
                scaled = x * scale[:, None]
            else:
                tile = tl.reshape(x, (BM, BN // BLOCK, BLOCK))
                scale = amax_to_scale(tl.max(_abs_bits(tile), 2), FLOAT8_EXPONENT, FORMAT)
                blocks = pid_n * (BN // BLOCK) + tl.arange(0, BN // BLOCK)
                index = blocks[None, :].to(tl.int64) * M + rows[:, None]
                wanted = row_mask[:, None] & (blocks < N // BLOCK)[None, :]
                _store_scale(scale_ptr, index, count, scale, wanted, FORMAT)
                scaled = tl.reshape(tile * scale[:, :, None], (BM, BN))
        offsets = rows[:, None] * N + columns[None, :]
        tl.store(data_ptr + offsets, scaled.to(data_ptr.dtype.element_ty), mask=mask)

    if T_KIND != "none":
        if T_KIND == "tensor":
            if KIND == "row":
                t_scale = amax_to_scale(tl.load(amax_ptr + M), FLOAT8_EXPONENT, FORMAT)
            else:
                t_scale = amax_to_scale(tl.load(amax_ptr), FLOAT8_EXPONENT, FORMAT)
            _store_scale(t_scale_ptr, 0, 1, t_scale, (pid_m == 0) & (pid_n == 0), FORMAT)
            scaled = x * t_scale
        if T_KIND == "column":
            before = M if KIND == "row" else 0
            bits = tl.load(amax_ptr + before + columns, mask=column_mask, other=0)
            t_scale = amax_to_scale(bits, FLOAT8_EXPONENT, FORMAT)
            _store_scale(t_scale_ptr, columns, N, t_scale, column_mask & (pid_m == 0), FORMAT)
            scaled = x * t_scale[None, :]
        if T_KIND == "own":
            count = (M_PADDED // T_BLOCK).to(tl.int64) * N
            if T_BLOCK == BM:
                t_scale = amax_to_scale(tl.max(_abs_bits(x), 0), FLOAT8_EXPONENT, FORMAT)
                index = pid_m.to(tl.int64) * N + columns
                _store_scale(t_scale_ptr, index, count, t_scale, column_mask, FORMAT)
                scaled = x * t_scale[None, :]
            else:
                tile = tl.reshape(x, (BM // T_BLOCK, T_BLOCK, BN))
                t_scale = amax_to_scale(tl.max(_abs_bits(tile), 1), FLOAT8_EXPONENT, FORMAT)
                blocks = pid_m * (BM // T_BLOCK) + tl.arange(0, BM // T_BLOCK)
                index = blocks[:, None].to(tl.int64) * N + columns[None, :]
                wanted = (blocks < M_PADDED // T_BLOCK)[:, None] & column_mask[None, :]
                _store_scale(t_scale_ptr, index, count, t_scale, wanted, FORMAT)
                scaled = tl.reshape(tile * t_scale[:, None, :], (BM, BN))
        offsets = columns[:, None].to(tl.int64) * M_PADDED + rows[None, :]
        tl.store(
            t_data_ptr + offsets,
            tl.trans(scaled.to(t_data_ptr.dtype.element_ty)),
            mask=column_mask[:, None] & (rows < M_PADDED)[None, :],
        )


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    M,
    N,
    stride,
    FLOAT8_EXPONENT: tl.constexpr,
    FORMAT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Cast x (M, N) by the scales of its rows: a program takes BM whole rows, of up to BN columns,
    or, not WHOLE, one, which it reads twice, the second time from the cache.
    """
    if WHOLE:
        rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
        columns = tl.arange(0, BN)
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)
        scale = amax_to_scale(tl.max(_abs_bits(x), 1), FLOAT8_EXPONENT, FORMAT)
        _store_scale(scale_ptr, rows, M, scale, rows < M, FORMAT)
        scaled = (x * scale[:, None]).to(data_ptr.dtype.element_ty)
        tl.store(data_ptr + rows[:, None] * N + columns[None, :], scaled, mask=mask)
    else:
        row = tl.program_id(0).to(tl.int64)
        most = tl.zeros((BN,), dtype=tl.int32)
        for start in range(0, N, BN):
            columns = start + tl.arange(0, BN)
            x = tl.load(x_ptr + row * stride + columns, mask=columns < N, other=0.0)
            most = tl.maximum(most, _abs_bits(x))
        scale = amax_to_scale(tl.max(most, 0), FLOAT8_EXPONENT, FORMAT)
        _store_scale(scale_ptr, row, M, scale, None, FORMAT)
        for start in range(0, N, BN):
            columns = start + tl.arange(0, BN)
            mask = columns < N
            x = tl.load(x_ptr + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
            scaled = (x * scale).to(data_ptr.dtype.element_ty)
            tl.store(data_ptr + row * N + columns, scaled, mask=mask)
