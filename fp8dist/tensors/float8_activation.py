"""`Float8Activation`: float8 data and scales that stand for a high-precision activation."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fp8dist import async_tp, kernels, numerics
from fp8dist.config import ROW, TENSOR, Block, ScaleFormat
from fp8dist.numerics import Scaled
from fp8dist.tensors.gathering import Again, Cut, GatheredAgain, gather_tokens, in_order, largest

aten = torch.ops.aten
_c10d = torch.ops._c10d_functional

_BOTH_OPS = {aten.detach.default, aten.alias.default, aten.clone.default}
# The latter, in torch 2.13, puts a tensor that waits by itself around what is still on its way.
_WAIT_OPS = {_c10d.wait_tensor.default}
if hasattr(_c10d, "_wrap_tensor_autograd"):
    _WAIT_OPS.add(_c10d._wrap_tensor_autograd.default)
_VIEW_OPS = {aten.view.default, aten._unsafe_view.default}
_SPLIT_OPS = {aten.split.Tensor, aten.split_with_sizes.default}

# [Note: one at a time on gloo]
# gloo, of torch 2.13 at least, writes to memory that it has freed when two all-gathers of one group
# are on their way: a crash, some time later, once in hundreds of runs. With glibc told to fill what
# is freed (MALLOC_PERTURB_=165 MALLOC_MMAP_THRESHOLD_=1024) a loop of such pairs, without any
# float8, dies within seconds. So scales are sent when data has arrived.


def _restored(
    of: tuple[Block, torch.dtype, Cut | None, torch.Size | None],
    high_precision: bool,
    data: torch.Tensor,
    scale: torch.Tensor,
    inverse: torch.Tensor | None = None,
) -> torch.Tensor:
    block, dtype, cut, size = of
    restored = Float8Activation(data, scale, block, dtype, None, cut, size, inverse)
    return restored.dequantize() if high_precision else restored


# Block, dtype, cut, by rank
_Meta = tuple[Block, torch.dtype, Cut | None, bool]
_OPTIONAL = ("_part", "_inverse", "_across")


class Float8Activation(torch.Tensor):
    """An activation, or the gradient of one, in float8; behaves as one of `dtype`.

    Ops on the dimensions of tokens act on data and scales, so that DTensor can gather one; a
    collective moves float8's bytes. `Float8Linear` multiplies them. Any other op dequantizes first
    and gives a plain tensor.

    Args:
        data: (..., K), float8.
        scale: float32, or uint8 for e8m0: (..., K / block columns), or (1,) for one scale.
        block: the elements of data as (tokens, K) that share a scale: TENSOR, or within a token.
        dtype: the high-precision dtype it stands for, which its gradients have.
        part: this rank's part of what was gathered, high precision, to be gathered again.
        cut: how it was cut.
        size: of the whole, if data and scale are 2-D; see [Note: tokens by rank].
        inverse: 1 / scale, (1,), for one scale, if it is there already.
        across: data as (K, tokens), padded as `numerics.quantize_both` does, if it was cast in both
            orientations.
    """

    _data: torch.Tensor
    _scale: torch.Tensor
    _inverse: torch.Tensor | None
    _across: torch.Tensor | None
    _block: Block
    _part: torch.Tensor | None
    _cut: Cut | None
    _by_rank: bool
    _again: Again

    @staticmethod
    def __new__(
        cls,
        data: torch.Tensor,
        scale: torch.Tensor,
        block: Block,
        dtype: torch.dtype,
        part: torch.Tensor | None = None,
        cut: Cut | None = None,
        size: Sequence[int] | None = None,
        inverse: torch.Tensor | None = None,
        across: torch.Tensor | None = None,
    ) -> "Float8Activation":
        if size is None:
            self = torch.Tensor._make_wrapper_subclass(
                cls, data.size(), strides=data.stride(), dtype=dtype, device=data.device
            )
        else:
            self = torch.Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=data.device)
        self._data, self._scale, self._block = data, scale, block
        self._inverse, self._across = inverse, across
        self._part, self._cut, self._again = part, cut, Again()
        self._by_rank = size is not None
        return self

    def scaled(self) -> Scaled:
        """Data as (tokens, K), and its float32 scales."""
        if self._by_rank:
            return self._in_order().scaled()
        scale = self._scale
        if scale.dtype == torch.uint8:
            scale = numerics.exponent_to_scale(scale)
        data = self._data.reshape(-1, self._data.size(-1))
        scale = scale.view(1, 1) if self._block == TENSOR else scale.reshape(-1, scale.size(-1))
        inverse = None if self._inverse is None else self._inverse.view(1, 1)
        return Scaled(data, scale, self._block, inverse)

    def transposed(self) -> Scaled | None:
        """Data as (K, tokens), padded, if it was cast so too."""
        return None if self._across is None else self.scaled()._replace(data=self._across)

    def dequantize(self) -> torch.Tensor:
        """The value: (..., K), `dtype`."""
        data, scale, *_ = self.scaled()
        return numerics.dequantize(data, scale).view(self.shape).to(self.dtype)

    def take_apart(
        self, high_precision: bool
    ) -> tuple[tuple[torch.Tensor, ...], Callable[..., torch.Tensor]]:
        """What to keep of it for backward, and the function that makes it again of that.

        Plain tensors, so that hooks on what is saved may move them; of what is gathered again, this
        rank's part alone.

        Args:
            high_precision: its value is wanted, (..., K), `dtype`.
        """
        if high_precision and self._part is not None and self._cut is not None:
            if self._again.version not in (None, self._part._version):
                raise RuntimeError(
                    "the input of a float8 layer was modified in place after it was cast, and "
                    "grad_weight is computed from it in high precision"
                )
            return (self._part,), GatheredAgain(self._again, self._cut, self.shape)
        size = self.shape if self._by_rank else None
        of = (self._block, self.dtype, self._cut, size)
        inverse = () if self._inverse is None else (self._inverse,)
        restore = functools.partial(_restored, of, high_precision)
        return (self._data, self._scale, *inverse), restore

    def by_rank(self) -> "Float8Activation":
        """(tokens, K), as they arrived; see [Note: tokens by rank]."""
        cut, part = self._cut, self._part
        if cut is None:
            raise AssertionError("tokens that did not arrive from other ranks")
        part = None if part is None else part.reshape(-1, part.size(-1))
        out = Float8Activation(
            self._data, self._scale, self._block, self.dtype, part, cut._replace(dim=0)
        )
        out._again, out._inverse = self._again, self._inverse
        return out

    def _in_order(self) -> "Float8Activation":
        if not self._by_rank:
            return self
        data = in_order(self._data.view(torch.uint8), self.shape[:-1], self._cut)
        scale = self._scale
        if self._block != TENSOR:
            scale = in_order(scale, self.shape[:-1], self._cut)
        out = Float8Activation(
            data.view(self._data.dtype), scale, self._block, self.dtype, self._part, self._cut
        )
        out._again, out._inverse = self._again, self._inverse
        return out

    def _with(self, data: torch.Tensor, scale: torch.Tensor) -> "Float8Activation":
        """Some tokens, or in another order."""
        return Float8Activation(data, scale, self._block, self.dtype, inverse=self._inverse)

    def _as_is(self, data: torch.Tensor, scale: torch.Tensor) -> "Float8Activation":
        """All tokens, in their order."""
        size = self.size() if self._by_rank else None
        out = Float8Activation(data, scale, self._block, self.dtype, self._part, self._cut, size)
        out._again, out._inverse, out._across = self._again, self._inverse, self._across
        return out

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # no classmethod in torch's stubs
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args else None
        if func._can_decompose() and torch.is_inference_mode_enabled():
            return func.decompose(*args, **kwargs)
        if isinstance(source, cls):
            if source._by_rank:
                if func in _BOTH_OPS:
                    return source._as_is(func(source._data), func(source._scale))
                if func in _VIEW_OPS and tuple(args[1]) == tuple(source.shape):  # DTensor's
                    return source._as_is(*map(aten.alias, (source._data, source._scale)))
            out = source._in_order()._on_tokens(func, args[1:], kwargs)
            if out is not None:
                return out
        if func is aten.cat.default and source and all(isinstance(x, cls) for x in source):
            source, dim = [x._in_order() for x in source], args[1] if len(args) > 1 else 0
            one_scale = all(x._scale is source[0]._scale for x in source)
            if dim % source[0].dim() != source[0].dim() - 1 and (
                one_scale or all(x._block == source[0]._block != TENSOR for x in source)
            ):
                scales = [x._scale for x in source]
                scale = scales[0] if source[0]._block == TENSOR else torch.cat(scales, dim)
                return source[0]._with(torch.cat([x._data for x in source], dim), scale)
        args, kwargs = pytree.tree_map_only(cls, cls.dequantize, (args, kwargs))
        return func(*args, **kwargs)

    def _on_tokens(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an op makes of data and scales; None if it is not one on dimensions of tokens."""
        data, scale, last = self._data, self._scale, self.dim() - 1
        one_scale = self._block == TENSOR
        if func in _BOTH_OPS:
            return self._as_is(func(data, *args, **kwargs), func(scale, *args, **kwargs))
        if func is aten.permute.default and args[0][-1] % self.dim() == last:
            return self._with(func(data, *args), scale if one_scale else func(scale, *args))
        if func in _WAIT_OPS:
            waited = _c10d.wait_tensor.default
            return self._as_is(waited(data), scale if one_scale else waited(scale))
        if func in _VIEW_OPS:
            viewed = func(data.view(torch.uint8), *args).view(data.dtype)
            if viewed.size(-1) != data.size(-1):
                return None
            size = (*viewed.shape[:-1], scale.size(-1))
            return self._as_is(viewed, scale if one_scale else func(scale, size))
        if func is _c10d.all_gather_into_tensor.default:
            gathered = func(data.view(torch.uint8), *args)
            if gathered.device.type == "cpu":  # see [Note: one at a time on gloo]
                gathered = _c10d.wait_tensor.default(gathered)
            gathered = gathered.view(data.dtype)
            return self._with(gathered, scale if one_scale else func(scale, *args))
        if func in _SPLIT_OPS and (args[1] if len(args) > 1 else 0) % self.dim() != last:
            parts = func(data, *args)
            scales = [scale] * len(parts) if one_scale else func(scale, *args)
            return [self._with(*part) for part in zip(parts, scales, strict=True)]
        if func is aten.slice.Tensor and (args[0] if args else 0) % self.dim() != last:
            return self._with(func(data, *args), scale if one_scale else func(scale, *args))
        if func is aten.constant_pad_nd.default and not any((*args[0][:2], *args[1:])):
            padded = func(data.view(torch.uint8), args[0]).view(data.dtype)
            return self._with(padded, scale if one_scale else func(scale, args[0], 1))
        return None

    # What torch offers for this has no types.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __tensor_flatten__(self) -> tuple[list[str], "_Meta"]:
        maybe = [name for name in _OPTIONAL if getattr(self, name) is not None]
        return ["_data", "_scale", *maybe], (self._block, self.dtype, self._cut, self._by_rank)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor],
        meta: "_Meta",
        outer_size: torch.Size,
        outer_stride: Any,
    ) -> "Float8Activation":
        block, dtype, cut, by_rank = meta
        size = outer_size if by_rank else None
        out = Float8Activation(inner["_data"], inner["_scale"], block, dtype, None, cut, size)
        out._part, out._inverse, out._across = (inner.get(name) for name in _OPTIONAL)
        return out

    def __coerce_same_metadata_as_tangent__(
        self, expected_metadata: Any, expected_type: type | None = None
    ) -> torch.Tensor | None:
        """A gradient from outside of what was compiled, which expects a plain one there."""
        return self.dequantize() if expected_type is torch.Tensor else None

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes tensor_contents
        return f"Float8Activation(shape={tuple(self.shape)}, dtype={self.dtype})"


