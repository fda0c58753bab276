"""Experts in float8: weights of three dimensions for `F.grouped_mm`, and its three matmuls.

The model's own modules go on calling `torch.nn.functional.grouped_mm` or `torch._grouped_mm` on
their weights; these are tensors that answer such calls in float8.
"""

from typing import Any

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable

from fp8dist import kernels, numerics
from fp8dist.config import HP_DTYPES, ROW, Float8Config, Recipe
from fp8dist.grouped_matmul import scaled_grouped_matmul, scaled_grouped_outer
from fp8dist.grouped_numerics import ContractedRows, ScaledGroups, contracted_rows
from fp8dist.kernels import grouped
from fp8dist.numerics import Scaled, wanted
from fp8dist.tensors.compiler_cache import hash_for_caching
from fp8dist.tensors.edits import Edits
from fp8dist.tensors.float8_tensor import Float8Tensor, gathered_data, scales_by_use
from fp8dist.tensors.sharded_weight import Float8ShardedWeight
from fp8dist.tensors.weight_state import WeightState

aten = torch.ops.aten

# "type: ignore[override]" below: torch's stubs give `Function.forward` and `backward` any
# arguments, `__torch_dispatch__` and `__repr__` others than torch calls them with, and the classes
# here are made from other arguments than those that they extend.


def _torch_function(
    cls: type, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
) -> Any:
    """Answers grouped matmuls whose second operand is the weight of experts."""
    kwargs = kwargs or {}
    # By name, which the compiler follows in all versions: F.grouped_mm and torch._grouped_mm.
    if func.__name__ in ("grouped_mm", "_grouped_mm"):
        weight = args[1] if len(args) > 1 else kwargs.get("mat_b")
        if isinstance(weight, (Float8Experts, Float8ShardedExperts)):
            return _grouped_mm(*args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


class Float8Experts(Float8Tensor):
    """The weights of experts in float8, as a `Float8Tensor` of three dimensions.

    What models do to a weight before they multiply it keeps it in float8: a cast to another high
    precision, an exchange of the last two dimensions.

    Args:
        data, scales: as `Float8Tensor` takes them for the matrix of all experts' weights, one
            below the other, (E * R, C).
        size: (E, R, C), or (E, C, R) if transposed.
        dtype: the high-precision dtype it stands for, which its gradients have.
        config: how it is multiplied.
        transposed: whether the last two dimensions are exchanged.
    """

    config: Float8Config
    transposed: bool

    __torch_function__: Any = classmethod(_torch_function)
    _stable_hash_for_caching = hash_for_caching

    @staticmethod
    def __new__(
        cls,
        data: torch.Tensor,
        scales: torch.Tensor | None,
        size: torch.Size,
        dtype: torch.dtype,
        config: Float8Config,
        transposed: bool = False,
    ) -> "Float8Experts":
        rows, columns = size[1:]
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            size,
            strides=(rows * columns, 1, rows) if transposed else (rows * columns, columns, 1),
            dtype=dtype,
            device=data.device,
        )
        self._data = data
        self._scales = scales
        self._scales_for_grad_input = None  # one copy of the weight, and its scales, serve both
        self.config = config
        self.transposed = transposed
        return self

    @property
    def rows(self) -> int:
        """R: how many rows of `_data` an expert has."""
        return self.size(2 if self.transposed else 1)

    def dequantize(self) -> torch.Tensor:
        data, scale, *_ = self._unpacked()
        value = numerics.dequantize(data, scale).to(self.dtype).unflatten(0, (-1, self.rows))
        return value.transpose(1, 2) if self.transposed else value

    def _with_data(self, data: torch.Tensor) -> "Float8Experts":
        return self._replace(data=data)

    def _replace(
        self,
        data: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        transpose: bool = False,
    ) -> "Float8Experts":
        experts, rows, columns = self.shape
        return Float8Experts(
            self._data.detach() if data is None else data,
            self._scales,
            torch.Size((experts, columns, rows)) if transpose else self.shape,
            self.dtype if dtype is None else dtype,
            self.config,
            self.transposed is not transpose,
        )

    def _without_values(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        if func is aten._to_copy.default and kwargs.keys() == {"dtype"}:
            if kwargs["dtype"] in HP_DTYPES:
                return self._replace(dtype=kwargs["dtype"])
        if func is aten.transpose.int and {args[1] % 3, args[2] % 3} == {1, 2}:
            return self._replace(transpose=True)
        if func is aten.permute.default and [dim % 3 for dim in args[1]] == [0, 2, 1]:
            return self._replace(transpose=True)
        if func is aten.clone.default:  # as `contiguous` does
            return self._replace(data=self._data.clone())
        if func is aten.as_strided.default and tuple(args[2]) != self.stride():
            return None
        return super()._without_values(func, args, kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names, (dtype,) = super().__tensor_flatten__()
        return names, (dtype, self.config, self.transposed)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], meta: Any, outer_size: torch.Size, outer_stride: Any
    ) -> "Float8Experts":
        dtype, config, transposed = meta
        scales = inner.get("_scales")
        return Float8Experts(inner["_data"], scales, outer_size, dtype, config, transposed)

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes tensor_contents
        return f"Float8Experts(shape={tuple(self.shape)}, dtype={self.dtype})"


