"""`Float8Linear` and the autograd function of its three matmuls."""

from contextlib import nullcontext
from typing import Any, Protocol

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from fp8dist import kernels
from fp8dist.config import HP_DTYPES, TENSOR, Block, Float8Config, Recipe
from fp8dist.matmul import scaled_matmul
from fp8dist.numerics import Scaled, wanted
from fp8dist.tensors.float8_activation import ByRank, Float8Activation
from fp8dist.tensors.float8_tensor import Float8Tensor
from fp8dist.tensors.gathering import in_order
from fp8dist.tensors.parameters import make_plain, plain, wrap_weight
from fp8dist.tensors.sharded_weight import Float8ShardedWeight
from fp8dist.tensors.weight_part import CastPart, StandIn, high_precision
from fp8dist.tensors.weight_state import WeightState, local_float8
from fp8dist.tracing import copied, is_tracing, not_kept


def _operands(
    x: torch.Tensor,
    block: Block | None,
    transposed_block: Block | None,
    float8_dtype: torch.dtype,
    recipe: Recipe,
    amax: torch.Tensor | None = None,
) -> tuple[Scaled | None, Scaled | None]:
    """x (M, K) for a matmul that contracts K and x^T for one that contracts M, as they are wanted:
    cast here, by the amax if that is known, or from what has arrived in float8.
    """
    if not isinstance(x, Float8Activation):
        return kernels.quantize_both(
            x, block, transposed_block, float8_dtype, recipe.scale_format, amax=amax
        )
    arrived, transposed = x.scaled(), None
    if transposed_block is not None:
        transposed = x.transposed() or kernels.rescale_transposed(
            arrived, transposed_block, None, recipe.scale_format
        )
    return (None if block is None else arrived), transposed


def _weight(weight: torch.Tensor, recipe: Recipe) -> Scaled:
    """The operand of output, (N, K): as it arrived in float8, or cast here."""
    if isinstance(weight, Float8Tensor):
        # What MXFP8's exponents stand for is four times as large.
        with not_kept() if is_tracing() else nullcontext():
            return weight.unpack(recipe.weight)
    scaled, _ = kernels.quantize_both(
        high_precision(weight), recipe.weight, None, recipe.weight_dtype, recipe.scale_format
    )
    return wanted(scaled)


def _weight_for_grad_input(weight: torch.Tensor, recipe: Recipe, after: torch.Tensor) -> Scaled:
    """The operand of grad_input, (K, N): derived from what arrived, or cast here.

    after: see [Note: only in backward] in `kernels.ops`.
    """
    block = recipe.weight_for_grad_input
    if isinstance(weight, Float8Tensor):
        arrived, scales = weight.unpack(recipe.weight), weight._scales_for_grad_input
        new_scale = None if scales is None else scales[1]
        derived = kernels.rescale_transposed(arrived, block, new_scale, recipe.scale_format, after)
        return derived if scales is None else derived._replace(inverse=scales[0].t())
    _, transposed = kernels.quantize_both(
        high_precision(weight), None, block, recipe.weight_dtype, recipe.scale_format, after
    )
    cast = wanted(transposed)
    # Padded as tokens are; weights of other sizes are multiplied dequantized only.
    return cast._replace(data=cast.data[:, : weight.size(0)])


