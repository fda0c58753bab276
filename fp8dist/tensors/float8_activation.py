"""`Float8Activation`: float8 data and scales that stand for a high-precision activation."""

from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch.utils import _pytree as pytree

from fp8dist import kernels, numerics
from fp8dist.config import TENSOR, Block, ScaleFormat
from fp8dist.numerics import Scaled

aten = torch.ops.aten
_c10d = torch.ops._c10d_functional

_BOTH_OPS = {aten.detach.default, aten.alias.default, aten.clone.default}
# The latter, in torch 2.13, puts a tensor that waits by itself around what is still on its way.
_WAIT_OPS = {_c10d.wait_tensor.default}
if hasattr(_c10d, "_wrap_tensor_autograd"):
    _WAIT_OPS.add(_c10d._wrap_tensor_autograd.default)
_VIEW_OPS = {aten.view.default, aten._unsafe_view.default}
_SPLIT_OPS = {aten.split.Tensor, aten.split_with_sizes.default}


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
    """

    _data: torch.Tensor
    _scale: torch.Tensor
    _block: Block

    @staticmethod
    def __new__(
        cls, data: torch.Tensor, scale: torch.Tensor, block: Block, dtype: torch.dtype
    ) -> "Float8Activation":
        self = torch.Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), dtype=dtype, device=data.device
        )
        self._data, self._scale, self._block = data, scale, block
        return self

    def scaled(self) -> Scaled:
        """Data as (tokens, K), and its float32 scales."""
        scale = self._scale
        if scale.dtype == torch.uint8:
            scale = numerics.exponent_to_scale(scale)
        data = self._data.reshape(-1, self._data.size(-1))
        scale = scale.view(1, 1) if self._block == TENSOR else scale.reshape(-1, scale.size(-1))
        return Scaled(data, scale, self._block)

    def dequantize(self) -> torch.Tensor:
        """The value: (..., K), `dtype`."""
        data, scale, *_ = self.scaled()
        return numerics.dequantize(data, scale).view(self.shape).to(self.dtype)

    def _with(self, data: torch.Tensor, scale: torch.Tensor) -> "Float8Activation":
        return Float8Activation(data, scale, self._block, self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args else None
        if isinstance(source, cls):
            out = source._on_tokens(func, args[1:], kwargs)
            if out is not None:
                return out
        if func is aten.cat.default and source and all(isinstance(x, cls) for x in source):
            dim = args[1] if len(args) > 1 else 0
            if dim % source[0].dim() != source[0].dim() - 1:
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
            return self._with(func(data, *args), func(scale, *args))
        if func in _WAIT_OPS:
            return self._with(*(_c10d.wait_tensor.default(part) for part in (data, scale)))
        if func in _VIEW_OPS:
            viewed = func(data.view(torch.uint8), *args).view(data.dtype)
            if viewed.size(-1) != data.size(-1):
                return None
            size = (*viewed.shape[:-1], scale.size(-1))
            return self._with(viewed, scale if one_scale else scale.view(size))
        if func is _c10d.all_gather_into_tensor.default:
            gathered = func(data.view(torch.uint8), *args).view(data.dtype)
            return self._with(gathered, scale if one_scale else func(scale, *args))
        if func in _SPLIT_OPS and (args[1] if len(args) > 1 else 0) % self.dim() != last:
            parts = func(data, *args)
            scales = [scale] * len(parts) if one_scale else func(scale, *args)
            return [self._with(*part) for part in zip(parts, scales, strict=True)]
        if func is aten.slice.Tensor and (args[0] if args else 0) % self.dim() != last:
            return self._with(func(data, *args), scale if one_scale else func(scale, *args))
        if func is aten.constant_pad_nd.default and not any(args[0][:2]):
            padded = func(data.view(torch.uint8), args[0]).view(data.dtype)
            return self._with(padded, scale if one_scale else func(scale, args[0], 1))
        return None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Block, torch.dtype]]:
        return ["_data", "_scale"], (self._block, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor],
        meta: tuple[Block, torch.dtype],
        outer_size: torch.Size,
        outer_stride: Any,
    ) -> "Float8Activation":
        return Float8Activation(inner["_data"], inner["_scale"], *meta)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Float8Activation(shape={tuple(self.shape)}, dtype={self.dtype})"


def cast_activation(
    x: torch.Tensor,
    block: Block,
    float8_dtype: torch.dtype,
    scale_format: ScaleFormat,
    group_name: str,
) -> Float8Activation:
    """Cast this rank's part of an activation.

    Args:
        x: (..., K), high precision.
        block: as of (tokens, K).
        group_name: the ranks that hold the other parts: one scale for all takes one all-reduce of
            the amax.
    """
    flat = x.reshape(-1, x.size(-1))
    amax = None
    if block == TENSOR:
        bits = numerics.amax(flat, block).float().view(torch.int32)
        reduced = funcol.all_reduce(bits, "max", group_name)  # type: ignore[arg-type]
        bits = funcol.wait_tensor(reduced)
        amax = bits.view(torch.float32)
    scaled = kernels.quantize(flat, block, float8_dtype, scale_format, amax)
    scale = scaled.scale.contiguous()
    if scale_format == "e8m0":
        scale = numerics.scale_to_exponent(scale)
    scale = scale.view(1) if block == TENSOR else scale.view(*x.shape[:-1], -1)
    return Float8Activation(scaled.data.view(x.shape), scale, block, x.dtype)
