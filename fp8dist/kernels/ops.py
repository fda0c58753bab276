"""Casts as torch ops: opaque to the compiler, which merges equal ones, so that layers that share an
input share its cast. On the GPU they are Triton kernels, elsewhere `fp8dist.numerics`, which the
compiler does not touch then either (but for square blocks, see `kernels.quantize_both`).

They are defined in a `torch.library.Library`, as `custom_op` costs the CPU more time per call.
"""

from importlib.util import find_spec

import torch
from torch.library import Library, register_fake

from fp8dist import hardware, numerics
from fp8dist.config import Block, ScaleFormat
from fp8dist.kernels.layout import Cast, cast_named, kind_of, name_of, sizes_of
from fp8dist.numerics import Scaled

if torch.backends.cuda.is_built() and find_spec("triton") is not None:
    from fp8dist.kernels import launch
else:
    launch = None  # type: ignore[assignment]  # a module elsewhere


def has_kernels(x: torch.Tensor) -> bool:
    """Triton compiles float8 casts for compute capability 8.9 and newer."""
    return launch is not None and x.is_cuda and hardware.has_float8_casts(x.device)


def in_kernels(x: torch.Tensor) -> bool:
    """Whether x, (M, N), is cast by a kernel.

    Not if M is 1: that is a constant to Triton then, and version 3.6 compiles masks of rows
    wrongly: rows come through that do not exist. `numerics` does one row. And none: nothing is cast
    then, but a scale that is known is that of other ranks' rows, too.
    """
    return has_kernels(x) and x.size(0) > 1


# [Note: only in backward]
# The compiler moves what backward computes from the weight alone into forward, and keeps the
# result. FSDP2 frees a weight between forward and backward, but it could not free that. An
# argument `after`, which is not used, ties such an op to a gradient, and so to backward: to its
# scales, as of what it has not written to memory yet the compiler would write a copy for the op.