@torch._dynamo.allow_in_graph
class _Float8Matmul(torch.autograd.Function):
    """output = input @ weight^T, with all matmuls of forward and backward that the recipe says.

    Saved for backward are the input as grad_weight multiplies it and the weight itself, never a
    copy of the weight: FSDP2 frees the unsharded weight after forward and refills its storage
    before backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        config: Float8Config,
        grad_enabled: bool,
    ) -> torch.Tensor:
        recipe = config.recipe
        # In here gradients are off, whether or not there will be a backward.
        needs_weight_grad = grad_enabled and ctx.needs_input_grad[1]
        later = isinstance(input, Float8Activation) and input._across is None
        block = recipe.input_for_grad_weight if needs_weight_grad and not later else None
        arrived = isinstance(input, Float8Activation)
        if needs_weight_grad and ctx.needs_input_grad[0] and not arrived and is_tracing():
            # See [Note: cast again in backward] in `fp8dist.tracing`.
            amax = kernels.fused_amax(input) if recipe.input == block == TENSOR else None
            scaled, _ = _operands(input, recipe.input, None, recipe.input_dtype, recipe, amax)
            with not_kept():
                input = copied(input)
                _, transposed = _operands(input, None, block, recipe.input_dtype, recipe, amax)
        else:
            scaled, transposed = _operands(input, recipe.input, block, recipe.input_dtype, recipe)
        saved: tuple[torch.Tensor, ...] = (input,)
        ctx.restore = None
        if transposed is not None:
            inverse = () if transposed.inverse is None else (transposed.inverse,)
            saved = (transposed.data, transposed.scale, *inverse)
        elif needs_weight_grad and isinstance(input, Float8Activation):
            # Several layers share what arrived; their transposes would be apart.
            saved, ctx.restore = input.take_apart(recipe.input_for_grad_weight is None)
        ctx.save_for_backward(weight, *(saved if needs_weight_grad else ()))
        ctx.config = config
        return scaled_matmul(
            wanted(scaled),
            _weight(weight, recipe),
            input.dtype,
            recipe,
            fast_accum=config.fast_accum_by_matmul.output,
            emulate=config.emulate,
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        weight, *saved_input = ctx.saved_tensors
        if ctx.restore is not None:
            saved_input = [ctx.restore(*saved_input)]
        config: Float8Config = ctx.config
        recipe = config.recipe
        needs_input_grad, needs_weight_grad, *_ = ctx.needs_input_grad
        input_block = recipe.input_for_grad_weight
        scaled, transposed = _operands(
            grad_output,
            recipe.grad_output if needs_input_grad else None,
            recipe.grad_output_for_grad_weight if needs_weight_grad else None,
            recipe.grad_output_dtype,
            recipe,
        )
        grad_input = grad_weight = None
        if scaled is not None:
            grad_input = scaled_matmul(
                scaled,
                _weight_for_grad_input(weight, recipe, scaled.scale),
                grad_output.dtype,
                recipe,
                fast_accum=config.fast_accum_by_matmul.grad_input,
                emulate=config.emulate,
            )
        if transposed is not None and input_block is not None:
            if isinstance(saved_input[0], Float8Activation):
                _, saved = _operands(saved_input[0], None, input_block, recipe.input_dtype, recipe)
            else:
                data, scale, *inverse = saved_input
                saved = Scaled(data, scale, (input_block[1], input_block[0]), *inverse)
            grad_weight = scaled_matmul(
                transposed,
                wanted(saved),
                grad_output.dtype,
                recipe,
                fast_accum=config.fast_accum_by_matmul.grad_weight,
                emulate=config.emulate,
            )
        elif needs_weight_grad:
            grad_weight = torch.mm(grad_output.t(), saved_input[0])
        return grad_input, grad_weight, None, None


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    device_type = x.device.type
    # A meta device has no autocast. (torch 2.11's compiler does not know
    # `torch.amp.is_autocast_available`.)
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast(input: torch.Tensor) -> torch.Tensor:
    """The input as autocast would have it for `F.linear`."""
    dtype = _autocast_dtype(input)
    return input if dtype is None else input.to(dtype)


def _flat_matmul(flat: torch.Tensor, weight: torch.Tensor, config: Float8Config) -> torch.Tensor:
    if _autocast_dtype(flat) is None:
        return _Float8Matmul.apply(flat, weight, config, torch.is_grad_enabled())
    # The input is of that dtype already; nothing is to be cast inside.
    with torch.autocast(flat.device.type, enabled=False):
        return _Float8Matmul.apply(flat, weight, config, torch.is_grad_enabled())


def _matmul(input: torch.Tensor, weight: torch.Tensor, config: Float8Config) -> torch.Tensor:
    """input (..., K) @ weight^T: (..., N)."""
    if isinstance(input, Float8Activation) and input._by_rank:
        output = _flat_matmul(ByRank.apply(input), weight, config)
        return in_order(output, input.shape[:-1], input._cut)
    output = _flat_matmul(input.reshape(-1, input.size(-1)), weight, config)
    if input.dim() != 2:
        # Not a view for autograd, as nn.Linear's output is none: FSDP2 hooks on it.
        output = torch.ops.aten._unsafe_view(output, (*input.shape[:-1], output.size(-1)))
    return output


# What torchao's Float8Linear sets beside its config.
_TORCHAO_ATTRIBUTES = {
    "linear_mm_config",
    "scaling_type_input",
    "scaling_type_weight",
    "scaling_type_grad_output",
}


class Style(Protocol):
    """What tensor parallelism does before and after this rank's part of the matmul."""

    def prepare_input(
        self, layer: "Float8Linear", input: torch.Tensor, mesh: DeviceMesh
    ) -> DTensor: ...

    def prepare_output(self, layer: "Float8Linear", output: DTensor) -> torch.Tensor:
        """`output` is without the bias: cut along N where the weight is; where that is cut along
        K, the sums that are partial then.
        """


