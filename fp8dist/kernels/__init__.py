"""Twins of `fp8dist.numerics` that run where the tensor is, on a GPU as Triton kernels."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from fp8dist import numerics
from fp8dist.config import COLUMN, ROW, TENSOR, WHOLE, Block, ScaleFormat
from fp8dist.kernels import ops
from fp8dist.kernels.layout import WIDEST_ROWS
from fp8dist.numerics import AmaxPart, CastPart, PackPart, Scaled
from fp8dist.tracing import is_tracing

if ops.launch is not None:
    from fp8dist.kernels import weight_launch


class Watcher(Protocol):
    """Is told of casts and transposes of operands before they are made, see `watched`."""

    def casts(
        self, x: torch.Tensor, block: Block | None, transposed_block: Block | None
    ) -> None: ...

    def transposes(self, weight: Scaled, block: Block, new_scale: torch.Tensor | None) -> None: ...


_watcher: Watcher | None = None


@contextmanager
def watched(by: Watcher) -> Iterator[None]:
    """While it is open, `by` is told, with the arguments, of what is not compiled."""
    global _watcher
    before, _watcher = _watcher, by
    try:
        yield
    finally:
        _watcher = before


def _is_fusible(x: torch.Tensor) -> bool:
    return ops.has_kernels(x) and is_tracing()


def fused_amax(x: torch.Tensor) -> torch.Tensor | None:
    """max(abs(x)), (1, 1), float32, where the compiler finds it while it computes x."""
    return numerics.amax(numerics.amax(x, ROW), TENSOR).float() if _is_fusible(x) else None


def quantize_both(
    x: torch.Tensor,
    block: Block | None,
    transposed_block: Block | None,
    float8_dtype: torch.dtype,
    scale_format: ScaleFormat,
    after: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
) -> tuple[Scaled | None, Scaled | None]:
    """See `numerics.quantize_both`; for `after`, [Note: only in backward] in `ops`.

    Args:
        amax: the known amax, or its bits, (1, 1), float32 or int32, if there is one scale and that
            is for more than x, or x is cast again.
    """
    if _watcher is not None:
        _watcher.casts(x, block, transposed_block)
    if block is None and transposed_block is None:
        return None, None
    one = block is None or transposed_block is None
    # Without kernels and the compiler, which may fail to fuse it, one orientation may be a view.
    as_view = one and not ops.has_kernels(x) and not is_tracing()
    # Only weights have square blocks, and those are cast by the shard (`cast_into`) unless the
    # float8 all-gather is off.
    if as_view or (128, 128) in (block, transposed_block):
        known = None if amax is None else amax.view(torch.float32)
        return numerics.quantize_both(x, block, transposed_block, float8_dtype, scale_format, known)
    # What the compiler does where it computes x saves reading x once more.
    if amax is None and _is_fusible(x) and (block, transposed_block) == (ROW, None):
        return numerics.quantize_both(x, block, None, float8_dtype, scale_format)
    if amax is None and {block, transposed_block} <= {TENSOR, None}:
        amax = fused_amax(x)
    return ops.quantize_both(x, block, transposed_block, float8_dtype, scale_format, amax, after)


def quantize(
    x: torch.Tensor, block: Block, float8_dtype: torch.dtype, scale_format: ScaleFormat
) -> Scaled:
    """See `numerics.quantize`."""
    if _watcher is not None:
        _watcher.casts(x, block, None)
    scaled, _ = ops.quantize_both(x, block, None, float8_dtype, scale_format)
    return numerics.wanted(scaled)


def rescale_transposed(
    weight: Scaled,
    block: Block,
    new_scale: torch.Tensor | None,
    scale_format: ScaleFormat,
    after: torch.Tensor | None = None,
) -> Scaled:
    """See `numerics.rescale_transposed`; for `after`, [Note: only in backward] in `ops`."""
    if _watcher is not None:
        _watcher.transposes(weight, block, new_scale)
    return ops.rescale_transposed(weight, block, new_scale, scale_format, after)


def _in_rows(x: torch.Tensor) -> bool:
    return ops.has_kernels(x) and x.stride(1) == 1


_Part = TypeVar("_Part")


def _divided(
    parts: Sequence[_Part], condition: Callable[[_Part], bool]
) -> tuple[list[_Part], list[_Part]]:
    """Those for which it holds, and the others."""
    divided: tuple[list[_Part], list[_Part]] = [], []
    for part in parts:
        divided[not condition(part)].append(part)
    return divided


class Prepared(NamedTuple):
    """What a function does to parts, as often as it is called, on the stream on which it was made.

    The parts are kept. Between two calls those of their tensors that share a storage may move with
    it, and no others: see [Note: made ready] in `precompute`.
    """

    parts: Sequence[Any]
    calls: Sequence[Callable[[], None]]

    def __call__(self) -> None:
        for call in self.calls:
            call()


def prepare_fill_amaxes(parts: Sequence[AmaxPart]) -> Prepared:
    """Of `numerics.fill_amaxes`."""

    def in_kernel(part: AmaxPart) -> bool:
        # The kernel writes whole rows of blocks: a shard of some columns is left to numerics,
        # where its columns matter.
        narrow = part.out is None or part.x.size(1) <= WIDEST_ROWS
        return (
            narrow
            and _in_rows(part.x)
            and all(
                block in (TENSOR, ROW)
                or (block in (COLUMN, (128, 128)) and amaxes.size(1) * block[1] == part.x.size(1))
                for block, amaxes in zip(part.blocks, part.amaxes, strict=True)
            )
        )

    for_kernel, others = _divided(parts, in_kernel)
    calls: list[Callable[[], None]] = []
    if for_kernel:
        cast = [(part, part.out) for part in for_kernel if part.out is not None]
        calls += weight_launch.fill_amaxes([part for part in for_kernel if part.out is None])
        calls += weight_launch.cast_rows(cast)
    return Prepared(parts, [*calls, functools.partial(numerics.fill_amaxes, others)])


def prepare_cast_into(parts: Sequence[CastPart]) -> Prepared:
    """Of `numerics.cast_into`."""

    def in_kernel(part: CastPart) -> bool:
        # Where a shard of columns begins within a block, the kernel's tiles are not its blocks.
        side = part.block[1]
        at_block = side == WHOLE or part.start[1] % side == part.x.size(1) % side == 0
        return _in_rows(part.x) and at_block

    for_kernel, others = _divided(parts, in_kernel)
    calls = list(weight_launch.cast_into(for_kernel)) if for_kernel else []
    return Prepared(parts, [*calls, functools.partial(numerics.cast_into, others)])


def prepare_pack_into(parts: Sequence[PackPart]) -> Prepared:
    """Of `numerics.pack_into`."""
    for_kernel, others = _divided(parts, lambda part: _in_rows(part.x))
    calls = list(weight_launch.pack_into(for_kernel)) if for_kernel else []
    return Prepared(parts, [*calls, functools.partial(numerics.pack_into, others)])
