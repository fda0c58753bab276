"""Triton kernels: amaxes of a matrix, in one pass over it.

Each program handles a tile, or some below one another. Amaxes travel as the bits of float32 numbers
with the sign off: as integers these keep the order of the floats and put NaN on top, so that a
maximum never loses one.
"""

import triton
import triton.language as tl


@triton.jit
def _abs_bits(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _abs_bits_as_stored(x):
    """Of bfloat16 the 16 bits that it has, which keep the order as well, in half the registers; see
    `_widened`.
    """
    if x.dtype == tl.bfloat16:
        return x.to(tl.int16, bitcast=True) & 0x7FFF
    else:
        return _abs_bits(x)


@triton.jit
def _widened(bits, STORED: tl.constexpr):
    return bits.to(tl.int32) << 16 if STORED == tl.bfloat16 else bits


@triton.jit
def _raise_amaxes(
    x_ptr,
    M,
    N,
    stride,
    first_row,
    first_column,
    inverse_ptr,
    row_ptr,
    column_ptr,
    tensor_ptr,
    block_ptr,
    row_start,
    BY_ROW: tl.constexpr,
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
    """Raise amaxes, int32 bits, to those of STEPS times BM rows and BN columns of x; BY_ROW: of x
    times an inverse scale per row. With STAGES above 1 the rows of so many steps are loaded before
    they are needed, to shared memory.

    Blocks are of 128 x 128, of the matrix of which x is the rows from row_start on; IN_ONE_BLOCK:
    all those rows are in the same blocks.
    """
    columns = first_column + tl.arange(0, BN)
    column_mask = columns < N
    STORED: tl.constexpr = tl.float32 if BY_ROW else x_ptr.dtype.element_ty
    most = tl.zeros((BM, BN), dtype=tl.int16 if STORED == tl.bfloat16 else tl.int32)
    if WANT_BLOCK:
        block_columns = first_column // 128 + tl.arange(0, BN // 128)
        blocks_in_row = tl.cdiv(N, 128)
        block_mask = block_columns < blocks_in_row
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = first_row + step * BM + tl.arange(0, BM)
        row_mask = rows < M
        mask = row_mask[:, None] & column_mask[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
        if BY_ROW:
            inverse = tl.load(inverse_ptr + rows, mask=row_mask, other=1.0)
            x = x.to(tl.float32) * inverse[:, None]
        bits = _abs_bits_as_stored(x)
        most = tl.maximum(most, bits)
        if WANT_ROW:
            of_rows = _widened(tl.max(bits, 1), STORED)
            tl.atomic_max(row_ptr + rows, of_rows, mask=row_mask, sem="relaxed")
        if WANT_BLOCK and not IN_ONE_BLOCK:
            of_blocks = _widened(tl.max(tl.reshape(bits, (BM, BN // 128, 128)), 2), STORED)
            index = ((rows + row_start) // 128 * blocks_in_row)[:, None] + block_columns[None, :]
            in_matrix = row_mask[:, None] & block_mask[None, :]
            tl.atomic_max(block_ptr + index, of_blocks, mask=in_matrix, sem="relaxed")
    if WANT_BLOCK and IN_ONE_BLOCK:
        of_their_rows = tl.max(tl.reshape(most, (BM, BN // 128, 128)), 2)
        of_blocks = _widened(tl.max(of_their_rows, 0), STORED)
        index = (first_row + row_start) // 128 * blocks_in_row + block_columns
        tl.atomic_max(block_ptr + index, of_blocks, mask=block_mask, sem="relaxed")
    if WANT_COLUMN:
        of_columns = _widened(tl.max(most, 0), STORED)
        tl.atomic_max(column_ptr + columns, of_columns, mask=column_mask, sem="relaxed")
    if WANT_TENSOR:
        of_tensor = _widened(tl.max(tl.max(most, 1), 0), STORED)
        tl.atomic_max(tensor_ptr, of_tensor, sem="relaxed")


@triton.jit
def amax_kernel(
    x_ptr,
    inverse_ptr,
    amax_ptr,
    M,
    N,
    stride,
    BY_ROW: tl.constexpr,
    WANT_ROW: tl.constexpr,
    WANT_COLUMN: tl.constexpr,
    WANT_TENSOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Amaxes of the (M, N) matrix x, or, BY_ROW, of x times inverse scales of rows, as int32 bits,
    into a buffer that is zero before.

    The buffer has, of what is wanted: M of rows, N of columns, one of the tensor.
    """
    column_ptr = amax_ptr + M if WANT_ROW else amax_ptr
    tensor_ptr = column_ptr + N if WANT_COLUMN else column_ptr
    _raise_amaxes(
        x_ptr,
        M,
        N,
        stride,
        tl.program_id(0) * (BM * STEPS),
        tl.program_id(1) * BN,
        inverse_ptr,
        amax_ptr,
        column_ptr,
        tensor_ptr,
        amax_ptr,
        0,
        BY_ROW,
        WANT_ROW,
        WANT_COLUMN,
        WANT_TENSOR,
        False,
        False,
        BM,
        BN,
        STEPS,
        STAGES,
    )
