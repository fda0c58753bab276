"""The kernel of grad_weight of experts. In Gluon, where Triton leaves it to the program which warp
does what, and when.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# [Note: loader and multipliers]
# grad_weight sums the few tokens of an expert to a large result, so that a program is done with a
# tile soon after it has begun, and would wait for the first operands of the next, and multiply
# nothing while it stores. So one warp loads, as many steps ahead as there is room for, whichever
# tile they are of, and twice four warps multiply and store, each the upper or lower half of every
# tile: a half may multiply while the other stores. What they tell each other are barriers in
# shared memory: `ready[i]`, all bytes of place i have arrived; `free[i]`, both halves have
# multiplied them. The n-th step of a program is in place n % STAGES, whose barriers have by then
# been passed n // STAGES times; the parity of that is waited for, and of `free` the other. With the
# last step of a tile come the inverse scales of its rows and columns. A group has at least one
# step: without one the parities would be wrong from then on, so that ends the kernel.


# What was fastest on an H200: rows and columns of a tile, how many tokens a step contracts, and how
# many steps are in shared memory, as many as fit.
BM, BN, BK, STAGES = gl.constexpr(128), gl.constexpr(256), gl.constexpr(64), gl.constexpr(6)


@gluon.jit
def new_barriers(PLACES: gl.constexpr):
    """`ready` and `free` of each place, see [Note: loader and multipliers]."""
    ready = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(PLACES):
        mbarrier.init(ready.index(place), count=1)
        mbarrier.init(free.index(place), count=2)
    fence_async_shared()
    return ready, free


@gluon.jit
def _tile(tile, ends_ptr, tiles, tiles_n):
    """Its group, first row and column, and where its steps begin and how many they are."""
    group = tile // tiles
    row = tile % tiles % tiles_n * BM
    column = tile % tiles // tiles_n * BN
    start = gl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    steps = (gl.load(ends_ptr + group) - start) // BK
    return group, row, column, start, steps


@gluon.jit
def _load(shared, PROGRAMS: gl.constexpr):
    """What the loading warp does."""
    descriptors, sizes, ends_ptr, operands, inverses, ready, free = shared
    a_desc, b_desc, a_inverse_desc, b_inverse_desc = descriptors
    total, tiles, tiles_n, N, K = sizes
    a_places, b_places = operands
    a_inverse_places, b_inverse_places = inverses
    count = 0
    for tile in range(gl.program_id(0), total, PROGRAMS):
        group, row, column, start, steps = _tile(tile, ends_ptr, tiles, tiles_n)
        gl.inline_asm_elementwise(
            "{ .reg .pred bad; setp.lt.s32 bad, $1, 1; @bad trap; mov.u32 $0, $1; }",
            "=r,r",
            [steps],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
        for step in range(steps):
            place = count % STAGES
            arrived = ready.index(place)
            mbarrier.wait(free.index(place), (count // STAGES & 1) ^ 1)  # at first it is free
            if step == steps - 1:
                mbarrier.expect(arrived, (BM + BN) * (BK + 4))
                tma.async_copy_global_to_shared(
                    a_inverse_desc, [group * N + row], arrived, a_inverse_places.index(place)
                )
                tma.async_copy_global_to_shared(
                    b_inverse_desc, [group * K + column], arrived, b_inverse_places.index(place)
                )
            else:
                mbarrier.expect(arrived, (BM + BN) * BK)
            k = start + step * BK
            tma.async_copy_global_to_shared(a_desc, [row, k], arrived, a_places.index(place))
            tma.async_copy_global_to_shared(b_desc, [column, k], arrived, b_places.index(place))
            count += 1


@gluon.jit
def _multiply(shared, HALF: gl.constexpr, PROGRAMS: gl.constexpr):
    """What the warps of a half do, HALF 0 or 1."""
    out_desc, sizes, ends_ptr, operands, inverses, out_places, ready, free = shared
    total, tiles, tiles_n, N, K = sizes
    a_places, b_places = operands
    a_inverse_places, b_inverse_places = inverses
    HALF_BM: gl.constexpr = BM // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32]
    )
    out = out_places.index(HALF)
    sums = gl.zeros([HALF_BM, BN], gl.float32, layout)
    count = 0
    for tile in range(gl.program_id(0), total, PROGRAMS):
        group, row, column, start, steps = _tile(tile, ends_ptr, tiles, tiles_n)
        for step in range(steps):
            place = count % STAGES
            mbarrier.wait(ready.index(place), count // STAGES & 1)
            a = a_places.index(place).slice(HALF * HALF_BM, HALF_BM, dim=0)
            b = b_places.index(place).permute((1, 0))
            sums = warpgroup_mma(a, b, sums, use_acc=step > 0, is_async=True)
            # The step before is done when at most this one is not.
            sums = warpgroup_mma_wait(1, deps=(sums,))
            mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), pred=step > 0)
            count += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        place = (count + STAGES - 1) % STAGES
        of_rows = a_inverse_places.index(place).slice(HALF * HALF_BM, HALF_BM, dim=0)
        a_inverse = of_rows.load(gl.SliceLayout(1, layout))
        b_inverse = b_inverse_places.index(place).load(gl.SliceLayout(0, layout))
        fence_async_shared()  # they are read before they are loaded over
        mbarrier.arrive(free.index(place))
        product = (sums * a_inverse[:, None] * b_inverse[None, :]).to(gl.bfloat16)
        tma.store_wait(0)  # the half's last tile has left
        out.reshape([HALF_BM, BN]).store(product)
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [group, row + HALF * HALF_BM, column], out)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["GROUPS"])  # one group is not compiled by itself
def outer_groups_kernel(
    a_desc,
    b_desc,
    a_inverse_desc,
    b_inverse_desc,
    ends_ptr,
    out_desc,
    N,
    K,
    GROUPS,
    PROGRAMS: gl.constexpr,
):
    """out (GROUPS, N, K), bfloat16 = the columns of each group of a (N, padded rows) times those of
    b (K, padded rows), transposed, and the inverse scales of rows of both, by group. See [Note:
    loader and multipliers].

    Groups have multiples of BK columns, and at least that. Sums are accumulated as the tensor cores
    do it ("fast"). PROGRAMS are launched, of four warps, the first half's; those of the other half
    and of the loader are added here. The descriptors are of blocks BM x BK, BN x BK, BM, BN and
    1 x BM / 2 x BN; what goes over the edge of a and b is read as 0, of out not written.
    """
    tiles_n = gl.cdiv(N, BM)
    tiles = tiles_n * gl.cdiv(K, BN)
    sizes = (tiles * GROUPS, tiles, tiles_n, N, K)
    operands = (
        gl.allocate_shared_memory(a_desc.dtype, [STAGES, BM, BK], a_desc.layout),
        gl.allocate_shared_memory(b_desc.dtype, [STAGES, BN, BK], b_desc.layout),
    )
    inverses = (
        gl.allocate_shared_memory(gl.float32, [STAGES, BM], a_inverse_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, BN], b_inverse_desc.layout),
    )
    out_places = gl.allocate_shared_memory(out_desc.dtype, [2, 1, BM // 2, BN], out_desc.layout)
    ready, free = new_barriers(STAGES)
    descriptors = (a_desc, b_desc, a_inverse_desc, b_inverse_desc)
    multiplier = (out_desc, sizes, ends_ptr, operands, inverses, out_places, ready, free)
    loader = (descriptors, sizes, ends_ptr, operands, inverses, ready, free)
    gl.warp_specialize(
        [
            (_multiply, (multiplier, 0, PROGRAMS)),
            (_multiply, (multiplier, 1, PROGRAMS)),
            (_load, (loader, PROGRAMS)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],  # of a thread; 128 of a multiplier's are sums
    )
