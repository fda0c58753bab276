"""Triton kernels: casts by blocks that lie along rows and along columns.

Each program handles one tile, of which each thread has a patch; see [Note: patches].
"""

import triton
import triton.language as tl

from fp8dist.kernels.triton_kernels import _store_scale, amax_to_scale

# [Note: patches]
# What is cast to both orientations, or to the transpose, is written as runs of bytes along rows and
# along columns. In the tiles of `triton_kernels` a thread has runs of rows, and all that it writes
# to the transpose changes hands in shared memory, with waits before and after. Here it has 8
# columns of 16 rows, of which it writes 8 bytes at a time to one and 16 to the other: only amaxes
# change hands, and few of them, as each is of 8 or 16 elements of a thread already.
#
# Triton does not let a kernel say which thread has what, but it follows rules: the dim whose
# addresses are adjacent goes to a thread's registers, as far as a load or store is wide, and then
# the others to the threads of a warp, to the warps, and to registers, with version 3.6 from the
# first on and with newer ones from the last but one back. So a tile has a dim for each, in this
# order or, but for the last, in the opposite one: columns to the threads of a warp, rows to
# threads (and warps), columns to warps (or blocks of them, first), rows of a patch, columns of a
# patch. Rows of a patch are dim ROWS, 3 or 0, and the transpose swaps it and the last. Were Triton
# to follow others, the bytes would be the same, and a thread out of registers.


@triton.jit
def _along(SIZE: tl.constexpr, DIM: tl.constexpr):
    """0, 1, ..., SIZE - 1 along a dim of five."""
    numbers = tl.arange(0, SIZE)
    if DIM == 0:
        return numbers[:, None, None, None, None]
    elif DIM == 1:
        return numbers[None, :, None, None, None]
    elif DIM == 2:
        return numbers[None, None, :, None, None]
    elif DIM == 3:
        return numbers[None, None, None, :, None]
    else:
        return numbers[None, None, None, None, :]


@triton.jit
def _larger_of_pairs(a, b):
    """Of two numbers of 16 bits without a sign in an int32."""
    return tl.inline_asm_elementwise(
        "max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _cast_pairs_of_rows(pairs, scale):
    """Two bfloat16 in an int32, times the scale of their row, as two bytes of e4m3."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 bits; .reg .f32 a, b, c, d; .reg .b16 low, high;
        shl.b32 bits, $1, 16; mov.b32 a, bits; and.b32 bits, $1, 0xffff0000; mov.b32 b, bits;
        shl.b32 bits, $2, 16; mov.b32 c, bits; and.b32 bits, $2, 0xffff0000; mov.b32 d, bits;
        mul.f32 a, a, $3; mul.f32 b, b, $3; mul.f32 c, c, $4; mul.f32 d, d, $4;
        cvt.rn.satfinite.e4m3x2.f32 low, b, a; cvt.rn.satfinite.e4m3x2.f32 high, d, c;
        mov.b32 $0, {low, high};
        }""",
        "=r,r,r,r,r",
        [pairs, scale],
        dtype=tl.int16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _cast_pairs_of_columns(pairs_0, pairs_1, pairs_2, pairs_3, scale, next_scale):
    """Of four rows two bfloat16 each, times the scales of their columns: the four bytes of e4m3 of
    one column, and those of the next. ("&": the first is written before all is read.)
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 bits; .reg .f32 a, b, c, d; .reg .b16 low, high;
        shl.b32 bits, $2, 16; mov.b32 a, bits; shl.b32 bits, $3, 16; mov.b32 b, bits;
        shl.b32 bits, $4, 16; mov.b32 c, bits; shl.b32 bits, $5, 16; mov.b32 d, bits;
        mul.f32 a, a, $6; mul.f32 b, b, $6; mul.f32 c, c, $6; mul.f32 d, d, $6;
        cvt.rn.satfinite.e4m3x2.f32 low, b, a; cvt.rn.satfinite.e4m3x2.f32 high, d, c;
        mov.b32 $0, {low, high};
        and.b32 bits, $2, 0xffff0000; mov.b32 a, bits;
        and.b32 bits, $3, 0xffff0000; mov.b32 b, bits;
        and.b32 bits, $4, 0xffff0000; mov.b32 c, bits;
        and.b32 bits, $5, 0xffff0000; mov.b32 d, bits;
        mul.f32 a, a, $7; mul.f32 b, b, $7; mul.f32 c, c, $7; mul.f32 d, d, $7;
        cvt.rn.satfinite.e4m3x2.f32 low, b, a; cvt.rn.satfinite.e4m3x2.f32 high, d, c;
        mov.b32 $1, {low, high};
        }""",
        "=&r,=&r,r,r,r,r,r,r",
        [pairs_0, pairs_1, pairs_2, pairs_3, scale, next_scale],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _rows_of_fours(x, ROWS: tl.constexpr):
    """The first, second, third and fourth rows of all fours of rows of patches."""
    if ROWS == 3:
        fours = tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], 4, 2, 2, x.shape[4]))
        fours = tl.permute(fours, (0, 1, 2, 3, 6, 4, 5))
    else:
        fours = tl.reshape(x, (4, 2, 2, x.shape[1], x.shape[2], x.shape[3], x.shape[4]))
        fours = tl.permute(fours, (0, 3, 4, 5, 6, 1, 2))
    even, odd = tl.split(fours)
    row_0, row_2 = tl.split(even)
    row_1, row_3 = tl.split(odd)
    return row_0, row_1, row_2, row_3


