"""`Float8Activation`: float8 data and scales that stand for a high-precision activation."""

from typing import Any, NamedTuple

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


class Cut(NamedTuple):
    """Which dimension of tokens ranks cut, how many ranks, and their group's name."""

    dim: int
    ranks: int
    group_name: str


class Again:
    """What is gathered a second time, once for all layers whose backward will ask for it."""

    def __init__(self) -> None:
        self.users = 0
        self.version: int | None = None  # of the part, as it was cast
        self.gathered: torch.Tensor | None = None

    def take(self, part: torch.Tensor, cut: Cut) -> torch.Tensor:
        if self.version is not None and part._version != self.version:
            raise RuntimeError(
                "the input of a float8 layer was modified in place between forward and backward, "
                "where it is gathered again for grad_weight"
            )
        gathered = gather_tokens(part, cut) if self.gathered is None else self.gathered
        self.users -= 1
        self.gathered = gathered if self.users > 0 else None
        return gathered


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
    """

    _data: torch.Tensor
    _scale: torch.Tensor
    _block: Block
    _part: torch.Tensor | None
    _cut: Cut | None
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
    ) -> "Float8Activation":
        self = torch.Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), dtype=dtype, device=data.device
        )
        self._data, self._scale, self._block = data, scale, block
        self._part, self._cut, self._again = part, cut, Again()
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

    def expect_high_precision(self) -> None:
        """`high_precision` will be called once more."""
        self._again.users += 1

    def high_precision(self) -> torch.Tensor:
        """(..., K), `dtype`: gathered again if a part was kept, or the value."""
        if self._part is None or self._cut is None:
            return self.dequantize()
        return self._again.take(self._part, self._cut).reshape(self.shape)

    def _with(self, data: torch.Tensor, scale: torch.Tensor) -> "Float8Activation":
        return Float8Activation(data, scale, self._block, self.dtype)

    def _as_is(self, data: torch.Tensor, scale: torch.Tensor) -> "Float8Activation":
        """All tokens, in their order."""
        out = Float8Activation(data, scale, self._block, self.dtype, self._part, self._cut)
        out._again = self._again
        return out

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
        if func._can_decompose() and torch.is_inference_mode_enabled():
            return func.decompose(*args, **kwargs)
        if isinstance(source, cls):
            out = source._on_tokens(func, args[1:], kwargs)
            if out is not None:
                return out
        if func is aten.cat.default and source and all(isinstance(x, cls) for x in source):
            dim = args[1] if len(args) > 1 else 0
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
            return self._as_is(func(data, *args), func(scale, *args))
        if func in _WAIT_OPS:
            return self._as_is(*(_c10d.wait_tensor.default(part) for part in (data, scale)))
        if func in _VIEW_OPS:
            viewed = func(data.view(torch.uint8), *args).view(data.dtype)
            if viewed.size(-1) != data.size(-1):
                return None
            size = (*viewed.shape[:-1], scale.size(-1))
            return self._as_is(viewed, scale if one_scale else scale.view(size))
        if func is _c10d.all_gather_into_tensor.default:
            gathered = func(data.view(torch.uint8), *args).view(data.dtype)
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

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Block, torch.dtype, Cut | None]]:
        names = ["_data", "_scale"] if self._part is None else ["_data", "_scale", "_part"]
        return names, (self._block, self.dtype, self._cut)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor],
        meta: tuple[Block, torch.dtype, Cut | None],
        outer_size: torch.Size,
        outer_stride: Any,
    ) -> "Float8Activation":
        block, dtype, cut = meta
        return Float8Activation(
            inner["_data"], inner["_scale"], block, dtype, inner.get("_part"), cut
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Float8Activation(shape={tuple(self.shape)}, dtype={self.dtype})"


def gather_tokens(part: torch.Tensor, cut: Cut) -> torch.Tensor:
    """All tokens, from this rank's."""
    gathered = _c10d.wait_tensor.default(
        _c10d.all_gather_into_tensor.default(part.contiguous(), cut.ranks, cut.group_name)
    )
    if cut.dim == 0:
        return gathered
    return torch.cat(torch.chunk(gathered, cut.ranks, dim=0), dim=cut.dim)


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
    scale = scale.view(1) if block == TENSOR else scale.view(*x.shape[:-1], scale.size(-1))
    return Float8Activation(scaled.data.view(x.shape), scale, block, x.dtype)
