"""Twins of `fp8dist.grouped_numerics` that run where the tensor is."""

import torch

from fp8dist import grouped_numerics, kernels
from fp8dist.config import Block, ScaleFormat
from fp8dist.grouped_numerics import ScaledGroups
from fp8dist.numerics import Scaled


def quantize_tokens(
    x: torch.Tensor,
    ends: torch.Tensor,
    block: Block | None,
    transposed_block: Block | None,
    float8_dtype: torch.dtype,
    scale_format: ScaleFormat,
) -> tuple[Scaled | None, ScaledGroups | None]:
    """x (M, K) for a matmul that contracts K, in blocks within a row, and the groups of x^T for one
    that contracts each group's tokens, as they are wanted; see `grouped_numerics.quantize_groups`.
    """
    scaled, _ = kernels.quantize_both(x, block, None, float8_dtype, scale_format)
    groups = None
    if transposed_block is not None:
        groups = grouped_numerics.quantize_groups(
            x, ends, transposed_block, float8_dtype, scale_format
        )
    return scaled, groups


def transpose_each(
    x: Scaled,
    rows: int,
    block: Block,
    new_scale: torch.Tensor | None,
    scale_format: ScaleFormat,
    after: torch.Tensor | None = None,
) -> Scaled:
    """See `grouped_numerics.transpose_each`; for `after`, [Note: only in backward] in `ops`."""
    return grouped_numerics.transpose_each(x, rows, block, new_scale, scale_format)