# torch's stubs give `forward` and `backward` any arguments, which mypy takes for an override.
@torch._dynamo.allow_in_graph
class ByRank(torch.autograd.Function):
    """An activation's tokens as they arrived, (tokens, K); see [Note: tokens by rank]."""

    @staticmethod
    def forward(ctx: Any, input: Float8Activation) -> Float8Activation:
        ctx.tokens, ctx.cut = input.shape[:-1], input._cut
        return input.by_rank()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return in_order(grad, ctx.tokens, ctx.cut)


def gather_activation(
    cast: Float8Activation, cut: Cut, part: torch.Tensor | None
) -> Float8Activation:
    """All tokens in float8, from this rank's. `part`: what to gather again, if anything."""
    # With scales of other blocks the compiler overlaps nothing.
    if cast._block not in (TENSOR, ROW) or not async_tp.is_on_for(cut.group_name):
        gathered: Any = gather_tokens(cast, cut)
        data, scale, inverse = gathered._data, gathered._scale, gathered._inverse
        return Float8Activation(data, scale, cast._block, cast.dtype, part, cut, None, inverse)
    data, scale = (x.reshape(-1, x.size(-1)) for x in (cast._data, cast._scale))
    by_rank = cut._replace(dim=0)
    scale = cast._scale if cast._block == TENSOR else gather_tokens(scale, by_rank)
    size = list(cast.shape)
    size[cut.dim] *= cut.ranks
    data = gather_tokens(data, by_rank)
    return Float8Activation(data, scale, cast._block, cast.dtype, part, cut, size, cast._inverse)


