"""The kernel of `rows_kernel`, launched."""

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fp8dist.kernels import rows_kernel
from fp8dist.kernels.grouped_launch import described, multiprocessors
from fp8dist.kernels.launch import where_x_is
from fp8dist.kernels.outer_launch import descriptor, layout_of

_BM, _BK, _HALF_BN = (size.value for size in (rows_kernel.BM, rows_kernel.BK, rows_kernel.HALF_BN))


@where_x_is
def multiply_rows(
    a: torch.Tensor,
    b: torch.Tensor,
    a_inverse: torch.Tensor,
    b_inverse: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """The op `fp8dist::scaled_grouped_mm_rows`: `torch._scaled_grouped_mm` of tokens and weights
    whose rows are contracted, with fast accumulation. The same bits, and no transpose before it.

    Args:
        a: (M, K), float8, the tokens. b: (E * K, N), float8, the weights, one below the other; K
            and N multiples of 16.
        a_inverse: (M,), float32, 1 / the scales of a's rows. b_inverse: (E,), of weights.
        ends: (E,), int32.

    Returns:
        (M, N), bfloat16; what is in rows of no group is undefined.
    """
    (m, k), n, groups = a.shape, b.size(1), ends.numel()
    out = torch.empty((m, n), dtype=torch.bfloat16, device=a.device)
    if m == 0:
        return out
    b, _, _ = described(b)
    pairs = b.view(torch.int16).view(groups, k // 16, 4, 4, n // 2).transpose(2, 3)
    block = [1, _BK // 16, 4, 4, _HALF_BN // 2]
    programs = multiprocessors(a.device)
    # Not `launch_kernel`, which knows of tensors only.
    rows_kernel.multiply_rows_kernel[(programs,)](
        descriptor(a, [_BM, _BK]),
        TensorDescriptor(
            pairs, list(pairs.shape), list(pairs.stride()), block, layout_of(tuple(block), 2)
        ),
        a_inverse.contiguous(),
        b_inverse.contiguous(),
        ends.contiguous(),
        out,
        m,
        n,
        k,
        groups,
        programs,
        max(32, 1 << (groups - 1).bit_length()),
        num_warps=4,
        sanitize_overflow=False,  # its checks, with TRITON_DEBUG=1, are calls
    )
    return out
