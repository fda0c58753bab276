"""The Triton kernels as torch ops, so that eager code and the compiler call the same.

Each op is the twin of a function in `fp8dist.numerics` and gives the same bytes. The ops are opaque
to the compiler and not `triton_op`s: as those, together with another way of sharing casts (commit
09c350e), a compiled rowwise step ended in an illegal memory access on torch 2.11. The cause is not
known, so it may lie elsewhere.
"""

from collections.abc import Sequence

import torch
import triton
from torch.library import custom_op

from fp8dist.config import COLUMN, ROW, TENSOR, Block, ScaleFormat
from fp8dist.kernels import triton_kernels as kernels
from fp8dist.numerics import Scaled, token_multiple

_KINDS = {TENSOR: 1, ROW: 2, COLUMN: 3}
_NONE, _OWN = 0, 4


def _kind(block: Block | None) -> int:
    """The kernels' name for a block; see `triton_kernels`."""
    return _NONE if block is None else _KINDS.get(block, _OWN)


def _grid(m: int, n: int, bm: int, bn: int) -> tuple[int, int]:
    return triton.cdiv(m, bm), triton.cdiv(n, bn)


def _launch_amax(x: torch.Tensor, buffers: dict[int, torch.Tensor], row_start: int = 0) -> None:
    """Raise the amaxes in `buffers` (int32 bits, by kind) to those of x."""
    (m, n), bm, bn = x.shape, 64, 128
    unused = next(iter(buffers.values()))
    kernels.amax_kernel[_grid(m, n, bm, bn)](
        x,
        buffers.get(1, unused),
        buffers.get(2, unused),
        buffers.get(3, unused),
        buffers.get(_OWN, unused),
        m,
        n,
        x.stride(0),
        row_start,
        WANT_TENSOR=1 in buffers,
        WANT_ROW=2 in buffers,
        WANT_COLUMN=3 in buffers,
        WANT_BLOCK=_OWN in buffers,
        BM=bm,
        BN=bn,
        num_warps=8,
    )


def _amax_bits(x: torch.Tensor, kinds: set[int]) -> dict[int, torch.Tensor]:
    """The amaxes of x by kind, as the bits of float32 numbers."""
    sizes = {kind: {1: 1, 2: x.size(0), 3: x.size(1)}[kind] for kind in sorted(kinds)}
    bits = torch.zeros(sum(sizes.values()), dtype=torch.int32, device=x.device)
    buffers = dict(zip(sizes, bits.split(list(sizes.values())), strict=True))
    if x.numel() > 0 and buffers:
        _launch_amax(x, buffers)
    return buffers


def fill_amaxes(
    amaxes: Sequence[torch.Tensor], x: torch.Tensor, blocks: Sequence[Block], row_start: int
) -> None:
    """Twin of `numerics.fill_amaxes` for all blocks of a shard at once: one pass."""
    buffers = {}
    for part, block in zip(amaxes, blocks, strict=True):
        bits = part.view(torch.int32)
        buffers[_kind(block)] = bits[row_start:] if block == ROW else bits
    _launch_amax(x, buffers, row_start)


def _as_block(block: list[int] | None) -> Block | None:
    return None if block is None else (block[0], block[1])


