"""The Triton kernels for experts, launched. Functions that cast are twins of those in
`fp8dist.grouped_numerics` and give the same bytes.
"""

import functools

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fp8dist.grouped_numerics import GROUP_MULTIPLE, padded_rows
from fp8dist.kernels import grouped_kernels as kernels
from fp8dist.kernels.launch import FLOAT8_EXPONENT, launch_kernel, where_x_is
from fp8dist.kernels.layout import cdiv, contiguous_strides

CHUNK = GROUP_MULTIPLE
# What was fastest on an H200: rows and columns that are taken at once, and warps, of tokens as they
# are and of those that have a factor.
_AMAX_TILES, _CAST_COLUMNS = {False: (8, 1024, 4), True: (8, 256, 2)}, {False: 128, True: 64}


def quantize_groups(
    x: torch.Tensor,
    ends: torch.Tensor,
    rows: bool,
    float8_dtype: torch.dtype,
    factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `fp8dist::quantize_groups`, see `grouped`; x is not empty. One pass for the amaxes and
    one that casts in both orientations.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    (m, n), groups, device = x.shape, ends.numel(), x.device
    m_padded = padded_rows(m, groups, CHUNK)
    chunks = m_padded // CHUNK
    new_ends = torch.empty_like(ends)
    first, end, group = torch.empty((3, chunks), dtype=torch.int32, device=device).unbind()
    launch_kernel(
        kernels.chunks_kernel,
        (cdiv(chunks, 64), 1, 1),
        (ends, new_ends, first, end, group),
        (groups, chunks, m),
        (CHUNK, max(16, 1 << (groups - 1).bit_length()), 64),
        num_warps=4,
        sanitize_overflow=False,  # which `debug`, there for the assertion, would check as well
    )
    amaxes = torch.zeros(m * rows + groups * n, dtype=torch.int32, device=device)
    row_amaxes, column_amaxes = amaxes, amaxes[m * rows :]
    has_factor = factor is not None
    factor = amaxes if factor is None else factor.contiguous()  # some pointer, which is not used
    (bm, bn, warps), cast_columns = _AMAX_TILES[has_factor], _CAST_COLUMNS[has_factor]
    launch_kernel(
        kernels.group_amaxes_kernel,
        (chunks, cdiv(n, bn), 1),
        (x, first, end, group, factor, row_amaxes, column_amaxes),
        (n, x.stride(0)),
        (rows, has_factor, CHUNK, bm, bn),
        num_warps=warps,
    )
    data = torch.empty((m, n) if rows else (0, 0), dtype=float8_dtype, device=device)
    scale = torch.empty((2, m, 1) if rows else (0, 0), dtype=torch.float32, device=device)
    t_data = torch.empty((n, m_padded), dtype=float8_dtype, device=device)
    t_scale = torch.empty((2, groups, n), dtype=torch.float32, device=device)
    launch_kernel(
        kernels.quantize_groups_kernel,
        (chunks, cdiv(n, cast_columns), 1),
        (x, first, end, group, factor, row_amaxes, column_amaxes, data, scale, t_data, t_scale),
        (m, n, m_padded, groups, groups * n, x.stride(0)),
        (FLOAT8_EXPONENT[float8_dtype], "power_of_2", rows, has_factor, CHUNK, cast_columns),
        num_warps=4,
    )
    return data, scale, t_data, t_scale, new_ends


def transpose_each(data: torch.Tensor, rows: int) -> torch.Tensor:
    """The op `fp8dist::transpose_each`: (E * rows, N), float8, to (E * N, rows)."""
    experts, n = data.size(0) // rows, data.size(1)
    out = torch.empty((experts * n, rows), dtype=data.dtype, device=data.device)
    launch_kernel(
        kernels.transpose_each_kernel,
        (cdiv(rows, 128), cdiv(n, 128), experts),
        (data, out),
        (rows, n, data.stride(0)),
        (128, 128),
        num_warps=4,
    )
    return out


@functools.cache
def _all_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many there are, but those that torch's matmuls, too, leave to communication."""
    reserved = torch._C._get_sm_carveout_experimental() or 0
    return max(1, _all_multiprocessors(device) - reserved)


def described(x: torch.Tensor) -> tuple[torch.Tensor, list[int], list[int]]:
    """x as descriptors want it, contiguous and at a multiple of 16 bytes, its shape and strides.
    These are not those that x had: a dimension of 1 may have any.
    """
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    return x, list(x.shape), list(contiguous_strides(tuple(x.shape)))


@where_x_is
def multiply_groups(
    a: torch.Tensor,
    b: torch.Tensor,
    a_inverse: torch.Tensor,
    b_inverse: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """The op `fp8dist::scaled_grouped_mm`: `torch._scaled_grouped_mm` of tokens and weights, with
    fast accumulation. The same bits, in less time where groups differ in size.

    Args:
        a: (M, K), float8, the tokens. b: (E * N, K), float8, the weights, one below the other.
        a_inverse: float32, 1 / the scales of a's rows. b_inverse: of b's.
        ends: (E,), int32.

    Returns:
        (M, N), bfloat16; what is in rows of no group is undefined.
    """
    (m, k), groups = a.shape, ends.numel()
    n = b.size(0) // groups
    out = torch.empty((m, n), dtype=torch.bfloat16, device=a.device)
    if m == 0:
        return out
    # Of small groups a tile of 256 leaves too few tiles for all multiprocessors, which run two
    # programs of 128.
    bn, warps, programs = (128, 4, 2) if m <= 256 * groups else (256, 8, 1)
    programs *= multiprocessors(a.device)
    # Not `launch_kernel`, which knows of tensors only.
    kernels.multiply_groups_kernel[(programs,)](
        TensorDescriptor(*described(a), [128, 128]),
        TensorDescriptor(*described(b), [bn, 128]),
        a_inverse.contiguous(),
        b_inverse.contiguous(),
        ends.contiguous(),
        out,
        m,
        n,
        k,
        groups,
        programs,
        max(16, 1 << (groups - 1).bit_length()),
        128,
        bn,
        128,
        num_warps=warps,
        num_stages=3,
        sanitize_overflow=False,  # its checks, with TRITON_DEBUG=1, are calls
    )
    return out
