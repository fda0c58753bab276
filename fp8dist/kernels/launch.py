"""The Triton kernels, launched: each function is the twin of one in `fp8dist.numerics` and gives
the same bytes.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import triton
from torch._C import _cuda_getCurrentRawStream
from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined] # not in stubs
from triton.knobs import HookChain, runtime

from fp8dist import hardware
from fp8dist.kernels import amax_kernels, block_kernels, transpose_kernel
from fp8dist.kernels import triton_kernels as kernels
from fp8dist.kernels.layout import (
    WIDEST_ROWS,
    Cast,
    Sizes,
    cdiv,
    contiguous_strides,
    kind_of,
    sizes_of,
)

# The largest number of each is 1.75 times 2 to this power.
FLOAT8_EXPONENT = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}
# What was fastest on an H200: rows and columns of a tile, how many tiles, one below the other, a
# program takes if that leaves enough programs, its warps, and how many tiles are on their way or at
# hand at once. Amaxes of columns pay for tall programs.
_AMAX_TILE, _COLUMN_AMAX_TILE = (32, 256, 2, 8, 1), (64, 64, 4, 4, 3)
ENOUGH_PROGRAMS = 512  # some for each multiprocessor


def _cast_tile(cast: Cast) -> tuple[int, int, int, int | None]:
    """Rows and columns of a cast's tile, warps, and registers of a thread: what was fastest on an
    H200, for bfloat16; of blocks of 128 that is for what `_in_pairs` leaves.

    Left alone, ptxas takes more registers, and fewer programs fit a multiprocessor. In a tile as
    high as a block of 32 the one warp waits for no other.
    """
    if cast.transposed_block == (32, 1):
        return 32, 64, 1, 128
    if (cast.block, cast.transposed_block) == ((1, 128), (128, 1)):
        return 128, 128, 8, 128
    return 128, 128, 8, None


# [Note: launching]
# Triton decides at every launch which compilation of a kernel fits the arguments, which takes the
# CPU longer than the launch itself, and a step has hundreds. So what it decided is kept by all that
# it looks at: dtypes, numbers, whether addresses are multiples of 16, and how it is compiled. It is
# launched as `CompiledKernel.__getitem__` does, but for what that puts together and calls for hooks
# when there are none. To look at again with a new Triton (this is 3.6 to 3.8): the arguments of
# `CompiledKernel.run`, that a chain of hooks has its `calls`, and [Note: patches].

_compiled: dict[Hashable, Any] = {}
_MOST_COMPILED = 4096  # numbers of tokens that vary would fill it without end


def launch_kernel(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[torch.Tensor],
    numbers: tuple[int, ...],
    constants: tuple[Any, ...],
    **options: int,
) -> None:
    """Launch a kernel on the current stream: its parameters are tensors, numbers and constants, in
    this order. See [Note: launching]."""
    device = tensors[0].get_device()
    if device != torch.cuda.current_device():  # where Triton launches, and loads what it compiled
        with torch.cuda.device(device):
            launch_kernel(kernel, grid, tensors, numbers, constants, **options)
        return
    kinds = tuple([(tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors])
    key = (id(kernel), device, numbers, constants, kinds, *options.items())
    known = _compiled.get(key)
    if known is None:
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        compiled = kernel[grid](*tensors, *numbers, *constants, **options)
        if compiled is not None:  # None where Triton interprets
            _compiled[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata
        return
    compiled, run, *function = known
    if _is_set(runtime.launch_enter_hook) or _is_set(runtime.launch_exit_hook):
        compiled[grid](*tensors, *numbers, *constants)
        return
    stream = _cuda_getCurrentRawStream(device)
    run(*grid, stream, *function, None, None, None, *tensors, *numbers, *constants)


def _is_set(hook: Any) -> bool:
    """Whether there is anything to call: it may be a chain of hooks, one, or None."""
    return bool(hook.calls) if isinstance(hook, HookChain) else hook is not None


_Function = TypeVar("_Function", bound=Callable[..., Any])


def where_x_is(function: _Function) -> _Function:
    """The device of the first argument is the current one within, where memory is taken."""

    @functools.wraps(function)
    def there(x: torch.Tensor, *args: Any) -> Any:
        device = x.get_device()
        if device == torch.cuda.current_device():
            return function(x, *args)
        with torch.cuda.device(device):
            return function(x, *args)

    return there  # type: ignore[return-value]  # of a wrapper with *args mypy knows no arguments


def _empty(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """`torch.empty` on the current device, as the compiler's own code has it: a step has hundreds,
    and looking for a device and a layout takes the CPU longer than the memory. Nothing is filled
    where `torch.use_deterministic_algorithms` would.

    Args:
        size: of ints; a `torch.Size` will not do.
    """
    return _empty_strided_cuda(size, contiguous_strides(size), dtype)


class _Launch(NamedTuple):
    """A launch but for its tensors; see `launch_kernel`."""

    kernel: Any
    grid: tuple[int, int, int]
    numbers: tuple[int, ...]
    constants: tuple[Any, ...]
    options: dict[str, int]

    def __call__(self, *tensors: torch.Tensor) -> None:
        launch_kernel(self.kernel, self.grid, tensors, self.numbers, self.constants, **self.options)


class _Plan(NamedTuple):
    """What a cast is but for its tensors: worked out once, as sizes are the same at every step."""

    sizes: Sizes
    amaxes: int
    """How many have to be found before, by `find`."""
    find: _Launch
    by: Literal["rows", "blocks", "derived blocks", "tiles"]
    cast: _Launch


# As many registers of a thread as leave a multiprocessor three programs of four warps, and 16 of
# one: ptxas takes more for the first if it may.
_BLOCKS_OF_128 = {"num_warps": 4, "maxnreg": 168}
_DERIVED_BLOCKS_OF_32 = {"num_warps": 1, "maxnreg": 128}
_PATCH_ROWS = 3 if triton.__version__.startswith("3.6.") else 0  # see [Note: patches]
_MOST_IN_BLOCKS = 2**25  # rows, and elements from one row to the next: offsets are of 32 bits


def _in_pairs(x: torch.Tensor, cast: Cast) -> bool:
    """Whether `quantize_blocks_of_128_kernel` casts it, which reads pairs, 16 bytes at a time."""
    return (
        (cast.block or (1, 128)) == (1, 128)
        and (cast.transposed_block or (128, 1)) == (128, 1)
        and x.size(1) % 128 == 0
        and (x.dtype, cast.float8_dtype) == (torch.bfloat16, torch.float8_e4m3fn)
        and x.data_ptr() % 16 == x.stride(0) % 16 == 0
        and max(x.size(0), x.stride(0)) <= _MOST_IN_BLOCKS
        and hardware.has_maxima_of_pairs(x.device)
    )


@functools.lru_cache(maxsize=1024)
def _plan(
    m: int,
    n: int,
    stride: int,
    cast: Cast,
    inverse: tuple[int, int, int] | None,
    in_pairs: bool,
) -> _Plan:
    """Of x (m, n).

    Args:
        inverse: columns and strides of x_inverse, if there is one.
        in_pairs: see `_in_pairs`.
    """
    a, b, float8_dtype, scale_format = cast
    sizes, m_padded, amaxes = sizes_of(m, n, cast)
    kind, t_kind = kind_of(a), kind_of(b)
    by = "none" if inverse is None else "row" if inverse[0] == 1 else "own"
    exponent = FLOAT8_EXPONENT[float8_dtype]
    bm, bn, steps, warps, stages = _COLUMN_AMAX_TILE if t_kind == "column" else _AMAX_TILE
    while steps > 1 and cdiv(m, bm * steps) * cdiv(n, bn) < ENOUGH_PROGRAMS:
        steps //= 2
    wanted = kind == "row", t_kind == "column", "tensor" in (kind, t_kind)
    find = _Launch(
        amax_kernels.amax_kernel,
        (cdiv(m, bm * steps), cdiv(n, bn), 1),
        (m, n, stride),
        (by == "row", *wanted, bm, bn, steps, stages),
        {"num_warps": warps},
    )
    if kind == "row" and t_kind == "none":
        whole = n <= WIDEST_ROWS
        bn = max(128, 1 << (n - 1).bit_length()) if whole else 1024
        bm = 2 if bn <= 4096 and whole else 1
        by_rows = _Launch(
            kernels.quantize_rows_kernel,
            (cdiv(m, bm), 1, 1),
            (m, n, stride),
            (exponent, scale_format, bm, bn, whole),
            {"num_warps": 4 if bn <= 4096 else 8},
        )
        return _Plan(sizes, amaxes, find, "rows", by_rows)
    refused = f"no kernel casts to {a} and {b} at once, derived: {inverse}"
    if in_pairs and inverse is None:
        by_blocks = _Launch(
            block_kernels.quantize_blocks_of_128_kernel,
            (cdiv(m_padded, 128), n // 128, 1),
            (m, n, m_padded, stride),
            (exponent, scale_format, a is not None, b is not None, _PATCH_ROWS),
            _BLOCKS_OF_128,
        )
        return _Plan(sizes, amaxes, find, "blocks", by_blocks)
    if inverse is not None and (a, b, scale_format) == (None, (32, 1), "e8m0"):
        if inverse[0] * 32 != n or max(m, stride) > _MOST_IN_BLOCKS:
            raise AssertionError(refused)
        derived = _Launch(
            block_kernels.derive_blocks_of_32_kernel,
            (m_padded // 32, cdiv(n, 128), 1),
            (m, n, m_padded, stride, *inverse[1:]),
            (exponent, _PATCH_ROWS),
            _DERIVED_BLOCKS_OF_32,
        )
        return _Plan(sizes, amaxes, find, "derived blocks", derived)
    bm, bn, warps, registers = _cast_tile(cast)
    own, t_own = (
        block if block is not None and kind_of(block) == "own" else (1, 1) for block in (a, b)
    )
    of_tiles = inverse is None or (scale_format != "e8m0" and inverse[0] in (1, n // bn))
    if own[1] > bn or t_own[0] > bm or not of_tiles:
        raise AssertionError(refused)
    by_tiles = _Launch(
        kernels.quantize_kernel,
        (cdiv(m_padded, bm), cdiv(n, bn), 1),
        (m, n, m_padded, stride, *((1, 1) if inverse is None else inverse[1:])),
        (
            exponent,
            scale_format,
            by,
            kind,
            own[1],
            t_kind,
            t_own[0],
            bm,
            bn,
        ),
        {"num_warps": warps, **({} if registers is None else {"maxnreg": registers})},
    )
    return _Plan(sizes, amaxes, find, "tiles", by_tiles)


@where_x_is
def quantize(
    x: torch.Tensor,
    cast: Cast,
    x_inverse: torch.Tensor | None,
    known_amax: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `fp8dist::quantize`, see `ops`: one pass for the amaxes, where the blocks are not
    within a tile or a row, and one that casts in both orientations.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    m, n = x.shape
    plan = _plan(
        m,
        n,
        x.stride(0),
        cast,
        None if x_inverse is None else (x_inverse.size(1), *x_inverse.stride()),
        _in_pairs(x, cast),
    )
    sizes, float8_dtype = plan.sizes, cast.float8_dtype
    data, scale = _empty(sizes[0], float8_dtype), _empty(sizes[1], torch.float32)
    t_data, t_scale = _empty(sizes[2], float8_dtype), _empty(sizes[3], torch.float32)
    inverse = x if x_inverse is None else x_inverse  # x: not read
    if n == 0:  # no rows are not cast here, see `ops.in_kernels`
        pass
    elif plan.by == "rows":
        plan.cast(x, data, scale)
    elif plan.by == "blocks":
        plan.cast(x, data, scale, t_data, t_scale)
    elif plan.by == "derived blocks":
        plan.cast(x, inverse, t_data, t_scale)
    else:
        amax = x  # not read
        if known_amax is not None:
            amax = known_amax
        elif plan.amaxes > 0:
            amax = torch.zeros(plan.amaxes, dtype=torch.int32, device=x.device)
            plan.find(x, inverse, amax)
        plan.cast(x, inverse, amax, data, scale, t_data, t_scale)
    return data, scale, t_data, t_scale


def in_fours(x: torch.Tensor) -> bool:
    """Whether x (M, N), of bytes in rows, is words of four along either dim; see [Note: fours]."""
    (m, n), stride = x.shape, x.stride(0)
    return x.element_size() == 1 and m % 4 == n % 4 == stride % 4 == x.data_ptr() % 4 == 0


def can_shift(x: torch.Tensor, x_inverse: torch.Tensor, new_scale: torch.Tensor) -> bool:
    """Whether these are what `shift` takes."""
    return (
        x.dtype == torch.float8_e4m3fn
        and in_fours(x)
        and x_inverse.dtype == new_scale.dtype == torch.float32
        and x_inverse.shape == (x.size(0), 1)
        and new_scale.shape in ((1, 1), (1, x.size(1)))
        and new_scale.is_contiguous()
    )


def _transposed(
    kernel: Any,
    x: torch.Tensor,
    scales: Sequence[torch.Tensor] = (),
    numbers: tuple[int, ...] = (),
    constants: tuple[Any, ...] = (),
) -> torch.Tensor:
    m, n = x.shape
    out = _empty((n, m), x.dtype)
    grid = cdiv(m, 128), cdiv(n, 128), 1
    numbers, constants = (m, n, x.stride(0), *numbers), (*constants, 128, 128)
    launch_kernel(kernel, grid, (x, *scales, out), numbers, constants, num_warps=8)
    return out


@where_x_is
def transpose(x: torch.Tensor) -> torch.Tensor:
    """(M, N), of bytes in rows, copied as (N, M)."""
    if in_fours(x):
        return _transposed(transpose_kernel.transpose_kernel, x, (x, x), (0,), ("none",))
    return _transposed(transpose_kernel.transpose_bytes_kernel, x)


@where_x_is
def shift(x: torch.Tensor, x_inverse: torch.Tensor, new_scale: torch.Tensor) -> torch.Tensor:
    """(M, N), e4m3, from scales of rows to one or to those of columns, as (N, M). See `can_shift`.

    Args:
        x_inverse: (M, 1), float32, 1 / the scales of rows.
        new_scale: (1, 1) or (1, N), float32.
    """
    scales = "tensor" if new_scale.numel() == 1 else "column"
    return _transposed(
        transpose_kernel.transpose_kernel,
        x,
        (x_inverse, new_scale),
        (x_inverse.stride(0),),
        (scales,),
    )
