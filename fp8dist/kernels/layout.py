"""What the op `fp8dist::quantize` is to do, and the sizes of what it gives, which those who compute
it agree on.
"""

import functools
from typing import NamedTuple

import torch

from fp8dist.config import COLUMN, ROW, TENSOR, Block, ScaleFormat
from fp8dist.numerics import token_multiple

WIDEST_ROWS = 16384
"""Columns of the widest matrix that is cast by rows in the pass that finds amaxes."""

_KINDS = {TENSOR: "tensor", ROW: "row", COLUMN: "column"}


def kind_of(block: Block | None) -> str:
    """Which elements share a scale, as the kernels are told: see `triton_kernels`."""
    return "none" if block is None else _KINDS.get(block, "own")


class Cast(NamedTuple):
    """To blocks of x, and of its transpose to what are `transposed_block` of x; either may be None.

    An op is handed the name of one: four arguments take the CPU twice as long as one does.
    """

    block: Block | None
    transposed_block: Block | None
    float8_dtype: torch.dtype
    scale_format: ScaleFormat


@functools.cache
def name_of(cast: Cast) -> str:
    """Such as "1x-1 none float8_e4m3fn power_of_2"."""
    a, b = (
        "none" if block is None else f"{block[0]}x{block[1]}"
        for block in (cast.block, cast.transposed_block)
    )
    return f"{a} {b} {str(cast.float8_dtype).removeprefix('torch.')} {cast.scale_format}"


@functools.cache
def cast_named(name: str) -> Cast:
    *blocks, dtype, scale_format = name.split()
    a, b = (None if block == "none" else tuple(map(int, block.split("x"))) for block in blocks)
    # To mypy tuples of any length and any string.
    return Cast(a, b, getattr(torch, dtype), scale_format)  # type: ignore[arg-type]


Sizes = tuple[tuple[int, ...], ...]


def sizes_of(m: int, n: int, cast: Cast) -> tuple[Sizes, int, int]:
    """For x (M, N).

    Scales are (2, ...), see [Note: reciprocals], or e8m0 (1, ...). Within a row (or, of the
    transpose, a column of x) blocks of a number of elements have theirs column by column.

    Returns:
        The sizes of data, scales, transposed data and its scales, (0, 0) where they are not wanted;
        M padded for the transpose; how many amaxes have to be found before the cast.
    """
    block, t_block, _, scale_format = cast
    kind, t_kind = kind_of(block), kind_of(t_block)
    sizes: list[tuple[int, ...]] = [(0, 0)] * 4
    copies = 1 if scale_format == "e8m0" else 2
    m_padded = m
    if block is not None:
        sizes[0] = (m, n)
        of_kind = {"tensor": (1, 1), "row": (m, 1)}
        sizes[1] = (copies, *(of_kind.get(kind) or (n // block[1], m)))
    if t_block is not None:
        m_padded = m + -m % token_multiple(t_block)
        sizes[2] = (n, m_padded)
        of_kind = {"tensor": (1, 1), "column": (n, 1)}
        sizes[3] = (copies, *(of_kind.get(t_kind) or (m_padded // t_block[0], n)))
    # Alone, those of rows are found in the cast's pass.
    rows = m if kind == "row" and t_block is not None else 0
    columns = n if t_kind == "column" else 0
    amaxes = rows + columns + int("tensor" in (kind, t_kind))
    return tuple(sizes), m_padded, amaxes


@functools.lru_cache(maxsize=1024)
def contiguous_strides(size: tuple[int, ...]) -> tuple[int, ...]:
    """As `torch.empty` has them, also where there are no elements."""
    strides = [1]
    for extent in reversed(size[1:]):
        strides.append(strides[-1] * max(extent, 1))
    return tuple(reversed(strides))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (`triton.cdiv` is wrapped for kernels, which takes the CPU longer.)"""
    return -(-a // b)
