"""Twins of `fp8dist.numerics` for GPUs, and the choice between the two."""

from collections.abc import Sequence

import torch

from fp8dist import hardware, numerics
from fp8dist.config import COLUMN, ROW, TENSOR, Block, ScaleFormat
from fp8dist.numerics import Scaled

try:
    from fp8dist.kernels import ops
except ImportError:  # no Triton: a CPU build of torch
    ops = None  # type: ignore[assignment]


def _has_kernels(x: torch.Tensor) -> bool:
    """Triton compiles float8 casts for compute capability 8.9 and newer."""
    return ops is not None and x.is_cuda and hardware.has_float8_casts(x.device)


def quantize_both(
    x: torch.Tensor,
    block: Block | None,
    transposed_block: Block | None,
    float8_dtype: torch.dtype,
    scale_format: ScaleFormat,
) -> tuple[Scaled | None, Scaled | None]:
    """See `numerics.quantize_both`."""
    implementation = ops if _has_kernels(x) else numerics
    if (128, 128) in (block, transposed_block):
        # Only weights have square blocks, and those are cast by the shard (`cast_into`) unless
        # the float8 all-gather is off.
        implementation = numerics
    return implementation.quantize_both(x, block, transposed_block, float8_dtype, scale_format)


def rescale_transposed(
    weight: Scaled, block: Block, new_scale: torch.Tensor | None, scale_format: ScaleFormat
) -> Scaled:
    """See `numerics.rescale_transposed`."""
    implementation = ops if _has_kernels(weight.data) else numerics
    return implementation.rescale_transposed(weight, block, new_scale, scale_format)


def cast_into(out: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> None:
    """See `numerics.cast_into`."""
    implementation = ops if _has_kernels(x) else numerics
    implementation.cast_into(out, x, scale)


def fill_amaxes(
    amaxes: Sequence[torch.Tensor], x: torch.Tensor, blocks: Sequence[Block], start: tuple[int, int]
) -> None:
    """See `numerics.fill_amaxes`."""
    # The kernel writes whole rows of blocks: a shard of some columns is left to numerics, where
    # its columns matter.
    in_kernel = all(
        block in (TENSOR, ROW)
        or (block in (COLUMN, (128, 128)) and part.size(1) * block[1] == x.size(1))
        for part, block in zip(amaxes, blocks, strict=True)
    )
    if _has_kernels(x) and in_kernel:
        ops.fill_amaxes(amaxes, x, blocks, start[0])
    else:
        numerics.fill_amaxes(amaxes, x, blocks, start)
