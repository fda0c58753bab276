"""The kernel of tokens times weights of experts whose rows are contracted. In Gluon, where a
program loads an operand into registers as it wants it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fp8dist.kernels.outer_kernel import new_barriers

# [Note: transposed on the way]
# Hopper's tensor cores take float8 operands whose bytes follow each other along what is contracted,
# both from shared memory or the first from registers. Where rows of a weight are contracted they do
# not, so the weight is the first operand, out^T = weight^T tokens^T, and is transposed on its way
# through registers, which costs next to nothing beside the products. Two bytes of a row, of columns
# 2 i and 2 i + 1, are loaded as one element of two bytes, transposed, which is what `ldmatrix` is
# for; a thread then has them of four rows, and `prmt` makes four rows of column 2 i of them, and
# four of column 2 i + 1: a register each, as the tensor cores want it. They take column c of eight,
# for what is loaded as i = c, and c + 8 from a thread, so rows of out^T are in another order: of 16
# columns of the weight first the even ones. A thread takes rows 4 t to 4 t + 3 of 16, for t from 0
# to 3, and `ldmatrix` one of the four at a time; so that the eight rows that it loads, of two t,
# follow each other in shared memory, and not in the same banks, the descriptor has rows 4 t + q in
# the order of q.

# What was fastest on an H200: tokens and columns of a tile, how many rows a step contracts, half by
# half, and how many steps are in shared memory, as many as fit.
BM, BN, BK, STAGES = gl.constexpr(128), gl.constexpr(256), gl.constexpr(128), gl.constexpr(4)
HALF_BN, HALF_BK = gl.constexpr(128), gl.constexpr(64)


@gluon.jit
def _sum_of(a, b):
    return a + b


@gluon.jit
def _table(ends_ptr, GROUPS, tiles_n, BG: gl.constexpr):
    """Of each group: its index, where it starts and ends, how many tiles it has, and how many there
    are up to its last. In each warp, which then needs no other to look something up.
    """
    layout: gl.constexpr = gl.BlockedLayout([BG // 32], [32], [gl.num_warps()], [0])
    groups = gl.arange(0, BG, layout=layout)
    known = groups < GROUPS
    ends = gl.load(ends_ptr + groups, mask=known, other=0)
    starts = gl.load(ends_ptr + groups - 1, mask=known & (groups > 0), other=0)
    tiles = gl.where(known, (ends - starts + BM - 1) // BM * tiles_n, 0)
    return groups, starts, ends, tiles, gl.associative_scan(tiles, 0, _sum_of)


@gluon.jit
def _tile(tile, table, tiles_n):
    """Its group, first token, where the group's end, and its first column."""
    groups, starts, ends, tiles, after = table
    group = gl.sum((after <= tile).to(gl.int32), 0)
    here = groups == group
    own_tiles = gl.sum(gl.where(here, tiles, 0), 0)
    tile_in_group = tile - gl.sum(gl.where(here, after, 0), 0) + own_tiles
    tiles_m = own_tiles // tiles_n
    end = gl.sum(gl.where(here, ends, 0), 0)
    row = gl.sum(gl.where(here, starts, 0), 0) + tile_in_group % tiles_m * BM
    return group, row, end, tile_in_group // tiles_m * BN