def cast_activation(
    x: torch.Tensor,
    block: Block,
    float8_dtype: torch.dtype,
    scale_format: ScaleFormat,
    group_name: str,
    across: bool = False,
) -> Float8Activation:
    """Cast this rank's part of an activation.

    Args:
        x: (..., K), high precision.
        block: as of (tokens, K).
        group_name: the ranks that hold the other parts: one scale for all takes one all-reduce of
            the amax.
        across: cast in both orientations; for what has one scale and is multiplied as it is.
    """
    flat = x.reshape(-1, x.size(-1))
    if block == TENSOR:
        amax = largest(numerics.amax(flat, block).float().view(torch.int32), group_name)
        both = kernels.quantize_both(
            flat, block, block if across else None, float8_dtype, scale_format, amax=amax
        )
        scaled, transposed = numerics.wanted(both[0]), both[1]
        return Float8Activation(
            scaled.data.view(x.shape),
            scaled.scale.view(1),
            block,
            x.dtype,
            inverse=None if scaled.inverse is None else scaled.inverse.view(1),
            across=None if transposed is None else transposed.data,
        )
    scaled = kernels.quantize(flat, block, float8_dtype, scale_format)
    scale = scaled.scale.contiguous()
    if scale_format == "e8m0":
        scale = numerics.scale_to_exponent(scale)
    scale = scale.view(*x.shape[:-1], scale.size(-1))
    return Float8Activation(scaled.data.view(x.shape), scale, block, x.dtype)