@triton.jit
def _transposed(x, ROWS: tl.constexpr):
    return tl.permute(x, (0, 1, 2, 4, 3) if ROWS == 3 else (4, 1, 2, 3, 0))


@triton.jit
def quantize_blocks_of_128_kernel(
    x_ptr,
    data_ptr,
    scale_ptr,
    t_data_ptr,
    t_scale_ptr,
    M,
    N,
    M_PADDED,
    x_stride,
    FLOAT8_EXPONENT: tl.constexpr,
    FORMAT: tl.constexpr,
    ALONG: tl.constexpr,
    ACROSS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`quantize_kernel` of bfloat16 x to e4m3 by blocks of 1 x 128, if ALONG, and, transposed, 128
    x 1, if ACROSS. A tile is 128 x 128, of 4 warps, and x is read as pairs of columns; N is a
    multiple of 128. For ROWS see [Note: patches].
    """
    N_THREAD: tl.constexpr = 3 - ROWS
    M_THREAD: tl.constexpr = 1 if ROWS == 3 else 2
    N_WARP: tl.constexpr = 2 if ROWS == 3 else 1
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    first = pid_m.to(tl.int64) * 128
    rows = _along(8, M_THREAD) * 16 + _along(16, ROWS)
    first_pair = _along(2, N_WARP) * 32 + _along(8, N_THREAD) * 4
    pairs = first_pair + _along(4, 4)
    mask = rows < M - pid_m * 128
    x_ptr = (x_ptr + first * x_stride + pid_n * 128).to(tl.pointer_type(tl.int32), bitcast=True)
    x = tl.load(x_ptr + rows * (x_stride // 2) + pairs, mask=mask, other=0)
    bits = x & 0x7FFF7FFF

    if ALONG:
        amax = tl.reduce(bits, 4, _larger_of_pairs)
        amax = tl.maximum(amax << 16, amax & 0x7FFF0000)
        if ROWS == 3:
            amax = tl.max(tl.max(amax, 0), 1)[None, :, None, :, None]
        else:
            amax = tl.max(tl.max(amax, 3), 1)[:, None, :, None, None]
        scale = amax_to_scale(amax, FLOAT8_EXPONENT, FORMAT)
        # For the casts a thread has the scales of all its rows, and so has every other thread of
        # these rows. To be stored they are found anew, one by a thread: Triton hands amaxes over
        # instead of scales if those are of 16 bits first.
        amax = (amax >> 16).to(tl.int16).to(tl.int32) << 16
        index = pid_m * 128 + rows
        _store_scale(
            scale_ptr,
            pid_n.to(tl.int64) * M + index,
            (N // 128).to(tl.int64) * M,
            amax_to_scale(amax, FLOAT8_EXPONENT, FORMAT),
            index < M,
            FORMAT,
        )

    if ACROSS:
        if ROWS == 3:
            t_amax = tl.reduce(tl.reduce(bits, 3, _larger_of_pairs), 1, _larger_of_pairs)
            t_amax = t_amax[:, None, :, None, :]
        else:
            t_amax = tl.reduce(tl.reduce(bits, 0, _larger_of_pairs), 1, _larger_of_pairs)
            t_amax = t_amax[None, :, None, :, :]
        t_scale = amax_to_scale(t_amax << 16, FLOAT8_EXPONENT, FORMAT)
        next_t_scale = amax_to_scale(t_amax & 0x7FFF0000, FLOAT8_EXPONENT, FORMAT)
        t_amax = tl.join(t_amax.to(tl.int16), (t_amax >> 16).to(tl.int16)).to(tl.int32) << 16
        index = pid_n * 128 + pairs[:, :, :, :, :, None] * 2 + tl.arange(0, 2)
        _store_scale(
            t_scale_ptr,
            pid_m.to(tl.int64) * N + index,
            (M_PADDED // 128).to(tl.int64) * N,
            amax_to_scale(t_amax, FLOAT8_EXPONENT, FORMAT),
            None,
            FORMAT,
        )

    if ALONG:
        data_ptr = (data_ptr + first * N + pid_n * 128).to(tl.pointer_type(tl.int16), bitcast=True)
        out = _cast_pairs_of_rows(x, tl.broadcast_to(scale, x.shape))
        tl.store(data_ptr + rows * (N // 2) + pairs, out, mask=mask)

    if ACROSS:
        row_0, row_1, row_2, row_3 = _rows_of_fours(x, ROWS)
        column, next_column = _cast_pairs_of_columns(
            row_0, row_1, row_2, row_3, t_scale, next_t_scale
        )
        columns = (first_pair + _along(4, ROWS)) * 2
        t_data_ptr += (pid_n * 128).to(tl.int64) * M_PADDED + first
        t_data_ptr = t_data_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        t_data_ptr += columns * (M_PADDED // 4) + _along(8, M_THREAD) * 4 + _along(4, 4)
        tl.store(t_data_ptr, _transposed(column, ROWS))
        tl.store(t_data_ptr + M_PADDED // 4, _transposed(next_column, ROWS))


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _inverse_of_e8m0(scale):
    """1 / scale, of powers of two from 2^-127 to 2^127, of which either end is the other's. Wrong
    for NaN, as what was scaled by it is NaN then.
    """
    bits = scale.to(tl.int32, bitcast=True)
    # 2^-127 is subnormal, with half a mantissa: that is rounded up to the exponent of 2^127.
    exponent = (0x7F000000 + (1 << 22) - bits) & 0x7F800000
    return tl.maximum(exponent, 1 << 22).to(tl.float32, bitcast=True)


@triton.jit
def _cast_four_rows(row_0, row_1, row_2, row_3, E4M3: tl.constexpr):
    """As four bytes. (Left to Triton, bytes of columns are made first, and taken apart.)"""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }"""
        if E4M3
        else """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e5m2x2.f32 low, $2, $1; cvt.rn.satfinite.e5m2x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,r,r,r,r",
        [row_0, row_1, row_2, row_3],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def derive_blocks_of_32_kernel(
    x_ptr,
    x_scale_ptr,
    t_data_ptr,
    t_scale_ptr,
    M,
    N,
    M_PADDED,
    x_stride,
    scale_stride,
    scale_block_stride,
    FLOAT8_EXPONENT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Cast what float8 x (M, N) stands for, of e8m0 scales (M, N / 32) of blocks of 1 x 32, to its
    transpose, t_data (N, M_PADDED), by such scales of blocks of 32 x 1, t_scale (M_PADDED / 32, N).
    A tile is 32 x 128, of one warp. For ROWS see [Note: patches].
    """
    BLOCK: tl.constexpr = 3 - ROWS
    N_THREAD: tl.constexpr = 1 if ROWS == 3 else 2
    M_THREAD: tl.constexpr = 2 if ROWS == 3 else 1
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    first, first_column = pid_m.to(tl.int64) * 32, pid_n * 128
    # Scales come before elements, whose layout is the one that is followed then; each is inverted
    # by one thread.
    rows, blocks = tl.arange(0, 32)[:, None], tl.arange(0, 4)[None, :]
    mask = (rows < M - pid_m * 32) & (blocks * 32 < N - first_column)
    x_scale_ptr += first * scale_stride + rows * scale_stride
    x_scale_ptr += (pid_n * 4 + blocks) * scale_block_stride
    factor = _inverse_of_e8m0(tl.load(x_scale_ptr, mask=mask, other=1.0))
    if ROWS == 3:
        factor = tl.reshape(tl.trans(factor), (4, 1, 2, 16, 1))
    else:
        factor = tl.permute(tl.reshape(factor, (2, 16, 4)), (1, 0, 2))
        factor = tl.reshape(factor, (16, 2, 1, 4, 1))

    rows = _along(2, M_THREAD) * 16 + _along(16, ROWS)
    columns = _along(4, BLOCK) * 32 + _along(4, N_THREAD) * 8
    column_mask = columns < N - first_column
    x_ptr += first * x_stride + first_column
    # Nothing is added, but that Triton does not know: so it loads 8 elements at once, not 16.
    x_ptr += rows * x_stride + (columns + _along(8, 4) + tl.program_id(2) * 8)
    x = tl.load(x_ptr, mask=(rows < M - pid_m * 32) & column_mask, other=0.0)
    x = x.to(tl.float32) * factor

    # Given its other dims before it is a scale, the amax costs Triton 3.6 registers.
    if ROWS == 3:
        amax = tl.reduce(tl.reduce(tl.abs(x), 3, _larger_or_nan), 2, _larger_or_nan)
        t_scale = amax_to_scale(amax, FLOAT8_EXPONENT, "e8m0")[:, :, None, None, :]
    else:
        amax = tl.reduce(tl.reduce(tl.abs(x), 0, _larger_or_nan), 0, _larger_or_nan)
        t_scale = amax_to_scale(amax, FLOAT8_EXPONENT, "e8m0")[None, None, :, :, :]
    index = first_column + columns + _along(8, 4)
    tl.store(t_scale_ptr + pid_m.to(tl.int64) * N + index, t_scale, mask=index < N)

    row_0, row_1, row_2, row_3 = _rows_of_fours(x * t_scale, ROWS)
    four = _cast_four_rows(row_0, row_1, row_2, row_3, FLOAT8_EXPONENT == 8)
    t_data_ptr += first_column.to(tl.int64) * M_PADDED + first
    t_data_ptr = t_data_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    t_columns = columns + _along(8, ROWS)
    t_data_ptr += t_columns * (M_PADDED // 4) + _along(2, M_THREAD) * 4 + _along(4, 4)
    tl.store(t_data_ptr, _transposed(four, ROWS), mask=column_mask)