_library = Library("fp8dist", "FRAGMENT")
_library.define(
    "quantize(Tensor x, str cast, Tensor? x_inverse, Tensor? amax, Tensor? after) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "transpose(Tensor x, Tensor? x_inverse, Tensor? new_scale, Tensor? after) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_FourTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _quantize(
    x: torch.Tensor,
    cast: str,
    x_inverse: torch.Tensor | None,
    amax: torch.Tensor | None,
    after: torch.Tensor | None,
) -> _FourTensors:
    """`numerics.quantize_both`, or `rescale_transposed`, as data, scales, transposed data and its
    scales; see `layout.sizes_of`.

    Args:
        cast: the name of a `layout.Cast`.
        x_inverse: 1 / what x was scaled by; for e8m0, which has no reciprocals, what it was.
        amax: (1, 1), float32 or its bits, int32, if one scale is wanted: of x, or of all that x is
            a part of.
        after: see [Note: only in backward].
    """
    what = cast_named(cast)
    if in_kernels(x):
        return launch.quantize(x, what, x_inverse, amax)
    a, b, float8_dtype, scale_format = what
    if amax is not None:
        amax = amax.view(torch.float32)
    if x_inverse is not None:
        x = numerics.dequantize(x, x_inverse if scale_format == "e8m0" else x_inverse.reciprocal())
    scaled, transposed = numerics.quantize_both(x, a, b, float8_dtype, scale_format, amax)
    one, other = (
        _nothing(x, float8_dtype) if part is None else _written(part, kind_of(c), scale_format)
        for part, c in ((scaled, a), (transposed, b))
    )
    return *one, *other


def _nothing(x: torch.Tensor, float8_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty((0, 0), dtype=float8_dtype), x.new_empty((0, 0), dtype=torch.float32)


def _written(x: Scaled, kind: str, scale_format: ScaleFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """As the kernels write it, see `layout.sizes_of`, in storages of their own."""
    scale = x.scale.t() if kind == "own" else x.scale
    copies = [scale] if scale_format == "e8m0" else [scale.reciprocal(), scale]
    return x.data.clone(memory_format=torch.contiguous_format), torch.stack(copies)


def _transpose(
    x: torch.Tensor,
    x_inverse: torch.Tensor | None,
    new_scale: torch.Tensor | None,
    after: torch.Tensor | None,
) -> torch.Tensor:
    """(M, N), float8, copied as (N, M).

    Args:
        x_inverse: 1 / the scales of x, as many as it has blocks, if it is to have new ones.
        new_scale: which these are, for x; scales of rows by one or by those of columns is what a
            kernel does.
        after: see [Note: only in backward].
    """
    if (x_inverse is None) != (new_scale is None):
        raise AssertionError("a transpose has old and new scales, or neither")
    # Of one column as of one row; what lies in columns is rows of the transpose already.
    by_kernel = in_kernels(x) and x.size(1) > 1 and x.stride(1) == 1
    if x_inverse is None or new_scale is None:
        if by_kernel:
            return launch.transpose(x)
        return x.t().clone(memory_format=torch.contiguous_format)
    if by_kernel and launch.can_shift(x, x_inverse, new_scale):
        return launch.shift(x, x_inverse, new_scale)
    value = numerics.dequantize(x, x_inverse.reciprocal())
    data = numerics.cast(value, new_scale, x.dtype).t()
    return data.clone(memory_format=torch.contiguous_format)


_library.impl("quantize", _quantize, "CompositeExplicitAutograd")
_library.impl("transpose", _transpose, "CompositeExplicitAutograd")


@register_fake("fp8dist::quantize", lib=_library)
def _(
    x: torch.Tensor,
    cast: str,
    x_inverse: torch.Tensor | None,
    amax: torch.Tensor | None,
    after: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    what = cast_named(cast)
    sizes, _, _ = sizes_of(x.size(0), x.size(1), what)
    dtypes = (what.float8_dtype, torch.float32, what.float8_dtype, torch.float32)
    return tuple(
        torch.empty(size, dtype=dtype, device=x.device)
        for size, dtype in zip(sizes, dtypes, strict=True)
    )


@register_fake("fp8dist::transpose", lib=_library)
def _(
    x: torch.Tensor,
    x_inverse: torch.Tensor | None,
    new_scale: torch.Tensor | None,
    after: torch.Tensor | None,
) -> torch.Tensor:
    return torch.empty((x.size(1), x.size(0)), dtype=x.dtype, device=x.device)


def quantize_both(
    x: torch.Tensor,
    block: Block | None,
    transposed_block: Block | None,
    float8_dtype: torch.dtype,
    scale_format: ScaleFormat,
    amax: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
) -> tuple[Scaled | None, Scaled | None]:
    """`numerics.quantize_both`, for blocks within one row or column; x^T is contiguous.

    Args:
        amax: as `fp8dist::quantize` takes it.
        after: see [Note: only in backward].
    """
    data, scale, t_data, t_scale = torch.ops.fp8dist.quantize.default(
        x,
        name_of(Cast(block, transposed_block, float8_dtype, scale_format)),
        None,
        amax,
        after,
    )
    scaled = transposed = None
    if block is not None:
        scaled = _scaled(data, scale, block, kind_of(block) == "own")
    if transposed_block is not None:
        flipped = (transposed_block[1], transposed_block[0])
        transposed = _scaled(t_data, t_scale, flipped, kind_of(transposed_block) == "own")
    return scaled, transposed


def _scaled(data: torch.Tensor, scales: torch.Tensor, block: Block, by_column: bool) -> Scaled:
    parts = scales.unbind()
    *inverse, scale = [part.t() for part in parts] if by_column else parts
    return Scaled(data, scale, block, *inverse)


def rescale_transposed(
    weight: Scaled,
    block: Block,
    new_scale: torch.Tensor | None,
    scale_format: ScaleFormat,
    after: torch.Tensor | None = None,
) -> Scaled:
    """`numerics.rescale_transposed`; contiguous where the device has kernels.

    Args:
        after: see [Note: only in backward].
    """
    flipped = (block[1], block[0])
    transpose = torch.ops.fp8dist.transpose.default
    if block == weight.block:
        if not has_kernels(weight.data):  # operands are dequantized: a view will do
            return weight.t()
        return weight.t()._replace(data=transpose(weight.data, None, None, after))
    inverse = weight.inverse
    if scale_format == "e8m0" and new_scale is None:
        inverse = weight.scale
    elif inverse is None:
        inverse = weight.scale.reciprocal()
    if new_scale is not None:
        return Scaled(transpose(weight.data, inverse, new_scale, after), new_scale.t(), flipped)
    cast = name_of(Cast(None, block, weight.data.dtype, scale_format))
    _, _, data, scales = torch.ops.fp8dist.quantize.default(weight.data, cast, inverse, None, after)
    return _scaled(data, scales, flipped, kind_of(block) == "own")
