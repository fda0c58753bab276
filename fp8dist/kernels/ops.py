"""The Triton kernels, launched: each function is the twin of one in `fp8dist.numerics` and gives
the same bytes.

Casts of activations and transposes are torch ops, opaque to the compiler, which merges equal ones:
layers that share an input share its cast. They are defined in a `torch.library.Library`, as
`custom_op` costs the CPU a third more time per call.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch.library import Library, register_fake

from fp8dist.config import COLUMN, ROW, TENSOR, Block, ScaleFormat
from fp8dist.kernels import triton_kernels as kernels
from fp8dist.numerics import AmaxPart, CastPart, Scaled, token_multiple

_KINDS = {TENSOR: "tensor", ROW: "row", COLUMN: "column"}
# The largest number of each is 1.75 times 2 to this power.
_FLOAT8_EXPONENT = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}
# What was fastest on an H200: rows and columns of a tile, how many tiles, one below the other, a
# program takes, and its warps. Amaxes of columns pay for few and tall programs.
_AMAX_TILE, _COLUMN_AMAX_TILE = (32, 256, 2, 8), (32, 256, 4, 4)
_WEIGHT_AMAX_TILE = (8, 1024, 16, 8)

_library = Library("fp8dist", "FRAGMENT")


def _kind(block: Block | None) -> str:
    """The kernels' name for a block; see `triton_kernels`."""
    return "none" if block is None else _KINDS.get(block, "own")


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


# [Note: only in backward]
# The compiler moves what backward computes from the weight alone into forward, and keeps the
# result. FSDP2 frees a weight between forward and backward, but it could not free that. An
# argument `after`, which is not used, ties such an op to a gradient, and so to backward.

