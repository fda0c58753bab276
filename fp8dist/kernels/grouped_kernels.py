"""Triton kernels for experts: tokens in groups, and weights one below the other.

Groups are cast padded to CHUNK rows, see [Note: groups] in `grouped_numerics`, so that a chunk of
padded rows is of one group, and the rows of the tokens that it holds lie one below the other.
`chunks_kernel` finds out which.
"""

import triton
import triton.language as tl

from fp8dist.kernels.amax_kernels import _abs_bits
from fp8dist.kernels.triton_kernels import _store_scale, amax_to_scale


@triton.jit(debug=True)
def chunks_kernel(
    ends_ptr,
    padded_ends_ptr,
    first_ptr,
    end_ptr,
    group_ptr,
    GROUPS,
    COUNT,
    M,
    CHUNK: tl.constexpr,
    BG: tl.constexpr,
    BC: tl.constexpr,
):
    """Of each of COUNT chunks: the first row of the M tokens that it holds, where the rows of its
    group end, and its group; a chunk after the last group holds no rows of that. Also padded_ends.
    """
    groups = tl.arange(0, BG)
    known = groups < GROUPS
    ends = tl.load(ends_ptr + groups, mask=known, other=0)
    starts = tl.load(ends_ptr + groups - 1, mask=known & (groups > 0), other=0)
    in_order = (starts <= ends) & (ends <= M)
    tl.device_assert(in_order | ~known, "offsets of experts go down, or beyond the tokens")
    sizes = tl.maximum(ends - starts, 1)
    padded = tl.where(known, (sizes + CHUNK - 1) // CHUNK * CHUNK, 0)
    padded_ends = tl.cumsum(padded, 0)
    if tl.program_id(0) == 0:
        tl.store(padded_ends_ptr + groups, padded_ends, mask=known)
    chunks = tl.program_id(0) * BC + tl.arange(0, BC)
    rows = chunks * CHUNK
    before = known[None, :] & (padded_ends[None, :] <= rows[:, None])
    group = tl.minimum(tl.sum(before.to(tl.int32), 1), GROUPS - 1)
    mine = groups[None, :] == group[:, None]
    shift = tl.sum(tl.where(mine, (starts - (padded_ends - padded))[None, :], 0), 1)
    end = tl.sum(tl.where(mine, ends[None, :], 0), 1)
    in_range = chunks < COUNT
    tl.store(first_ptr + chunks, rows + shift, mask=in_range)
    tl.store(end_ptr + chunks, end, mask=in_range)
    tl.store(group_ptr + chunks, group, mask=in_range)


@triton.jit
def group_amaxes_kernel(
    x_ptr,
    first_ptr,
    end_ptr,
    group_ptr,
    factor_ptr,
    row_ptr,
    column_ptr,
    N,
    stride,
    WANT_ROW: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Raise amaxes, int32 bits that are zero before, to those of rows of x (M, N), times its
    group's factor (groups, N) if there is one, and of columns of each group, (groups, N). A program
    takes a chunk, BM rows after BM rows.
    """
    chunk = tl.program_id(0)
    first, end = tl.load(first_ptr + chunk), tl.load(end_ptr + chunk)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    column_mask = columns < N
    of_group = tl.load(group_ptr + chunk).to(tl.int64) * N + columns
    if first < end:
        if HAS_FACTOR:
            factor = tl.load(factor_ptr + of_group, mask=column_mask, other=1.0)
        most = tl.zeros((BM, BN), dtype=tl.int32)
        for step in range(CHUNK // BM):
            rows = first + step * BM + tl.arange(0, BM)
            row_mask = rows < end
            offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
            mask = row_mask[:, None] & column_mask[None, :]
            bits = _abs_bits(tl.load(x_ptr + offsets, mask=mask, other=0.0))
            most = tl.maximum(most, bits)
            if HAS_FACTOR:
                bits = bits.to(tl.float32, bitcast=True) * factor[None, :]
                bits = bits.to(tl.int32, bitcast=True)
            if WANT_ROW:
                tl.atomic_max(row_ptr + rows, tl.max(bits, 1), mask=row_mask, sem="relaxed")
        tl.atomic_max(column_ptr + of_group, tl.max(most, 0), mask=column_mask, sem="relaxed")


@triton.jit
def quantize_groups_kernel(
    x_ptr,
    first_ptr,
    end_ptr,
    group_ptr,
    factor_ptr,
    row_amax_ptr,
    column_amax_ptr,
    data_ptr,
    scale_ptr,
    t_data_ptr,
    t_scale_ptr,
    M,
    N,
    M_PADDED,
    GROUPS,
    SCALES,
    stride,
    FLOAT8_EXPONENT: tl.constexpr,
    FORMAT: tl.constexpr,
    WANT_ROW: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    BN: tl.constexpr,
):
    """Cast x (M, N), times its group's factor (GROUPS, N) if there is one, by the scales of its
    rows to data (M, N), and x by those of the columns of each group to t_data (N, M_PADDED), its
    transpose; the scales go to (M,) and (GROUPS, N), SCALES in number. A program takes BN columns
    of a chunk, the last first: those are in the cache, where amaxes have been found.
    """
    chunk, pid_n = tl.program_id(0).to(tl.int64), tl.num_programs(1) - 1 - tl.program_id(1)
    first, end = tl.load(first_ptr + chunk), tl.load(end_ptr + chunk)
    columns = pid_n * BN + tl.arange(0, BN)
    rows = first.to(tl.int64) + tl.arange(0, CHUNK)
    row_mask, column_mask = rows < end, columns < N
    mask = row_mask[:, None] & column_mask[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    of_group = tl.load(group_ptr + chunk).to(tl.int64) * N + columns
    if WANT_ROW:
        bits = tl.load(row_amax_ptr + rows, mask=row_mask, other=0)
        scale = amax_to_scale(bits, FLOAT8_EXPONENT, FORMAT)
        _store_scale(scale_ptr, rows, M, scale, row_mask & (pid_n == 0), FORMAT)
        by_rows = x
        if HAS_FACTOR:
            by_rows = x * tl.load(factor_ptr + of_group, mask=column_mask, other=1.0)[None, :]
        scaled = (by_rows * scale[:, None]).to(data_ptr.dtype.element_ty)
        tl.store(data_ptr + rows[:, None] * N + columns[None, :], scaled, mask=mask)

    # There are at least as many chunks as groups, so each program writes the scales of one.
    wanted = column_mask & (chunk < GROUPS)
    bits = tl.load(column_amax_ptr + chunk * N + columns, mask=wanted, other=0)
    t_scale = amax_to_scale(bits, FLOAT8_EXPONENT, FORMAT)
    _store_scale(t_scale_ptr, chunk * N + columns, SCALES, t_scale, wanted, FORMAT)

    bits = tl.load(column_amax_ptr + of_group, mask=column_mask, other=0)
    t_scaled = x * amax_to_scale(bits, FLOAT8_EXPONENT, FORMAT)[None, :]
    padded = chunk * CHUNK + tl.arange(0, CHUNK)
    tl.store(
        t_data_ptr + columns.to(tl.int64)[:, None] * M_PADDED + padded[None, :],
        tl.trans(t_scaled.to(t_data_ptr.dtype.element_ty)),
        mask=column_mask[:, None],
    )


@triton.jit
def transpose_each_kernel(x_ptr, out_ptr, ROWS, N, stride, BM: tl.constexpr, BN: tl.constexpr):
    """Transpose each of the matrices x (E * ROWS, N), elements of a byte, to (E * N, ROWS)."""
    expert = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    row_mask, column_mask = rows < ROWS, columns < N
    mask = row_mask[:, None] & column_mask[None, :]
    x = tl.load(x_ptr + (expert * ROWS + rows)[:, None] * stride + columns[None, :], mask=mask)
    tl.store(
        out_ptr + (expert * N + columns)[:, None] * ROWS + rows[None, :],
        tl.trans(x),
        mask=column_mask[:, None] & row_mask[None, :],
    )


# [Note: tiles of groups]
# A tile of a product is of one group, and its first row is the group's or whole tiles below that.
# How many tiles there are follows from where groups end, which only the device knows: there are as
# many programs as run at once, and each takes every PROGRAMS-th tile. Tiles of an expert follow
# each other, those of the same columns first, so that programs share its weight in the cache. What
# a tile reads below its group are rows of the next, of which nothing is stored.


# M and GROUPS as they are: of a constant 1 Triton 3.6 compiles masks wrongly, see `ops.in_kernels`.
@triton.jit(do_not_specialize=["M", "GROUPS"])
def multiply_groups_kernel(
    a_desc,
    b_desc,
    a_inverse_ptr,
    b_inverse_ptr,
    ends_ptr,
    out_ptr,
    M,
    N,
    K,
    GROUPS,
    PROGRAMS: tl.constexpr,
    BG: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out (M, N), bfloat16 = the rows of each group of a (M, K), times b^T of the group, of b
    (GROUPS * N, K), and the inverse scales of rows of both. See [Note: tiles of groups].

    Sums are accumulated as the tensor cores do it ("fast"). PROGRAMS are launched. a and b are
    descriptors of blocks BM x BK and BN x BK, which are 0 where they go over the edge.
    """
    groups = tl.arange(0, BG)
    known = groups < GROUPS
    ends = tl.load(ends_ptr + groups, mask=known, other=0)
    starts = tl.load(ends_ptr + groups - 1, mask=known & (groups > 0), other=0)
    # `chunks_kernel` has a message for wrong offsets, where it came before. An assertion here is a
    # function that might be called, for which ptxas has each product waited for: a third slower.
    in_order = (starts <= ends) & (ends <= M)
    tl.inline_asm_elementwise(
        "{ .reg .pred bad; setp.eq.u32 bad, $1, 0; @bad trap; mov.u32 $0, $1; }",
        "=r,r",
        [(in_order | ~known).to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tiles_n = tl.cdiv(N, BN)
    tiles = tl.where(known, (ends - starts + BM - 1) // BM * tiles_n, 0)
    after = tl.cumsum(tiles, 0)
    # Flattened: what the next tile needs first is loaded while this one is stored.
    for tile in tl.range(tl.program_id(0), tl.sum(tiles, 0), PROGRAMS, flatten=True):
        group = tl.sum((after <= tile).to(tl.int32), 0)
        here = groups == group
        own_tiles = tl.sum(tl.where(here, tiles, 0), 0)
        tile_in_group = tile - tl.sum(tl.where(here, after, 0), 0) + own_tiles
        tiles_m = tl.maximum(own_tiles // tiles_n, 1)  # 0 after the last tile, looked at ahead
        end = tl.sum(tl.where(here, ends, 0), 0)
        row = tl.sum(tl.where(here, starts, 0), 0) + tile_in_group % tiles_m * BM
        column = tile_in_group // tiles_m * BN
        sums = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, K, BK):
            a = a_desc.load([row, k])
            b = b_desc.load([group * N + column, k])
            sums = tl.dot(a, b.T, sums)
        rows = row + tl.arange(0, BM)
        columns = column + tl.arange(0, BN)
        row_mask, column_mask = rows < end, columns < N
        a_inverse = tl.load(a_inverse_ptr + rows, mask=row_mask, other=0.0)
        b_inverse = tl.load(b_inverse_ptr + group * N + columns, mask=column_mask, other=0.0)
        product = sums * a_inverse[:, None] * b_inverse[None, :]
        tl.store(
            out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :],
            product.to(tl.bfloat16),
            mask=row_mask[:, None] & column_mask[None, :],
        )
