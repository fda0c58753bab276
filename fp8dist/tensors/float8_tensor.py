"""`Float8Tensor`: float8 data and its scale, standing for a high-precision tensor."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fp8dist import numerics

aten = torch.ops.aten

# Ops that keep the data and its blocks as they are: what autograd, `nn.Parameter` and FSDP2 do
# to a parameter that they only pass along.
_SAME_DATA_OPS = {aten.detach.default, aten.alias.default}
_SAME_SHAPE_OPS = {aten.as_strided.default, aten.view.default}


class Float8Tensor(torch.Tensor):
    """A 2-D tensor in float8 with the scale it was multiplied by; behaves as a tensor of `dtype`.

    `Float8Linear` multiplies `_data` itself. Any other op dequantizes first and gives a
    plain tensor, so that code which looks at a weight sees its value. Writing to one is refused.

    Args:
        data: (N, K), float8, rows contiguous.
        scale: float32, one per block of data; see [Note: blocks].
        dtype: the high-precision dtype it stands for, which its gradients have.
    """

    _data: torch.Tensor
    _scale: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> "Float8Tensor":
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=dtype,
            layout=data.layout,
            device=data.device,
        )
        self._data = data
        self._scale = scale
        return self

    def dequantize(self) -> torch.Tensor:
        """The value: (N, K), `dtype`."""
        return numerics.dequantize(self._data, self._scale).to(self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args else None
        if isinstance(source, cls):
            if func in _SAME_DATA_OPS or (
                func in _SAME_SHAPE_OPS and tuple(args[1]) == tuple(source.shape)
            ):
                return cls(func(source._data, *args[1:], **kwargs), source._scale, source.dtype)
        if func._schema.is_mutable:  # type: ignore[attr-defined]
            written = args[0] if func._schema.arguments[0].is_write else None  # type: ignore[attr-defined]
            if isinstance(written, cls):
                raise AssertionError(
                    f"{func} writes to an unsharded float8 weight: edit the sharded parameter"
                )
        args, kwargs = pytree.tree_map_only(cls, cls.dequantize, (args, kwargs))
        return func(*args, **kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["_data", "_scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], dtype: torch.dtype, outer_size: Any, outer_stride: Any
    ) -> "Float8Tensor":
        return Float8Tensor(inner["_data"], inner["_scale"], dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return (
            f"Float8Tensor(shape={tuple(self.shape)}, data={self._data.dtype}, "
            f"scale={tuple(self._scale.shape)}, dtype={self.dtype})"
        )
