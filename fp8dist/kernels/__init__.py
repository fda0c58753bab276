"""Twins of `fp8dist.numerics` for GPUs, and the choice between the two."""

from collections.abc import Sequence

import torch

from fp8dist import hardware, numerics
from fp8dist.config import COLUMN, ROW, TENSOR, WHOLE, Block, ScaleFormat
from fp8dist.numerics import AmaxPart, CastPart, Scaled

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
    after: torch.Tensor | None = None,
) -> tuple[Scaled | None, Scaled | None]:
    """See `numerics.quantize_both`; for `after`, [Note: only in backward] in `ops`."""
    # Only weights have square blocks, and those are cast by the shard (`cast_into`) unless the
    # float8 all-gather is off.
    if _has_kernels(x) and (128, 128) not in (block, transposed_block):
        return ops.quantize_both(x, block, transposed_block, float8_dtype, scale_format, after)
    return numerics.quantize_both(x, block, transposed_block, float8_dtype, scale_format)


def rescale_transposed(
    weight: Scaled,
    block: Block,
    new_scale: torch.Tensor | None,
    scale_format: ScaleFormat,
    after: torch.Tensor | None = None,
) -> Scaled:
    """See `numerics.rescale_transposed`; for `after`, [Note: only in backward] in `ops`."""
    if _has_kernels(weight.data):
        return ops.rescale_transposed(weight, block, new_scale, scale_format, after)
    return numerics.rescale_transposed(weight, block, new_scale, scale_format)


def fill_amaxes(parts: Sequence[AmaxPart]) -> None:
    """See `numerics.fill_amaxes`."""

    def in_kernel(part: AmaxPart) -> bool:
        # The kernel writes whole rows of blocks: a shard of some columns is left to numerics,
        # where its columns matter.
        return _has_kernels(part.x) and all(
            block in (TENSOR, ROW)
            or (block in (COLUMN, (128, 128)) and amaxes.size(1) * block[1] == part.x.size(1))
            for block, amaxes in zip(part.blocks, part.amaxes, strict=True)
        )

    if for_kernel := [part for part in parts if in_kernel(part)]:
        ops.fill_amaxes(for_kernel)
    numerics.fill_amaxes([part for part in parts if not in_kernel(part)])


def cast_into(parts: Sequence[CastPart]) -> None:
    """See `numerics.cast_into`."""

    def in_kernel(part: CastPart) -> bool:
        # Where a shard of columns begins within a block, the kernel's tiles are not its blocks.
        side = part.block[1]
        at_block = side == WHOLE or part.start[1] % side == part.x.size(1) % side == 0
        return _has_kernels(part.x) and at_block

    if for_kernel := [part for part in parts if in_kernel(part)]:
        ops.cast_into(for_kernel)
    numerics.cast_into([part for part in parts if not in_kernel(part)])
