"""Triton kernels that transpose float8, one of which may move it from scales of rows to others."""

import triton
import triton.language as tl

# [Note: fours]
# A transpose that moves byte by byte takes five instructions for an element, or ten with scales, as
# ptxas counts them for sm_90. Here it is three, or eight: a thread has the same word of four rows,
# whose sixteen bytes it puts together to four words of columns, four rows each, with eight
# instructions. What changes hands in shared memory then are words; elements are scaled by fours.


@triton.jit
def _columns_of_fours(row_0, row_1, row_2, row_3):
    """Of words of four rows: their first bytes, in a word, their second, third and fourth ones.
    ("&": the first is written before all is read.)
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d;
        prmt.b32 a, $4, $5, 0x5140; prmt.b32 b, $6, $7, 0x5140;
        prmt.b32 c, $4, $5, 0x7362; prmt.b32 d, $6, $7, 0x7362;
        prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632;
        prmt.b32 $2, c, d, 0x5410; prmt.b32 $3, c, d, 0x7632;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r",
        [row_0, row_1, row_2, row_3],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _shifted(column, inverse_0, inverse_1, inverse_2, inverse_3, scale):
    """Four bytes of e4m3, each times what is 1 / the scale of its row, times the new scale."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high, even, odd; .reg .b32 pair; .reg .f32 a, b, c, d;
        mov.b32 {low, high}, $1;
        cvt.rn.f16x2.e4m3x2 pair, low; mov.b32 {even, odd}, pair;
        cvt.f32.f16 a, even; cvt.f32.f16 b, odd;
        cvt.rn.f16x2.e4m3x2 pair, high; mov.b32 {even, odd}, pair;
        cvt.f32.f16 c, even; cvt.f32.f16 d, odd;
        mul.f32 a, a, $2; mul.f32 b, b, $3; mul.f32 c, c, $4; mul.f32 d, d, $5;
        mul.f32 a, a, $6; mul.f32 b, b, $6; mul.f32 c, c, $6; mul.f32 d, d, $6;
        cvt.rn.satfinite.e4m3x2.f32 low, b, a; cvt.rn.satfinite.e4m3x2.f32 high, d, c;
        mov.b32 $0, {low, high};
        }""",
        "=r,r,r,r,r,r,r",
        [column, inverse_0, inverse_1, inverse_2, inverse_3, scale],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def transpose_kernel(
    x_ptr,
    x_inverse_ptr,
    scale_ptr,
    out_ptr,
    M,
    N,
    x_stride,
    inverse_stride,
    SCALES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """out (N, M) = x (M, N) transposed, elements of a byte. M, N, x_stride and addresses are
    multiples of 4; see [Note: fours].

    SCALES are "none", or "column" or "tensor": then elements are e4m3, x_inverse (M, 1) is 1 / what
    rows were scaled by, and scale (1, N) or (1, 1) what they are scaled by instead.
    """
    rows = tl.program_id(0).to(tl.int64) * (BM // 4) + tl.arange(0, BM // 4)  # fours of them
    columns = tl.program_id(1).to(tl.int64) * (BN // 4) + tl.arange(0, BN // 4)
    row_mask, column_mask = rows < M // 4, columns < N // 4
    x_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    x_ptr += rows[:, None] * x_stride + columns[None, :]
    x_mask, next_row = row_mask[:, None] & column_mask[None, :], x_stride // 4
    row_0 = tl.load(x_ptr, mask=x_mask, other=0)
    row_1 = tl.load(x_ptr + next_row, mask=x_mask, other=0)
    row_2 = tl.load(x_ptr + 2 * next_row, mask=x_mask, other=0)
    row_3 = tl.load(x_ptr + 3 * next_row, mask=x_mask, other=0)
    fours = _columns_of_fours(row_0, row_1, row_2, row_3)
    if SCALES != "none":
        x_inverse_ptr += rows * 4 * inverse_stride
        inverse_0 = tl.load(x_inverse_ptr, mask=row_mask, other=1.0)[:, None]
        inverse_1 = tl.load(x_inverse_ptr + inverse_stride, mask=row_mask, other=1.0)[:, None]
        inverse_2 = tl.load(x_inverse_ptr + 2 * inverse_stride, mask=row_mask, other=1.0)[:, None]
        inverse_3 = tl.load(x_inverse_ptr + 3 * inverse_stride, mask=row_mask, other=1.0)[:, None]
    out_ptr = out_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    out_ptr += columns[:, None] * M + rows[None, :]
    out_mask = column_mask[:, None] & row_mask[None, :]
    for i in tl.static_range(4):
        column = fours[i]
        if SCALES != "none":
            if SCALES == "tensor":
                scale = tl.load(scale_ptr)
            else:
                scale = tl.load(scale_ptr + columns * 4 + i, mask=column_mask, other=1.0)[None, :]
            column = _shifted(column, inverse_0, inverse_1, inverse_2, inverse_3, scale)
        tl.store(out_ptr + i * (M // 4), tl.trans(column), mask=out_mask)


@triton.jit
def transpose_bytes_kernel(x_ptr, out_ptr, M, N, x_stride, BM: tl.constexpr, BN: tl.constexpr):
    """The same of any M, N, x_stride and addresses, without scales."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask)
    offsets = columns[:, None] * M + rows[None, :]
    tl.store(out_ptr + offsets, tl.trans(x), mask=(columns < N)[:, None] & (rows < M)[None, :])
