"""`Float8Tensor`: float8 data and its scale, standing for a high-precision tensor."""

import functools
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fp8dist import numerics
from fp8dist.config import Block
from fp8dist.numerics import Scaled
from fp8dist.tensors.placement import matrix_size

aten = torch.ops.aten

# Ops that keep the data and its blocks as they are: what autograd, `nn.Parameter` and FSDP2 do
# to a parameter that they only pass along.
_SAME_DATA_OPS = {aten.detach.default, aten.alias.default}
# Ops that look at no value: FSDP2 may call them when it has freed the data, for the gradient of a
# weight that was not used.
_SIZE_OPS = {
    aten.empty_like.default,
    aten.full_like.default,
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.new_empty.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
}
_SAME_SHAPE_OPS = {aten.as_strided.default, aten.view.default}


@functools.cache
def is_view(func: Any) -> bool:
    """Whether the result shares the storage of the argument and is not written to."""
    aliases = [output.alias_info for output in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


class Float8Tensor(torch.Tensor):
    """A 2-D tensor in float8 with the scales it was multiplied by; behaves as one of `dtype`.

    `Float8Linear` multiplies `_data` itself. Any other op dequantizes first and gives a
    plain tensor, so that code which looks at a weight sees its value. Writing to one is refused.

    Args:
        data: (N, K), float8; or packed, (N, K + K / 32), uint8: each row's data followed by
            its e8m0 scales.
        scales: (2, ...), float32, for blocks of data: see [Note: blocks] and [Note: reciprocals];
            or (1, ...), e8m0, uint8; None if packed.
        size: (N, K).
        dtype: the high-precision dtype it stands for, which its gradients have.
        scales_for_grad_input: (2, ...), those of the recipe's `weight_for_grad_input`, where they
            are not the same as `scales` and come from the high-precision weight.
    """

    _data: torch.Tensor
    _scales: torch.Tensor | None
    _scales_for_grad_input: torch.Tensor | None

    @staticmethod
    def __new__(
        cls,
        data: torch.Tensor,
        scales: torch.Tensor | None,
        size: torch.Size,
        dtype: torch.dtype,
        scales_for_grad_input: torch.Tensor | None = None,
    ) -> "Float8Tensor":
        self = torch.Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=data.device)
        self._data = data
        self._scales = scales
        self._scales_for_grad_input = scales_for_grad_input
        return self

    def unpack(self, block: Block) -> Scaled:
        """Data (N, K), float8, and its scales, float32.

        Args:
            block: the elements of data that share a scale.
        """
        data, scale, *inverse = self._unpacked()
        return Scaled(data, scale, block, *inverse)

    def _unpacked(self) -> tuple[torch.Tensor, ...]:
        data, scales = self._data, self._scales
        if scales is None:
            columns = data.size(1) // 33 * 32  # packed: an exponent for 32 elements
            exponents = data[:, columns:]
            return data[:, :columns].view(torch.float8_e4m3fn), numerics.exponent_to_scale(
                exponents
            )
        if scales.dtype == torch.uint8:
            return data, numerics.exponent_to_scale(scales[0])
        inverse, scale = scales.unbind()
        return data, scale, inverse

    def dequantize(self) -> torch.Tensor:
        """The value: (N, K), `dtype`."""
        data, scale, *_ = self._unpacked()
        return numerics.dequantize(data, scale).to(self.dtype)

    def _with_data(self, data: torch.Tensor) -> "Float8Tensor":
        return Float8Tensor(data, self._scales, self.shape, self.dtype, self._scales_for_grad_input)

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
        if torch.is_inference_mode_enabled():  # elsewhere autograd has done this before
            if func._can_decompose():
                return func.decompose(*args, **kwargs)
            if isinstance(source, cls) and is_view(func) and not source.is_inference():
                # Its views must not be inference tensors either.
                with torch.inference_mode(False):
                    return cls.__torch_dispatch__(func, types, args, kwargs)
        if isinstance(source, cls):
            out = source._without_values(func, args, kwargs)
            if out is not None:
                return out
        if func._schema.is_mutable:
            for i, argument in enumerate(func._schema.arguments):
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                if argument.is_write and any(isinstance(x, cls) for x in pytree.tree_leaves(value)):
                    raise AssertionError(
                        f"{func} writes to an unsharded float8 weight: edit the sharded parameter"
                    )
        args, kwargs = pytree.tree_map_only(cls, cls.dequantize, (args, kwargs))
        return func(*args, **kwargs)

    def _without_values(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """What an op of this gives without a look at the values; None: they are to be looked at."""
        if func in _SAME_DATA_OPS:
            return self._with_data(func(self._data))
        if func in _SAME_SHAPE_OPS and tuple(args[1]) == tuple(self.shape):
            return self._with_data(self._data.detach())
        if func in _SIZE_OPS:
            alike = torch.empty_strided(self.size(), self.stride(), dtype=self.dtype, device="meta")
            # None is what autograd gives for a device that was not asked for.
            device = kwargs.get("device") or self.device
            like: torch.Tensor = func(alike, *args[1:], **{**kwargs, "device": device})
            return like
        return None

    # What torch offers for this has no types.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype]]:
        names = ["_data", "_scales", "_scales_for_grad_input"]
        return [name for name in names if getattr(self, name) is not None], (self.dtype,)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor],
        meta: tuple[torch.dtype],
        outer_size: torch.Size,
        outer_stride: Any,
    ) -> "Float8Tensor":
        return Float8Tensor(
            inner["_data"],
            inner.get("_scales"),
            outer_size,
            meta[0],
            inner.get("_scales_for_grad_input"),
        )

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes tensor_contents
        return f"Float8Tensor(shape={tuple(self.shape)}, dtype={self.dtype})"


def scales_by_use(scales: list[torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`WeightState.scales` as `Float8Tensor` takes them."""
    return scales[0] if scales else None, scales[1] if len(scales) > 1 else None


def gathered_weight(
    payload: torch.Tensor, scales: list[torch.Tensor], size: torch.Size, dtype: torch.dtype
) -> Float8Tensor:
    """What is gathered of a weight, `size` and standing for `dtype`, from the payloads of all ranks
    and `WeightState.scales`.
    """
    own_scales, scales_for_grad_input = scales_by_use(scales)
    data = gathered_data(payload, own_scales is None, size)
    return Float8Tensor(data, own_scales, size, dtype, scales_for_grad_input)


def gathered_data(payload: torch.Tensor, packed: bool, size: torch.Size) -> torch.Tensor:
    """The data of a `Float8Tensor` of `size` in the payloads of all ranks."""
    # Ranks pad their rows at the end, and other dimensions have been put together: the weight's
    # rows are contiguous.
    rows, columns = matrix_size(size)
    if packed:
        return payload.view(rows, -1)
    return payload.view(-1)[: rows * columns].view(rows, columns).view(torch.float8_e4m3fn)