class Float8ShardedExperts(Float8ShardedWeight):
    """The weights of experts, or FSDP2's shard of them, in high precision.

    Args:
        tensor: (E, R, C) or a shard of it along any dimension.
        config: how it is multiplied.
        name: what its module calls it.
    """

    config: Float8Config
    parameter_name: str

    __torch_function__: Any = classmethod(_torch_function)
    _stable_hash_for_caching = hash_for_caching

    @staticmethod
    def __new__(
        cls, tensor: torch.Tensor, config: Float8Config, name: str, edits: Edits | None = None
    ) -> "Float8ShardedExperts":
        self: Any = Float8ShardedWeight.__new__(cls, tensor, edits)
        self.config, self.parameter_name = config, name
        return self

    def _like(self, tensor: torch.Tensor, edits: Edits | None = None) -> "Float8ShardedExperts":
        return Float8ShardedExperts(tensor, self.config, self.parameter_name, edits)

    def _of_module(self, module: nn.Module) -> tuple[WeightState | None, Any]:
        states = getattr(module, "expert_states", {})
        return states.get(self.parameter_name), getattr(module, self.parameter_name, None)

    def _unsharded(
        self, payload: torch.Tensor, scales: Any, size: torch.Size, dtype: torch.dtype
    ) -> Float8Experts:
        own_scales, _ = scales_by_use(scales)
        data = gathered_data(payload, own_scales is None, size)
        return Float8Experts(data, own_scales, size, dtype, self.config)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_tensor"], (self.config, self.parameter_name)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], meta: Any, outer_size: Any, outer_stride: Any
    ) -> "Float8ShardedExperts":
        return Float8ShardedExperts(inner["_tensor"], *meta)

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes tensor_contents
        return f"Float8ShardedExperts({self._tensor!r})"


# --- the three matmuls


def _is_transposed(weight: torch.Tensor) -> bool:
    """Whether the weight (E, K, N) is stored as (E, N, K)."""
    return weight.stride(1) == 1


def weight_operand(
    weight: torch.Tensor, contracts_rows: bool, recipe: Recipe, after: torch.Tensor | None = None
) -> Scaled | ContractedRows:
    """The weight for a matmul that contracts the rows of what is stored, or its columns.

    after: see [Note: only in backward] in `kernels.ops`.
    """
    experts, by_rows = weight.size(0), recipe.weight == ROW
    if isinstance(weight, Float8Experts):
        scaled = weight.unpack(recipe.weight)
        if contracts_rows and not by_rows:
            block = recipe.weight_for_grad_input
            return grouped.rescale_each(scaled, weight.rows, block, recipe.scale_format, after)
    else:
        hp = weight._tensor if isinstance(weight, Float8ShardedWeight) else weight
        lies_as_wanted = by_rows or not contracts_rows
        hp = hp.transpose(1, 2) if _is_transposed(hp) == lies_as_wanted else hp
        rows = hp.reshape(-1, hp.size(2))
        found, _ = kernels.quantize_both(
            rows, recipe.weight, None, recipe.weight_dtype, recipe.scale_format, after
        )
        scaled = wanted(found)
    return contracted_rows(scaled, experts) if contracts_rows and by_rows else scaled


def factor_of(operand: Scaled | ContractedRows | None) -> torch.Tensor | None:
    """What tokens that are multiplied by the operand are multiplied by before they are cast."""
    return operand.factor if isinstance(operand, ContractedRows) else None