@custom_op("fp8dist::quantize", mutates_args=())
def _quantize(
    x: torch.Tensor,
    block: list[int] | None,
    transposed_block: list[int] | None,
    float8_dtype: torch.dtype,
    scale_format: str,
    x_scale: torch.Tensor | None,
    new_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `quantize_both` and `rescale_transposed`; what is not wanted comes back empty."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (m, n), bm, bn = x.shape, 128, 128
    a, b = _as_block(block), _as_block(transposed_block)
    kind, t_kind = _kind(a), _kind(b)
    data, scale, t_data, t_scale = _quantize_outputs(x, a, b, float8_dtype, new_scale is not None)
    if x.numel() == 0:
        return data, scale, t_data, t_scale
    m_padded = t_data.size(1) if b is not None else m
    unused = x
    wanted = {k for k in (kind, t_kind) if k not in (_NONE, _OWN)}
    amaxes = _amax_bits(x, wanted) if new_scale is None else {}
    kernels.quantize_kernel[_grid(m_padded, n, bm, bn)](
        x,
        unused if x_scale is None else x_scale,
        amaxes.get(kind, unused),
        data,
        scale,
        amaxes.get(t_kind, unused) if new_scale is None else new_scale,
        t_data,
        t_scale,
        m,
        n,
        m_padded,
        x.stride(0),
        n,
        FLOAT8_MAX=torch.finfo(float8_dtype).max,
        FORMAT=scale_format,
        X_SCALE=_NONE if x_scale is None else (2 if x_scale.size(1) == 1 else _OWN),
        KIND=kind,
        BLOCK=a[1] if a is not None and kind == _OWN else 1,
        T_KIND=t_kind,
        T_BLOCK=b[0] if b is not None and t_kind == _OWN else 1,
        T_GIVEN=new_scale is not None,
        BM=bm,
        BN=bn,
        num_warps=8,
    )
    return data, scale, t_data, t_scale


def _quantize_outputs(
    x: torch.Tensor, a: Block | None, b: Block | None, dtype: torch.dtype, given: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    m, n = x.shape
    sizes: list[tuple[int, int]] = [(0, 0)] * 4
    if a is not None:
        sizes[0] = (m, n)
        sizes[1] = {1: (1, 1), 2: (m, 1), _OWN: (n // a[1], m)}[_kind(a)]
    if b is not None:
        m_padded = m + -m % token_multiple(b)
        sizes[2] = (n, m_padded)
        if not given:
            sizes[3] = {1: (1, 1), 3: (n, 1), _OWN: (m_padded // b[0], n)}[_kind(b)]
    data, scale, t_data, t_scale = (
        torch.empty(size, dtype=kind, device=x.device)
        for size, kind in zip(sizes, (dtype, torch.float32, dtype, torch.float32), strict=True)
    )
    return data, scale, t_data, t_scale


@_quantize.register_fake
def _(
    x: torch.Tensor,
    block: list[int] | None,
    transposed_block: list[int] | None,
    float8_dtype: torch.dtype,
    scale_format: str,
    x_scale: torch.Tensor | None,
    new_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    a, b = _as_block(block), _as_block(transposed_block)
    return _quantize_outputs(x, a, b, float8_dtype, new_scale is not None)


@custom_op("fp8dist::transpose", mutates_args=())
def _transpose(x: torch.Tensor) -> torch.Tensor:
    """(M, N) bytes, copied as (N, M)."""
    (m, n), bm, bn = x.shape, 128, 128
    out = torch.empty((n, m), dtype=x.dtype, device=x.device)
    kernels.transpose_kernel[_grid(m, n, bm, bn)](
        x, out, m, n, x.stride(0), m, BM=bm, BN=bn, num_warps=8
    )
    return out


@_transpose.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty((x.size(1), x.size(0)), dtype=x.dtype, device=x.device)


def quantize_both(
    x: torch.Tensor,
    block: Block | None,
    transposed_block: Block | None,
    float8_dtype: torch.dtype,
    scale_format: ScaleFormat,
) -> tuple[Scaled | None, Scaled | None]:
    """Twin of `numerics.quantize_both`: one pass for the amaxes, where the blocks are not within
    a tile, and one that casts in both orientations.
    """
    data, scale, t_data, t_scale = _quantize(
        x,
        None if block is None else list(block),
        None if transposed_block is None else list(transposed_block),
        float8_dtype,
        scale_format,
        None,
        None,
    )
    scaled = transposed = None
    if block is not None:
        scaled = Scaled(data, scale.t() if _kind(block) == _OWN else scale, block)
    if transposed_block is not None:
        flipped = (transposed_block[1], transposed_block[0])
        own = _kind(transposed_block) == _OWN
        transposed = Scaled(t_data, t_scale.t() if own else t_scale, flipped)
    return scaled, transposed


def rescale_transposed(
    weight: Scaled,
    block: Block,
    new_scale: torch.Tensor | None,
    scale_format: ScaleFormat,
) -> Scaled:
    """Twin of `numerics.rescale_transposed`: one pass."""
    flipped = (block[1], block[0])
    if block == weight.block:
        data = _transpose(weight.data.view(torch.uint8)).view(weight.data.dtype)
        return Scaled(data, weight.scale.t(), flipped)
    _, _, data, scale = _quantize(
        weight.data,
        None,
        list(block),
        weight.data.dtype,
        scale_format,
        weight.scale.contiguous(),
        new_scale,
    )
    if new_scale is None:
        return Scaled(data, scale.t(), flipped)
    return Scaled(data, new_scale.t(), flipped)


def cast_into(out: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> None:
    """Twin of `numerics.cast_into`: one pass."""
    (m, n), bm = x.shape, 64
    if scale.size(0) not in (1, m) or n % scale.size(1):
        raise AssertionError(f"scales {tuple(scale.shape)} do not match rows of {tuple(x.shape)}")
    if scale.numel() == 1:
        kind, bn = _KINDS[TENSOR], 256
    elif scale.size(1) == 1:
        kind, bn = _KINDS[ROW], 256
    else:
        kind, bn = _OWN, n // scale.size(1)
    kernels.cast_kernel[_grid(m, n, bm, bn)](
        x,
        scale,
        out,
        m,
        n,
        x.stride(0),
        out.stride(0),
        scale.size(1),
        KIND=kind,
        BM=bm,
        BN=bn,
        num_warps=8,
    )