@gluon.jit
def _load(shared, PROGRAMS: gl.constexpr, BG: gl.constexpr):
    """What the loading warp does."""
    a_desc, b_desc, a_inverse_ptr, b_inverse_ptr, ends_ptr, sizes, places, ready, free = shared
    M, N, K, GROUPS = sizes
    a_places, b_places, inverse_places = places
    tiles_n, steps = gl.cdiv(N, BN), gl.cdiv(K, BK)
    table = _table(ends_ptr, GROUPS, tiles_n, BG)
    groups, starts, ends, tiles, after = table
    in_order = (starts <= ends) & (ends <= M)
    gl.inline_asm_elementwise(
        "{ .reg .pred bad; setp.eq.u32 bad, $1, 0; @bad trap; mov.u32 $0, $1; }",
        "=r,r",
        [(in_order | (groups >= GROUPS)).to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    layout: gl.constexpr = gl.BlockedLayout([BM // 32], [32], [1], [0])
    count = 0
    for tile in range(gl.program_id(0), gl.sum(tiles, 0), PROGRAMS):
        group, row, end, column = _tile(tile, table, tiles_n)
        rows = row + gl.arange(0, BM, layout=layout)
        inverse = gl.load(a_inverse_ptr + rows, mask=rows < end, other=0.0)
        inverse *= gl.load(b_inverse_ptr + group)
        for step in range(steps):
            place = count % STAGES
            arrived = ready.index(place)
            mbarrier.wait(free.index(place), (count // STAGES & 1) ^ 1)  # at first it is free
            if step == steps - 1:
                inverse_places.index(place).store(inverse)
            mbarrier.expect(arrived, (BM + BN) * BK)
            k = step * BK
            tma.async_copy_global_to_shared(a_desc, [row, k], arrived, a_places.index(place))
            for half in gl.static_range(2):
                at = [group, k // 16, 0, 0, (column + half * HALF_BN) // 2]
                b_place = b_places.index(place * 2 + half)
                tma.async_copy_global_to_shared(b_desc, at, arrived, b_place)
            count += 1


@gluon.jit
def _transposed(b):
    """b, HALF_BK rows of HALF_BN columns, in registers as (HALF_BN, HALF_BK), even columns of 16
    first; see [Note: transposed on the way].
    """
    layout: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[
            [0, 0, 1, 0, 0],
            [0, 0, 2, 0, 0],
            [0, 1, 0, 0, 0],
            [0, 2, 0, 0, 0],
            [0, 0, 0, 0, 32],
        ],
        lane_bases=[
            [0, 0, 0, 1, 0],
            [0, 0, 0, 2, 0],
            [0, 0, 0, 0, 1],
            [0, 0, 0, 0, 2],
            [0, 0, 0, 0, 4],
        ],
        warp_bases=[[0, 0, 0, 0, 8], [0, 0, 0, 0, 16]],
        block_bases=[],
        shape=[1, HALF_BK // 16, 4, 4, HALF_BN // 2],
    )
    pairs = b.load(layout).permute((4, 0, 1, 3, 2)).reshape([HALF_BN // 2, HALF_BK])
    even, odd = gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;",
        "=&r,=r,r,r",
        [pairs],
        dtype=(gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )
    both = gl.join(even, odd).reshape([HALF_BN // 16, 8, HALF_BK, 2]).permute((0, 3, 1, 2))
    return both.reshape([HALF_BN, HALF_BK]).to(gl.float8e4nv, bitcast=True)


@gluon.jit
def _multiply(shared, HALF: gl.constexpr, PROGRAMS: gl.constexpr, BG: gl.constexpr):
    """What the warps of a half do, HALF 0 or 1: the left or right half of every tile."""
    out_ptr, ends_ptr, sizes, places, ready, free = shared
    M, N, K, GROUPS = sizes
    a_places, b_places, inverse_places = places
    tiles_n, steps = gl.cdiv(N, BN), gl.cdiv(K, BK)
    table = _table(ends_ptr, GROUPS, tiles_n, BG)
    groups, starts, ends, tiles, after = table
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 32]
    )
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    sums = gl.zeros([HALF_BN, BM], gl.float32, layout)
    count = 0
    for tile in range(gl.program_id(0), gl.sum(tiles, 0), PROGRAMS):
        group, row, end, column = _tile(tile, table, tiles_n)
        for step in range(steps):
            place = count % STAGES
            mbarrier.wait(ready.index(place), count // STAGES & 1)
            # What comes second is loaded into registers while the first is multiplied. ptxas lets
            # nothing be multiplied across the end of a loop that has operands in registers.
            for i in gl.static_range(2):
                b_place = b_places.index(place * 2 + HALF)
                b = _transposed(b_place.slice(i * HALF_BK // 16, HALF_BK // 16, dim=1))
                a = a_places.index(place).slice(i * HALF_BK, HALF_BK, dim=1)
                sums = warpgroup_mma(
                    gl.convert_layout(b, gl.DotOperandLayout(0, layout, 4)),
                    a.permute((1, 0)),
                    sums,
                    use_acc=step + i > 0,
                    is_async=True,
                )
            sums = warpgroup_mma_wait(0, deps=(sums,))
            mbarrier.arrive(free.index(place), pred=step < steps - 1)
            count += 1
        place = (count + STAGES - 1) % STAGES
        inverse = inverse_places.index(place).load(gl.SliceLayout(0, layout))
        mbarrier.arrive(free.index(place))
        product = (sums * inverse[None, :]).to(gl.bfloat16)
        product = product.reshape([HALF_BN // 16, 2, 8, BM]).permute((3, 0, 2, 1))
        product = gl.convert_layout(product.reshape([BM, HALF_BN]), stored)
        rows = row + gl.arange(0, BM, layout=gl.SliceLayout(1, stored))
        columns = column + HALF * HALF_BN + gl.arange(0, HALF_BN, layout=gl.SliceLayout(0, stored))
        mask = (rows < end)[:, None] & (columns < N)[None, :]
        gl.store(out_ptr + rows.to(gl.int64)[:, None] * N + columns[None, :], product, mask=mask)


@gluon.jit(do_not_specialize=["M", "GROUPS"])  # one group is not compiled by itself
def multiply_rows_kernel(
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
    PROGRAMS: gl.constexpr,
    BG: gl.constexpr,
):
    """out (M, N), bfloat16 = the rows of each group of a (M, K), times b of the group, (GROUPS, K,
    N), the inverse scales of rows of a and those of groups. See [Note: tiles of groups] in
    `grouped_kernels`, [Note: loader and multipliers] in `outer_kernel` and [Note: transposed on the
    way].

    Sums are accumulated as the tensor cores do it ("fast"). PROGRAMS are launched, of four warps,
    the first half's; those of the other half and of the loader are added here. BG: a power of two,
    32 at least, and GROUPS at least. The descriptors are of blocks BM x BK, and of
    1 x BK / 16 x 4 x 4 x HALF_BN / 2 of b as (GROUPS, K / 16, 4, 4, N / 2) elements of two bytes,
    whose second and third dimension from the end are exchanged; what goes over the edge is read
    as 0.
    """
    sizes = (M, N, K, GROUPS)
    places = (
        gl.allocate_shared_memory(a_desc.dtype, [STAGES, BM, BK], a_desc.layout),
        gl.allocate_shared_memory(
            b_desc.dtype, [STAGES * 2, 1, BK // 16, 4, 4, HALF_BN // 2], b_desc.layout
        ),
        gl.allocate_shared_memory(
            gl.float32, [STAGES, BM], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
        ),
    )
    ready, free = new_barriers(STAGES)
    multiplier = (out_ptr, ends_ptr, sizes, places, ready, free)
    loader = (a_desc, b_desc, a_inverse_ptr, b_inverse_ptr, ends_ptr, sizes, places, ready, free)
    gl.warp_specialize(
        [
            (_multiply, (multiplier, 0, PROGRAMS, BG)),
            (_multiply, (multiplier, 1, PROGRAMS, BG)),
            (_load, (loader, PROGRAMS, BG)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[232, 40],  # of a thread; 128 of a multiplier's are sums
    )
