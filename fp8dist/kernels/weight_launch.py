"""The Triton kernels for weights, ready to be launched: what each function gives does what its twin
in `fp8dist.numerics` does, and gives the same bytes.
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from fp8dist.config import COLUMN, ROW, TENSOR, Block
from fp8dist.kernels import weight_kernels as kernels
from fp8dist.kernels.launch import ENOUGH_PROGRAMS, FLOAT8_EXPONENT, launch_kernel
from fp8dist.kernels.layout import cdiv
from fp8dist.numerics import AmaxPart, CastPart, PackPart

# What was fastest on an H200: rows and columns of a tile, and its warps.
_WEIGHT_AMAX_TILE = (8, 256, 2)  # twice the rows of 2-byte elements
# So many are one below the other, the most that leave the GPU enough programs; 16 of 2 bytes only.
_STEPS = (16, 8, 4, 2, 1)
_AMAX_STAGES = 4  # so many of them are on their way at once
_PACK_TILE = (16, 512, 4)

_ELEMENTS_AT_ONCE = 16384  # for which a multiprocessor has the registers
_MULTIPROCESSORS = 128  # about as many as there are

# See `kernels.Prepared`. The table of [Note: many matrices in one launch] is made on the stream and
# holds where tensors are from those of the first part.
Launch = Callable[[], None]


def _rows_tile(bn: int, size: int) -> tuple[int, int, int]:
    """Rows of a tile of whole rows, of `bn` columns of `size` bytes each, its warps, and how many
    are on their way at once. They stay in registers, with the amaxes of columns.

    A warp that has all of a row finds its amax without the others. Of float32 loading rows ahead
    was slower.
    """
    stages = 4 if size == 2 else 1
    if bn <= 512:
        return 2048 // bn, 1, stages
    return max(1, 16384 // (bn * size)), 4 if bn <= 4096 else 8, stages


def _entry(part: AmaxPart, base: AmaxPart, blocks: Sequence[Block]) -> tuple[int, ...]:
    """What a table of [Note: many matrices in one launch] has of a part and its amaxes of blocks,
    places from where those of `base` begin.
    """
    x, (row_start, _), own, amaxes, *_ = part
    places = dict.fromkeys(blocks, 0)
    for block, amax in zip(own, amaxes, strict=True):
        places[block] = _place(amax, base.amaxes[0])
    return *x.shape, x.stride(0), row_start, _place(x, base.x), *places.values()


def fill_amaxes(parts: Sequence[AmaxPart]) -> Iterator[Launch]:
    """Twin of `numerics.fill_amaxes` for parts that are not to be cast: one launch for all that are
    alike in dtype and blocks.
    """
    for alike in _alike(parts, lambda part: (part.x.device, part.x.dtype, tuple(part.blocks))):
        x_base, out_base = alike[0].x, alike[0].amaxes[0]
        entries = [_entry(part, alike[0], (ROW, COLUMN, (128, 128), TENSOR)) for part in alike]
        bm, bn, warps = _WEIGHT_AMAX_TILE
        blocks, size = alike[0].blocks, x_base.element_size()
        bm = bm * 4 // size
        heights = tuple(bm * steps for steps in _STEPS[0 if size == 2 else 1 :])
        if (128, 128) in blocks:  # of which a height is a part
            heights = tuple(height for height in heights if height <= 128)
        stream = _stream(x_base)
        table, matrices, height = _table(tuple(entries), heights, bn, stream, ENOUGH_PROGRAMS)
        yield functools.partial(
            launch_kernel,
            kernels.fill_amaxes_kernel,
            (matrices.size(0), 1, 1),
            (x_base, out_base.view(torch.int32), table, matrices),
            (),
            (
                all(e[1] % 16 == e[2] % 16 == e[4] % 16 == 0 for e in entries),
                *(block in blocks for block in (ROW, COLUMN, TENSOR, (128, 128))),
                all(entry[3] % height == 0 for entry in entries),
                bm,
                bn,
                height // bm,
                _AMAX_STAGES,
            ),
            num_warps=warps,
        )


def cast_rows(parts: Sequence[tuple[AmaxPart, torch.Tensor]]) -> Iterator[Launch]:
    """Twin of `numerics.fill_amaxes` for parts, beside them their `out`, of at most `WIDEST_ROWS`
    columns: one launch for all that are alike in dtype and blocks, and as wide up to a factor of 2.
    """

    def key(pair: tuple[AmaxPart, torch.Tensor]) -> Hashable:
        part, out = pair
        alike = (part.x.device, part.x.dtype, tuple(part.blocks), out.dtype, part.scale_format)
        return *alike, (part.x.size(1) - 1).bit_length()

    for alike in _alike(parts, key):
        base, out_base = alike[0]
        entries = tuple(
            (*_entry(part, base, (ROW, COLUMN, TENSOR)), _place(out, out_base), out.stride(0))
            for part, out in alike
        )
        bn = 1 << (base.x.size(1) - 1).bit_length()
        size = base.x.element_size()
        bm, warps, stages = _rows_tile(bn, size)
        heights = tuple(max(bm, rows) for rows in (64, 32, 16, 8, 4))
        enough = ENOUGH_PROGRAMS
        if COLUMN in base.blocks:
            # As many as run at once: more, of fewer rows, raise amaxes of columns more often.
            enough = _MULTIPROCESSORS * max(1, _ELEMENTS_AT_ONCE // (bm * bn))
        table, matrices, height = _table(entries, heights, bn, _stream(base.x), enough)
        yield functools.partial(
            launch_kernel,
            kernels.cast_rows_kernel,
            (matrices.size(0), 1, 1),
            (base.x, base.amaxes[0].view(torch.int32), out_base, table, matrices),
            (),
            (
                all(e[i] % 16 == 0 for e in entries for i in (1, 2, 4, 8, 9)),
                *(block in base.blocks for block in (COLUMN, TENSOR)),
                FLOAT8_EXPONENT[out_base.dtype],
                base.scale_format,
                bm,
                bn,
                height // bm,
                stages,
            ),
            num_warps=warps,
        )


def cast_into(parts: Sequence[CastPart]) -> Iterator[Launch]:
    """Twin of `numerics.cast_into`: one launch for all parts alike in dtype and block."""
    for alike in _alike(
        parts, lambda part: (part.x.device, part.x.dtype, part.out.dtype, part.block)
    ):
        x_base, scale_base, out_base = alike[0].x, alike[0].scale, alike[0].out
        block = alike[0].block
        kind = {TENSOR: "tensor", ROW: "row"}.get(block, "block")
        bm, bn = 64, 256 if kind != "block" else block[1]
        entries = []
        for x, (row_start, column_start), _, scale, out in alike:
            scale_at = _place(scale, scale_base)
            if kind == "block":
                scale_at += column_start // block[1]
            entry = (*x.shape, x.stride(0), row_start, _place(x, x_base), scale_at)
            entries.append((*entry, scale.stride(0), _place(out, out_base), out.stride(0)))
        table, matrices, _ = _table(tuple(entries), (bm,), bn, _stream(x_base), 1)
        aligned = all(
            e[1] % 16 == e[2] % 16 == e[4] % 16 == e[7] % 16 == e[8] % 16 == 0 for e in entries
        )
        yield functools.partial(
            launch_kernel,
            kernels.cast_kernel,
            (matrices.size(0), 1, 1),
            (x_base, scale_base, out_base, table, matrices),
            (),
            (aligned, kind, block[0] if kind == "block" else 1, bm, bn),
            num_warps=8,
        )


def pack_into(parts: Sequence[PackPart]) -> Iterator[Launch]:
    """Twin of `numerics.pack_into`: one launch for all parts alike in dtype and block."""
    for alike in _alike(
        parts, lambda part: (part.x.device, part.x.dtype, part.float8_dtype, part.block)
    ):
        x_base, block, float8_dtype, out_base, not_finite_base = alike[0]
        bm, bn, warps = _PACK_TILE
        entries = []
        for x, _, _, out, not_finite in alike:
            entry = (*x.shape, x.stride(0), 0, _place(x, x_base), _place(out, out_base))
            entries.append((*entry, out.stride(0), _place(not_finite, not_finite_base)))
        table, matrices, _ = _table(tuple(entries), (bm,), bn, _stream(x_base), 1)
        bits = not_finite_base.view(torch.int32)
        yield functools.partial(
            launch_kernel,
            kernels.pack_kernel,
            (matrices.size(0), 1, 1),
            (x_base, out_base.view(float8_dtype), bits, table, matrices),
            (),
            (
                all(e[i] % 16 == 0 for e in entries for i in (1, 2, 4, 5, 6)),
                FLOAT8_EXPONENT[float8_dtype],
                block[1],
                bm,
                bn,
            ),
            num_warps=warps,
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


def _stream(x: torch.Tensor) -> torch.cuda.Stream:
    return torch.cuda.current_stream(x.device)


@functools.lru_cache(maxsize=256)
def _table(
    entries: tuple[tuple[int, ...], ...],
    heights: tuple[int, ...],
    bn: int,
    stream: torch.cuda.Stream,
    enough: int,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The table of [Note: many matrices in one launch] in `weight_kernels`, `matrix_ptr`, and the
    rows that a program takes.

    Places and sizes stay the same from step to step, so that it is made once.

    Args:
        entries: per matrix: M, N, stride, the row at which it starts, and places.
        heights: rows that a program may take, most first: the first that leaves enough programs,
            or the last.
        bn: columns that a program takes.
        stream: the current one, on which the table is made: another has one of its own.
        enough: how many programs that are.
    """
    for bm in heights:
        tiles = [cdiv(entry[0], bm) * cdiv(entry[1], bn) for entry in entries]
        if sum(tiles) >= enough:
            break
    rows, first = [], 0
    for entry, count in zip(entries, tiles, strict=True):
        rows.append((*entry[:4], first, *entry[4:]))
        first += count
    matrices = torch.repeat_interleave(torch.tensor(tiles)).int()
    table = torch.tensor(rows).pin_memory().to(stream.device, non_blocking=True)
    return table, matrices.pin_memory().to(stream.device, non_blocking=True), bm
