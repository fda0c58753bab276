"""The reference numerics of experts, in plain torch: tokens in groups, weights one below the other.

Like `fp8dist.numerics`, of which this is a part, it is the specification. Nothing here waits for
the device to learn how many tokens an expert has.
"""

from typing import NamedTuple

import torch

from fp8dist import numerics
from fp8dist.config import WHOLE, Block, ScaleFormat
from fp8dist.numerics import Scaled

# [Note: groups]
# The tokens of expert g are the rows of a matrix from ends[g - 1], or 0, to ends[g]; rows from the
# last end on belong to none. A matmul that contracts tokens wants every group to begin at and to
# number a multiple of `numerics.token_multiple`, so there groups are padded with zeros, to
# GROUP_MULTIPLE. How far is known on the device only; room is made for the most it can be. A group
# without tokens becomes one of zeros, whose product is 0 and not whatever was in memory.

GROUP_MULTIPLE = 64
"""Tokens to whose multiple groups are padded. torch's matmuls need 16, or 32 for MXFP8. With 64 all
that a program casts at once, which halves the time of a cast, and all that a step of grad_weight's
matmul multiplies is of one group."""


class ScaledGroups(NamedTuple):
    """x^T of groups of tokens, quantized for a matmul that contracts each group's tokens.

    Args:
        data: (N, `padded_rows`), float8; zeros outside of the groups.
        scale: float32: (groups, N), or, where a scale is for `block` tokens, (N, rows / block).
        ends: (groups,), int32, where the padded groups end.
        block: how many tokens share a scale; WHOLE: those of a group.
        inverse: 1 / scale, where it is there already.
    """

    data: torch.Tensor
    scale: torch.Tensor
    ends: torch.Tensor
    block: int
    inverse: torch.Tensor | None = None


def padded_rows(rows: int, groups: int, multiple: int) -> int:
    """The most rows that groups of together `rows` tokens can be padded to."""
    return rows + -rows % multiple + groups * multiple


