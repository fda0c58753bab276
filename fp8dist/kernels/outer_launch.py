"""The kernel of `outer_kernel`, launched."""

import functools

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fp8dist.grouped_numerics import GROUP_MULTIPLE
from fp8dist.kernels import outer_kernel
from fp8dist.kernels.grouped_launch import described, multiprocessors
from fp8dist.kernels.launch import where_x_is

_BM, _BN, _BK = (size.value for size in (outer_kernel.BM, outer_kernel.BN, outer_kernel.BK))
assert GROUP_MULTIPLE % _BK == 0, "a step is of one group"


@functools.cache  # a launch needs five
def layout_of(block: tuple[int, ...], element_size: int) -> NVMMASharedLayout:
    """Matrices lie in shared memory as the tensor cores read them, vectors as they are."""
    row = block[-1] * element_size if len(block) > 1 else 0
    return NVMMASharedLayout(
        swizzle_byte_width=min(row, 128), element_bitwidth=8 * element_size, rank=len(block)
    )


def descriptor(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """For the kernel to move blocks of x."""
    return TensorDescriptor(*described(x), block, layout_of(tuple(block), x.element_size()))


@where_x_is
def outer_groups(
    a: torch.Tensor,
    b: torch.Tensor,
    a_inverse: torch.Tensor,
    b_inverse: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """The op `fp8dist::scaled_grouped_outer`: `torch._scaled_grouped_mm` of padded groups whose
    tokens are contracted, with fast accumulation. The same bits, in less time.

    Args:
        a: (N, padded rows), float8. b: (K, padded rows), float8.
        a_inverse: (E * N,), float32, 1 / the scales. b_inverse: (E * K,).
        ends: (E,), int32, where padded groups end, which have multiples of `GROUP_MULTIPLE` rows
            and at least that.

    Returns:
        (E, N, K), bfloat16.
    """
    n, k, groups = a.size(0), b.size(0), ends.numel()
    out = torch.empty((groups, n, k), dtype=torch.bfloat16, device=a.device)
    programs = multiprocessors(a.device)
    # Not `launch_kernel`, which knows of tensors only.
    outer_kernel.outer_groups_kernel[(programs,)](
        descriptor(a, [_BM, _BK]),
        descriptor(b, [_BN, _BK]),
        descriptor(a_inverse, [_BM]),
        descriptor(b_inverse, [_BN]),
        ends.contiguous(),
        descriptor(out, [1, _BM // 2, _BN]),
        n,
        k,
        groups,
        programs,
        num_warps=4,
        sanitize_overflow=False,  # its checks, with TRITON_DEBUG=1, are calls
    )
    return out