_library.define(
    "quantize(Tensor x, int[2]? block, int[2]? transposed_block, ScalarType float8_dtype, "
    "str scale_format, Tensor? x_inverse, Tensor? new_scale, Tensor? after) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("transpose(Tensor x, Tensor? after) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _quantize(
    x: torch.Tensor,
    block: Sequence[int] | None,
    transposed_block: Sequence[int] | None,
    float8_dtype: torch.dtype,
    scale_format: str,
    x_inverse: torch.Tensor | None,
    new_scale: torch.Tensor | None,
    after: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `quantize_both` and `rescale_transposed`; what is not wanted comes back empty."""
    if x.stride(1) != 1:
        x = x.contiguous()
    a = None if block is None else (block[0], block[1])
    b = None if transposed_block is None else (transposed_block[0], transposed_block[1])
    given = new_scale is not None
    m, n = x.shape
    sizes, m_padded, amaxes = _sizes(m, n, a, b, scale_format, given)
    device = x.device
    data = torch.empty(sizes[0], dtype=float8_dtype, device=device)
    scale = torch.empty(sizes[1], dtype=torch.float32, device=device)
    t_data = torch.empty(sizes[2], dtype=float8_dtype, device=device)
    t_scale = torch.empty(sizes[3], dtype=torch.float32, device=device)
    if m == 0 or n == 0:
        return data, scale, t_data, t_scale
    kind, t_kind = _kind(a), _kind(b)
    x_stride = x.stride(0)
    amax = x if new_scale is None else new_scale  # x: not read
    if amaxes > 0:
        amax = torch.zeros(amaxes, dtype=torch.int32, device=device)
        bm, bn, steps, warps = _COLUMN_AMAX_TILE if t_kind == "column" else _AMAX_TILE
        kernels.amax_kernel[_cdiv(m, bm * steps), _cdiv(n, bn)](
            x,
            amax,
            m,
            n,
            x_stride,
            WANT_ROW=kind == "row",
            WANT_COLUMN=t_kind == "column",
            WANT_TENSOR=kind == "tensor" or t_kind == "tensor",
            BM=bm,
            BN=bn,
            STEPS=steps,
            num_warps=warps,
        )
    kernels.quantize_kernel[_cdiv(m_padded, 128), _cdiv(n, 128)](
        x,
        x if x_inverse is None else x_inverse,
        amax,
        data,
        scale,
        t_data,
        t_scale,
        m,
        n,
        m_padded,
        x_stride,
        FLOAT8_EXPONENT=_FLOAT8_EXPONENT[float8_dtype],
        FORMAT=scale_format,
        X_INVERSE="none" if x_inverse is None else "row" if x_inverse.size(1) == 1 else "own",
        KIND=kind,
        BLOCK=a[1] if a is not None and kind == "own" else 1,
        T_KIND=t_kind,
        T_BLOCK=b[0] if b is not None and t_kind == "own" else 1,
        T_GIVEN=given,
        BM=128,
        BN=128,
        num_warps=4 if given else 8,
    )
    return data, scale, t_data, t_scale


_Sizes = tuple[tuple[int, ...], ...]


def _sizes_of(
    m: int, n: int, a: Block | None, b: Block | None, scale_format: str, given: bool
) -> tuple[_Sizes, int, int]:
    """The sizes of what `_quantize` returns, m padded, and how many amaxes it needs.

    Scales come as (2, ...), see [Note: reciprocals]; e8m0 as (1, ...).
    """
    sizes: list[tuple[int, ...]] = [(0, 0)] * 4
    copies = 1 if scale_format == "e8m0" else 2
    m_padded = m
    if a is not None:
        sizes[0] = (m, n)
        of_kind = {"tensor": (1, 1), "row": (m, 1)}
        sizes[1] = (copies, *(of_kind.get(_kind(a)) or (n // a[1], m)))
    if b is not None:
        m_padded = m + -m % token_multiple(b)
        sizes[2] = (n, m_padded)
        if not given:
            of_kind = {"tensor": (1, 1), "column": (n, 1)}
            sizes[3] = (copies, *(of_kind.get(_kind(b)) or (m_padded // b[0], n)))
    amaxes = 0
    if not given:
        amaxes = m * (_kind(a) == "row") + n * (_kind(b) == "column")
        amaxes += "tensor" in (_kind(a), _kind(b))
    return tuple(sizes), m_padded, amaxes


_sizes = functools.lru_cache(maxsize=1024)(_sizes_of)


def _fake_quantize(
    x: torch.Tensor,
    block: Sequence[int] | None,
    transposed_block: Sequence[int] | None,
    float8_dtype: torch.dtype,
    scale_format: str,
    x_inverse: torch.Tensor | None,
    new_scale: torch.Tensor | None,
    after: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    a = None if block is None else (block[0], block[1])
    b = None if transposed_block is None else (transposed_block[0], transposed_block[1])
    sizes, _, _ = _sizes_of(x.size(0), x.size(1), a, b, scale_format, new_scale is not None)
    dtypes = (float8_dtype, torch.float32, float8_dtype, torch.float32)
    return tuple(
        torch.empty(size, dtype=dtype, device=x.device)
        for size, dtype in zip(sizes, dtypes, strict=True)
    )


def _transpose(x: torch.Tensor, after: torch.Tensor | None) -> torch.Tensor:
    """(M, N) bytes, copied as (N, M)."""
    m, n = x.shape
    out = torch.empty((n, m), dtype=x.dtype, device=x.device)
    kernels.transpose_kernel[_cdiv(m, 128), _cdiv(n, 128)](
        x, out, m, n, x.stride(0), m, BM=128, BN=128, num_warps=8
    )
    return out


def _fake_transpose(x: torch.Tensor, after: torch.Tensor | None) -> torch.Tensor:
    return torch.empty((x.size(1), x.size(0)), dtype=x.dtype, device=x.device)


_library.impl("quantize", _quantize, "CUDA")
_library.impl("transpose", _transpose, "CUDA")
register_fake("fp8dist::quantize", _fake_quantize, lib=_library)
register_fake("fp8dist::transpose", _fake_transpose, lib=_library)


def quantize_both(
    x: torch.Tensor,
    block: Block | None,
    transposed_block: Block | None,
    float8_dtype: torch.dtype,
    scale_format: ScaleFormat,
    after: torch.Tensor | None = None,
) -> tuple[Scaled | None, Scaled | None]:
    """Twin of `numerics.quantize_both`: one pass for the amaxes, where the blocks are not within
    a tile, and one that casts in both orientations.

    Args:
        after: see [Note: only in backward].
    """
    data, scale, t_data, t_scale = torch.ops.fp8dist.quantize.default(
        x, block, transposed_block, float8_dtype, scale_format, None, None, after
    )
    scaled = transposed = None
    if block is not None:
        scaled = _scaled(data, scale, block, _kind(block) == "own")
    if transposed_block is not None:
        flipped = (transposed_block[1], transposed_block[0])
        transposed = _scaled(t_data, t_scale, flipped, _kind(transposed_block) == "own")
    return scaled, transposed


def _scaled(data: torch.Tensor, scales: torch.Tensor, block: Block, by_column: bool) -> Scaled:
    """What a kernel has written: scales (copies, ...), column by column or as they lie."""
    *inverse, scale = (part.t() if by_column else part for part in scales.unbind())
    return Scaled(data, scale, block, *inverse)


def rescale_transposed(
    weight: Scaled,
    block: Block,
    new_scale: torch.Tensor | None,
    scale_format: ScaleFormat,
    after: torch.Tensor | None = None,
) -> Scaled:
    """Twin of `numerics.rescale_transposed`: one pass.

    Args:
        after: see [Note: only in backward].
    """
    flipped = (block[1], block[0])
    if block == weight.block:
        data = torch.ops.fp8dist.transpose.default(weight.data.view(torch.uint8), after)
        return weight.t()._replace(data=data.view(weight.data.dtype))
    _, _, data, scales = torch.ops.fp8dist.quantize.default(
        weight.data,
        None,
        block,
        weight.data.dtype,
        scale_format,
        weight.scale.reciprocal() if weight.inverse is None else weight.inverse,
        new_scale,
        after,
    )
    if new_scale is None:
        return _scaled(data, scales, flipped, by_column=True)
    return Scaled(data, new_scale.t(), flipped)


def fill_amaxes(parts: Sequence[AmaxPart]) -> None:
    """Twin of `numerics.fill_amaxes`: one launch for all parts alike in dtype and blocks."""
    for alike in _alike(parts, lambda part: (part.x.dtype, tuple(part.blocks))):
        x_base, out_base = alike[0].x, alike[0].amaxes[0]
        entries = []
        for x, (row_start, _), blocks, amaxes in alike:
            places = {
                block: _place(amax, out_base) for block, amax in zip(blocks, amaxes, strict=True)
            }
            entry = (*x.shape, x.stride(0), row_start, _place(x, x_base))
            places_of = (places.get(block, 0) for block in (ROW, COLUMN, (128, 128), TENSOR))
            entries.append((*entry, *places_of))
        bm, bn, steps, warps = _WEIGHT_AMAX_TILE
        table, matrices = _table(tuple(entries), bm * steps, bn, x_base.device)
        blocks = alike[0].blocks
        kernels.fill_amaxes_kernel[(matrices.size(0),)](
            x_base,
            out_base.view(torch.int32),
            table,
            matrices,
            ALIGNED=all(e[1] % 16 == e[2] % 16 == e[4] % 16 == 0 for e in entries),
            WANT_ROW=ROW in blocks,
            WANT_COLUMN=COLUMN in blocks,
            WANT_TENSOR=TENSOR in blocks,
            WANT_BLOCK=(128, 128) in blocks,
            BM=bm,
            BN=bn,
            STEPS=steps,
            num_warps=warps,
        )


def cast_into(parts: Sequence[CastPart]) -> None:
    """Twin of `numerics.cast_into`: one launch for all parts alike in dtype and block."""
    for alike in _alike(parts, lambda part: (part.x.dtype, part.out.dtype, part.block)):
        x_base, scale_base, out_base = alike[0].x, alike[0].scale, alike[0].out
        block = alike[0].block
        kind = _KINDS.get(block, "block")
        bm, bn = 64, 256 if kind != "block" else block[1]
        entries = []
        for x, (row_start, column_start), _, scale, out in alike:
            scale_at = _place(scale, scale_base)
            if kind == "block":
                scale_at += column_start // block[1]
            entry = (*x.shape, x.stride(0), row_start, _place(x, x_base), scale_at)
            entries.append((*entry, scale.stride(0), _place(out, out_base), out.stride(0)))
        table, matrices = _table(tuple(entries), bm, bn, x_base.device)
        kernels.cast_kernel[(matrices.size(0),)](
            x_base,
            scale_base,
            out_base,
            table,
            matrices,
            ALIGNED=all(
                e[1] % 16 == e[2] % 16 == e[4] % 16 == e[7] % 16 == e[8] % 16 == 0 for e in entries
            ),
            KIND=kind,
            BLOCK_ROWS=block[0] if kind == "block" else 1,
            BM=bm,
            BN=bn,
            num_warps=8,
        )


_Part = TypeVar("_Part")


def _alike(parts: Sequence[_Part], key: Callable[[_Part], Any]) -> Iterable[list[_Part]]:
    groups: dict[Any, list[_Part]] = {}
    for part in parts:
        groups.setdefault(key(part), []).append(part)
    return groups.values()


def _place(x: torch.Tensor, base: torch.Tensor) -> int:
    """Where x begins, in elements from where base does."""
    return (x.data_ptr() - base.data_ptr()) // x.element_size()


@functools.lru_cache(maxsize=256)
def _table(
    entries: tuple[tuple[int, ...], ...], bm: int, bn: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The table of [Note: many matrices in one launch] in `triton_kernels`, and `matrix_ptr`.

    Places and sizes stay the same from step to step, so that it is made once.

    Args:
        entries: per matrix: M, N, stride, the row at which it starts, and places.
        bm, bn: what a program takes.
    """
    tiles = [_cdiv(entry[0], bm) * _cdiv(entry[1], bn) for entry in entries]
    rows, first = [], 0
    for entry, count in zip(entries, tiles, strict=True):
        rows.append((*entry[:4], first, *entry[4:]))
        first += count
    matrices = torch.repeat_interleave(torch.tensor(tiles)).int()
    table = torch.tensor(rows).pin_memory().to(device, non_blocking=True)
    return table, matrices.pin_memory().to(device, non_blocking=True)
