"""Twins of `fp8dist.grouped_numerics` that run where the tensor is; ops of torch, as those in
`fp8dist.kernels.ops` are and for the same reasons.
"""

from collections.abc import Sequence

import torch
from torch.library import Library, register_fake

from fp8dist import grouped_numerics, hardware, kernels
from fp8dist.config import COLUMN, ROW, WHOLE, Block, ScaleFormat
from fp8dist.grouped_numerics import GROUP_MULTIPLE, ContractedRows, ScaledGroups, padded_rows
from fp8dist.kernels.ops import has_kernels, in_kernels, launch
from fp8dist.numerics import Scaled, wanted

HAS_GLUON = False
"""Whether there is a Triton whose Gluon, which is experimental, is as the kernels here have it."""

if launch is not None:
    import triton

    from fp8dist.kernels import grouped_launch

    HAS_GLUON = triton.__version__.startswith(("3.6.", "3.7.", "3.8."))
    if HAS_GLUON:
        from fp8dist.kernels import outer_launch, rows_launch

_library = Library("fp8dist", "FRAGMENT")
_library.define(
    "pad_groups(Tensor x, Tensor ends, int multiple) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "quantize_groups(Tensor x, Tensor ends, bool rows, ScalarType float8_dtype, Tensor? factor) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "transpose_each(Tensor data, int rows, Tensor? after) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "rescale_each(Tensor data, Tensor scale, int[2] own_block, int rows, int[2] block, "
    "str scale_format, Tensor? after) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _name in "scaled_grouped_mm", "scaled_grouped_mm_rows", "scaled_grouped_outer":
    _library.define(
        f"{_name}(Tensor a, Tensor b, Tensor a_inverse, Tensor b_inverse, Tensor ends) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )


def _pad_groups(
    x: torch.Tensor, ends: torch.Tensor, multiple: int
) -> tuple[torch.Tensor, torch.Tensor]:
    padded = grouped_numerics.pad_groups(x, ends, multiple)
    return padded, grouped_numerics.padded_ends(ends, multiple)


_FiveTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _quantize_groups(
    x: torch.Tensor,
    ends: torch.Tensor,
    rows: bool,
    float8_dtype: torch.dtype,
    factor: torch.Tensor | None,
) -> _FiveTensors:
    """Scaled by rows, if they are wanted, and by columns of groups, with powers of two.

    Args:
        factor: (groups, N), float32: what rows are multiplied by before, but not columns.

    Returns:
        data (M, N), its reciprocals and scales (2, M, 1), transposed data (N, `padded_rows`), its
        reciprocals and scales (2, groups, N), and the padded ends.
    """
    if in_kernels(x) and x.numel() > 0:
        return grouped_launch.quantize_groups(x, ends, rows, float8_dtype, factor)
    sizes = _sizes(x, ends, rows)
    data, scales = x.new_empty(sizes[0], dtype=float8_dtype), x.new_empty(sizes[1]).float()
    if rows:
        by_rows = x if factor is None else grouped_numerics.by_factor(x, ends, factor)
        scaled, _ = kernels.quantize_both(by_rows, ROW, None, float8_dtype, "power_of_2")
        scaled = wanted(scaled)
        data = scaled.data.clone(memory_format=torch.contiguous_format)
        scales = torch.stack([scaled.scale.reciprocal(), scaled.scale])
    groups = grouped_numerics.quantize_groups(x, ends, COLUMN, float8_dtype, "power_of_2")
    t_scales = torch.stack([groups.scale.reciprocal(), groups.scale])
    t_data = groups.data.clone(memory_format=torch.contiguous_format)
    return data, scales, t_data, t_scales, groups.ends


def _sizes(x: torch.Tensor, ends: torch.Tensor, rows: bool) -> list[tuple[int, ...]]:
    (m, n), groups = x.shape, ends.size(0)
    m_padded = padded_rows(m, groups, GROUP_MULTIPLE)
    of_rows: list[tuple[int, ...]] = [(m, n), (2, m, 1)] if rows else [(0, 0), (0, 0)]
    return [*of_rows, (n, m_padded), (2, groups, n)]


def _transpose_each(data: torch.Tensor, rows: int, after: torch.Tensor | None) -> torch.Tensor:
    """Each of the matrices of `rows` rows that lie one below the other."""
    if has_kernels(data):
        return grouped_launch.transpose_each(data, rows)
    return data.unflatten(0, (-1, rows)).transpose(1, 2).contiguous().flatten(0, 1)


def _rescale_each(
    data: torch.Tensor,
    scale: torch.Tensor,
    own_block: Sequence[int],
    rows: int,
    block: Sequence[int],
    scale_format: ScaleFormat,
    after: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    x = Scaled(data, scale, (own_block[0], own_block[1]))
    found = grouped_numerics.rescale_each(x, rows, (block[0], block[1]), scale_format)
    return found.data.clone(memory_format=torch.contiguous_format), found.scale.clone()


if launch is not None:
    _library.impl("scaled_grouped_mm", grouped_launch.multiply_groups, "CUDA")
if HAS_GLUON:
    _library.impl("scaled_grouped_outer", outer_launch.outer_groups, "CUDA")
    _library.impl("scaled_grouped_mm_rows", rows_launch.multiply_rows, "CUDA")
_library.impl("pad_groups", _pad_groups, "CompositeExplicitAutograd")
_library.impl("quantize_groups", _quantize_groups, "CompositeExplicitAutograd")
_library.impl("transpose_each", _transpose_each, "CompositeExplicitAutograd")
_library.impl("rescale_each", _rescale_each, "CompositeExplicitAutograd")


@register_fake("fp8dist::pad_groups", lib=_library)
def _(x: torch.Tensor, ends: torch.Tensor, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = padded_rows(x.size(0), ends.size(0), multiple)
    return x.new_empty(rows, x.size(1)), torch.empty_like(ends)


@register_fake("fp8dist::quantize_groups", lib=_library)
def _(
    x: torch.Tensor,
    ends: torch.Tensor,
    rows: bool,
    float8_dtype: torch.dtype,
    factor: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    dtypes = (float8_dtype, torch.float32, float8_dtype, torch.float32)
    sizes = _sizes(x, ends, rows)
    parts = [x.new_empty(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    return (*parts, torch.empty_like(ends))


@register_fake("fp8dist::transpose_each", lib=_library)
def _(data: torch.Tensor, rows: int, after: torch.Tensor | None) -> torch.Tensor:
    return data.new_empty(data.size(0) // rows * data.size(1), rows)


@register_fake("fp8dist::rescale_each", lib=_library)
def _(
    data: torch.Tensor,
    scale: torch.Tensor,
    own_block: Sequence[int],
    rows: int,
    block: Sequence[int],
    scale_format: str,
    after: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    stacked = data.size(0) // rows * data.size(1)
    return data.new_empty(stacked, rows), scale.new_empty(stacked, rows // block[0])


def empty_product(a: torch.Tensor, b: torch.Tensor, *scales_and_ends: torch.Tensor) -> torch.Tensor:
    """Of a (M, K), tokens, and b (E * N, K): (M, N), bfloat16."""
    groups = scales_and_ends[-1].size(0)
    return a.new_empty((a.size(0), b.size(0) // groups), dtype=torch.bfloat16)


def empty_outer(a: torch.Tensor, b: torch.Tensor, *scales_and_ends: torch.Tensor) -> torch.Tensor:
    """Of a (N, padded rows) and b (K, padded rows): (E, N, K), bfloat16."""
    groups = scales_and_ends[-1].size(0)
    return a.new_empty((groups, a.size(0), b.size(0)), dtype=torch.bfloat16)


register_fake("fp8dist::scaled_grouped_mm", empty_product, lib=_library)
register_fake("fp8dist::scaled_grouped_outer", empty_outer, lib=_library)


@register_fake("fp8dist::scaled_grouped_mm_rows", lib=_library)
def _(a: torch.Tensor, b: torch.Tensor, *inverses_and_ends: torch.Tensor) -> torch.Tensor:
    return a.new_empty((a.size(0), b.size(1)), dtype=torch.bfloat16)


def multiplies_groups(a: torch.Tensor) -> bool:
    """Whether `fp8dist::scaled_grouped_mm` is there for tokens where these are."""
    return has_kernels(a) and hardware.has_hopper_units(a.device)


def multiplies_in_gluon(a: torch.Tensor) -> bool:
    """Whether `fp8dist::scaled_grouped_outer` and `scaled_grouped_mm_rows` are there, too."""
    return hardware.matmuls_are_assumed() or HAS_GLUON and multiplies_groups(a)


def quantize_tokens(
    x: torch.Tensor,
    ends: torch.Tensor,
    block: Block | None,
    transposed_block: Block | None,
    float8_dtype: torch.dtype,
    scale_format: ScaleFormat,
    factor: torch.Tensor | None = None,
) -> tuple[Scaled | None, ScaledGroups | None]:
    """x (M, K) for a matmul that contracts K, in blocks within a row, and the groups of x^T for one
    that contracts each group's tokens, as they are wanted; see `grouped_numerics.quantize_groups`.

    factor: that of `grouped_numerics.ContractedRows`, if that is what x (M, K) is multiplied by.
    """
    # With a factor also where columns are not wanted: to write these costs less than to write the
    # products, in float32, and to cast those.
    if transposed_block == COLUMN or factor is not None:
        data, scales, t_data, t_scales, padded_ends = torch.ops.fp8dist.quantize_groups.default(
            x, ends, block is not None, float8_dtype, factor
        )
        scaled = None if block is None else Scaled(data, scales[1], block, scales[0])
        groups = ScaledGroups(t_data, t_scales[1], padded_ends, WHOLE, t_scales[0])
        return scaled, None if transposed_block is None else groups
    scaled, _ = kernels.quantize_both(x, block, None, float8_dtype, scale_format)
    if transposed_block is None:
        return scaled, None
    padded, padded_ends = torch.ops.fp8dist.pad_groups.default(x, ends, GROUP_MULTIPLE)
    _, t = kernels.quantize_both(padded, None, transposed_block, float8_dtype, scale_format)
    t = wanted(t)
    return scaled, ScaledGroups(t.data, t.scale, padded_ends, transposed_block[0], t.inverse)


def transposed(x: ContractedRows, after: torch.Tensor | None = None) -> Scaled:
    """The weights for a matmul that contracts columns, (E * B, A); for `after`, see [Note: only in
    backward] in `ops`."""
    experts, rows = x.factor.shape
    data = torch.ops.fp8dist.transpose_each.default(x.data, rows, after)
    inverse = x.inverse[:, None].expand(experts, x.data.size(1)).reshape(-1, 1)
    return Scaled(data, inverse.reciprocal(), ROW, inverse)


def rescale_each(
    x: Scaled,
    rows: int,
    block: Block,
    scale_format: ScaleFormat,
    after: torch.Tensor | None = None,
) -> Scaled:
    """See `grouped_numerics.rescale_each`; for `after`, [Note: only in backward] in `ops`."""
    data, scale = torch.ops.fp8dist.rescale_each.default(
        x.data, x.scale, x.block, rows, block, scale_format, after
    )
    return Scaled(data, scale, (block[1], block[0]))