def padded_ends(ends: torch.Tensor, multiple: int) -> torch.Tensor:
    """(groups,), int32: where padded groups end; see [Note: groups]."""
    sizes = ends.diff(prepend=ends.new_zeros(1)).clamp(min=1)
    return ((sizes + multiple - 1) // multiple * multiple).cumsum(0, dtype=torch.int32)


def group_of_rows(ends: torch.Tensor, rows: int) -> torch.Tensor:
    """(rows,), int64: the group of each row; the last one's also for the rows after it."""
    row = torch.arange(rows, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, row, right=True).clamp(max=ends.numel() - 1)


def pad_groups(x: torch.Tensor, ends: torch.Tensor, multiple: int) -> torch.Tensor:
    """The groups of x (M, N), each padded with zeros to `multiple`: (`padded_rows`, N)."""
    rows = padded_rows(x.size(0), ends.numel(), multiple)
    if x.size(0) == 0:
        return x.new_zeros(rows, x.size(1))
    new_ends = padded_ends(ends, multiple)
    group = group_of_rows(new_ends, rows)
    first, new_first = (torch.cat([e.new_zeros(1), e[:-1]]) for e in (ends, new_ends))
    source = torch.arange(rows, device=x.device) - new_first[group] + first[group]
    exists = source < ends[group]
    # Not by a product: rows that belong to no group may be NaN.
    return torch.where(exists[:, None], x[source.clamp(max=x.size(0) - 1)], 0)


def unpad_groups(x: torch.Tensor, ends: torch.Tensor, multiple: int, rows: int) -> torch.Tensor:
    """(rows, N): of x as `pad_groups` returns it the rows that it was given. What it returns for
    those of no group is undefined.
    """
    first, new_first = (
        torch.cat([e.new_zeros(1), e[:-1]]) for e in (ends, padded_ends(ends, multiple))
    )
    shift = (new_first - first)[group_of_rows(ends, rows)]
    return x[torch.arange(rows, device=x.device) + shift]


def quantize_groups(
    x: torch.Tensor,
    ends: torch.Tensor,
    block: Block,
    float8_dtype: torch.dtype,
    scale_format: ScaleFormat,
) -> ScaledGroups:
    """x^T for a matmul that contracts the rows of each group by itself.

    Args:
        x: (M, N), high precision.
        ends: (groups,), int32; see [Note: groups].
        block: COLUMN, for a scale per column of each group; or a number of rows of one column.
    """
    padded, new_ends = pad_groups(x, ends, GROUP_MULTIPLE), padded_ends(ends, GROUP_MULTIPLE)
    if block[0] != WHOLE:
        scaled = numerics.quantize(padded, block, float8_dtype, scale_format).t()
        return ScaledGroups(scaled.data, scaled.scale, new_ends, block[0])
    group = group_of_rows(new_ends, padded.size(0))
    amaxes = torch.zeros(ends.numel(), x.size(1), device=x.device)
    of_chunks = numerics.amax(padded, (GROUP_MULTIPLE, 1)).float()  # each within a group
    group_of_chunks = group[::GROUP_MULTIPLE, None].expand_as(of_chunks)
    amaxes.scatter_reduce_(0, group_of_chunks, of_chunks, "amax")
    scale = numerics.amax_to_scale(amaxes, float8_dtype, scale_format)
    data = numerics.cast(padded, scale[group], float8_dtype).t()
    return ScaledGroups(data, scale, new_ends, WHOLE)


def dequantize_groups(x: ScaledGroups) -> torch.Tensor:
    """data / scale in float32, (N, padded rows)."""
    scale = x.scale
    if x.block == WHOLE:
        scale = scale[group_of_rows(x.ends, x.data.size(1))].t()
    return numerics.dequantize(x.data, scale)


# [Note: rows that are contracted]
# A weight that is scaled by rows contributes x[m, a] * w[a, b] / scale[a] to a product that
# contracts its rows. The scale of a row is a factor of all that the row is multiplied by, so x can
# be divided by it as well, before it is cast: as scales are powers of two, that moves exponents.
# Then what arrived is the operand as it is. To scale the weight by columns instead would move the
# exponents of its own elements as far; either is exact but for elements that become subnormal. No
# other scales are needed, so no amaxes of columns, and on Hopper no transpose (`rows_kernel`).
# Where amaxes of rows are more than 2^15 apart, what quiet rows contribute loses precision in all
# columns; scaled by columns it would in those of the loud elements.
# Factors are relative to the largest of their expert, so that tokens become no larger, and tiny
# ones do not come near the amax at which scales end.


class ContractedRows(NamedTuple):
    """The weights of experts for a matmul that contracts their rows.

    Args:
        data: (E * A, B), float8, the weights one below the other.
        factor: (E, A), float32, what tokens (M, A) are multiplied by before they are cast.
        inverse: (E,), float32, what products are multiplied by.
    """

    data: torch.Tensor
    factor: torch.Tensor
    inverse: torch.Tensor


def contracted_rows(x: Scaled, experts: int) -> ContractedRows:
    """x (E * A, B), scaled by rows with powers of two; see [Note: rows that are contracted]."""
    inverse = x.scale.reciprocal() if x.inverse is None else x.inverse
    of_rows = inverse.view(experts, -1)
    largest = of_rows.amax(1)
    return ContractedRows(x.data, of_rows / largest[:, None], largest)


def by_factor(x: torch.Tensor, ends: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x (M, A) times its group's factor (groups, A), in float32."""
    return x.float() * factor[group_of_rows(ends, x.size(0))]


def rescale_each(x: Scaled, rows: int, block: Block, scale_format: ScaleFormat) -> Scaled:
    """`numerics.rescale_transposed`, from what x stands for, of each of the matrices that lie one
    below the other.

    Args:
        x: (E * rows, N), E matrices of `rows` rows.
        block: the blocks of each matrix for the new operand, others than those of x.

    Returns:
        (E * N, rows).
    """
    w = numerics.dequantize(x.data, x.scale)
    w = w.unflatten(0, (-1, rows)).transpose(1, 2).flatten(0, 1)
    return numerics.quantize(w, (block[1], block[0]), x.data.dtype, scale_format)