@torch._dynamo.allow_in_graph
class _Float8GroupedMatmul(torch.autograd.Function):
    """Each expert's tokens times its weight, and the two matmuls of the backward.

    As in `linear`, the weight itself is saved and never a copy of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        ends: torch.Tensor,
        config: Float8Config,
        grad_enabled: bool,
    ) -> torch.Tensor:
        recipe = config.recipe
        needs_weight_grad = grad_enabled and ctx.needs_input_grad[1]
        operand = weight_operand(weight, not _is_transposed(weight), recipe)
        scaled, groups = grouped.quantize_tokens(
            input,
            ends,
            recipe.input,
            recipe.input_for_grad_weight if needs_weight_grad else None,
            recipe.input_dtype,
            recipe.scale_format,
            factor_of(operand),
        )
        saved = () if groups is None else (groups.data, groups.scale, groups.ends)
        inverse = () if groups is None or groups.inverse is None else (groups.inverse,)
        ctx.save_for_backward(weight, ends, *saved, *inverse)
        ctx.config = config
        return scaled_grouped_matmul(
            wanted(scaled),
            operand,
            ends,
            input.dtype,
            recipe,
            fast_accum=config.fast_accum_of_experts.output,
            emulate=config.emulate,
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        weight, ends, *saved = ctx.saved_tensors
        config: Float8Config = ctx.config
        recipe = config.recipe
        needs_input_grad, needs_weight_grad, *_ = ctx.needs_input_grad
        transposed = _is_transposed(weight)
        operand = (
            weight_operand(weight, transposed, recipe, grad_output) if needs_input_grad else None
        )
        scaled, groups = grouped.quantize_tokens(
            grad_output,
            ends,
            recipe.grad_output if needs_input_grad else None,
            recipe.grad_output_for_grad_weight if needs_weight_grad else None,
            recipe.grad_output_dtype,
            recipe.scale_format,
            factor_of(operand),
        )
        grad_input = grad_weight = None
        if scaled is not None and operand is not None:
            grad_input = scaled_grouped_matmul(
                scaled,
                operand,
                ends,
                grad_output.dtype,
                recipe,
                fast_accum=config.fast_accum_of_experts.grad_input,
                emulate=config.emulate,
                after=scaled.scale,
            )
        if groups is not None:
            data, scale, padded_ends, *inverse = saved
            tokens = ScaledGroups(data, scale, padded_ends, groups.block, *inverse)
            a, b = (groups, tokens) if transposed else (tokens, groups)
            grad_weight = scaled_grouped_outer(
                a,
                b,
                grad_output.dtype,
                recipe,
                fast_accum=config.fast_accum_of_experts.grad_weight,
                emulate=config.emulate,
            )
            if transposed:
                grad_weight = grad_weight.transpose(1, 2)
        return grad_input, grad_weight, None, None, None


def _grouped_mm(
    mat_a: torch.Tensor,
    mat_b: "Float8Experts | Float8ShardedExperts",
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.grouped_mm` of tokens and float8 weights.

    Args:
        mat_a: (M, K), grouped by offs; or (E, tokens, K) without offs.
        mat_b: (E, K, N), the weights.
        offs: (E,), int32: where each expert's tokens end.

    Returns:
        (M, N) or (E, tokens, N) in mat_a's dtype.

    Raises:
        ValueError: a bias, another out_dtype, tokens that are not in high precision, or shapes
            that do not go together.
    """
    experts, inner, _ = mat_b.shape
    found = f"grouped_mm of float8 experts {tuple(mat_b.shape)}"
    if bias is not None or out_dtype not in (None, mat_a.dtype):
        raise ValueError(f"{found} takes no bias and no other out_dtype: add, or cast, afterwards")
    if mat_a.dtype not in HP_DTYPES:
        raise ValueError(
            f"{found}: the tokens are {mat_a.dtype}: pass float32, bfloat16 or float16"
        )
    batched = mat_a.dim() == 3 and offs is None
    if not batched and (mat_a.dim() != 2 or offs is None):
        raise ValueError(
            f"{found} takes tokens (M, {inner}) with offs, or ({experts}, tokens, {inner}) "
            f"without; got {tuple(mat_a.shape)} {'without' if offs is None else 'with'} offs"
        )
    if offs is None:
        ends = torch.arange(1, experts + 1, dtype=torch.int32, device=mat_a.device) * mat_a.size(1)
    else:
        ends = offs
    fits = mat_a.size(-1) == inner and (not batched or mat_a.size(0) == experts)
    if not fits or ends.shape != (experts,) or ends.dtype != torch.int32:
        raise ValueError(
            f"{found} takes tokens with {inner} elements and {experts} offsets, int32; got "
            f"{tuple(mat_a.shape)} and {tuple(ends.shape)}, {ends.dtype}"
        )
    flat = mat_a.reshape(-1, inner)
    output = _Float8GroupedMatmul.apply(flat, mat_b, ends, mat_b.config, torch.is_grad_enabled())
    return output.unflatten(0, (experts, -1)) if batched else output