class Float8Linear(nn.Linear):
    """`torch.nn.Linear` whose three matmuls run in float8.

    Made from an `nn.Linear` by `convert_to_float8_training`. Its parameters keep their names,
    shapes and dtypes, and its state dict is that of the `nn.Linear`.

    Shapes: input (..., K), weight (N, K), bias (N,), output (..., N) in the input's dtype: float32,
    bfloat16 or float16, or autocast's. Other inputs are a ValueError that names the layer.
    """

    config: Float8Config
    """How this layer computes and is gathered; frozen, and may be shared with other layers."""
    weight_state: WeightState | None
    """The weight's scales and float8 bytes; None where FSDP2 gathers it in high precision."""
    style: Style | None = None
    """The style of tensor parallelism that was applied."""
    fqn: str = ""
    """The layer's name in the model that was converted, for messages."""

    @classmethod
    def from_float(
        cls, linear: nn.Linear, config: Float8Config, fqn: str = "", root: nn.Module | None = None
    ) -> "Float8Linear":
        """Turn `linear` into a `Float8Linear`, in place, so that hooks and references stay.

        Args:
            fqn: the layer's name in `root`, for messages.
            root: the module that conversion was called on.
        """
        # torchao's layer may carry its own wrapper of the weight, and attributes of no use here.
        if hasattr(linear.weight, "_tensor") and not isinstance(linear.weight, Float8ShardedWeight):
            linear.weight = nn.Parameter(linear.weight._tensor, linear.weight.requires_grad)
        for name in _TORCHAO_ATTRIBUTES & linear.__dict__.keys():
            delattr(linear, name)
        linear.__class__ = cls
        if not isinstance(linear, cls):
            raise AssertionError("the layer's class was not changed")
        linear.config, linear.fqn = config, fqn
        linear.weight_state = None
        if config.enable_fsdp_float8_all_gather:
            linear.weight_state = WeightState(config, fqn, linear if root is None else root)
            linear._wrap_weight()
        return linear

    def _wrap_weight(self) -> None:
        wrap_weight(self, "weight", Float8ShardedWeight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if isinstance(weight, DTensor):
            return self._tensor_parallel(input, weight)
        if isinstance(input, DTensor):
            raise ValueError(
                f"{self._name()}: the input is a DTensor, placed as {input.placements}, and the "
                "layer is not in the plan: give it Float8ColwiseParallel or Float8RowwiseParallel, "
                "or the local tensor"
            )
        if input.dtype not in HP_DTYPES:
            raise ValueError(
                f"{self._name()}: the input is {input.dtype}: pass float32, bfloat16 or float16"
            )
        if input.dim() == 0 or input.size(-1) != self.in_features:
            raise ValueError(
                f"{self._name()}: the input is {tuple(input.shape)}, its last dimension should be "
                f"in_features={self.in_features}"
            )
        output = _matmul(autocast(input), weight, self.config)
        return output if (bias := self.bias) is None else output + bias.to(output.dtype)

    def _tensor_parallel(self, input: torch.Tensor, weight: DTensor) -> torch.Tensor:
        """This rank's part of the matmul, between what its style makes of input and output.

        In here and not in hooks, so that a layer that is compiled alone has them in its graph.
        """
        if weight.device_mesh.ndim > 1:
            raise ValueError(
                f"{self._name()}: its weight is still sharded in forward, placed as "
                f"{weight.placements}: call the module that fully_shard was applied to, which "
                "gathers the weight"
            )
        if self.style is None:
            raise ValueError(
                f"{self._name()}: its weight is a DTensor placed as {weight.placements}, and the "
                "layer has no style of fp8dist: give it Float8ColwiseParallel or "
                "Float8RowwiseParallel for torch's ColwiseParallel or RowwiseParallel; or, if "
                "fully_shard cut it, call the module that was given to that"
            )
        mesh, by_column = weight.device_mesh, weight.placements[0].is_shard(0)
        prepared = self.style.prepare_input(self, input, mesh)
        grad_placements = (Partial(),) if by_column else prepared.placements
        local = prepared.to_local(grad_placements=grad_placements)
        output = _matmul(local, self._part(weight, local.dtype), self.config)
        placement = Shard(output.dim() - 1) if by_column else Partial()
        output = DTensor.from_local(output, mesh, (placement,), run_check=False)
        return self.style.prepare_output(self, output)

    def _part(self, weight: DTensor, dtype: torch.dtype) -> torch.Tensor:
        """This rank's part of the weight in float8, by the scales of all of it."""
        part = weight.to_local()
        if isinstance(part, Float8Tensor):
            return part
        state = self.weight_state if isinstance(part, Float8ShardedWeight) else None
        if state is not None and not torch.compiler.is_compiling():
            return StandIn.apply(part, local_float8(state, weight, dtype))
        dim = 0 if weight.placements[0].is_shard(0) else 1
        group_name = weight.device_mesh.get_group().group_name
        return CastPart.apply(part, dim, self.config.recipe.name, group_name)

    def _name(self) -> str:
        return self.fqn or type(self).__name__

    def extra_repr(self) -> str:
        gather = "" if self.config.enable_fsdp_float8_all_gather else ", float8_all_gather=False"
        return f"{super().extra_repr()}, recipe={self.config.recipe_name}{gather}"

    # A state dict holds what the nn.Linear would have: plain tensors that alias the parameter.

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A parametrization, or pruning, has put its own in the weight's place.
        if self.weight_state is not None and not keep_vars and "weight" in self._parameters:
            # From the parameter and not from what is saved, its detached copy: only tensors made
            # from the inner one move its version, see [Note: noticing edits].
            destination[prefix + "weight"] = plain(self.weight)
            self.weight_state.taken = True

    def state_dict(
        self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any
    ) -> Any:
        state = super().state_dict(*args, prefix=prefix, keep_vars=keep_vars, **kwargs)
        if self.weight_state is not None and not keep_vars and "weight" not in self._parameters:
            make_plain(state)
        return state

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.weight_state is not None and "weight" in self._parameters:
            self._wrap_weight()  # load_state_dict(assign=True) has put in a plain tensor
